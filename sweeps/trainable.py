"""What a Ray worker runs: a batch of trials, each into its MLflow run."""

from __future__ import annotations

import contextlib
import fcntl
import math
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from mlflow import MlflowClient
from ray import tune

from gptcore.checkpoint import checkpoint_file
from gptcore.config import InputError, TrialConfig, seed_of
from gptcore.corpus import GIVEN
from gptcore.experiment import check_trial, run_trial
from gptcore.records import Recorder, Row, TrainingRow, TrialResult
from sweeps.bucket import fetch, forget, keep
from sweeps.faults import answers_again, fault_of_sweep, fault_of_trial, has_lost_device
from sweeps.tracking import DONE, MlflowRecorder, chart_points, find_run

REPORT_SECONDS = 1.0


def run_batch(
    config: dict[str, Any], texts: Mapping[str, tuple[str, str]] = MappingProxyType({})
) -> None:
    """Run `config["batch"]`, a list of {key, name, params, tags}, and tell Tune how far each is.

    The trials of a batch have one shape. `config["store"]` is the tracking URI and experiment id;
    in `config["runs_dir"]` a trial that was cut off finds its checkpoint. A search has every value
    of `config["metric"]` reported. `texts` are corpora that need not be on this machine.
    A trial that breaks leaves its MLflow run FAILED with the reason, and the worker goes on: it
    would break again. What every trial would break on is told to the driver, which ends the sweep
    and closes the run. What Tune tries again is a worker that died. A trial that Tune stops (by
    SystemExit) is left to the driver.
    """
    GIVEN.update(texts)
    store, runs_dir = config["store"], Path(config["runs_dir"])
    for trial in config["batch"]:
        failed = {"trial_key": trial["key"], "status": "failed"}
        try:
            if why := _run_again_if_cut_off(trial, store, runs_dir, config.get("metric")):
                tune.report({**failed, "reason": why})
        except Exception as error:
            ends = fault_of_sweep(error, store["uri"], runs_dir)
            if ends is None:
                raise
            tune.report({**failed, "reason": ends, "ends_sweep": True})


def _run_again_if_cut_off(
    trial: dict[str, Any], store: dict[str, Any], runs_dir: Path, metric: str | None
) -> str | None:
    """As _run, but once more, from the trial's checkpoint, where a tracking server failed that
    answers again. MLflow asks again by itself, but not where a server died in its answer."""
    try:
        return _run(trial, store, runs_dir, metric)
    except Exception as error:
        if not (fault_of_sweep(error, store["uri"], runs_dir) and answers_again(store["uri"])):
            raise
    return _run(trial, store, runs_dir, metric)


def _run(
    trial: dict[str, Any], store: dict[str, Any], runs_dir: Path, metric: str | None
) -> str | None:
    """Run one trial; -> why it failed, if it did. Raises what is no fault of the trial's own."""
    with alone_with(trial["key"], runs_dir):
        run = find_run(MlflowClient(store["uri"]), None, "trial", trial_key=trial["key"])
        status = run.data.tags["trial_status"] if run else "missing"
        if status in DONE:  # by another sweep, since the driver looked
            steps = trial["params"]["train.steps"]
            tune.report({"trial_key": trial["key"], "step": steps, "status": status})
            return None
        return _run_alone(trial, store, runs_dir, metric)


@contextlib.contextmanager
def alone_with(key: str, runs_dir: Path) -> Iterator[None]:
    """While inside, no other process with this runs folder runs the trial; one that does is waited
    for. The lock is the file system's: a worker that dies holds nothing, but one whose machine is
    cut off may for as long as that runs."""
    file = runs_dir / "locks" / "trials"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        # A byte of the file for each trial, wherever it lies; the file stays empty.
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, seed_of("lock", key) >> 2)
        yield


def _run_alone(
    trial: dict[str, Any], store: dict[str, Any], runs_dir: Path, metric: str | None
) -> str | None:
    recorder = MlflowRecorder(**store, **trial)
    file = checkpoint_file(runs_dir, trial["key"])
    fetch(file)
    try:
        config = TrialConfig.from_flat(trial["params"])
        key = config.key(check_trial(config).digest)
        if key != trial["key"]:
            raise InputError(
                f"trial {trial['key']} is {key} on this worker: "
                "its corpus or its gptcore is not the driver's"
            )
        run_trial(config, _Reporting(recorder, key, metric), file, keep)
        with contextlib.suppress(OSError):  # it has its result; what is left of it hurts nobody
            forget(file)
        return None
    except Exception as error:
        if fault_of_sweep(error, store["uri"], runs_dir):
            raise
        if has_lost_device(error):
            # Tune has the trial go on in another process, from its checkpoint.
            raise RuntimeError(f"the GPU failed: {str(error).splitlines()[0]}") from error
        why, details = fault_of_trial(error), traceback.format_exc()
    # The error is gone by now, and with it the tensors that its frames held.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # other processes may want what this trial leaves
    recorder.fail(why, details)
    return why


class _Reporting:
    """A recorder that also tells Tune now and then how far the trial is."""

    def __init__(self, recorder: Recorder, key: str, metric: str | None) -> None:
        self.recorder, self.key, self.metric = recorder, key, metric
        # Not at once: the rows of a checkpoint come first, and say nothing of the trial's pace.
        self.next = time.monotonic() + REPORT_SECONDS

    def log(self, rows: Sequence[Row]) -> None:
        self.recorder.log(rows)
        for row in rows if self.metric else ():
            for name, step, value in chart_points(row):
                if name == self.metric and math.isfinite(value):
                    tune.report({"trial_key": self.key, "step": step, "value": value})
        for row in rows:
            if isinstance(row, TrainingRow) and time.monotonic() >= self.next:
                tune.report({"trial_key": self.key, "step": row.step, "loss": row.loss})
                self.next = time.monotonic() + REPORT_SECONDS

    def close(self, result: TrialResult) -> None:
        self.recorder.close(result)
        tune.report({"trial_key": self.key, "step": result.steps, "status": result.status})
