"""Sweeps as a user runs them: the real command, a real Ray, a real MLflow store, the report."""

import json
import os
import signal
import time
from pathlib import Path

import polars as pl
import pytest

from gptcore.config import TrialConfig
from gptcore.records import TABLES
from helpers.driving import kill, kill_worker, outcome, start, wait_for, workers
from helpers.store import check_whole, keys_running, runs_of
from helpers.trials import KILLED, TINY, flags, key_of, undisturbed_tables, with_knobs
from sweeps.execution.runner import RETRIES
from tracking.address import store_address
from tracking.store import Store, trial_status

ENDLESS = 10**6
"""Steps of a trial that is still under way whenever the test gets to it."""
QUICKLY = ["--no-report", "--no-estimate"]


def drive(runs_dir, *arguments):
    return start("init_sweep.py", runs_dir, "--name", "e2e", *arguments)


def run(runs_dir, *arguments):
    return outcome(drive(runs_dir, *arguments), 300)


def runs_in(runs_dir):
    return runs_of(store_address(runs_dir).uri)


def training_a_while(runs_dir, count=1, since=0.0):
    """Whether so many trials are under way, and each has a checkpoint newer than `since`."""
    saved = [file.stat().st_mtime > since for file in runs_dir.glob("checkpoints/*.pt")]
    return len(keys_running(runs_dir)) >= count and sum(saved) >= count


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two trials, run once for several tests; gives its folder and what it printed."""
    runs_dir = tmp_path_factory.mktemp("e2e") / "runs"
    code, output = run(
        runs_dir, *flags(TrialConfig.from_flat(TINY)), "--init.scheme", "model5", "gpt2"
    )
    assert code == 0, output
    return runs_dir, output


def test_a_sweep_goes_from_one_command_to_a_report(swept):
    runs_dir, output = swept
    runs = runs_in(runs_dir)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.params["init.scheme"] for run in runs.values()} == {"model5", "gpt2"}
    for run in runs.values():
        assert {"corpus_digest", "git_commit", "versions", "host", "sweep"} <= set(run.data.tags)
    findings = json.loads((runs_dir / "reports" / "e2e" / "findings.json").read_text())
    assert {name for name, count in findings["trials"].items() if count} == {"finished"}
    assert findings["trials"]["finished"] == 2
    assert (runs_dir / "reports" / "e2e" / "report.html").stat().st_size > 100_000
    kept = (runs_dir / "artifacts").glob("*/artifacts/report/*")
    assert sorted(file.name for file in kept) == [
        "findings.json", "group_log_probs.png", "qkv_std.png", "report.html", "summary.md",
    ]  # fmt: skip
    assert "2 of 2 finished, 0 running, 0 failed\n" in output
    assert f"MLflow: python -m tracking.pages --runs-dir {runs_dir} --name e2e\n" in output


@pytest.mark.browser
def test_a_browser_opens_the_report_of_a_real_sweep(swept, page):
    runs_dir, _ = swept
    page.goto((runs_dir / "reports" / "e2e" / "report.html").as_uri())
    page.wait_for_function("document.querySelectorAll('svg.marks').length > 5")
    assert "not measured" in page.content()  # over bytes no token is rare
    assert page.asked == []
    assert [line for line in page.said if line.startswith("error")] == []


def test_a_trial_on_ray_leaves_the_rows_that_it_leaves_in_this_process(swept):
    runs_dir, _ = swept
    for key, swept_run in runs_in(runs_dir).items():
        scheme = swept_run.data.params["init.scheme"]
        config = TrialConfig.from_flat({**TINY, "init.scheme": scheme})
        assert key_of(config) == key
        artifacts = Path(swept_run.info.artifact_uri.removeprefix("file://"))
        for table, rows in undisturbed_tables(config).items():
            assert rows.equals(pl.read_parquet(artifacts / f"{table}.parquet")), table


def test_debug_and_ray_leave_the_same_rows(swept, tmp_path):
    runs_dir, _ = swept
    config = TrialConfig.from_flat({**TINY, "init.scheme": "gpt2"})
    code, output = run(tmp_path / "runs", "--debug", *flags(config))
    assert code == 0, output
    key = key_of(config)
    artifacts = Path(runs_in(runs_dir)[key].info.artifact_uri.removeprefix("file://"))
    for table in TABLES:
        debugged = pl.read_parquet(tmp_path / "runs" / "debug" / key / f"{table}.parquet")
        assert debugged.equals(pl.read_parquet(artifacts / f"{table}.parquet")), table


@pytest.mark.full
def test_running_again_runs_nothing_and_widening_runs_the_difference(swept):
    runs_dir, _ = swept
    before = {key: run.info.run_id for key, run in runs_in(runs_dir).items()}
    arguments = [*flags(TrialConfig.from_flat(TINY)), "--init.scheme", "model5", "gpt2", *QUICKLY]
    code, output = run(runs_dir, *arguments)
    assert code == 0
    assert "2 trials, 2 done, 0 missing" in output
    assert "Ray:" not in output
    code, output = run(runs_dir, *arguments, "--init.seed", "0", "1")
    assert code == 0
    assert "4 trials, 2 done, 2 missing" in output
    after = {key: run.info.run_id for key, run in runs_in(runs_dir).items()}
    assert len(after) == 4
    assert before.items() <= after.items()


def test_an_array_whose_worker_and_then_driver_are_killed_loses_and_doubles_nothing(tmp_path):
    runs_dir = tmp_path / "runs"
    configs = [TrialConfig.from_flat({**KILLED, "init.seed": seed}) for seed in (0, 1)]
    arguments = [*flags(configs[0]), "--init.seed", "0", "1", "--array", "2", *QUICKLY]
    process = drive(runs_dir, *arguments)
    wait_for(lambda: training_a_while(runs_dir, 2))
    kill_worker()
    killed = time.time()
    wait_for(lambda: training_a_while(runs_dir, 2, since=killed))
    kill(process)
    code, output = run(runs_dir, *arguments)
    assert code == 0, output
    check_whole(store_address(runs_dir).uri, runs_dir / "mlflow.db", configs, tmp_path)
    runs = runs_in(runs_dir).values()
    assert {run.data.tags["array"] for run in runs} == {"2"}


@pytest.mark.full
def test_a_trial_whose_worker_is_killed_goes_on_with_another(tmp_path):
    runs_dir = tmp_path / "runs"
    configs = [TrialConfig.from_flat({**KILLED, "init.seed": seed}) for seed in (0, 1, 2)]
    arguments = [*flags(configs[0]), *QUICKLY, "--array", "off", "--init.seed", "0", "1", "2"]
    process = drive(runs_dir, *arguments)
    wait_for(lambda: training_a_while(runs_dir))
    kill_worker()
    code, output = outcome(process, 300)
    assert code == 0, output
    assert "continues in another worker: " in output
    runs = runs_in(runs_dir)
    assert {trial_status(run) for run in runs.values()} == {"finished"}
    (lost,) = (run for run in runs.values() if "retries" in run.data.tags)
    assert lost.data.tags["retries"] == "1"
    assert lost.data.tags["retried_because"].startswith("the worker died: ")
    # It went on under its own run, and holds every point once.
    check_whole(store_address(runs_dir).uri, runs_dir / "mlflow.db", configs, tmp_path)


@pytest.mark.full
def test_an_array_that_loses_two_workers_reaches_the_verdicts_of_single_trials(tmp_path):
    arguments = flags(TrialConfig.from_flat({**KILLED, "train.steps": 3000}))
    arguments += ["--init.seed", "0", "1", "2"]
    alone, together = tmp_path / "alone" / "runs", tmp_path / "together" / "runs"
    for runs_dir in (alone, together):
        runs_dir.parent.mkdir()
    code, output = run(alone, *arguments, "--array", "off")
    assert code == 0, output
    process = drive(together, *arguments, "--array", "3")
    sizes, killed = [], 0.0
    for _ in range(2):
        wait_for(lambda since=killed: training_a_while(together, 3, since))
        sizes += [run.data.tags["array"] for run in runs_in(together).values()]
        kill_worker()
        killed = time.time()
    code, output = outcome(process, 300)
    assert code == 0, output
    assert "3 trials of 9,000 steps in all, 3 at a time in arrays of 3" in output
    assert output.count("continues in another worker: ") == 6
    # Once together, again together, and then each by itself: one of them may be to blame.
    assert sizes == ["3"] * 6
    assert {run.data.tags["array"] for run in runs_in(together).values()} == {"1"}
    found, expected = (
        json.loads((runs_dir / "reports" / "e2e" / "findings.json").read_text())
        for runs_dir in (together, alone)
    )
    losses, expected_losses = (
        {run["trial_key"]: run["last_loss"] for run in findings["runs"]}
        for findings in (found, expected)
    )
    assert losses == expected_losses
    verdicts, expected_verdicts = (
        {claim: judged["verdict"] for claim, judged in findings["claims"]["here"].items()}
        for findings in (found, expected)
    )
    assert verdicts == expected_verdicts


@pytest.mark.full
def test_a_trial_that_loses_every_worker_fails_alone_and_the_same_command_goes_on(tmp_path):
    runs_dir = tmp_path / "runs"
    endless = with_knobs(TrialConfig.from_flat(KILLED), train__steps=ENDLESS)
    arguments = [*flags(endless), "--init.seed", "0", "--no-estimate"]
    process = drive(runs_dir, *arguments)
    for _ in range(RETRIES + 1):
        wait_for(lambda: workers() and keys_running(runs_dir))
        kill_worker()
    code, output = outcome(process)
    assert code == 1, output
    (failed,) = runs_in(runs_dir).values()
    assert (trial_status(failed), failed.info.status) == ("failed", "FAILED")
    assert failed.data.tags["reason"].startswith("the worker died: ")
    assert failed.data.tags["retries"] == str(RETRIES)
    assert f"failed: {failed.data.tags['reason'][:40]}" in output
    assert "1 failed" in output
    code, output = run(runs_dir, *arguments, "--init.seed", "0", "--dry-run")
    assert code == 0, output
    assert "1 trial, 0 done, 1 missing" in output


@pytest.mark.full
def test_a_killed_debug_trial_goes_on_and_ends_like_an_undisturbed_one(tmp_path):
    """In the fast tier tests/test_write_points.py kills a trial in one process."""
    config = TrialConfig.from_flat({**KILLED, "train.checkpoint_seconds": 0})
    arguments = ["--debug", *flags(config)]
    runs_dir = tmp_path / "runs"
    process = drive(runs_dir, *arguments)
    checkpoint = wait_for(lambda: list(runs_dir.glob("checkpoints/*.pt")))[0]
    first = checkpoint.stat().st_mtime_ns
    wait_for(lambda: checkpoint.stat().st_mtime_ns > first)  # that of step 0 would prove little
    process.kill()
    process.communicate()
    code, output = run(runs_dir, *arguments)
    assert code == 0, output
    assert f"continuing from runs/checkpoints/{checkpoint.name}" in output
    assert not checkpoint.exists()
    for table, rows in undisturbed_tables(config).items():
        resumed = pl.read_parquet(runs_dir / "debug" / checkpoint.stem / f"{table}.parquet")
        assert resumed.equals(rows), table


# tests/test_interrupts.py has the parts, without Ray.
@pytest.mark.full
@pytest.mark.parametrize("politely", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_ctrl_c_stops_says_what_remains_and_leaves_no_run_running(tmp_path, politely):
    """`timeout` and batch systems signal all processes of a group."""
    runs_dir = tmp_path / "runs"
    endless = with_knobs(TrialConfig.from_flat(KILLED), train__steps=ENDLESS)
    process = drive(runs_dir, *flags(endless), "--init.seed", "0", "1", *QUICKLY)
    wait_for(lambda: keys_running(runs_dir))
    os.killpg(process.pid, politely)
    code, output = outcome(process, 120)
    assert code == 130, output
    assert "stopped with 2 trials to go: run the same command again to continue" in output
    runs = runs_in(runs_dir).values()
    assert {(run.info.status, trial_status(run)) for run in runs} == {("KILLED", "stopped")}
    (sweep,) = Store(store_address(runs_dir)).runs("sweep")
    assert sweep.info.status == "KILLED"
    wait_for(lambda: not workers(), seconds=120)
