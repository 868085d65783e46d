"""Sweeps as a user runs them: the real command, a real Ray, a real MLflow store, the report."""

import json
import os
import signal
import time
from pathlib import Path

import polars as pl
import pytest

from analysis.runs import (
    connect,
    experiment_ids,
    search_runs,
    tracking_uri,
    trial_status,
)
from conftest import TINY, flags, outcome, runs_of, start, wait_for, workers
from gptcore.config import TrialConfig
from gptcore.experiment import check_trial
from gptcore.records import TABLES
from sweeps.ray_runner import RETRIES

pytestmark = pytest.mark.slow

LONG = 5000
"""Steps of a trial that is still under way when the test gets to it."""


def drive(runs_dir, *arguments):
    return start("init_sweep.py", runs_dir, "--name", "e2e", *arguments)


def run(runs_dir, *arguments):
    return outcome(drive(runs_dir, *arguments), 300)


def runs_in(runs_dir):
    return runs_of(tracking_uri(runs_dir))


def training(runs_dir):
    """The keys of trials that have a run and are running."""
    if not (runs_dir / "mlflow.db").exists():
        return []
    return [key for key, run in runs_in(runs_dir).items() if trial_status(run) == "running"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two trials, run once for several tests; -> its folder and what it printed."""
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
    assert "2 of 2 finished, 0 running, 0 failed\n" in output
    assert f"mlflow ui --backend-store-uri sqlite:///{runs_dir}/mlflow.db" in output


def test_debug_and_ray_leave_the_same_rows(swept, tmp_path):
    runs_dir, _ = swept
    for key, swept_run in runs_in(runs_dir).items():
        scheme = swept_run.data.params["init.scheme"]
        config = TrialConfig.from_flat({**TINY, "init.scheme": scheme})
        assert config.key(check_trial(config).digest) == key
        code, output = run(tmp_path / "runs", "--debug", *flags(config))
        assert code == 0, output
        artifacts = Path(swept_run.info.artifact_uri.removeprefix("file://"))
        for table in TABLES:
            debugged = pl.read_parquet(tmp_path / "runs" / "debug" / key / f"{table}.parquet")
            assert debugged.equals(pl.read_parquet(artifacts / f"{table}.parquet")), table


def test_running_again_runs_nothing_and_widening_runs_the_difference(swept):
    runs_dir, _ = swept
    before = {key: run.info.run_id for key, run in runs_in(runs_dir).items()}
    arguments = [*flags(TrialConfig.from_flat(TINY)), "--init.scheme", "model5", "gpt2"]
    code, output = run(runs_dir, *arguments, "--no-report")
    assert code == 0
    assert "2 trials, 2 done, 0 missing" in output
    assert "Ray:" not in output
    code, output = run(runs_dir, *arguments, "--init.seed", "0", "1")
    assert code == 0
    assert "4 trials, 2 done, 2 missing" in output
    after = {key: run.info.run_id for key, run in runs_in(runs_dir).items()}
    assert len(after) == 4
    assert before.items() <= after.items()


def test_a_trial_whose_worker_is_killed_goes_on_with_another(tmp_path):
    runs_dir = tmp_path / "runs"
    arguments = flags(TrialConfig.from_flat({**TINY, "train.steps": 150}))
    process = drive(runs_dir, *arguments, "--array", "off", "--init.seed", "0", "1", "2")
    wait_for(lambda: training(runs_dir))
    os.kill(workers()[0], signal.SIGKILL)
    code, output = outcome(process, 300)
    assert code == 0, output
    assert "goes on with another worker: " in output
    runs = runs_in(runs_dir)
    assert {trial_status(run) for run in runs.values()} == {"finished"}
    (lost,) = (run for run in runs.values() if "retries" in run.data.tags)
    assert lost.data.tags["retries"] == "1"
    assert lost.data.tags["retried_because"].startswith("the worker died: ")
    # It went on under its own run, and holds every point once.
    history = connect(tracking_uri(runs_dir)).get_metric_history(lost.info.run_id, "loss/train")
    assert [point.step for point in history] == list(range(151))


def test_an_array_that_loses_two_workers_reaches_the_verdicts_of_single_trials(tmp_path):
    arguments = flags(TrialConfig.from_flat({**TINY, "train.steps": 300}))
    arguments += ["--init.seed", "0", "1", "2"]
    alone, together = tmp_path / "alone" / "runs", tmp_path / "together" / "runs"
    for runs_dir in (alone, together):
        runs_dir.parent.mkdir()
    code, output = run(alone, *arguments, "--array", "off")
    assert code == 0, output
    process = drive(together, *arguments, "--array", "3")
    wait_for(lambda: len(training(together)) == 3)
    sizes = []
    for _ in range(2):
        (victim,) = wait_for(workers)
        time.sleep(2)
        sizes += [run.data.tags["array"] for run in runs_in(together).values()]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda victim=victim: victim not in workers())
    code, output = outcome(process, 300)
    assert code == 0, output
    assert "3 trials of 900 steps in all, 3 at a time in arrays of 3" in output
    assert output.count("goes on with another worker: ") == 6
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


def test_a_trial_that_loses_every_worker_fails_alone_and_the_same_command_goes_on(tmp_path):
    runs_dir = tmp_path / "runs"
    arguments = flags(TrialConfig.from_flat({**TINY, "train.steps": LONG}))
    process = drive(runs_dir, *arguments, "--init.seed", "0")
    wait_for(lambda: training(runs_dir))
    for _ in range(RETRIES + 1):
        victim = wait_for(workers)[0]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda victim=victim: victim not in workers())
    code, output = outcome(process)
    assert code == 1, output
    (failed,) = runs_in(runs_dir).values()
    assert (trial_status(failed), failed.info.status) == ("failed", "FAILED")
    assert failed.data.tags["reason"].startswith("the worker died: ")
    assert failed.data.tags["retries"] == str(RETRIES)
    assert f"failed: {failed.data.tags['reason'][:40]}" in output
    code, output = run(runs_dir, *arguments, "--init.seed", "0", "--dry-run")
    assert code == 0, output
    assert "1 trials, 0 done, 1 missing" in output


def test_a_killed_debug_trial_goes_on_and_ends_like_an_undisturbed_one(tmp_path):
    knobs = {**TINY, "train.steps": 300, "train.checkpoint_seconds": 0}
    arguments = ["--debug", *flags(TrialConfig.from_flat(knobs))]
    killed, whole = tmp_path / "killed" / "runs", tmp_path / "whole" / "runs"
    for runs_dir in (killed, whole):
        runs_dir.mkdir(parents=True)
    undisturbed = drive(whole, *arguments)
    process = drive(killed, *arguments)
    checkpoint = wait_for(lambda: list(killed.glob("checkpoints/*.pt")))[0]
    first = checkpoint.stat().st_mtime_ns
    wait_for(lambda: checkpoint.stat().st_mtime_ns > first)  # that of step 0 would prove little
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    code, output = run(killed, *arguments)
    assert code == 0, output
    assert f"going on from runs/checkpoints/{checkpoint.name}" in output
    assert not checkpoint.exists()
    undisturbed.communicate(timeout=300)
    for table in TABLES:
        resumed, expected = (
            pl.read_parquet(folder / "debug" / checkpoint.stem / f"{table}.parquet")
            for folder in (killed, whole)
        )
        assert resumed.equals(expected), table


@pytest.mark.parametrize("politely", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_says_what_remains_and_leaves_no_run_running(tmp_path, politely):
    runs_dir = tmp_path / "runs"
    arguments = flags(TrialConfig.from_flat({**TINY, "train.steps": LONG}))
    process = drive(runs_dir, *arguments, "--init.seed", "0", "1")
    wait_for(lambda: training(runs_dir))
    os.kill(process.pid, politely)
    code, output = outcome(process, 120)
    assert code == 130, output
    assert "stopped with 2 trials to go: the same command goes on" in output
    runs = runs_in(runs_dir).values()
    assert {(run.info.status, trial_status(run)) for run in runs} == {("KILLED", "stopped")}
    client = connect(tracking_uri(runs_dir))
    (sweep,) = search_runs(client, experiment_ids(client), "sweep")
    assert sweep.info.status == "KILLED"
    wait_for(lambda: not workers(), seconds=120)
