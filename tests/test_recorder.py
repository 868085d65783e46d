"""What is recorded of trials and sweeps, in a real store."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import polars as pl
import pytest
from mlflow import MlflowClient

from analysis.runs import read_sweeps
from gptcore.config import InputError, spelling
from gptcore.experiment import check_trial, run_trial
from helpers.paths import ROOT
from helpers.store import job_of, recorder_of
from helpers.trials import undisturbed_tables
from tracking.private_api import RUN_COLOUR_TAG
from tracking.recorder import close_runs
from tracking.store import trial_status
from tracking.sweep_run import RecordedPlan, RecordedTrial, SweepRun


@pytest.fixture
def key(tiny):
    return tiny.key(check_trial(tiny).digest)


@pytest.fixture
def recorder(store, experiment_id, tiny):
    """Return a function that makes the recorder of a trial like `tiny`, under any key."""
    return lambda key: recorder_of(store, experiment_id, job_of(tiny, key))


def plan_of(trials):
    return RecordedPlan(
        sweep="sweep", preset="", command="", notes=(), tags={"notes": ""}, trials=trials,
    )  # fmt: skip


def test_a_trial_leaves_params_tags_metrics_and_tables(store, recorder, key, tiny):
    run_trial(tiny, recorder(key))
    client = store.client
    run = client.get_run(store.trial_runs()[key].info.run_id)
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


def test_a_run_has_the_name_and_the_colour_of_its_trial_until_a_user_changes_them(
    store, experiment_id, key, tiny
):
    job = job_of(tiny, key, "gpt2, seed 0")
    run_id = recorder_of(store, experiment_id, job).run_id
    run = store.client.get_run(run_id)
    assert (run.info.run_name, run.data.tags[RUN_COLOUR_TAG]) == (job.name, job.colour)
    store.client.set_tag(run_id, RUN_COLOUR_TAG, "#000000")
    store.client.update_run(run_id, name="mine")
    assert recorder_of(store, experiment_id, job).run_id == run_id
    run = store.client.get_run(run_id)
    assert (run.info.run_name, run.data.tags[RUN_COLOUR_TAG]) == ("mine", "#000000")


def test_a_trial_that_runs_again_is_one_run_with_each_point_once(store, recorder, key, tiny):
    first = recorder(key)
    run_trial(tiny, first)
    again = recorder(key)
    run_trial(tiny, again)
    assert first.run_id == again.run_id
    history = store.client.get_metric_history(first.run_id, "loss/train")
    assert len(history) == 6


KILLED_AS_IT_CLOSES = """
import json, os, signal, sys
import polars as pl
from gptcore.config import TrialConfig
from gptcore.experiment import run_trial
from tracking.job import Job
from tracking.recorder import MlflowRecorder, make_run
from tracking.address import StoreAddress
from tracking.store import Store

write, written = pl.DataFrame.write_parquet, []

def write_four_and_a_half(frame, file, **options):
    write(frame, file, **options)
    written.append(file)
    if len(written) == 5:
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

pl.DataFrame.write_parquet = write_four_and_a_half
uri, experiment_id, trial = json.loads(sys.argv[1])
store, job = Store(StoreAddress(uri)), Job(**trial)
recorder = MlflowRecorder(store, make_run(store, experiment_id, job), job)
run_trial(TrialConfig.from_flat(trial["params"]), recorder)
"""


def test_tables_are_whole_or_absent_and_right_after_a_kill_among_them(
    store, experiment_id, recorder, key, tiny
):
    trial = json.dumps([store.address.uri, experiment_id, asdict(job_of(tiny))])
    killed = subprocess.run([sys.executable, "-c", KILLED_AS_IT_CLOSES, trial], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    expected = {f"{name}.parquet": table for name, table in undisturbed_tables(tiny).items()}

    def left(run):
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        for file in folder.glob("*.parquet"):
            assert pl.read_parquet(file).equals(expected[file.name])
        return {file.name for file in folder.iterdir()}

    cut_off = store.trial_runs()[key]
    assert trial_status(cut_off) == "running"
    assert len(left(cut_off) & expected.keys()) == 4
    run_trial(tiny, recorder(key))
    assert left(store.trial_runs()[key]) == expected.keys()


def test_a_broken_trial_is_failed_with_its_reason(store, recorder, key):
    recorder(key).fail("OSError: the disk is full", "where it happened")
    run = store.trial_runs()[key]
    assert run.info.status == "FAILED"
    assert trial_status(run) == "failed"
    assert run.data.tags["reason"] == "OSError: the disk is full"


def test_runs_of_trials_that_no_longer_run_are_closed(store, experiment_id, recorder, key, tiny):
    recorder(key)
    runs = store.trial_runs()
    assert trial_status(runs[key]) == "running"
    recorder("behind")
    jobs = [job_of(tiny, name) for name in (key, "begun not", "broken", "behind")]
    died, pruned = {key: ["it died", "it died again"]}, {"behind": "pruned at step 50"}
    close_runs(store, experiment_id, jobs, {"broken": "killed"}, died, pruned)
    behind = store.trial_runs()["behind"]
    assert (behind.info.status, trial_status(behind)) == ("KILLED", "pruned")
    assert behind.data.tags["reason"] == "pruned at step 50"
    closed = store.trial_runs()[key]
    assert (closed.info.status, trial_status(closed)) == ("KILLED", "stopped")
    assert closed.data.tags["retries"] == "2"
    assert closed.data.tags["retried_because"] == "it died; it died again"
    broken = store.trial_runs()["broken"]
    assert (broken.info.status, broken.data.tags["reason"]) == ("FAILED", "killed")
    assert "begun not" not in store.trial_runs()


def test_closing_asks_the_store_once_however_many_trials_have_ended_well(
    store, experiment_id, recorder, key, tiny, monkeypatch
):
    run_trial(tiny, recorder(key))
    recorder("stopped")
    asked, search = [], MlflowClient.search_runs

    def counting(*args, **named):
        asked.append(args)
        return search(*args, **named)

    monkeypatch.setattr(MlflowClient, "search_runs", counting)
    jobs = [job_of(tiny, name) for name in [*[key] * 20, "stopped"]]
    close_runs(store, experiment_id, jobs, {}, {}, {})
    assert len(asked) == 1
    status = {name: run.info.status for name, run in store.trial_runs().items()}
    assert status == {key: "FINISHED", "stopped": "KILLED"}


def test_plan_json_keeps_its_keys_and_their_order_for_sweeps_older_than_this_code():
    trial = {"params": {"init.seed": 0}, "corpus_digest": "c", "stamp": "s"}
    stored = {
        "sweep": "sweep", "preset": "quick", "command": "python", "notes": ["a note"],
        "tags": {"notes": "a note"}, "trials": {"key": trial}, "claims": ["order"],
    }  # fmt: skip
    assert json.dumps(RecordedPlan.from_json(stored).to_json()) == json.dumps(stored)
    oldest = {"command": "python", "notes": [], "trials": {"key": {"params": trial["params"]}}}
    assert RecordedPlan.from_json(oldest).trials["key"].params == trial["params"]


def test_a_sweep_has_one_run_and_its_latest_plan_counts(
    store, experiment_id, recorder, key, tiny, tmp_path
):
    run_trial(tiny, recorder(key))
    trial = RecordedTrial(params=tiny.to_flat(), corpus_digest="d")
    trials = {key: trial, "0" * 12: trial}
    first, second = (
        SweepRun(store, experiment_id, plan_of(wanted), launched=1) for wanted in ({}, trials)
    )
    assert first.run_id == second.run_id
    second.end("FINISHED")
    tables = read_sweeps(store, ["sweep"], None, tmp_path / "cache")
    assert dict(tables.trials.select("trial_key", "status").iter_rows()) == {
        key: "finished",
        "0" * 12: "missing",
    }
    assert set(tables.tables["weights"]["trial_key"]) == {key}


def test_a_deleted_sweep_is_not_silently_made_anew(store, experiment_id, tmp_path):
    store.client.delete_experiment(experiment_id)
    with pytest.raises(InputError, match="sweep sweep was deleted in MLflow"):
        store.open_experiment("sweep", tmp_path)
