"""What exists is not run again, and what is run, is run by one driver."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from analysis.claims import CLAIMS, digest
from gptcore.checkpoint import checkpoint_file
from gptcore.config import InputError, TrialConfig
from helpers.driving import outcome, start
from helpers.store import job_of, moved, recorder_of, store_in
from helpers.trials import TINY, WORDS, flags
from sweeps.launch import main
from sweeps.ledger import holder, read_ledger, sweep_lock, to_redo
from sweeps.presets import PRESETS
from sweeps.session import stamps_of
from tracking.recorder import close_cut_off
from tracking.store import set_aside
from tracking.sweep_run import read_plan


@pytest.fixture
def runs_dir(two_sweeps, tmp_path):
    """A copy of the runs of `one` and `two`, to be changed."""
    return moved(two_sweeps, tmp_path / "runs")


def ledger_of(runs_dir, sweep):
    store = store_in(runs_dir)
    return read_ledger(store.trial_runs(), sweep, store, runs_dir)


def test_a_trial_that_another_sweep_has_run_is_done(runs_dir):
    ledger = ledger_of(runs_dir, "two")
    assert {entry.status for entry in ledger.values()} == {"finished"}
    assert sorted(entry.why for entry in ledger.values()) == [
        "", "", "run by sweep one", "run by sweep one"
    ]  # fmt: skip


def test_a_dry_run_says_what_is_done_and_why(runs_dir, capsys):
    wanted = [*flags(TrialConfig.from_flat(WORDS)), "--no-estimate"]
    wanted += ["--init.scheme", "model5", "gpt2", "--init.seed", "0", "1"]
    command = ["--name", "three", "--runs-dir", str(runs_dir), "--dry-run", *wanted]
    assert main("doc", PRESETS, command) == 0
    said = capsys.readouterr().out
    assert "sweep three: 4 trials, 2 done, 2 missing" in said
    assert said.count("run by sweep one") == 2
    assert main("doc", PRESETS, [*command, "--redo", "all"]) == 0
    said = capsys.readouterr().out
    assert "4 trials, 0 done, 4 missing, 2 of them to be run again" in said
    assert len(store_in(runs_dir).trial_runs()) == 4  # it only says so


def test_a_run_that_nobody_works_on_was_cut_off(runs_dir, tiny):
    store = store_in(runs_dir)
    experiment_id = store.open_experiment("one", runs_dir)
    recorder_of(store, experiment_id, job_of(tiny, "begun", sweep="one"))
    checkpoint_file(runs_dir, "begun").parent.mkdir(exist_ok=True)
    checkpoint_file(runs_dir, "begun").touch()
    with sweep_lock(runs_dir, "one"):
        assert ledger_of(runs_dir, "one")["begun"].status == "running"
    entry = ledger_of(runs_dir, "one")["begun"]
    assert (entry.status, entry.why) == ("cut off", "continues from its checkpoint")
    close_cut_off(store, experiment_id)
    run = store.trial_runs()["begun"]
    assert (run.info.status, run.data.tags["trial_status"]) == ("KILLED", "stopped")
    # Whoever runs it again, under whatever sweep, goes on with the same run.
    other = store.open_experiment("other", runs_dir)
    again = recorder_of(store, other, job_of(tiny, "begun", sweep="other"))
    assert again.run_id == run.info.run_id
    assert store.trial_runs()["begun"].data.tags["sweep"] == "one"


def test_what_is_set_aside_is_kept_and_counts_no_more(runs_dir, tiny):
    store = store_in(runs_dir)
    key, run = next(iter(store.trial_runs().items()))
    set_aside(store, run)
    assert key not in store.trial_runs()
    (kept,) = store.runs("replaced")
    assert (kept.info.run_id, kept.data.tags["trial_key"]) == (run.info.run_id, key)
    assert store.client.get_metric_history(run.info.run_id, "loss/train")
    experiment_id = store.open_experiment("one", runs_dir)
    fresh = recorder_of(store, experiment_id, job_of(tiny, key, sweep="one"))
    assert fresh.run_id != run.info.run_id


def test_redo_takes_keys_all_and_failed(runs_dir):
    store = store_in(runs_dir)
    key, run = next(iter(store.trial_runs().items()))
    store.client.set_tag(run.info.run_id, "trial_status", "failed")
    ledger = read_ledger([*store.trial_runs(), "new"], "one", store, runs_dir)
    assert to_redo(ledger, []) == []
    assert to_redo(ledger, ["failed"]) == to_redo(ledger, [key, "failed", key]) == [key]
    assert len(to_redo(ledger, ["all"])) == 4
    with pytest.raises(InputError, match="--redo new: this trial has no run yet, leave it out"):
        to_redo(ledger, ["new"])
    with pytest.raises(InputError, match="takes all, failed, or keys of this sweep's trials, not"):
        to_redo(ledger, ["../x"])


def _hold(runs_dir, ready):
    with sweep_lock(runs_dir, "one"):
        ready.set()
        time.sleep(600)


def test_two_drivers_on_one_sweep_are_told_apart(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready))
    other.start()
    assert ready.wait(120)
    says = f"sweep one is being run by process {other.pid} on "
    with pytest.raises(InputError, match=says), sweep_lock(tmp_path, "one"):
        raise AssertionError("it is held")
    store = store_in(tmp_path)
    assert f"process {other.pid}" in holder(tmp_path, "one", store)
    assert holder(tmp_path, "two", store) is None
    with sweep_lock(tmp_path, "two"):
        pass
    # However it dies, it holds nothing.
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert holder(tmp_path, "one", store) is None
    with sweep_lock(tmp_path, "one"):
        assert json.loads((tmp_path / "locks" / "one.json").read_text())["pid"] == os.getpid()


@pytest.mark.full
def test_a_wider_sweep_runs_the_difference_and_redo_what_it_names(tmp_path):
    """3 schemes x 2 seeds, then x 3 seeds: exactly three trials more; then one of them anew."""

    def run(*arguments):
        wanted = [*flags(TrialConfig.from_flat(TINY)), "--init.scheme", "model5", "gpt2", "normal"]
        wanted.append("--no-estimate")
        process = start("init_sweep.py", tmp_path / "runs", *wanted, *arguments)
        code, output = outcome(process, 300)
        assert code == 0, output
        return output

    def started():
        runs = store_in(tmp_path / "runs").trial_runs()
        return {key: run.info.run_id for key, run in runs.items()}

    run("--init.seed", "0", "1", "--no-report")
    first = started()
    assert len(first) == 6
    said = run("--init.seed", "0", "1", "2", "--no-report")
    assert "9 trials, 6 done, 3 missing" in said
    wider = started()
    assert len(wider) == 9
    assert first.items() <= wider.items()
    # Another sweep of the same trials runs none, and reports on all.
    said = run("--name", "another", "--init.seed", "0", "1")
    assert "sweep another: 6 trials, 6 done, 0 missing" in said
    assert started() == wider
    assert (tmp_path / "runs" / "reports" / "another" / "report.html").exists()
    key = next(iter(first))
    said = run("--init.seed", "0", "1", "2", "--redo", key, "--no-report")
    assert "9 trials, 8 done, 1 missing, 1 of them to be run again" in said
    again = started()
    assert {name for name in again if again[name] != wider[name]} == {key}


def test_a_trial_keeps_its_first_stamp_and_gets_none_after_a_result():
    first = stamps_of(["a", "b"], {}, seen=set(), reported=False, current="old")
    assert first == {"a": "old", "b": "old"}
    wider = stamps_of(
        ["a", "b", "c", "d"], first, seen={"a", "b", "c"}, reported=False, current="new"
    )
    assert wider == {**first, "c": "", "d": "new"}  # c was run by another sweep
    assert stamps_of(["a", "e"], first, seen={"a"}, reported=True, current="old") == {
        "a": "old",
        "e": "",
    }


def plan_of(tmp_path, name):
    store = store_in(tmp_path)
    store.open()
    return read_plan(store, store.sweep_runs()[name])


@pytest.mark.full  # five sweeps through Ray
def test_trials_are_confirmatory_only_if_planned_before_any_result(tmp_path):
    """Seeds that were planned after a report, or had a result before, are exploratory."""
    tiny = [*flags(TrialConfig.from_flat(TINY)), "--no-estimate", "--runs-dir", str(tmp_path)]
    assert main("doc", PRESETS, [*tiny, "--name", "one", "--init.seed", "0", "1"]) == 0
    first = plan_of(tmp_path, "one")
    assert {trial.stamp for trial in first.trials.values()} == {digest()}
    assert main("doc", PRESETS, [*tiny, "--name", "one", "--init.seed", "0", "1", "2"]) == 0
    wider = plan_of(tmp_path, "one").trials
    assert {key: wider[key].stamp for key in first.trials} == dict.fromkeys(first.trials, digest())
    assert [wider[key].stamp for key in wider.keys() - first.trials.keys()] == [""]
    found = json.loads((tmp_path / "reports" / "one" / "findings.json").read_text())["claims"]
    assert found["standing"] == "confirmatory for 2 of 3 trials"
    assert found["exploratory_trials"] == list(wider.keys() - first.trials.keys())
    # Under another name, all these trials have been seen.
    assert main("doc", PRESETS, [*tiny, "--name", "two", "--init.seed", "0", "1"]) == 0
    assert {trial.stamp for trial in plan_of(tmp_path, "two").trials.values()} == {""}


@pytest.mark.full
def test_a_sweep_can_ask_only_some_claims(tmp_path):
    tiny = [*flags(TrialConfig.from_flat(TINY)), "--no-estimate", "--runs-dir", str(tmp_path)]
    asked = ["--claims", "order", "widening"]
    assert main("doc", PRESETS, [*tiny, "--name", "some", "--init.seed", "0", "1", *asked]) == 0
    found = json.loads((tmp_path / "reports" / "some" / "findings.json").read_text())["claims"]
    assert found["asked"] == ["widening", "order"]
    assert found["standing"] == "confirmatory"
    not_asked = {name for name, one in found["here"].items() if one["verdict"] == "not asked"}
    assert not_asked == set(CLAIMS) - {"order", "widening"}
