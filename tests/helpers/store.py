"""What a tracking store holds of trials, and stores made for a test."""

import fcntl
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from gptcore.config import Scalar, TrialConfig
from gptcore.records import TABLES
from helpers.trials import TINY, WORDS, key_of, undisturbed_tables


def runs_of(uri: str) -> dict[str, Any]:
    """The trials' runs in a store, each whole, by trial key: there is one of each."""
    from analysis.runs import connect, experiment_ids, search_runs

    client = connect(uri)
    found = search_runs(client, experiment_ids(client), "trial")
    runs = {run.data.tags["trial_key"]: client.get_run(run.info.run_id) for run in found}
    assert len(runs) == len(found)
    return runs


def keys_running(runs_dir: Path) -> list[str]:
    """Return the keys of trials under way, by what the store in a runs folder says."""
    from analysis.runs import tracking_uri

    if not (runs_dir / "mlflow.db").exists():
        return []
    runs = runs_of(tracking_uri(runs_dir))
    return [key for key, run in runs.items() if run.info.status == "RUNNING"]


def check_whole(
    uri: str, database: Path, configs: Sequence[TrialConfig], download_to: Path
) -> None:
    """Assert that a store holds a sweep of these trials, each as an undisturbed one leaves it.

    That is one finished run a trial and the sweep's own, every point of a metric once, and every
    Parquet table whole, with nothing half-written beside it.
    """
    from analysis.runs import connect, experiment_ids

    client, runs = connect(uri), runs_of(uri)
    found = client.search_runs(experiment_ids(client), max_results=1000)
    assert len(found) == len(configs) + 1
    assert {run.info.status for run in found} == {"FINISHED"}
    with sqlite3.connect(database) as store:
        doubled = store.execute(
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
    from analysis.runs import connect, trial_runs
    from gptcore.experiment import run_trial
    from tracking.recorder import MlflowRecorder, SweepRun, open_experiment
    from tracking.view import VIEW_TAG, view_of_sweep

    client = connect(uri)
    view = {VIEW_TAG: view_of_sweep(["init.scheme"], TINY["model.n_layer"])}
    experiment_id = open_experiment(client, name, runs_dir, view)
    trials = {}
    for one in knobs:
        config = TrialConfig.from_flat({**base, **one})
        trials[key_of(config)] = config
    done = trial_runs(client)
    for key, config in list(trials.items())[: len(trials) - missing]:
        if key not in done:
            flat = config.to_flat()
            label = f"{flat['init.scheme']}, {flat['corpus.subset']}, seed {flat['init.seed']}"
            tags = {"sweep": name}
            run_trial(config, MlflowRecorder(uri, experiment_id, key, label, flat, tags))
    plan = {
        "sweep": name,
        "tags": {},
        "claims_digest": digest(),
        "notes": ["made by a test <b>&</b>"],
        "command": f"python sweeps/init_sweep.py --name {name}",
        "trials": {key: {"params": config.to_flat()} for key, config in trials.items()},
    }
    SweepRun(client, experiment_id, plan, launched=time.time()).end("FINISHED")


def made_once(name: str, make: Callable[[Path], None], parent: Path) -> Path:
    """Return a runs folder of this process's own, in `parent`, of what `make` puts into one.

    It is made once for all processes of a test session: the first makes it, the others wait.
    """
    shared = Path(os.environ["GPT_SWEEPS_TEST_SHARED"])
    original = shared / name
    with (shared / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / f"{name}.made").exists():
            original.mkdir()
            make(original)
            (shared / f"{name}.made").touch()
    return moved(original, parent / "runs")


def moved(runs_dir: Path, to: Path) -> Path:
    """A copy of a runs folder whose artifacts are those of the copy: it can be changed."""
    shutil.copytree(runs_dir, to)
    with sqlite3.connect(to / "mlflow.db") as store:
        store.execute(
            "update runs set artifact_uri = replace(artifact_uri, ?, ?)", (str(runs_dir), str(to))
        )
    return to
