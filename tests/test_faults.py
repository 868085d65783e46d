"""A fault drill: real sweeps whose processes are killed at random, and what is left of them."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from analysis.runs import connect, experiment_ids, search_runs, tracking_uri
from conftest import ROOT, TINY, flags, workers
from gptcore.config import TrialConfig
from gptcore.experiment import check_trial, run_trial
from gptcore.records import TABLES, MemoryRecorder
from sweeps.parquet import write_tables

pytestmark = pytest.mark.slow

WORKERS_KILLED, DRIVERS_KILLED = 25, 10


def start(folder, seeds):
    """A driver of trials of a few seconds that keep a checkpoint every fifth of one."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sweeps" / "init_sweep.py"), "--no-report",
         "--runs-dir", "runs", *flags(drilled(0)), "--init.seed", *map(str, range(seeds))],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def drilled(seed):
    return TrialConfig.from_flat(
        {**TINY, "train.steps": 300, "train.checkpoint_seconds": 0.2, "init.seed": seed}
    )


def undisturbed(seed, folder):
    recorder = MemoryRecorder()
    run_trial(drilled(seed), recorder)
    write_tables(recorder.rows, folder)
    return folder


def test_nothing_is_lost_or_doubled_whoever_is_killed(tmp_path, capsys):
    dice = random.Random(0)
    killed = {"workers": 0, "drivers": 0}
    seeds, starts, deadline = 4, 0, time.monotonic() + 1500
    while killed["workers"] < WORKERS_KILLED or killed["drivers"] < DRIVERS_KILLED:
        assert time.monotonic() < deadline, killed
        driver = start(tmp_path, seeds)
        starts += 1
        end = time.monotonic() + dice.uniform(1, 30)
        while driver.poll() is None and time.monotonic() < end:
            time.sleep(dice.uniform(0.1, 1.5))
            if killed["workers"] < WORKERS_KILLED and (alive := workers()):
                os.kill(dice.choice(alive), signal.SIGKILL)
                killed["workers"] += 1
        if driver.poll() is None and killed["drivers"] < DRIVERS_KILLED:
            driver.kill()
            killed["drivers"] += 1
        output, _ = driver.communicate(timeout=300)
        assert driver.returncode in (0, 1, -signal.SIGKILL), output
        assert driver.returncode == -signal.SIGKILL or "Traceback" not in output, output
        if driver.returncode == 0:
            seeds += 2  # all is done, and not yet enough was killed
    for _ in range(3):  # a trial may have lost all its workers
        driver = start(tmp_path, seeds)
        output, _ = driver.communicate(timeout=600)
        if driver.returncode == 0:
            break
    assert driver.returncode == 0, output
    with capsys.disabled():
        print(f"\n{killed}, {starts} starts, {seeds} trials")

    client = connect(tracking_uri(tmp_path / "runs"))
    runs = {
        run.data.tags["trial_key"]: client.get_run(run.info.run_id)
        for run in search_runs(client, experiment_ids(client), "trial")
    }
    found = client.search_runs(experiment_ids(client), max_results=1000)
    assert len(found) == seeds + 1  # one a key, and the sweep's own
    assert {run.info.status for run in found} == {"FINISHED"}
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as store:
        doubled = store.execute(
            "select run_uuid, key, step, count(*) from metrics group by 1, 2, 3 having count(*) > 1"
        )
        assert doubled.fetchall() == []
    for seed in range(seeds):
        config = drilled(seed)
        run = runs[config.key(check_trial(config).digest)]
        whole = undisturbed(seed, tmp_path / "undisturbed" / str(seed))
        artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
        assert sorted(file.name for file in artifacts.iterdir() if file.suffix == ".parquet") == (
            sorted(f"{table}.parquet" for table in TABLES)
        )
        for table in TABLES:
            rows = pl.read_parquet(artifacts / f"{table}.parquet")
            assert rows.equals(pl.read_parquet(whole / f"{table}.parquet")), (seed, table)
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/train")]
        assert steps == list(range(config.train.steps + 1))
