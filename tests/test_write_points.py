"""A worker that is killed at each point where it writes: what it leaves, and how the next goes on.

The drill in test_faults.py kills real sweeps at random. Here a worker without Ray dies by SIGKILL
at one named point; what it left is looked at, and then another worker is given the same trials.
"""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
import torch
from mlflow import MlflowClient

from gptcore import checkpoint
from gptcore import train as training
from gptcore.checkpoint import Checkpoint, checkpoint_file
from gptcore.config import TrialConfig
from gptcore.experiment import run_trial
from gptcore.records import TABLES, MemoryRecorder
from helpers import trials
from helpers.store import job_of, store_in, worker_config
from helpers.trials import TINY, key_of
from sweeps.execution import trainable
from sweeps.execution.trainable import TrialReport
from tracking import recorder, tables
from tracking.charts import chart_points
from tracking.recorder import MlflowRecorder, close_runs

STEPS = 10
SAVED_EVERY = 4  # steps: a checkpoint at 0, 4 and 8 holds the rows of the steps before it
PROBED_EVERY = 3  # steps, whose points fill more than one call
FLUSH_AT = 10  # points: so they are flushed after steps 0, 3, 6 and 9, and at the end
WAIT = 120  # seconds: a worker that takes one or two ends by SIGALRM then


def config_of(seed):
    knobs = {"train.steps": STEPS, "train.checkpoint_seconds": 0.0, "init.seed": seed}
    return TrialConfig.from_flat({**TINY, "probes.every": PROBED_EVERY, **knobs})


def before(owner, name, nth=1, where=lambda *_, **__: True):
    """Die instead of the nth call of this kind."""
    return lambda: _arm(owner, name, nth, where, lambda call, *_: die())


def after(owner, name, nth=1, where=lambda *_, **__: True):
    """Die when the nth call of this kind has returned."""
    return lambda: _arm(owner, name, nth, where, lambda call, *_: (call(), die()))


def amid(owner, name, nth):
    """Die in the nth call, which writes a file: half of it is written."""

    def write_half(call, *arguments):
        call()
        (file,) = (given for given in arguments if isinstance(given, Path))
        os.truncate(file, file.stat().st_size // 2)
        die()

    return lambda: _arm(owner, name, nth, lambda *_, **__: True, write_half)


def _arm(owner, name, nth, where, end):
    """Have the nth call of this kind made by `end`, which is given it and its arguments."""
    real, alike = getattr(owner, name), []

    def counted(*arguments, **named):
        if where(*arguments, **named):
            alike.append(name)
            if len(alike) == nth:
                end(lambda: real(*arguments, **named), *arguments)
        return real(*arguments, **named)

    setattr(owner, name, counted)


def die():
    """End this process as the kernel may end one: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def has_params(*_, params=(), **__):
    return bool(params)


def has_points_of_step_3(*_, metrics=(), **__):
    return any(point.step == 3 for point in metrics)


def makes(suffix):
    """Of calls of Path.replace, those that make a file of this kind."""
    return lambda _, to: to.suffix == suffix


class Point(NamedTuple):
    """Where a worker dies."""

    arm: Callable[[], None]
    """Has this process die there."""
    left: tuple[dict[str, Any], ...]
    """What `left_by` finds of each trial, as far as it shows where the worker was."""
    ended_by: str = "worker"
    """Who ends the run then: the next worker or, if that has nothing to do, the driver."""


OPEN = {"status": "RUNNING", "trial_status": "running"}

POINTS = {
    "before the run is made": Point(
        before(MlflowClient, "create_run"),
        ({"status": None},),
    ),
    "between the run and its params": Point(
        before(MlflowClient, "log_batch", where=has_params),
        ({"status": "RUNNING", "params": 0},),
    ),
    "between the params and the tags": Point(
        after(MlflowClient, "log_batch", where=has_params),
        ({"params": len(config_of(0).to_flat()), "has host": False},),
    ),
    "in a flush": Point(
        after(MlflowClient, "log_batch", where=has_points_of_step_3),
        ({"last point": 3, "last loss": 2, "checkpoint": 0},),
    ),
    "between two flushes": Point(
        before(MlflowRecorder, "_flush", 3),
        ({"last loss": 3, "checkpoint": 4},),
    ),
    "between a flush and the checkpoint": Point(
        before(Checkpoint, "save", 3),
        ({"last loss": 6, "checkpoint": 4, "half checkpoints": 0},),
    ),
    "in the first checkpoint": Point(
        amid(Path, "write_bytes", 1),
        ({"last loss": None, "checkpoint": None, "half checkpoints": 1},),
    ),
    "in a later checkpoint": Point(
        amid(Path, "write_bytes", 3),
        ({"last loss": 6, "checkpoint": 4, "half checkpoints": 1},),
    ),
    "between a checkpoint and its name": Point(
        before(Path, "replace", 3, makes(".pt")),
        ({"last loss": 6, "checkpoint": 4, "half checkpoints": 1},),
    ),
    "between a checkpoint and the flush": Point(
        after(Checkpoint, "save", 3),
        ({"last loss": 6, "checkpoint": 8, "half checkpoints": 0},),
    ),
    "in a Parquet file": Point(
        amid(pl.DataFrame, "write_parquet", 5),
        ({**OPEN, "tables": 4, "half tables": 1},),
    ),
    "between a Parquet file and its name": Point(
        before(Path, "replace", 5, makes(".parquet")),
        ({**OPEN, "tables": 4, "half tables": 1},),
    ),
    "between two Parquet files": Point(
        after(tables, "write_atomically", 5),
        ({**OPEN, "last loss": STEPS, "tables": 5, "half tables": 0},),
    ),
    "between the Parquet files and the result": Point(
        after(recorder, "write_tables"),
        ({**OPEN, "tables": len(TABLES), "has result": False},),
    ),
    "between the result and the run's end": Point(
        before(MlflowClient, "set_terminated"),
        ({"trial_status": "finished", "has result": True, "status": "RUNNING"},),
        ended_by="driver",
    ),
    "between the run's end and the checkpoint's": Point(
        after(MlflowClient, "set_terminated"),
        ({"status": "FINISHED", "checkpoint": 8},),
    ),
    "after the checkpoint's end": Point(
        after(trainable, "delete_checkpoint"),
        ({"status": "FINISHED", "checkpoint": None},),
    ),
    "between the checkpoints of an array": Point(
        after(Checkpoint, "save", 5),
        ({"last loss": 6, "checkpoint": 8}, {"last loss": 6, "checkpoint": 4}),
    ),
    "between the ends of an array": Point(
        after(Checkpoint, "delete"),
        (
            {"status": "FINISHED", "checkpoint": None, "tables": len(TABLES)},
            {**OPEN, "checkpoint": 8, "tables": 0},
        ),
    ),
}
"""By name, in the order in which a worker comes by."""


def left_by(client, runs_dir, key):
    """What there is of a trial in the store and in the runs folder."""
    file = checkpoint_file(runs_dir, key)
    files = {
        "checkpoint": torch.load(file, weights_only=False)["step"] if file.exists() else None,
        "half checkpoints": len(list(file.parent.glob(f".{file.name}*"))),
    }
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.trial_key = '{key}'")
    if not runs:
        return {**files, "status": None, "last loss": None}
    (run,) = runs
    points = points_of(runs_dir, run)
    return {
        **files,
        "status": run.info.status,
        "params": len(run.data.params),
        "has host": "host" in run.data.tags,
        "trial_status": run.data.tags["trial_status"],
        "has result": "steps" in run.data.tags,
        "last point": max((step for _, step, _ in points), default=None),
        "last loss": max((step for name, step, _ in points if name == "loss/train"), default=None),
        "tables": len(list(artifacts_of(run).glob("*.parquet"))),
        "half tables": len(list(artifacts_of(run).glob(".*"))),
    }


def points_of(runs_dir, run):
    """All that the store has of a run's metrics, twice where it is there twice."""
    what = "select key, step, value from metrics where run_uuid = ?"
    with closing(sqlite3.connect(runs_dir / "mlflow.db")) as store:
        return store.execute(what, [run.info.run_id]).fetchall()


def artifacts_of(run):
    return Path(run.info.artifact_uri.removeprefix("file://"))


def work_until(name, work):
    """Do as a worker does, and die at the point."""
    told = []
    trainable.tune.report = told.append
    recorder.FLUSH_AT = FLUSH_AT
    checkpoint.SHARE_OF_TIME = float("inf")
    save = training.save

    def save_now_and_then(members, array, step, seconds):
        if step % SAVED_EVERY == 0:
            save(members, array, step, seconds)

    training.save = save_now_and_then
    POINTS[name].arm()
    trainable.run_batch(work)
    print(f"nobody died {name}: {told}", flush=True)


def fork_workers(orders):
    """Answer each order, the name of a point and a batch, with how a worker for it has ended.

    In a process that has imported all, and opened nothing: neither a database nor the threads of
    Polars can be taken along into another one.
    """
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    torch.set_num_threads(1)
    run_trial(config_of(0), MemoryRecorder())  # what is slow the first time is done once
    while order := orders.recv():
        if not (worker := os.fork()):
            signal.alarm(WAIT)
            try:
                work_until(*order)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(worker, 0)
        orders.send(os.waitstatus_to_exitcode(status))


@pytest.fixture(scope="module")
def exit_code_of():
    """A function that has a worker die at a point of a batch, and returns how it has ended."""
    spawn = multiprocessing.get_context("spawn")
    orders, taken = spawn.Pipe()
    forking = spawn.Process(target=fork_workers, args=[taken], daemon=True)
    forking.start()
    taken.close()  # so that there is an end of its answers when it ends

    def order(name, work):
        orders.send((name, work))
        return orders.recv()

    yield order
    orders.send(None)
    forking.join(WAIT)


@pytest.fixture(scope="module")
def undisturbed():
    """What two trials leave that nothing has happened to, by key: tables, and points of charts."""
    left = {}
    for seed in range(2):
        config = config_of(seed)
        rows = trials.undisturbed(config).rows.values()
        points = [point for some in rows for row in some for point in chart_points(row)]
        written = trials.undisturbed_tables(config)
        left[key_of(config)] = {f"{name}.parquet": written[name] for name in written}, points
    return left


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A store to copy: making one takes longer than a trial."""
    folder = tmp_path_factory.mktemp("store")
    store_in(folder)
    return folder / "mlflow.db"


TWICE = ("in a later checkpoint", "after the checkpoint's end")


@pytest.mark.parametrize("names", [*zip(POINTS), TWICE], ids=", then ".join)
def test_what_a_killed_worker_leaves_the_next_makes_whole(
    names, exit_code_of, undisturbed, empty_store, tmp_path, monkeypatch
):
    shutil.copy(empty_store, tmp_path)
    store = store_in(tmp_path)
    client, experiment_id = store.client, store.open_experiment("sweep", tmp_path)
    jobs = [job_of(config_of(seed)) for seed in range(len(POINTS[names[0]].left))]
    work = worker_config(store, experiment_id, tmp_path, jobs)

    for name in names:
        assert exit_code_of(name, work) == -signal.SIGKILL
        for job, expected in zip(jobs, POINTS[name].left, strict=True):
            left = left_by(client, tmp_path, job.key)
            assert {what: left[what] for what in expected} == expected

    told = []
    monkeypatch.setattr(
        trainable.tune, "report", lambda result: told.append(TrialReport.of(result))
    )
    monkeypatch.setattr(recorder, "FLUSH_AT", FLUSH_AT)
    trainable.run_batch(work)
    ended = {report.trial_key: report.status for report in told if report.status}
    assert ended == {job.key: "finished" for job in jobs}
    if POINTS[names[-1]].ended_by == "driver":
        close_runs(store, experiment_id, jobs, {}, {job.key: ["it died"] for job in jobs}, {})

    runs = client.search_runs([experiment_id])
    assert sorted(run.data.tags["trial_key"] for run in runs) == sorted(job.key for job in jobs)
    for run in runs:
        assert (run.info.status, run.data.tags["trial_status"]) == ("FINISHED", "finished")
        expected, points = undisturbed[run.data.tags["trial_key"]]
        assert {file.name for file in artifacts_of(run).iterdir()} == expected.keys()
        for file, rows in expected.items():
            assert rows.equals(pl.read_parquet(artifacts_of(run) / file)), file
        assert sorted(points_of(tmp_path, run)) == sorted(points)
        losses = client.get_metric_history(run.info.run_id, "loss/train")
        assert [loss.step for loss in losses] == list(range(STEPS + 1))
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert list(tmp_path.rglob(".*")) == []
