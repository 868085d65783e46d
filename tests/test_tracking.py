"""The writer of MLflow against a real store."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from mlflow import MlflowClient

from analysis.runs import connect, read_sweeps, trial_runs, trial_status
from gptcore.config import InputError, spelling
from gptcore.experiment import check_trial, run_trial
from helpers.paths import ROOT
from helpers.trials import undisturbed_tables
from tracking.recorder import MlflowRecorder, SweepRun, close_runs, open_experiment


@pytest.fixture
def store(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(uri)
    return {"uri": uri, "experiment_id": open_experiment(client, "sweep", tmp_path)}


@pytest.fixture
def key(tiny):
    return tiny.key(check_trial(tiny).digest)


def job(key, tiny):
    return {"key": key, "name": "a trial", "params": tiny.to_flat(), "tags": {"sweep": "sweep"}}


def plan_of(trials):
    return {
        "sweep": "sweep",
        "notes": [],
        "command": "",
        "claims_digest": "d",
        "tags": {"notes": ""},
        "trials": trials,
    }


def recorder(store, key, tiny):
    return MlflowRecorder(**store, **job(key, tiny))


def test_a_trial_leaves_params_tags_metrics_and_tables(store, key, tiny):
    run_trial(tiny, recorder(store, key, tiny))
    client = MlflowClient(store["uri"])
    run = client.get_run(trial_runs(client)[key].info.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {name: spelling(value) for name, value in tiny.to_flat().items()}
    expected = {"kind": "trial", "trial_key": key, "trial_status": "finished"}
    expected |= {"steps": "5", "device": "cpu"}
    assert expected.items() <= run.data.tags.items()
    for metric in ("loss/train", "loss/val", "grad_norm/global", "logprob/never_used",
                   "qkv_std/layer_01", "w_std/layer_00.attn.q", "w_std/layer_01.mlp.proj",
                   "w_std/wte"):  # fmt: skip
        assert metric in run.data.metrics, metric
    losses = client.get_metric_history(run.info.run_id, "loss/train")
    assert [(point.step, point.timestamp - run.info.start_time) for point in losses] == [
        (step, step) for step in range(6)
    ]
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert {"weights.parquet", "token_groups.parquet", "training.parquet"} <= set(files)


def test_a_trial_that_runs_again_is_one_run_with_each_point_once(store, key, tiny):
    first = recorder(store, key, tiny)
    run_trial(tiny, first)
    again = recorder(store, key, tiny)
    run_trial(tiny, again)
    assert first.run_id == again.run_id
    history = MlflowClient(store["uri"]).get_metric_history(first.run_id, "loss/train")
    assert len(history) == 6


KILLED_AS_IT_CLOSES = """
import json, os, signal, sys
import polars as pl
from gptcore.config import TrialConfig
from gptcore.experiment import run_trial
from tracking.recorder import MlflowRecorder

write, written = pl.DataFrame.write_parquet, []

def write_four_and_a_half(frame, file, **options):
    write(frame, file, **options)
    written.append(file)
    if len(written) == 5:
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

pl.DataFrame.write_parquet = write_four_and_a_half
trial = json.loads(sys.argv[1])
run_trial(TrialConfig.from_flat(trial["params"]), MlflowRecorder(**trial))
"""


def test_tables_are_whole_or_absent_and_right_after_a_kill_among_them(store, key, tiny, tmp_path):
    trial = json.dumps({**store, **job(key, tiny)})
    killed = subprocess.run([sys.executable, "-c", KILLED_AS_IT_CLOSES, trial], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    expected = {f"{name}.parquet": table for name, table in undisturbed_tables(tiny).items()}

    def left(run):
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        for file in folder.glob("*.parquet"):
            assert pl.read_parquet(file).equals(expected[file.name])
        return {file.name for file in folder.iterdir()}

    client = MlflowClient(store["uri"])
    cut_off = trial_runs(client)[key]
    assert trial_status(cut_off) == "running"
    assert len(left(cut_off) & expected.keys()) == 4
    run_trial(tiny, recorder(store, key, tiny))
    assert left(trial_runs(client)[key]) == expected.keys()


def test_a_broken_trial_is_failed_with_its_reason(store, key, tiny):
    recorder(store, key, tiny).fail("OSError: the disk is full", "where it happened")
    run = trial_runs(MlflowClient(store["uri"]))[key]
    assert run.info.status == "FAILED"
    assert trial_status(run) == "failed"
    assert run.data.tags["reason"] == "OSError: the disk is full"


def test_runs_of_trials_that_no_longer_run_are_closed(store, key, tiny):
    recorder(store, key, tiny)
    client = MlflowClient(store["uri"])
    runs = trial_runs(client)
    assert trial_status(runs[key]) == "running"
    recorder(store, "behind", tiny)
    jobs = [job(name, tiny) for name in (key, "begun not", "broken", "behind")]
    died, pruned = {key: ["it died", "it died again"]}, {"behind": "pruned at step 50"}
    close_runs(store, jobs, {"broken": "killed"}, died, pruned)
    behind = trial_runs(client)["behind"]
    assert (behind.info.status, trial_status(behind)) == ("KILLED", "pruned")
    assert behind.data.tags["reason"] == "pruned at step 50"
    closed = trial_runs(client)[key]
    assert (closed.info.status, trial_status(closed)) == ("KILLED", "stopped")
    assert closed.data.tags["retries"] == "2"
    assert closed.data.tags["retried_because"] == "it died; it died again"
    broken = trial_runs(client)["broken"]
    assert (broken.info.status, broken.data.tags["reason"]) == ("FAILED", "killed")
    assert "begun not" not in trial_runs(client)


def test_closing_asks_the_store_once_however_many_trials_have_ended_well(
    store, key, tiny, monkeypatch
):
    run_trial(tiny, recorder(store, key, tiny))
    recorder(store, "stopped", tiny)
    asked, search = [], MlflowClient.search_runs

    def counting(*args, **named):
        asked.append(args)
        return search(*args, **named)

    monkeypatch.setattr(MlflowClient, "search_runs", counting)
    close_runs(store, [job(name, tiny) for name in [*[key] * 20, "stopped"]], {}, {}, {})
    assert len(asked) == 1
    status = {name: run.info.status for name, run in trial_runs(connect(store["uri"])).items()}
    assert status == {key: "FINISHED", "stopped": "KILLED"}


def test_a_sweep_has_one_run_and_its_latest_plan_counts(store, key, tiny, tmp_path):
    client = MlflowClient(store["uri"])
    run_trial(tiny, recorder(store, key, tiny))
    trials = {key: {"params": tiny.to_flat()}, "other": {"params": tiny.to_flat()}}
    first, second = (
        SweepRun(client, store["experiment_id"], plan_of(wanted), launched=1)
        for wanted in ({}, trials)
    )
    assert first.run_id == second.run_id
    second.end("FINISHED")
    tables = read_sweeps(store["uri"], ["sweep"], None, tmp_path / "cache")
    assert dict(tables.trials.select("trial_key", "status").iter_rows()) == {
        key: "finished",
        "other": "missing",
    }
    assert set(tables.tables["weights"]["trial_key"]) == {key}


def test_a_deleted_sweep_is_not_silently_made_anew(store, tmp_path):
    client = MlflowClient(store["uri"])
    client.delete_experiment(store["experiment_id"])
    with pytest.raises(InputError, match="sweep sweep was deleted in MLflow"):
        open_experiment(client, "sweep", tmp_path)
