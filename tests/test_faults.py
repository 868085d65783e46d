"""A fault drill: real sweeps whose processes are killed at random, and what is left of them."""

import functools
import os
import random
import re
import signal
import sqlite3
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest

from analysis.runs import connect, experiment_ids, tracking_uri
from conftest import (
    TINY,
    flags,
    free_port,
    outcome,
    runs_of,
    start,
    start_server,
    wait_for,
    workers,
)
from gptcore.config import TrialConfig
from gptcore.experiment import check_trial, run_trial
from gptcore.records import TABLES, MemoryRecorder
from sweeps.launch import main
from sweeps.parquet import write_tables
from sweeps.spaces import PRESETS

pytestmark = pytest.mark.slow

WORKERS_KILLED, DRIVERS_KILLED = 12, 5  # 25 and 10 take CI over its hour


def drive(folder, *arguments, **environment):
    """A driver of trials of a few seconds that keep a checkpoint every fifth of one."""
    arguments = ["--no-report", *flags(drilled(0)), *arguments]
    return start("init_sweep.py", folder / "runs", *arguments, **environment)


def run(folder, *arguments, **environment):
    return outcome(drive(folder, *arguments, **environment))


def seeds(count):
    return ["--array", "off", "--init.seed", *map(str, range(count))]


def drilled(seed):
    return TrialConfig.from_flat(
        {**TINY, "train.steps": 300, "train.checkpoint_seconds": 0.2, "init.seed": seed}
    )


def key_of(config):
    return config.key(check_trial(config).digest)


@functools.cache
def undisturbed(seed):
    """The tables of a trial that nothing has happened to."""
    recorder = MemoryRecorder()
    run_trial(drilled(seed), recorder)
    with tempfile.TemporaryDirectory() as folder:
        files = write_tables(recorder.rows, Path(folder))
        return {file.stem: pl.read_parquet(file) for file in files}


def running(folder):
    """The trials under way, by what the store in the folder says."""
    if not (folder / "runs" / "mlflow.db").exists():
        return []
    return [run for run in runs_of(tracking_uri(folder / "runs")).values() if is_running(run)]


def is_running(run):
    return run.info.status == "RUNNING"


def check_whole(tmp_path, uri, database, count):
    """That so many seeds have run, and what they left is what undisturbed trials leave."""
    client, runs = connect(uri), runs_of(uri)
    found = client.search_runs(experiment_ids(client), max_results=1000)
    assert len(found) == count + 1  # one a key, and the sweep's own
    assert {run.info.status for run in found} == {"FINISHED"}
    with sqlite3.connect(database) as store:
        doubled = store.execute(
            "select run_uuid, key, step, count(*) from metrics group by 1, 2, 3 having count(*) > 1"
        )
        assert doubled.fetchall() == []
    for seed in range(count):
        config = drilled(seed)
        run = runs[key_of(config)]
        artifacts = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
        assert sorted(file.name for file in artifacts.glob("*.parquet")) == sorted(
            f"{table}.parquet" for table in TABLES
        )
        assert not list(artifacts.glob(".*"))  # nothing half-written
        for table, rows in undisturbed(seed).items():
            assert rows.equals(pl.read_parquet(artifacts / f"{table}.parquet")), (seed, table)
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/train")]
        assert steps == list(range(config.train.steps + 1))


def test_nothing_is_lost_or_doubled_whoever_is_killed(tmp_path, capsys):
    dice = random.Random(0)
    killed = {"workers": 0, "drivers": 0}
    count, starts, deadline = 4, 0, time.monotonic() + 1500
    while killed["workers"] < WORKERS_KILLED or killed["drivers"] < DRIVERS_KILLED:
        assert time.monotonic() < deadline, killed
        driver = drive(tmp_path, *seeds(count))
        starts += 1
        if dice.random() < 0.8:  # else it may be killed before it has a trial
            wait_for(lambda driver=driver: workers() or driver.poll() is not None)
        end = time.monotonic() + dice.uniform(1, 30)
        while driver.poll() is None and time.monotonic() < end:
            time.sleep(dice.uniform(0.1, 1.5))
            if killed["workers"] < WORKERS_KILLED and (alive := workers()):
                os.kill(dice.choice(alive), signal.SIGKILL)
                killed["workers"] += 1
        if driver.poll() is None and killed["drivers"] < DRIVERS_KILLED:
            driver.kill()
            killed["drivers"] += 1
        output, _ = driver.communicate(timeout=600)
        assert driver.returncode in (0, 1, -signal.SIGKILL), output
        assert driver.returncode == -signal.SIGKILL or "Traceback" not in output, output
        if driver.returncode == 0:
            count += 2  # all is done, and not yet enough was killed
    for _ in range(3):  # a trial may have lost all its workers
        code, output = run(tmp_path, *seeds(count))
        if code == 0:
            break
    assert code == 0, output
    with capsys.disabled():
        print(f"\n{killed}, {starts} starts, {count} trials")

    check_whole(tmp_path, tracking_uri(tmp_path / "runs"), tmp_path / "runs" / "mlflow.db", count)


def test_a_server_that_is_away_is_waited_for_and_caught_up_with(tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    uri = f"http://127.0.0.1:{free_port()}"
    server = start_server(uri, served)
    driver = drive(tmp_path, *seeds(2), MLFLOW_TRACKING_URI=uri)
    try:
        wait_for(lambda: sum(map(is_running, runs_of(uri).values())) > 0)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        time.sleep(40)
        server = start_server(uri, served)
        code, output = outcome(driver)
        assert code == 0, output
        place = uri.removeprefix("http://")
        assert f"the tracking server at {place} does not answer: it is waited for" in output
        assert f"the tracking server at {place} answers again" in output
        check_whole(tmp_path, uri, served / "mlflow.db", 2)
    finally:
        driver.kill()
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or error
        pytest.skip(f"a small file system cannot be mounted here: {why}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file):
    with file.open("wb", buffering=0) as opened, suppress(OSError):
        while opened.write(bytes(2**16)):
            pass


def test_a_full_disk_is_named_and_with_room_again_the_same_command_goes_on(tmp_path, small_disk):
    driver = drive(small_disk, *seeds(2))
    wait_for(lambda: list(small_disk.glob("runs/checkpoints/*.pt")))
    filler = small_disk / "filler"
    fill(filler)
    code, output = outcome(driver)
    assert code == 1, output
    assert f"error: no room on the disk of {small_disk}/runs for what was to be written" in output
    assert "of 101 MB are free: make room, then the same command goes on" in output
    assert "Traceback" not in output, output
    filler.unlink()
    code, output = run(small_disk, *seeds(2))
    assert code == 0, output
    check_whole(tmp_path, tracking_uri(small_disk / "runs"), small_disk / "runs" / "mlflow.db", 2)


def test_a_trial_that_is_out_of_memory_fails_alone_with_the_numbers(tmp_path):
    huge = str(2**20)
    code, output = run(tmp_path, *seeds(2), "--model.d_model", "16", huge)
    assert code == 1, output
    runs = runs_of(tracking_uri(tmp_path / "runs")).values()
    ended = {(run.data.params["model.d_model"], run.info.status) for run in runs}
    assert ended == {("16", "FINISHED"), (huge, "FAILED")}
    for run_ in runs:
        if run_.info.status == "FAILED":
            assert re.fullmatch(
                r"out of memory: 211 GB in one piece were refused; this process held [\d.]+ MB "
                r"at most, the machine has [\d.]+ GB of [\d.]+ GB free",
                run_.data.tags["reason"],
            )
            assert "retries" not in run_.data.tags


def test_a_worker_that_ray_kills_for_its_memory_leaves_rays_numbers(tmp_path):
    limits = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    code, output = run(tmp_path, *seeds(1), **limits)
    assert code == 1, output
    (failed,) = runs_of(tracking_uri(tmp_path / "runs")).values()
    assert failed.info.status == "FAILED"
    reason = r"out of memory, the worker was killed by Ray: Memory on the node .* used / .* limit"
    assert re.match(reason, failed.data.tags["reason"])
    assert "out of memory, the worker was killed by Ray: " in output


def test_damaged_checkpoints_are_named_and_the_other_trials_run(tmp_path):
    driver = drive(tmp_path, *seeds(3))
    files = wait_for(lambda: (found := list(tmp_path.glob("runs/checkpoints/*.pt")))[1:] and found)
    driver.kill()
    driver.communicate()
    wait_for(lambda: not workers())  # which outlive their driver for a moment, and save
    damaged, deleted = files
    whole = damaged.read_bytes()
    middle = len(whole) // 2
    damaged.write_bytes(whole[:middle] + bytes(9) + whole[middle + 9 :])
    deleted.unlink()
    code, output = run(tmp_path, *seeds(3))
    assert code == 1, output
    assert re.search(
        f"trial {damaged.stem} failed: the checkpoint {re.escape(str(damaged))} is damaged .*: "
        "delete it to begin from step 0",
        output,
    )
    assert "2 of 3 finished, 0 running, 1 failed" in output
    damaged.unlink()
    code, output = run(tmp_path, *seeds(3))
    assert code == 0, output
    check_whole(tmp_path, tracking_uri(tmp_path / "runs"), tmp_path / "runs" / "mlflow.db", 3)


@pytest.mark.parametrize("damage", ["empty", "cut short", "its head", "its middle"])
def test_a_damaged_database_is_named_and_left_alone(tmp_path, damage, capsys):
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    connect(tracking_uri(runs_dir))
    file = runs_dir / "mlflow.db"
    whole, middle = file.read_bytes(), file.stat().st_size // 2
    noise = random.Random(0).randbytes(20_000)
    file.write_bytes(
        {
            "empty": b"",
            "cut short": whole[:middle],
            "its head": noise + whole[len(noise) :],
            "its middle": whole[:middle] + noise + whole[middle + len(noise) :],
        }[damage]
    )
    before = file.read_bytes()
    assert main("", PRESETS, ["--runs-dir", str(runs_dir), *flags(drilled(0))]) == 2
    named = f"error: the database {re.escape(str(file))} is damaged .*: put a"
    assert re.search(named, capsys.readouterr().err)
    assert file.read_bytes() == before


def test_of_two_drivers_at_once_one_works_and_the_other_says_which(tmp_path):
    first = drive(tmp_path, *seeds(2))
    wait_for(lambda: running(tmp_path))
    code, output = run(tmp_path, *seeds(2))
    assert code == 2, output
    assert f"is being run by process {first.pid} on " in output
    code, output = outcome(first)
    assert code == 0, output
    check_whole(tmp_path, tracking_uri(tmp_path / "runs"), tmp_path / "runs" / "mlflow.db", 2)


def test_a_second_ctrl_c_stops_at_once_and_loses_nothing_written(tmp_path):
    driver = drive(tmp_path, *seeds(2))
    wait_for(lambda: running(tmp_path))
    # As a terminal does it: to the driver and all that it has started.
    os.killpg(driver.pid, signal.SIGINT)
    said = []
    while "stopping; Ctrl-C again stops at once" not in "".join(said[-1:]):
        said.append(driver.stdout.readline())
        assert said[-1], said
    second = time.monotonic()
    os.killpg(driver.pid, signal.SIGINT)
    code, output = outcome(driver, 300)
    assert time.monotonic() - second < 10
    assert code == 130, output
    assert "stopped at once: the same command goes on" in output
    assert "Traceback" not in output
    wait_for(lambda: not workers(), seconds=120)
    code, output = run(tmp_path, *seeds(2))
    assert code == 0, output
    check_whole(tmp_path, tracking_uri(tmp_path / "runs"), tmp_path / "runs" / "mlflow.db", 2)
