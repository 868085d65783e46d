"""What a Ray worker runs: a batch of trials, each recorded in its own MLflow run."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from mlflow.entities import Run
from ray import tune

from gptcore.checkpoint import checkpoint_file
from gptcore.config import InputError, TrialConfig, seed_of
from gptcore.corpus import NO_TEXTS, Texts
from gptcore.experiment import Trial, check_trial, run_trials
from gptcore.records import Recorder, Row, TrainingRow, TrialResult
from sweeps.execution.checkpoints import (
    delete_checkpoint,
    fetch_checkpoint,
    save_checkpoint,
)
from sweeps.execution.faults import fault_of_sweep, fault_of_trial, has_lost_device
from tracking.access import write_for
from tracking.address import StoreAddress
from tracking.charts import chart_points
from tracking.health import wait_for_server
from tracking.job import Job
from tracking.lease import own_trial
from tracking.recorder import MlflowRecorder, make_run
from tracking.store import DONE, Store, trial_status
from tracking.untrusted import check_no_link

REPORT_SECONDS = 1.0
"""Seconds between two reports of how far a trial is."""


@dataclass(frozen=True, kw_only=True)
class TrialReport:
    """What a worker tells the driver of one trial, through Tune."""

    trial_key: str
    step: int | None = None
    loss: float | None = None
    value: float | None = None  # of the metric that a search asked for
    status: str | None = None  # finished, diverged, failed; None while the trial goes on
    reason: str | None = None  # why it failed
    ends_sweep: bool = False  # every other trial would fail in the same way

    def send(self) -> None:
        """Tell Tune, which takes a dict."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        tune.report({name: value for name, value in values.items() if value is not None})

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> TrialReport:
        """Read a report from what Tune made of it, which has more entries."""
        names = [entry.name for entry in fields(cls)]
        return cls(**{name: result[name] for name in names if name in result})


@dataclass(frozen=True)
class Recording:
    """Where a worker records its trials, and where their checkpoints are."""

    address: StoreAddress
    experiment_id: str
    runs_dir: Path
    owner: str | None = None
    """The name by which the driver owns trials; None in the runs folder's own store."""
    known: tuple[str, ...] = ()
    """Experiments of a store that several folders share. A worker looks for its trials there first,
    and in newer ones once it has made a run."""


def run_batch(
    config: dict[str, Any],
    texts: Texts = NO_TEXTS,
    secrets: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run a batch of trials, and tell Tune how far each is.

    A trial with an error of its own leaves its MLflow run FAILED with the reason, and the worker
    continues with the next trial. An error that every trial would have is reported to the driver,
    which ends the sweep and closes the run. Tune retries only trials whose worker died. A trial
    that Tune stops (by SystemExit) is left to the driver.

    Args:
        config: Tune's, with `batch`, a list of Jobs; `recording`, a Recording; `isolate`, whether
            the trials of the batch run one after the other instead of together; `metric`, of which
            a search has every value reported.
        texts: corpora that need not be on this machine.
        secrets: environment variables with what the store asks for.
    """
    os.environ.update(secrets)
    recording: Recording = config["recording"]
    address, runs_dir = recording.address, recording.runs_dir
    write_for(runs_dir)
    batch, metric = config["batch"], config.get("metric")
    batches = [[job] for job in batch] if config.get("isolate") else [batch]
    try:
        for jobs in batches:
            answers = False
            try:
                run_missing(jobs, recording, metric, texts)
            except Exception as error:
                # MLflow repeats a request, but not if the server died while it answered.
                if fault_of_sweep(error, address, runs_dir) and address.is_server:
                    answers = wait_for_server(address.uri)
                if not answers:
                    raise
            if answers:  # the error is gone by now, and with it what its frames held
                run_missing(jobs, recording, metric, texts)
    except Exception as error:
        fault = fault_of_sweep(error, address, runs_dir)
        if fault is None:
            raise
        key = batch[0].key
        TrialReport(trial_key=key, status="failed", reason=fault, ends_sweep=True).send()


def run_missing(
    batch: Sequence[Job], recording: Recording, metric: str | None, texts: Texts
) -> None:
    """Run the trials of a batch that have no result, together, or else one by one.

    Raises what is no fault of a trial's own.
    """
    store = Store(recording.address)
    with trial_locks([job.key for job in batch], recording.runs_dir) as release:

        def missing(known: Sequence[str] = ()) -> dict[str, Run | None]:
            """Return by key the run of each trial without a result; None where it has no run."""
            found = {
                job.key: store.find_run("trial", trial_key=job.key, known=known) for job in batch
            }
            return {
                job.key: found[job.key]
                for job in batch
                if not _is_done(job, found[job.key], recording.runs_dir)
            }

        left = missing(recording.known)
        jobs = [job for job in batch if job.key in left]
        owned = {job.key: _own(job, left[job.key], store, recording) for job in _in_order(jobs)}
        if not all(owned.values()):  # another driver has trained some of them meanwhile
            left = missing()
        if len(left) > 1:
            jobs = [job for job in batch if job.key in left]
            if run_together(jobs, owned, store, recording, metric, texts, release):
                return
            left = missing()  # which of them broke the array is not known: each goes on by itself
        for job in [job for job in batch if job.key in left]:
            run_together([job], owned, store, recording, metric, texts, release)


def _in_order(jobs: Sequence[Job]) -> list[Job]:
    """Sort trials as every worker does, so that no two wait for each other."""
    return sorted(jobs, key=lambda job: job.key)


def _own(job: Job, run: Run | None, store: Store, recording: Recording) -> Run | None:
    """Return a run for the trial that no other driver writes into; None where it has a result.

    The locks of trials are enough for a store that no other runs folder uses.

    Args:
        job: the trial.
        run: that of the trial, which has no result; None where it has no run.
        store: where trials are recorded.
        recording: how.
    """

    def make() -> Run:
        return make_run(store, recording.experiment_id, job)

    if recording.owner:
        return own_trial(store, job.key, recording.owner, make, is_new=run is None)
    return run or make()


def _is_done(job: Job, run: Run | None, runs_dir: Path) -> bool:
    """Return whether a trial has its result, perhaps from another sweep, and report it if so."""
    status = trial_status(run)
    if status in DONE:
        _try_to_delete(checkpoint_file(runs_dir, job.key))  # a worker may have died before
        steps = int(job.params["train.steps"])
        TrialReport(trial_key=job.key, step=steps, status=status).send()
    return status in DONE


def _try_to_delete(file: Path) -> None:
    """Delete the checkpoint of a trial that has its result; one that stays does no harm."""
    with contextlib.suppress(OSError):
        delete_checkpoint(file)


@contextlib.contextmanager
def trial_locks(keys: Iterable[str], runs_dir: Path) -> Iterator[Callable[[str], None]]:
    """Inside, no other process with this runs folder runs the trials; wait for one that does.

    Yields a function that releases the lock of one trial, by its key.

    The locks are the file system's: a worker that dies holds nothing, but one whose machine is cut
    off may hold its locks for as long as that machine runs.
    """
    file = runs_dir / "locks" / "trials"
    file.parent.mkdir(parents=True, exist_ok=True)
    check_no_link(file, runs_dir)
    # A byte of the file for each trial, at a place that its key gives; the file stays empty.
    byte_of = {key: seed_of("lock", key) >> 2 for key in sorted(keys)}  # as _in_order
    # It is opened once: closing any handle would release every lock of this process on the file.
    with file.open("a") as lock:
        for byte in byte_of.values():  # in the same order as every other worker
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, byte)
        yield lambda key: fcntl.lockf(lock, fcntl.LOCK_UN, 1, byte_of[key])


def run_together(
    batch: Sequence[Job],
    runs: Mapping[str, Run | None],
    store: Store,
    recording: Recording,
    metric: str | None,
    texts: Texts,
    release: Callable[[str], None],
) -> bool:
    """Run trials as one array. Return False if it failed; its trials may still succeed alone.

    A trial that cannot even begin fails, and the others go on without it. `runs` has the run of
    each trial by its key. `release` is called with the key of each trial that has its result.
    """
    trials, recorders = [], []
    for job in batch:
        run = runs[job.key]
        assert run is not None
        recorder = MlflowRecorder(store, run, job.with_tags(array=str(len(batch))))
        file = checkpoint_file(recording.runs_dir, job.key)
        fetch_checkpoint(file)
        try:
            config = TrialConfig.from_flat(job.params)
            key = config.key(check_trial(config, texts).digest)
            if key != job.key:
                raise InputError(
                    f"trial {job.key} is {key} on this worker: "
                    "the worker has another text or another version of gptcore than the driver"
                )
        except Exception as error:
            if fault_of_sweep(error, recording.address, recording.runs_dir):
                raise
            _fail(job.key, recorder, fault_of_trial(error), traceback.format_exc())
            continue
        pause = REPORT_SECONDS * len(batch)
        reporting = ReportingRecorder(recorder, job.key, metric, file, pause, release)
        trials.append(Trial(config, reporting, file, save_checkpoint))
        recorders.append((job.key, recorder))
    if not trials:
        return True
    try:
        run_trials(trials, texts)
        return True
    except Exception as error:
        if fault_of_sweep(error, recording.address, recording.runs_dir):
            raise
        if has_lost_device(error):
            # Tune has the trials go on in another process, from their checkpoints.
            raise RuntimeError(f"the GPU failed: {str(error).splitlines()[0]}") from error
        why, details = fault_of_trial(error), traceback.format_exc()
    # The error is gone by now, and with it the tensors that its frames held.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # other processes may want what this trial leaves
    if len(trials) == 1:
        ((key, recorder),) = recorders
        _fail(key, recorder, why, details)
    return len(trials) == 1


def _fail(key: str, recorder: MlflowRecorder, why: str, details: str) -> None:
    recorder.fail(why, details)
    TrialReport(trial_key=key, status="failed", reason=why).send()


class ReportingRecorder:
    """A recorder that also tells Tune from time to time how far the trial is."""

    def __init__(
        self,
        recorder: Recorder,
        key: str,
        metric: str | None,
        checkpoint: Path,
        pause: float,
        release: Callable[[str], None],
    ) -> None:
        """Wrap a recorder.

        Args:
            recorder: where the rows go.
            key: of the trial.
            metric: every value of this chart's metric is reported; None where no search asks.
            checkpoint: deleted once the trial has its result.
            pause: least seconds between two reports.
            release: called with the key once the trial has its result.
        """
        self.recorder, self.key, self.metric = recorder, key, metric
        self.checkpoint, self.pause, self.release = checkpoint, pause, release
        # Not at once: the rows of a checkpoint come first, and say nothing of the trial's pace.
        self.next_report = time.monotonic() + pause
        self.loss: float | None = None  # of the last step

    def log(self, rows: Sequence[Row]) -> None:
        """Record rows, and report."""
        self.recorder.log(rows)
        for row in rows if self.metric else ():
            for name, step, value in chart_points(row):
                if name == self.metric and math.isfinite(value):
                    TrialReport(trial_key=self.key, step=step, value=value).send()
        for row in rows:
            if isinstance(row, TrainingRow):
                self.loss = row.loss
                if time.monotonic() >= self.next_report:
                    TrialReport(trial_key=self.key, step=row.step, loss=row.loss).send()
                    self.next_report = time.monotonic() + self.pause

    def close(self, result: TrialResult) -> None:
        """Record the result, delete the checkpoint, free the trial, and report.

        All of this is done when it returns: run_trials then deletes the checkpoint, and Tune gives
        this process no other batch before the last one has ended. So no thread writes meanwhile; on
        a GPU another process trains (sweeps/estimate/packing.py).
        """
        self.recorder.close(result)
        _try_to_delete(self.checkpoint)
        self.release(self.key)
        TrialReport(
            trial_key=self.key, step=result.steps, loss=self.loss, status=result.status
        ).send()
