"""Stores that are not as this project left them: large, moved, shared, or edited by hand."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from analysis.report import main
from analysis.runs import read_sweeps
from gptcore.config import InputError
from gptcore.experiment import check_trial, run_trial
from helpers.store import job_of, make_sweep, moved, open_store, recorder_of, store_in
from helpers.trials import TINY
from sweeps import launch
from sweeps.presets import PRESETS
from tracking.address import StoreAddress, sqlite_address, store_address
from tracking.private_api import KIND_OF_TRAINING
from tracking.recorder import close_cut_off, close_runs
from tracking.store import Store, delete_twins
from tracking.tags import say_incomplete


@pytest.fixture
def runs_dir(finished_sweep, tmp_path):
    """A copy of a runs folder with a sweep `small`."""
    return moved(finished_sweep, tmp_path / "runs")


@pytest.fixture
def job(tiny):
    return job_of(tiny, tiny.key(check_trial(tiny).digest), sweep="small")


def files_below(folder):
    return {
        file.relative_to(folder): file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith("mlflow.db")
    }


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def add_experiments(store, count):
    """Make experiments as another program would, without its second for each."""
    with sqlite3.connect(store.address.database) as database:
        database.executemany(
            "insert into experiments (name, artifact_location, lifecycle_stage, creation_time, "
            "last_update_time, workspace) "
            "values (?, 'file:///elsewhere', 'active', ?, ?, 'default')",
            [(f"other {i}", 2**41 + i, 2**41 + i) for i in range(count)],
        )


def test_a_sweep_among_thousands_of_experiments_is_found(runs_dir):
    store = store_in(runs_dir)
    before = store.trial_runs()
    add_experiments(store, 1500)
    assert len(store.experiment_ids()) > 1500
    assert store.trial_runs().keys() == before.keys()
    key, run = next(iter(before.items()))
    assert store.find_run("trial", trial_key=key).info.run_id == run.info.run_id
    assert list(store.sweep_runs()) == ["small"]


# Over a minute where the machine is busy: a server makes 1,500 experiments one by one.
@pytest.mark.full
def test_a_server_with_thousands_of_experiments_hides_no_run_and_none_is_deleted(
    server_with_many, tiny, tmp_path
):
    """The newest thousand were listed, and a finished run that was not found was deleted."""
    store = open_store(server_with_many)
    experiment_id = store.sweep_runs()["served"].info.experiment_id
    assert len(store.experiment_ids()) > 1500
    finished = store.trial_runs()
    key, run = next(iter(finished.items()))
    assert store.find_run("trial", trial_key=key).info.run_id == run.info.run_id
    # Even where the run that exists were not found, another one does not delete it.
    recorder = recorder_of(store, experiment_id, job_of(tiny, "new", sweep="served"))
    store.client.set_tag(recorder.run_id, "trial_key", key)
    runs = store.search(f"tags.trial_key = '{key}'")
    delete_twins(store, store.client.get_run(recorder.run_id), runs)
    assert {one.info.run_id for one in store.search(f"tags.trial_key = '{key}'")} == {
        run.info.run_id,
        recorder.run_id,
    }
    store.client.delete_run(recorder.run_id)
    assert store.trial_runs().keys() == finished.keys()


@pytest.fixture
def server_with_many(server_sweep):
    store = open_store(server_sweep)
    for i in range(len(store.experiment_ids()), 1502):
        store.client.create_experiment(f"other {i}")
    return server_sweep


@pytest.mark.parametrize("original", ["kept", "gone"])
def test_a_moved_or_copied_runs_folder_is_read_and_written_where_it_lies(
    finished_sweep, runs_dir, job, tiny, tmp_path, original
):
    first, copy = runs_dir, tmp_path / "another place" / "runs"
    copy.parent.mkdir()
    if original == "kept":
        shutil.copytree(first, copy)
    else:
        shutil.move(first, copy)
    before = files_below(first)
    store = store_in(copy)
    sweep = read_sweeps(store, ["small"], None, copy / "cache")
    assert all(folder.is_relative_to(copy) for folder in sweep.folders.values())
    experiment_id = store.open_experiment("small", copy)
    run_trial(tiny, recorder_of(store, experiment_id, job))
    store.client.log_text(store.sweep_runs()["small"].info.run_id, "report", "report/report.html")
    run_id = store.trial_runs()[job.key].info.run_id
    assert (copy / "artifacts" / run_id / "artifacts" / "weights.parquet").exists()
    assert files_below(first) == before
    assert first.exists() == (original == "kept")
    # MLflow's page reads the store's own addresses.
    assert {run.info.artifact_uri for run in store.runs("trial")} == {
        (copy / "artifacts" / run.info.run_id / "artifacts").as_uri() for run in store.runs("trial")
    }
    assert main(["--runs-dir", str(copy)]) == 0


def test_a_folder_of_files_that_somebody_chose_is_left_as_it_is(tmp_path):
    store = store_in(tmp_path)
    chosen = (tmp_path / "elsewhere" / "artifacts").as_uri()
    experiment_id = store.client.create_experiment("theirs", artifact_location=chosen)
    run = store.client.create_run(experiment_id)
    store.open_experiment("ours", tmp_path)
    assert store.client.get_experiment(experiment_id).artifact_location == chosen
    assert store.client.get_run(run.info.run_id).info.artifact_uri.startswith(chosen)


@pytest.mark.parametrize("name", ["Default", "theirs"])
def test_an_experiment_that_keeps_its_files_elsewhere_is_refused(tmp_path, name):
    store = store_in(tmp_path)
    store.open()
    if name == "theirs":
        store.client.create_experiment(name, artifact_location="file:///elsewhere")
    says = rf"the experiment {name} .* keeps its files at .*, not at .*: take another --name"
    with pytest.raises(InputError, match=says):
        store.open_experiment(name, tmp_path)


def test_runs_of_other_people_are_left_alone(runs_dir, job):
    store = store_in(runs_dir)
    before = store.trial_runs()
    experiment_id = store.sweep_runs()["small"].info.experiment_id
    theirs = [
        store.client.create_run(experiment_id, tags={"kind": kind}) for kind in ("trial", "sweep")
    ]
    assert store.trial_runs().keys() == before.keys()
    assert list(store.sweep_runs()) == ["small"]
    close_cut_off(store, experiment_id)
    close_runs(store, experiment_id, [job], {}, {}, {})
    assert store.incomplete == {}
    for run in theirs:
        assert store.client.get_run(run.info.run_id).info.status == "RUNNING"


@pytest.mark.parametrize("tag", ["trial_status", "trial_key"])
def test_a_run_whose_tag_was_removed_is_named_and_left_out(runs_dir, tag, capsys):
    store = store_in(runs_dir)
    key, run = next(iter(store.trial_runs().items()))
    store.client.delete_tag(run.info.run_id, tag)
    assert key not in store.trial_runs()
    said = say_incomplete(*store.incomplete.values())
    assert f"run {run.info.run_id} (" in said
    assert f"has no usable tag {tag}, so it is left out: set the tag in MLflow" in said
    assert main(["--runs-dir", str(runs_dir)]) == 0
    assert said in (runs_dir / "reports" / "small" / "summary.md").read_text()
    # It is still there, and counts again with its tag.
    store.client.set_tag(run.info.run_id, tag, key if tag == "trial_key" else "finished")
    assert store.trial_runs()[key].info.run_id == run.info.run_id
    assert store.incomplete == {}


def test_a_status_that_is_none_of_ours_is_named_and_left_out(runs_dir):
    store = store_in(runs_dir)
    key, run = next(iter(store.trial_runs().items()))
    store.client.set_tag(run.info.run_id, "trial_status", "banana")
    assert key not in store.trial_runs()
    assert "has no usable tag trial_status" in say_incomplete(store.incomplete[run.info.run_id])


@pytest.mark.parametrize(
    "text", ['{"sweep": "small", "tri', "[]", "{}", '{"command": "", "notes": [], "trials": []}'],
    ids=["cut short", "a list", "empty", "no table of trials"],
)  # fmt: skip
def test_a_damaged_plan_is_named_with_the_way_out(runs_dir, text, capsys):
    store = store_in(runs_dir)
    plan = store.folder_of(store.sweep_runs()["small"]) / "plan.json"
    plan.write_text(text)
    assert main(["--runs-dir", str(runs_dir)]) == 2
    error = capsys.readouterr().err
    assert "plan.json is damaged (" in error
    assert "run the sweep's command again with all its knobs" in error
    assert error.count("\n") == 1


def test_a_name_whose_own_run_is_gone_does_not_become_another_sweep(runs_dir, capsys):
    store = store_in(runs_dir)
    store.client.delete_run(store.sweep_runs()["small"].info.run_id)
    given = ["--runs-dir", str(runs_dir), "--name", "small", "--dry-run", "--no-estimate"]
    assert launch.main("doc", PRESETS, given) == 2
    assert "sweep small has trials, but no run of its own that says which" in (
        capsys.readouterr().err
    )


def test_a_database_that_was_cut_short_is_named_as_damaged(runs_dir, capsys):
    file = runs_dir / "mlflow.db"
    file.write_bytes(file.read_bytes()[:50_000])
    assert main(["--runs-dir", str(runs_dir)]) == 2
    assert "mlflow.db is damaged (" in capsys.readouterr().err


@pytest.mark.parametrize("launched", [None, "yesterday", "nan"])
def test_a_sweep_whose_tag_is_no_longer_a_number_is_named_and_left_out(runs_dir, launched):
    store = store_in(runs_dir)
    run = store.sweep_runs()["small"]
    if launched is None:
        store.client.delete_tag(run.info.run_id, "launched")
    else:
        store.client.set_tag(run.info.run_id, "launched", launched)
    assert store.sweep_runs() == {}
    with pytest.raises(InputError, match=r"there is no sweep yet .* has no usable tag launched"):
        read_sweeps(store, [], None, runs_dir / "cache")


def test_a_run_of_a_trial_that_is_finished_counts_before_a_newer_one(runs_dir, job):
    store = store_in(runs_dir)
    key, run = next(
        (key, run) for key, run in store.trial_runs().items() if run.info.status == "FINISHED"
    )
    newer = store.client.create_run(
        run.info.experiment_id,
        tags={"kind": "trial", "trial_key": key, "trial_status": "running"},
    )
    assert newer.info.start_time > run.info.start_time
    assert store.find_run("trial", trial_key=key).info.run_id == run.info.run_id
    assert store.trial_runs()[key].info.run_id == run.info.run_id


def test_a_sweep_whose_experiment_was_renamed_goes_on_there(runs_dir):
    store = store_in(runs_dir)
    experiment_id = store.sweep_runs()["small"].info.experiment_id
    store.client.rename_experiment(experiment_id, "a better name")
    assert store.open_experiment("small", runs_dir) == experiment_id
    assert main(["--runs-dir", str(runs_dir), "--name", "small"]) == 0


def test_an_experiment_is_one_of_training_runs_unless_a_user_chose_another_kind(tmp_path):
    store = store_in(tmp_path)
    (tag,), (training,) = KIND_OF_TRAINING, KIND_OF_TRAINING.values()
    place = (tmp_path / "artifacts").as_uri()
    store.client.create_experiment("older", artifact_location=place)
    store.client.create_experiment("chosen", artifact_location=place, tags={tag: "finetuning"})
    for name, kind in (("new", training), ("older", training), ("chosen", "finetuning")):
        for _ in range(2):
            experiment_id = store.open_experiment(name, tmp_path, {"view": "a view"})
            tags = store.client.get_experiment(experiment_id).tags
            assert {tag: kind, "view": "a view"}.items() <= tags.items(), name


@pytest.mark.parametrize("name", ["a#b '\"c ü;&=+", "x" * 200])
def test_a_runs_folder_of_any_name_keeps_everything_in_it(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    runs_dir = tmp_path / name
    runs_dir.mkdir()
    make_sweep(store_address(runs_dir).uri, runs_dir, "odd", [{}], base=TINY)
    assert main(["--runs-dir", str(runs_dir)]) == 0
    assert (runs_dir / "mlflow.db").exists()
    assert (runs_dir / "reports" / "odd" / "report.html").exists()
    assert names_in(tmp_path) == sorted(["here", name])
    assert names_in(tmp_path / "here") == []


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///", "sqlite:a.db"])
def test_a_database_that_keeps_nothing_is_refused(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"names no file: it takes sqlite:///FILE"):
        store_address(tmp_path)
    assert names_in(tmp_path) == []


def test_the_address_of_a_database_is_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///a.db?timeout=5")
    address = store_address(tmp_path / "runs")
    assert address.uri == f"sqlite:///{tmp_path}/a.db?timeout=5"
    assert address.database == tmp_path / "a.db"
    odd = StoreAddress(sqlite_address(Path("/a%20b?c/mlflow.db")))
    assert odd.database == Path("/a%20b?c/mlflow.db")
    assert Store(odd).address.exists is False
