"""One driver's hold on one sweep: it runs what is missing of a plan, and records and reports it."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from analysis.claims import digest
from analysis.report import build_report
from analysis.runs import chart_page, connect, has_started, mlflow_command, tracking_uri
from gptcore.checkpoint import checkpoint_file
from gptcore.config import InputError, TrialConfig, spelling
from sweeps import tracking
from sweeps.bucket import check_bucket, forget
from sweeps.faults import GO_ON, Fault, check_database, fault_of_sweep
from sweeps.interrupts import two_presses
from sweeps.ledger import Entry, holding, read_ledger, to_redo
from sweeps.mlflow_view import VIEW_TAG, view_of_sweep
from sweeps.plan import Plan, jobs_of
from sweeps.units import clock

if TYPE_CHECKING:
    from sweeps.estimate import Batch


class Session:
    """A sweep while this driver holds it.

    Entering raises InputError where another driver works on the sweep, or nothing can be written.
    On leaving Ray is stopped, and the sweep's run ends as `ended` says. Inside, Ctrl-C stops
    cleanly and, pressed again, at once.
    """

    def __init__(
        self,
        name: str,
        runs_dir: Path,
        console: Console,
        array: str = "off",
        measures: bool = True,
    ) -> None:
        """`array`: which trials train together, as --array takes it. `measures`: whether shapes are
        measured before trials run; else what was measured before is used."""
        self.name, self.runs_dir, self.console, self.array = name, runs_dir, console, array
        self.measures = measures
        self.uri = tracking_uri(runs_dir)
        self.ended = "FAILED"
        self.held = ExitStack()
        self.sweep: tracking.SweepRun | None = None
        self.has_ray = False
        self.looks: Mapping[str, Any] | None = None

    def __enter__(self) -> Session:
        check_writable(self.runs_dir)
        self.held.enter_context(two_presses())
        try:
            self.held.enter_context(holding(self.runs_dir, self.name))
        except InputError:
            self.held.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is KeyboardInterrupt:
            self.ended = "KILLED"
        self.held.__exit__(kind, error, trace)

    def run(
        self, plan: Plan, redo: Sequence[str] = (), only: Collection[str] | None = None
    ) -> bool:
        """Run what is missing of the plan, or `only` of some trials, and anew what `redo` names; ->
        whether stopped."""
        self.ledger = ledger_of(plan, self.runs_dir)
        again = to_redo(self.ledger, redo)
        missing = [
            key
            for key, entry in self.ledger.items()
            if key in again or not (entry.is_done or (only is not None and key not in only))
        ]
        say_how_far(plan, self.ledger, again, self.console)
        configs = [plan.trials[key] for key in missing]
        self.open(
            plan,
            {config.train.device for config in configs},
            {config.corpus.name for config in configs},
        )
        for key in again:
            run = self.ledger[key].run
            assert run is not None
            forget(checkpoint_file(self.runs_dir, key))
            tracking.set_aside(self.client, run)
        if not missing:
            return False
        from sweeps.ray_runner import run_on_ray

        jobs = jobs_of(plan, missing)
        with self.estimated({key: plan.trials[key] for key in missing}) as batches:
            stopped = run_on_ray(jobs, batches, self.store, self.texts, self.runs_dir, self.console)
        # By the client at hand: where the store is away just now, that one waits for it.
        self.ledger = read_ledger(plan.trials, plan.name, self.client, self.runs_dir)
        return stopped

    def open(self, plan: Plan, devices: Collection[str], corpora: Collection[str]) -> None:
        """Open the store, and Ray where trials are to run on any devices; record the plan.

        Raises InputError for what is not as it has to be, before any trial is begun.
        """
        # A new store takes as long to make as Ray to start.
        with ThreadPoolExecutor(max_workers=1) as beside:
            opening = beside.submit(connect, self.uri)
            if devices and not self.has_ray:
                # Ray takes long to import, and a finished sweep needs none.
                from sweeps.cluster import check_shared, start_ray, stop_ray

                self.held.callback(stop_ray)
                start_ray(devices, self.console)
                check_shared(self.runs_dir, self.uri)
                self.has_ray = True
            self.client = opening.result()
        if devices:
            from sweeps.cluster import texts_for

            self.texts = texts_for(corpora)
        self.record(plan)

    @contextmanager
    def estimated(self, trials: Mapping[str, TrialConfig]) -> Iterator[list[Batch]]:
        """Measure, tell and record what some trials will take, as far as is known, before they run
        inside, and what they took after. Gives which train together, and what they need."""
        from sweeps.estimate import estimate

        assert self.sweep
        expected, batches = estimate(
            trials, self.texts, self.console, self.runs_dir, self.array, self.measures
        )
        for line in expected.lines():
            self.console.print(line, soft_wrap=True)
        if tags := expected.as_tags():
            tracking.set_tags(self.client, self.sweep.run_id, **tags)
        else:  # what other trials were to take, before, says nothing of these
            tracking.delete_tags(self.client, self.sweep.run_id, "estimated_")
        begun = time.monotonic()
        yield batches
        took = time.monotonic() - begun
        tracking.set_tags(self.client, self.sweep.run_id, took_seconds=f"{took:.0f}")
        estimated = f", estimated {clock(expected.seconds)}" if tags else ""
        self.console.print(f"took {clock(took)}{estimated}")

    @property
    def store(self) -> dict[str, str]:
        """Where trials record themselves, as sweeps.trainable takes it."""
        return {"uri": self.uri, "experiment_id": self.experiment_id}

    def keep_looks(self, looks: Mapping[str, Any]) -> None:
        """Record the looks taken and to come, analysis.looks' Record, now or with the plan."""
        self.looks = looks
        if self.sweep:
            self.sweep.keep_looks(looks)

    def finish(self, report: bool) -> int:
        """Say how the trials stand, after all have run, and report; -> the exit code."""
        self.console.print(trial_table(self.plan, self.ledger))
        remain = sum(not entry.is_done for entry in self.ledger.values())
        if report:
            self.report()
        self.console.print(f"MLflow: {mlflow_command(self.uri)}", soft_wrap=True)
        page = chart_page(self.uri, self.experiment_id)
        self.console.print(f"  then: {page}", soft_wrap=True)
        self.ended = "FAILED" if remain else "FINISHED"
        return 1 if remain else 0

    def report(self) -> None:
        """Build the report, and keep it on the sweep's run, unless it is there and up to date."""
        assert self.sweep
        file = self.runs_dir / "reports" / self.name / "report.html"
        ledger = read_ledger(self.plan.trials, self.name, self.client, self.runs_dir)
        if not any(entry.status == "finished" for entry in ledger.values()):
            self.console.print("no trial finished, so there is nothing to report")
            return
        made_of = self._made_of(ledger)
        if file.exists() and self.sweep.report_of() == made_of:
            self.console.print(f"report: {file}, up to date", soft_wrap=True)
            return
        folder = build_report(self.uri, [self.name], None, self.runs_dir)
        names = ("report.html", "findings.json", "summary.md")
        self.sweep.keep([folder / name for name in names], report_of=made_of)
        self.console.print(f"report: {file}", soft_wrap=True)

    def keep(self, files: Sequence[Path]) -> None:
        """Keep files on the sweep's run, beside the report."""
        assert self.sweep
        self.sweep.keep(files)

    def _made_of(self, ledger: Mapping[str, Entry]) -> str:
        """Changes with all that the report rests on: the runs that count, claims, looks, code."""
        runs = {
            key: [entry.status, dict(entry.run.info) if entry.run else {}]
            for key, entry in ledger.items()
        }
        rests_on: list[Any] = [runs, digest(), self.plan.tags(), self.looks]
        if not re.fullmatch("[0-9a-f]+", self.plan.tags()["git_commit"]):
            rests_on.append(time.time())  # which code this is is not known
        return hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()[:12]

    def stop(self) -> int:
        """Say what remains after a Ctrl-C; -> the exit code."""
        self.console.print(trial_table(self.plan, self.ledger))
        remain = sum(not entry.is_done for entry in self.ledger.values())
        self.console.print(f"stopped with {remain} trials to go: {GO_ON}")
        self.ended = "KILLED"
        return 130

    def record(self, plan: Plan) -> None:
        """Make the sweep's own run what the plan says; the first time open it."""
        self.plan = plan
        said = {**plan.as_dict(), "claims_digest": digest()}
        if self.sweep:
            self.sweep.plans(said)
            return
        n_layer = max((config.model.n_layer for config in plan.trials.values()), default=1)
        view = {VIEW_TAG: view_of_sweep(plan.compared(), n_layer)}
        self.experiment_id = tracking.open_experiment(self.client, self.name, self.runs_dir, view)
        tracking.close_cut_off(self.client, self.experiment_id)
        sweep = tracking.SweepRun(
            self.client, self.experiment_id, said, launched=time.time(), looks=self.looks
        )
        self.held.callback(lambda: sweep.end(self.ended))
        self.sweep = sweep


@contextmanager
def sound_store(runs_dir: Path) -> Iterator[str]:
    """Inside, what ends a sweep is raised as a Fault that names it; gives the store's address.

    Raises InputError for a damaged store or a bad bucket, before anything is done.
    """
    uri = tracking_uri(runs_dir)
    check_bucket()
    if uri.startswith("sqlite:///") and has_started(uri):
        check_database(Path(uri.removeprefix("sqlite:///")))
    try:
        yield uri
    except Exception as error:
        if isinstance(error, (InputError, Fault)) or not (
            why := fault_of_sweep(error, uri, runs_dir)
        ):
            raise
        raise Fault(why) from error


def ledger_of(plan: Plan, runs_dir: Path) -> dict[str, Entry]:
    """How each trial of the plan stands."""
    uri = tracking_uri(runs_dir)
    client = connect(uri) if has_started(uri) else None
    return read_ledger(plan.trials, plan.name, client, runs_dir)


def check_writable(folder: Path) -> None:
    """Make the folder. Raises InputError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--runs-dir {folder} cannot be written: {error.strerror}") from error


def say_how_far(
    plan: Plan, ledger: Mapping[str, Entry], again: Sequence[str], console: Console
) -> None:
    done = sum(entry.is_done and key not in again for key, entry in ledger.items())
    line = f"sweep {plan.name}: {len(ledger)} trials, {done} done, {len(ledger) - done} missing"
    console.print(line + (f", {len(again)} of them to be run again" if again else ""))


def trial_table(plan: Plan, ledger: Mapping[str, Entry], again: Sequence[str] = ()) -> Table:
    """The trials of a plan, with the knobs in which they differ, and how each stands."""
    varied = plan.varied()
    told = any(entry.why for entry in ledger.values()) or bool(again)
    table = Table("trial", *varied, "status", *(["why"] if told else []))
    for key, config in plan.trials.items():
        flat, entry = config.to_flat(), ledger[key]
        why = "; ".join(filter(None, ["to be run again" if key in again else "", entry.why]))
        row = [key, *(spelling(flat[knob]) for knob in varied), entry.status]
        table.add_row(*row, *([why] if told else []))
    return table
