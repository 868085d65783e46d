"""What a tracking store holds of trials, and stores made for a test."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from gptcore.config import Scalar, TrialConfig
from gptcore.records import TABLES
from helpers.trials import TINY, WORDS, key_of, undisturbed_tables

if TYPE_CHECKING:  # MLflow takes seconds to import, and many tests need none
    from tracking.job import Job
    from tracking.recorder import MlflowRecorder
    from tracking.store import Store


def open_store(uri: str) -> Store:
    """Return the store at an address, made if it is new, after a check that it answers."""
    from tracking.address import StoreAddress
    from tracking.store import Store

    store = Store(StoreAddress(uri))
    if (database := store.address.database) and not database.exists():
        shutil.copyfile(empty_database(), database)
    store.open()
    return store


def empty_database() -> Path:
    """Return MLflow's database without a run, made once a session: it takes seconds to make."""
    from tracking.address import StoreAddress, sqlite_address
    from tracking.store import Store

    def make(folder: Path) -> None:
        Store(StoreAddress(sqlite_address(folder / "mlflow.db"))).open()

    return shared("empty_store", make) / "mlflow.db"


def store_in(runs_dir: Path) -> Store:
    """Return the store that a command with this runs folder uses, open."""
    from tracking.address import store_address

    return open_store(store_address(runs_dir).uri)


def recorder_of(store: Store, experiment_id: str, job: Job) -> MlflowRecorder:
    """Begin to record a trial, in its run if it has one."""
    from tracking.recorder import MlflowRecorder, make_run

    found = store.find_run("trial", trial_key=job.key)
    return MlflowRecorder(store, found or make_run(store, experiment_id, job), job)


def job_of(
    config: TrialConfig, key: str | None = None, name: str = "a trial", sweep: str = "sweep"
) -> Job:
    """Return a trial as a worker of a sweep is given it, under its own key or another one."""
    from tracking.colours import COLOURS
    from tracking.job import Job

    return Job(key or key_of(config), name, config.to_flat(), {"sweep": sweep}, "", COLOURS[0])


def worker_config(
    store: Store, experiment_id: str, runs_dir: Path, jobs: Sequence[Job]
) -> dict[str, Any]:
    """Return what Tune gives a worker that is to run these trials as one batch."""
    from sweeps.execution.trainable import Recording

    return {"recording": Recording(store.address, experiment_id, runs_dir), "batch": list(jobs)}


def runs_of(uri: str) -> dict[str, Any]:
    """The trials' runs in a store, each whole, by trial key: there is one of each."""
    store = open_store(uri)
    found = store.runs("trial")
    runs = {run.data.tags["trial_key"]: store.client.get_run(run.info.run_id) for run in found}
    assert len(runs) == len(found)
    return runs


def keys_running(runs_dir: Path) -> list[str]:
    """Return the keys of trials under way, by what the store in a runs folder says."""
    from tracking.address import store_address

    if not (runs_dir / "mlflow.db").exists():
        return []
    runs = runs_of(store_address(runs_dir).uri)
    return [key for key, run in runs.items() if run.info.status == "RUNNING"]


def check_whole(
    uri: str, database: Path, configs: Sequence[TrialConfig], download_to: Path
) -> None:
    """Assert that a store holds a sweep of these trials, each as an undisturbed one leaves it.

    That is one finished run a trial and the sweep's own, every point of a metric once, and every
    Parquet table whole, with nothing half-written beside it.
    """
    store, runs = open_store(uri), runs_of(uri)
    client = store.client
    found = client.search_runs(store.experiment_ids(), max_results=1000)
    assert len(found) == len(configs) + 1
    assert {run.info.status for run in found} == {"FINISHED"}
    with sqlite3.connect(database) as opened:
        doubled = opened.execute(
            "select run_uuid, key, step, count(*) from metrics group by 1, 2, 3 having count(*) > 1"
        )
        assert doubled.fetchall() == []
    for config in configs:
        run = runs[key_of(config)]
        artifacts = Path(client.download_artifacts(run.info.run_id, "", str(download_to)))
        assert sorted(file.name for file in artifacts.glob("*.parquet")) == sorted(
            f"{table}.parquet" for table in TABLES
        )
        assert not list(artifacts.glob(".*"))  # nothing half-written
        for table, rows in undisturbed_tables(config).items():
            read = pl.read_parquet(artifacts / f"{table}.parquet")
            assert rows.equals(read), (config.init.seed, table)
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/train")]
        assert steps == list(range(config.train.steps + 1))


def make_sweep(
    uri: str,
    runs_dir: Path,
    name: str,
    knobs: Sequence[Mapping[str, Scalar]],
    missing: int = 0,
    base: Mapping[str, Scalar] = WORDS,
) -> None:
    """Run tiny trials in this process and record them as a sweep, whose last ones are only planned.

    A trial that another sweep has already run is planned here, and not run again.
    """
    from analysis.claims import digest
    from gptcore.experiment import run_trial
    from tracking.sweep_run import RecordedPlan, RecordedTrial, SweepRun
    from tracking.view import VIEW_TAG, view_of_sweep

    store = open_store(uri)
    view = {VIEW_TAG: view_of_sweep(["init.scheme"], TINY["model.n_layer"])}
    experiment_id = store.open_experiment(name, runs_dir, view)
    trials = {}
    for one in knobs:
        config = TrialConfig.from_flat({**base, **one})
        trials[key_of(config)] = config
    done = store.trial_runs()
    for key, config in list(trials.items())[: len(trials) - missing]:
        if key not in done:
            flat = config.to_flat()
            label = f"{flat['init.scheme']}, {flat['corpus.subset']}, seed {flat['init.seed']}"
            job = job_of(config, key, label, name)
            run_trial(config, recorder_of(store, experiment_id, job))
    plan = RecordedPlan(
        sweep=name,
        preset="",
        command=f"python sweeps/init_sweep.py --name {name}",
        notes=("made by a test <b>&</b>",),
        tags={},
        trials={
            key: RecordedTrial(params=config.to_flat(), corpus_digest="", stamp=digest())
            for key, config in trials.items()
        },
    )
    SweepRun(store, experiment_id, plan, launched=time.time()).end("FINISHED")


def made_once(name: str, make: Callable[[Path], None], parent: Path) -> Path:
    """Return a runs folder of this process's own, in `parent`, of what `make` puts into one."""
    return moved(shared(name, make), parent / "runs")


def shared(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` fills once for all processes of a test session.

    The first process makes it, and the others wait.
    """
    folder = Path(os.environ["GPT_SWEEPS_TEST_SHARED"])
    with (folder / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / f"{name}.made").exists():
            (folder / name).mkdir()
            make(folder / name)
            (folder / f"{name}.made").touch()
    return folder / name


def moved(runs_dir: Path, to: Path) -> Path:
    """A copy of a runs folder: it can be changed."""
    shutil.copytree(runs_dir, to)
    return to
