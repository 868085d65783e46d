"""One driver's work on one sweep: run what is missing of a plan, record it, and report.

This is one file because a session has one state, from the lock of the sweep to the report.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

from analysis.claims import digest
from analysis.interim import InterimPlan
from analysis.report import MAIN_FIGURES, build_report
from analysis.runs import ENDED
from gptcore.checkpoint import checkpoint_file
from gptcore.config import InputError, TrainConfig, TrialConfig
from gptcore.corpus import NO_TEXTS, Texts
from gptcore.files import JsonObject
from gptcore.units import clock, counted
from sweeps.execution.checkpoints import check_bucket, delete_checkpoint
from sweeps.execution.faults import Fault, fault_of_sweep
from sweeps.execution.interrupts import Interrupts
from sweeps.ledger import (
    Entry,
    read_ledger,
    say_how_far,
    sweep_lock,
    to_redo,
    trial_table,
)
from sweeps.plan import Plan, jobs_of
from tracking.arguments import check_writable
from tracking.health import GO_ON, check_database
from tracking.lease import SweepLease, sweep_lease
from tracking.recorder import close_cut_off
from tracking.store import Store, set_aside
from tracking.sweep_run import (
    SEARCH_GOALS,
    RecordedPlan,
    RecordedTrial,
    SweepEnd,
    SweepRun,
    read_plan,
)
from tracking.view import VIEW_TAG, view_of_sweep

if TYPE_CHECKING:
    from mlflow.entities import Run

    from sweeps.estimate.arrays import Batch
    from sweeps.execution.runner import RunContext
    from sweeps.watch import Watch


class Session:
    """A sweep while this driver holds it.

    Entering takes the sweep's lock and, in a store that several folders share, its lease. On
    leaving, Ray is stopped and the sweep's run is ended. Inside, Ctrl-C and SIGTERM stop it cleanly
    and, when they come again, at once.
    """

    def __init__(
        self,
        name: str,
        runs_dir: Path,
        store: Store,
        console: Console,
        *,
        array: str = "off",
        measures: bool = True,
        waits: bool = False,
        watch: Watch | None = None,
    ) -> None:
        """Describe the work; nothing is opened before the session is entered.

        Args:
            name: of the sweep.
            runs_dir: where everything goes.
            store: where trials are recorded.
            console: where to print.
            array: which trials train together, as --array takes it.
            measures: whether shapes are measured before trials run; else an earlier measurement is
                used.
            waits: whether to wait for another driver that works on the sweep.
            watch: the page that shows the trials while they run, if any.
        """
        self.name, self.runs_dir, self.store, self.console = name, runs_dir, store, console
        self.array, self.measures, self.waits, self.watch = array, measures, waits, watch
        self.plan: Plan | None = None
        self.ledger: dict[str, Entry] = {}
        self.texts: Texts = NO_TEXTS
        self._sweep_run: SweepRun | None = None
        self._lease: SweepLease | None = None
        self._interim: JsonObject | None = None  # the contents of looks.json
        self._stamps: dict[str, str] | None = None  # by trial key, of all that was ever planned
        self._was_reported = False  # before this driver
        self._ended: SweepEnd = "FAILED"
        self._has_ray = False
        self._on_exit = ExitStack()
        self._interrupts = Interrupts()

    def __enter__(self) -> Session:
        """Take the sweep's lock, and its lease.

        Raises:
            InputError: another driver works on the sweep, or nothing can be written.
        """
        check_writable(self.runs_dir)
        self._on_exit.enter_context(self._interrupts.handled())
        if self.watch:
            self._on_exit.callback(self.watch.close)
        try:
            self._on_exit.enter_context(
                sweep_lock(self.runs_dir, self.name, wait=self.waits, say=self._say)
            )
            if not self.store.address.is_of(self.runs_dir):
                self.store.open()
                self._lease = self._on_exit.enter_context(
                    sweep_lease(
                        self.store,
                        self.store.open_experiment(self.name, self.runs_dir),
                        self.name,
                        wait=self.waits,
                        say=self._say,
                        on_loss=self._interrupts.stop,
                    )
                )
        except BaseException:
            self._on_exit.close()
            raise
        return self

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, soft_wrap=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is KeyboardInterrupt:
            self._ended = "KILLED"
        self._on_exit.__exit__(kind, error, trace)
        if self._lease and self._lease.taken_by:
            raise Fault(
                f"sweep {self.name} was taken over by {self._lease.taken_by}: this driver could "
                f"not renew its lease in time, perhaps because its machine slept"
            ) from error

    @property
    def sweep_run(self) -> SweepRun:
        """The sweep's own MLflow run, which `record` opens."""
        assert self._sweep_run, "no plan has been recorded"
        return self._sweep_run

    def run(
        self, plan: Plan, redo: Sequence[str] = (), only: Collection[str] | None = None
    ) -> bool:
        """Run what is missing of a plan. Return whether the user stopped it.

        Args:
            plan: the trials of the sweep.
            redo: trials to run anew, as --redo takes them.
            only: of what is missing, run these trials alone.
        """
        self.ledger = read_ledger(plan.trials, plan.name, self.store, self.runs_dir)
        again = to_redo(self.ledger, redo)
        missing = [
            key
            for key, entry in self.ledger.items()
            if key in again or not (entry.is_done or (only is not None and key not in only))
        ]
        say_how_far(plan, self.ledger, again, self.store, self.console)
        configs = [plan.trials[key] for key in missing]
        self.open(
            plan,
            {config.train for config in configs},
            {config.corpus.name for config in configs},
        )
        for key in again:
            run = self.ledger[key].run
            assert run is not None
            delete_checkpoint(checkpoint_file(self.runs_dir, key))
            set_aside(self.store, run)
        if not missing:
            return False
        from sweeps.execution.runner import run_grid

        if self.watch:
            done = [key for key, entry in self.ledger.items() if entry.is_done and key not in again]
            self.watch.open(plan, done)
        with self.estimated({key: plan.trials[key] for key in missing}) as batches:
            stopped = run_grid(jobs_of(plan, missing), batches, self.run_context())
        self.ledger = read_ledger(plan.trials, plan.name, self.store, self.runs_dir)
        return stopped

    def open(self, plan: Plan, trials: Collection[TrainConfig], corpora: Collection[str]) -> None:
        """Open the store, and Ray where trials are to run; record the plan.

        Args:
            plan: the trials of the sweep.
            trials: how the trials that are to run now train; none starts no Ray.
            corpora: `corpus.name` of the same trials.

        Raises:
            InputError: the store, the cluster or a corpus cannot be used; no trial has started.
        """
        # A new store takes as long to make as Ray to start.
        with ThreadPoolExecutor(max_workers=1) as background:
            opening = background.submit(self.store.open)
            if trials and not self._has_ray:
                # A signal that raised an exception inside an import or ray.init could leave a lock
                # of theirs held, for which the other thread would wait for ever.
                with self._interrupts.postponed():
                    # Ray takes long to import, and a finished sweep needs none.
                    from sweeps.execution import ray_cluster

                    self._on_exit.callback(ray_cluster.stop_ray)
                    ray_cluster.start_ray()
                ray_cluster.await_ray(trials, self.console)
                ray_cluster.check_shared(self.runs_dir, self.store.address)
                self._has_ray = True
            opening.result()
        if trials:
            from sweeps.execution.ray_cluster import texts_for

            self.texts = texts_for(corpora)
        self.record(plan)

    def record(self, plan: Plan) -> None:
        """Record the plan; the first time, open the sweep's own MLflow run."""
        self.plan = plan
        planned = recorded(plan, self._stamped(plan))
        if self._sweep_run:
            self._sweep_run.plans(planned)
            return
        n_layer = max((config.model.n_layer for config in plan.trials.values()), default=1)
        view = {VIEW_TAG: view_of_sweep(plan.compared(), n_layer)}
        experiment_id = self.store.open_experiment(self.name, self.runs_dir, view)
        close_cut_off(self.store, experiment_id, self._owner)
        sweep_run = SweepRun(
            self.store,
            experiment_id,
            planned,
            launched=time.time(),
            interim=self._interim,
            run_id=self._lease.run_id if self._lease else None,
        )
        self._on_exit.callback(self._end_sweep_run)
        self._sweep_run = sweep_run

    def _stamped(self, plan: Plan) -> dict[str, str]:
        """Return the stamp of each trial of a plan, and keep the stamps of earlier plans."""
        if self._stamps is None:
            self._stamps = {}
            if before := self.store.sweep_runs().get(self.name):
                earlier = read_plan(self.store, before)
                self._stamps = {key: trial.stamp for key, trial in earlier.trials.items()}
                # All trials of interim analyses were planned before the first one.
                self._was_reported = "report_of" in before.data.tags and not self._interim
        seen = {key for key, entry in self.ledger.items() if entry.is_done}
        stamps = stamps_of(plan.trials, self._stamps, seen, self._was_reported, digest(plan.claims))
        self._stamps |= stamps
        return stamps

    def _end_sweep_run(self) -> None:
        if not (self._lease and self._lease.taken_by):  # else it is another driver's
            self.sweep_run.end(self._ended)

    @property
    def _owner(self) -> str | None:
        """The name by which this driver owns trials; None in the runs folder's own store."""
        return self._lease.owner if self._lease else None

    def run_context(self) -> RunContext:
        """Return what all trials of this driver share."""
        from sweeps.execution.runner import RunContext
        from sweeps.execution.trainable import Recording

        recording = Recording(
            self.store.address,
            self.sweep_run.experiment_id,
            self.runs_dir,
            self._owner,
            tuple(self.store.experiment_ids()) if self._owner else (),
        )
        tell = {"tell": self.watch.tell} if self.watch else {}
        return RunContext(self.store, recording, self.texts, self.console, self._interrupts, **tell)

    @contextmanager
    def estimated(self, trials: Mapping[str, TrialConfig]) -> Iterator[list[Batch]]:
        """Print and record the estimate for some trials, and afterwards the time they took.

        Yields which of them train together, and what each batch needs.
        """
        from sweeps.estimate.estimate import estimate

        expected, batches = estimate(
            trials, self.texts, self.console, self.runs_dir, self.array, self.measures
        )
        for line in expected.lines():
            self.console.print(line, soft_wrap=True)
        run_id = self.sweep_run.run_id
        if tags := expected.as_tags():
            self.store.set_tags(run_id, **tags)
        else:  # the recorded estimate was for other trials
            self.store.delete_tags(run_id, "estimated_")
        begun = time.monotonic()
        yield batches
        took = time.monotonic() - begun
        self.store.set_tags(run_id, took_seconds=f"{took:.0f}")
        # A sweep that was stopped did not do what was estimated.
        estimated = f", estimated {clock(expected.seconds)}" if tags else ""
        self.console.print(f"took {clock(took)}{'' if self._interrupts.has_come else estimated}")

    def keep_interim_plan(self, interim: InterimPlan) -> None:
        """Record the interim analyses, made and to come, now or with the plan."""
        self._interim = interim.to_json()
        if self._sweep_run:
            self._sweep_run.keep_interim_plan(self._interim)

    def keep(self, files: Sequence[Path]) -> None:
        """Keep files on the sweep's run, with the report."""
        self.sweep_run.keep(files)

    def finish(self, report: bool) -> int:
        """Say what became of the trials, after all have run, and report. Return the exit code."""
        assert self.plan
        self.console.print(trial_table(self.plan, self.ledger))
        failed = not all(entry.is_done for entry in self.ledger.values())
        if report:
            self.report()
        address = self.store.address
        command = address.mlflow_command(self.runs_dir, self.name)
        self.console.print(f"MLflow: {command}", soft_wrap=True)
        if address.is_server:
            page = address.chart_page(self.sweep_run.experiment_id)
            then = f"then open {page}"
        else:
            then = (
                "prints a link that opens this sweep once: a plain `mlflow ui` would be open to "
                "every account of this machine"
            )
        self.console.print(f"  {then}", soft_wrap=True)
        return self.end(failed)

    def stop(self, left: int | None = None) -> int:
        """Say what remains after a Ctrl-C. Return the exit code.

        Args:
            left: trials to go, where the ledger does not know.
        """
        if left is None:
            assert self.plan
            self.console.print(trial_table(self.plan, self.ledger))
            left = sum(not entry.is_done for entry in self.ledger.values())
        self.console.print(f"stopped with {counted(left, 'trial')} to go: {GO_ON}")
        self._ended = "KILLED"
        return 130

    def end(self, failed: bool) -> int:
        """Set how the sweep's run will end, FINISHED or FAILED. Return the exit code."""
        self._ended = "FAILED" if failed else "FINISHED"
        return 1 if failed else 0

    def report(self) -> None:
        """Build the report, and keep it on the sweep's run, unless it is there and up to date."""
        assert self.plan
        file = self.runs_dir / "reports" / self.name / "report.html"
        ledger = read_ledger(self.plan.trials, self.name, self.store, self.runs_dir)
        if not any(entry.status in ENDED for entry in ledger.values()):
            self.console.print("no trial has ended, so there is nothing to report")
            return
        made_of = self._report_digest(self.plan, ledger)
        if file.is_file() and self.sweep_run.report_of() == f"{made_of} {_written(file)}":
            self.console.print(f"report: {file}, up to date", soft_wrap=True)
            return
        folder = build_report(self.store, [self.name], None, self.runs_dir)
        files = [folder / name for name in ("report.html", "findings.json", "summary.md")]
        pictures = [folder / "figures" / f"{name}.png" for name in MAIN_FIGURES]
        self.sweep_run.keep(
            [*files, *filter(Path.is_file, pictures)], report_of=f"{made_of} {_written(file)}"
        )
        self.console.print(f"report: {file}", soft_wrap=True)

    def _report_digest(self, plan: Plan, ledger: Mapping[str, Entry]) -> str:
        """Return a digest of all that the report rests on: runs, claims, interim analyses, code."""
        runs = {
            key: [entry.status, dict(entry.run.info) if entry.run else {}]
            for key, entry in ledger.items()
        }
        depends_on: list[object] = [runs, digest(plan.claims), plan.tags(), self._interim]
        if not re.fullmatch("[0-9a-f]+", plan.tags()["git_commit"]):
            depends_on.append(time.time())  # the code is not a commit: its version is not known
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]


def _written(file: Path) -> int:
    """Return when a file came to be here, which nobody can choose who made a copy of it."""
    return file.lstat().st_ctime_ns


def stamps_of(
    keys: Iterable[str],
    earlier: Mapping[str, str],
    seen: Collection[str],
    reported: bool,
    current: str,
) -> dict[str, str]:
    """Return the stamp of each trial, which it keeps from when it was first planned.

    A new trial gets an empty stamp, so that it can confirm nothing, if a result was seen before:
    its own, or those of the sweep in a report.

    Args:
        keys: of the trials.
        earlier: the stamps of all that was planned before.
        seen: keys of trials that have a result, perhaps in another sweep.
        reported: whether the sweep had a report before.
        current: the digest of the claims and rules.
    """
    return {key: earlier.get(key, "" if reported or key in seen else current) for key in keys}


def recorded(plan: Plan, stamps: Mapping[str, str]) -> RecordedPlan:
    """Return what the sweep's run keeps of a plan.

    Args:
        plan: the trials of the sweep.
        stamps: by trial key, the digest of the claims before the trial had a result.
    """
    return RecordedPlan(
        sweep=plan.name,
        preset=plan.preset,
        command=shlex.join(["python", *sys.argv]),
        notes=plan.notes,
        tags=plan.tags(),
        trials={
            key: RecordedTrial(
                params=config.to_flat(),
                corpus_digest=plan.corpora[key].digest,
                stamp=stamps[key],
            )
            for key, config in plan.trials.items()
        },
        claims=plan.claims,
    )


@contextmanager
def naming_faults(store: Store, runs_dir: Path) -> Iterator[None]:
    """Inside, raise what ends a sweep as a Fault that names it.

    Raises:
        InputError: before anything is done, for a damaged store or a bucket that cannot be used.
        Fault: for a full disk or a store that fails.
    """
    check_bucket()
    if (file := store.address.database) and store.address.exists:
        check_database(file)
    try:
        yield
    except Exception as error:
        if isinstance(error, (InputError, Fault)) or not (
            why := fault_of_sweep(error, store.address, runs_dir)
        ):
            raise
        raise Fault(why) from error


def check_kind(sweep_run: Run | None, is_search: bool) -> None:
    """Raise InputError where a sweep has the name of a search, or a search that of a sweep.

    Each would replace the other's plan and report.

    Args:
        sweep_run: the own run of what has this name; None for a new name.
        is_search: whether a search asks.
    """
    tags = sweep_run.data.tags if sweep_run else {}
    if "preset" in tags and (tags["preset"] in SEARCH_GOALS) != is_search:
        theirs, command = ("sweep", "init_sweep") if is_search else ("search", "search")
        raise InputError(
            f"{tags['sweep']} is the name of a {theirs}: continue that with "
            f"sweeps/{command}.py, or take another --name"
        )
