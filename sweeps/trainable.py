"""What a Ray worker runs: a batch of trials, each into its MLflow run."""

from __future__ import annotations

import contextlib
import fcntl
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from mlflow import MlflowClient
from ray import tune

from gptcore.checkpoint import checkpoint_file
from gptcore.config import InputError, TrialConfig, seed_of
from gptcore.corpus import GIVEN
from gptcore.experiment import Trial, check_trial, run_trials
from gptcore.records import Recorder, Row, TrainingRow, TrialResult
from sweeps.bucket import fetch, forget, keep
from sweeps.charts import chart_points
from sweeps.faults import answers_again, fault_of_sweep, fault_of_trial, has_lost_device
from sweeps.tracking import DONE, MlflowRecorder, find_run

REPORT_SECONDS = 1.0


def run_batch(
    config: dict[str, Any], texts: Mapping[str, tuple[str, str]] = MappingProxyType({})
) -> None:
    """Run `config["batch"]`, a list of {key, name, params, tags}, and tell Tune how far each is.

    The trials of a batch train together, unless `config["apart"]`. `config["store"]` is the
    tracking URI and experiment id; in `config["runs_dir"]` a trial that was cut off finds its
    checkpoint. A search has every value of `config["metric"]` reported. `texts` are corpora that
    need not be on this machine.
    A trial that breaks leaves its MLflow run FAILED with the reason, and the worker goes on: it
    would break again. What every trial would break on is told to the driver, which ends the sweep
    and closes the run. What Tune tries again is a worker that died. A trial that Tune stops (by
    SystemExit) is left to the driver.
    """
    GIVEN.update(texts)
    store, runs_dir = config["store"], Path(config["runs_dir"])
    batch, metric = config["batch"], config.get("metric")
    batches = [[trial] for trial in batch] if config.get("apart") else [batch]
    try:
        for some in batches:
            answers = False
            try:
                _run(some, store, runs_dir, metric)
            except Exception as error:
                # MLflow asks again by itself, but not where a server died in its answer.
                if fault_of_sweep(error, store["uri"], runs_dir):
                    answers = answers_again(store["uri"])
                if not answers:
                    raise
            if answers:  # the error is gone by now, and with it what its frames held
                _run(some, store, runs_dir, metric)
    except Exception as error:
        ends = fault_of_sweep(error, store["uri"], runs_dir)
        if ends is None:
            raise
        failed = {"trial_key": batch[0]["key"], "status": "failed"}
        tune.report({**failed, "reason": ends, "ends_sweep": True})


def _run(
    batch: Sequence[Mapping[str, Any]], store: dict[str, Any], runs_dir: Path, metric: str | None
) -> None:
    """Run what is missing of the trials. Raises what is no fault of a trial's own."""
    with alone_with([trial["key"] for trial in batch], runs_dir) as done_with:

        def attempt(batch: Sequence[Mapping[str, Any]]) -> bool:
            return _attempt(batch, store, runs_dir, metric, done_with)

        batch = [trial for trial in batch if not _is_done(trial, store, runs_dir)]
        if len(batch) > 1 and not attempt(batch):
            # Which of them broke the array is not known: each goes on by itself.
            batch = [trial for trial in batch if not _is_done(trial, store, runs_dir)]
        elif len(batch) > 1:
            return
        for trial in batch:
            attempt([trial])


def _is_done(trial: Mapping[str, Any], store: Mapping[str, str], runs_dir: Path) -> bool:
    """Whether the trial has its result, by now or from another sweep; the driver is told."""
    run = find_run(MlflowClient(store["uri"]), None, "trial", trial_key=trial["key"])
    status = run.data.tags["trial_status"] if run else "missing"
    if status in DONE:
        _forget(checkpoint_file(runs_dir, trial["key"]))  # whoever had it may have died before
        steps = trial["params"]["train.steps"]
        tune.report({"trial_key": trial["key"], "step": steps, "status": status})
    return status in DONE


def _forget(file: Path) -> None:
    """Delete the checkpoint of a trial that has its result; what cannot be deleted hurts nobody."""
    with contextlib.suppress(OSError):
        forget(file)


@contextlib.contextmanager
def alone_with(keys: Iterable[str], runs_dir: Path) -> Iterator[Callable[[str], None]]:
    """While inside, no other process with this runs folder runs the trials; one that does is waited
    for. Gives a function to call with a key when that trial is done with.

    The locks are the file system's: a worker that dies holds nothing, but one whose machine is cut
    off may for as long as that runs."""
    file = runs_dir / "locks" / "trials"
    file.parent.mkdir(parents=True, exist_ok=True)
    # A byte of the file for each trial, wherever it lies; the file stays empty.
    byte_of = {key: seed_of("lock", key) >> 2 for key in sorted(keys)}
    # One opening of it: when any is closed, the process loses every lock that it has on the file.
    with file.open("a") as lock:
        for byte in byte_of.values():  # in the order in which every other worker does
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, byte)
        yield lambda key: fcntl.lockf(lock, fcntl.LOCK_UN, 1, byte_of[key])


def _attempt(
    batch: Sequence[Mapping[str, Any]],
    store: dict[str, Any],
    runs_dir: Path,
    metric: str | None,
    done_with: Callable[[str], None],
) -> bool:
    """Run trials together; -> False where several broke that may do better alone.

    One that cannot even begin is left out, and fails. `done_with` is called with the key of each
    that has its result.
    """
    trials, recorders = [], []
    for job in batch:
        said = {**job, "tags": {**job["tags"], "array": str(len(batch))}}
        recorder = MlflowRecorder(**store, **said)
        file = checkpoint_file(runs_dir, job["key"])
        fetch(file)
        try:
            config = TrialConfig.from_flat(job["params"])
            key = config.key(check_trial(config).digest)
            if key != job["key"]:
                raise InputError(
                    f"trial {job['key']} is {key} on this worker: "
                    "its corpus or its gptcore is not the driver's"
                )
        except Exception as error:
            if fault_of_sweep(error, store["uri"], runs_dir):
                raise
            _fail(job["key"], recorder, fault_of_trial(error), traceback.format_exc())
            continue
        seconds = REPORT_SECONDS * len(batch)
        reporting = _Reporting(recorder, job["key"], metric, file, seconds, done_with)
        trials.append(Trial(config, reporting, file, keep))
        recorders.append((job["key"], recorder))
    if not trials:
        return True
    try:
        run_trials(trials)
        return True
    except Exception as error:
        if fault_of_sweep(error, store["uri"], runs_dir):
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
    tune.report({"trial_key": key, "status": "failed", "reason": why})


class _Reporting:
    """A recorder that also tells Tune now and then how far the trial is."""

    def __init__(
        self,
        recorder: Recorder,
        key: str,
        metric: str | None,
        file: Path,
        seconds: float,
        done_with: Callable[[str], None],
    ) -> None:
        self.recorder, self.key, self.metric = recorder, key, metric
        self.file, self.seconds, self.done_with = file, seconds, done_with
        # Not at once: the rows of a checkpoint come first, and say nothing of the trial's pace.
        self.next = time.monotonic() + seconds

    def log(self, rows: Sequence[Row]) -> None:
        self.recorder.log(rows)
        for row in rows if self.metric else ():
            for name, step, value in chart_points(row):
                if name == self.metric and math.isfinite(value):
                    tune.report({"trial_key": self.key, "step": step, "value": value})
        for row in rows:
            if isinstance(row, TrainingRow) and time.monotonic() >= self.next:
                tune.report({"trial_key": self.key, "step": row.step, "loss": row.loss})
                self.next = time.monotonic() + self.seconds

    def close(self, result: TrialResult) -> None:
        self.recorder.close(result)
        _forget(self.file)
        self.done_with(self.key)
        tune.report({"trial_key": self.key, "step": result.steps, "status": result.status})
