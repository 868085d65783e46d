"""A fault drill: real sweeps whose processes are killed at random, and what is left of them.

Random kills are in the full tier. What a death at each point of writing leaves is tested one point
after the other, without Ray, in tests/test_write_points.py.
"""

import itertools
import os
import random
import re
import signal
import time
from contextlib import suppress

import pytest

from gptcore.config import TrialConfig
from helpers.driving import kill, outcome, start, wait_for, workers
from helpers.machines import mounted
from helpers.servers import free_port, start_server
from helpers.store import check_whole, keys_running, runs_of, store_in
from helpers.trials import KILLED, WORDS, flags
from sweeps.launch import main
from sweeps.presets import PRESETS
from tracking.address import store_address

WORKERS_KILLED, DRIVERS_KILLED = 25, 10


def drive(folder, *arguments, **environment):
    """Start a driver of trials of some seconds that keep a checkpoint every fifth of one."""
    arguments = ["--no-report", "--no-estimate", *flags(drilled(0)), *arguments]
    return start("init_sweep.py", folder / "runs", *arguments, **environment)


def run(folder, *arguments, **environment):
    return outcome(drive(folder, *arguments, **environment))


def seeds(count):
    return ["--array", "off", "--init.seed", *map(str, range(count))]


def drilled(seed):
    return TrialConfig.from_flat({**KILLED, "init.seed": seed})


def check(folder, count, tmp_path, uri=None, database=None):
    """Assert that so many seeds have run, and left what undisturbed trials leave."""
    uri = uri or store_address(folder / "runs").uri
    database = database or folder / "runs" / "mlflow.db"
    check_whole(uri, database, [drilled(seed) for seed in range(count)], tmp_path)


@pytest.mark.full
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

    check(tmp_path, count, tmp_path)


# MLflow asks again after 0, 4, 8, 16 and 32 seconds: one absence ends among the first of them.
@pytest.mark.parametrize("longer", [0, pytest.param(40, marks=pytest.mark.full)])
def test_a_server_that_is_away_is_waited_for_and_caught_up_with(tmp_path, longer):
    served = tmp_path / "served"
    served.mkdir()
    uri = f"http://127.0.0.1:{free_port()}"
    server = start_server(uri, served)
    count = 2 if longer else 1
    # By itself MLflow asks again half as often, which the longer absence is for.
    often = {} if longer else {"MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
    driver = drive(tmp_path, *seeds(count), MLFLOW_TRACKING_URI=uri, **often)
    try:
        wait_for(lambda: [run for run in runs_of(uri).values() if run.info.status == "RUNNING"])
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        place = uri.removeprefix("http://")
        away = f"the tracking server at {place} does not answer: waiting for it"
        said = list(itertools.takewhile(lambda line: away not in line, driver.stdout))
        assert driver.poll() is None, said
        assert not any("Traceback" in line for line in said), said
        time.sleep(longer)  # how long it is away is what this is about
        server = start_server(uri, served)
        code, output = outcome(driver)
        assert code == 0, output
        assert f"the tracking server at {place} answers again" in output
        check(tmp_path, count, tmp_path, uri, served / "mlflow.db")
    finally:
        driver.kill()
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "small", "96m") as folder:
        yield folder


def fill(file):
    with file.open("wb", buffering=0) as opened, suppress(OSError):
        while opened.write(bytes(2**16)):
            pass


@pytest.mark.full
def test_a_full_disk_is_named_and_with_room_again_the_same_command_goes_on(tmp_path, small_disk):
    driver = drive(small_disk, *seeds(2))
    wait_for(lambda: list(small_disk.glob("runs/checkpoints/*.pt")))
    filler = small_disk / "filler"
    fill(filler)
    code, output = outcome(driver)
    assert code == 1, output
    assert f"error: the disk of {small_disk}/runs is full" in output
    assert "of 101 MB are free: make room, then run the same command again to continue" in output
    assert "Traceback" not in output, output
    filler.unlink()
    code, output = run(small_disk, *seeds(2))
    assert code == 0, output
    check(small_disk, 2, tmp_path)


@pytest.mark.full
def test_a_trial_that_is_out_of_memory_fails_alone_with_the_numbers(tmp_path):
    huge = str(2**20)
    words = flags(TrialConfig.from_flat(WORDS))  # whose embedding alone is too large then
    arguments = ["--no-report", *words, *seeds(2), "--model.d_model", "16", huge]
    code, output = outcome(start("init_sweep.py", tmp_path / "runs", *arguments))
    assert code == 1, output
    runs = runs_of(store_address(tmp_path / "runs").uri).values()
    ended = {(run.data.params["model.d_model"], run.info.status) for run in runs}
    assert ended == {("16", "FINISHED"), (huge, "FAILED")}
    for run_ in runs:
        if run_.info.status == "FAILED":
            assert re.fullmatch(
                r"out of memory: an allocation of 211 GB was refused; this process held at most "
                r"[\d.]+ MB, and [\d.]+ GB of the machine's [\d.]+ GB are free",
                run_.data.tags["reason"],
            )
            assert "retries" not in run_.data.tags


@pytest.mark.full
def test_a_worker_that_ray_kills_for_its_memory_leaves_rays_numbers(tmp_path):
    limits = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    code, output = run(tmp_path, *seeds(1), **limits)
    assert code == 1, output
    (failed,) = runs_of(store_address(tmp_path / "runs").uri).values()
    assert failed.info.status == "FAILED"
    reason = r"out of memory, the worker was killed by Ray: Memory on the node .* used / .* limit"
    assert re.match(reason, failed.data.tags["reason"])
    assert "out of memory, the worker was killed by Ray: " in output


@pytest.mark.full
def test_damaged_checkpoints_are_named_and_the_other_trials_run(tmp_path):
    driver = drive(tmp_path, *seeds(3))
    files = wait_for(lambda: (found := list(tmp_path.glob("runs/checkpoints/*.pt")))[1:] and found)
    kill(driver)
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
    check(tmp_path, 3, tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut short", "its head", "its middle"])
def test_a_damaged_database_is_named_and_left_alone(tmp_path, damage, capsys):
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    store_in(runs_dir)
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


@pytest.mark.full
def test_of_two_drivers_at_once_one_works_and_the_other_says_which(tmp_path):
    first = drive(tmp_path, *seeds(2))
    wait_for(lambda: keys_running(tmp_path / "runs"))
    code, output = run(tmp_path, *seeds(2))
    assert code == 2, output
    assert f"is being run by process {first.pid} on " in output
    code, output = outcome(first)
    assert code == 0, output
    check(tmp_path, 2, tmp_path)


@pytest.mark.full
def test_a_second_ctrl_c_stops_at_once_and_loses_nothing_written(tmp_path):
    driver = drive(tmp_path, *seeds(2))
    wait_for(lambda: keys_running(tmp_path / "runs"))
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
    assert "stopped at once: run the same command again to continue" in output
    assert "Traceback" not in output
    wait_for(lambda: not workers(), seconds=120)
    code, output = run(tmp_path, *seeds(2))
    assert code == 0, output
    check(tmp_path, 2, tmp_path)
