"""The reader of MLflow against real stores: files, damaged files, a server."""

import base64
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pytest
from mlflow.exceptions import MlflowException

from analysis.frames import RECORDED
from analysis.report import main
from analysis.runs import READ, read_sweeps
from gptcore.config import InputError
from helpers.paths import ROOT
from helpers.store import moved, open_store, store_in
from tracking.places import Client
from tracking.sweep_run import RecordedPlan, SweepRun


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:secret@127.0.0.1:9",
        "http://me:secret@localhost:port",
        "postgresql://me:secret@127.0.0.1:9/runs",
        "gopher://me:secret@127.0.0.1",
    ],
)
def test_a_store_that_does_not_answer_is_named_without_its_password(uri):
    with pytest.raises(InputError) as error:
        open_store(uri)
    assert f"the tracking store {uri.replace('secret', '***')} does not answer" in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_wants_a_password_gets_it_and_answers(tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            self.do_GET()
            self.wfile.write(b"{}")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        open_store(f"http://me:secret@127.0.0.1:{server.server_port}")
        server.shutdown()
    assert asked[0] == "Basic " + base64.b64encode(b"me:secret").decode()


def test_a_file_that_is_no_store_is_named(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says" * 99)
    with pytest.raises(InputError, match=r"mlflow.db is damaged \(file is not a database\)"):
        store_in(tmp_path)


def test_an_empty_file_is_no_store_and_none_is_made_of_it(tmp_path):
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(InputError, match=r"mlflow.db is damaged \(it is empty\): put a copy of it"):
        store_in(tmp_path)
    assert (tmp_path / "mlflow.db").stat().st_size == 0


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.full)])
def test_processes_that_open_a_new_store_at_once_all_get_it(tmp_path, count):
    code = (
        "import sys; from pathlib import Path; from tracking.address import store_address; "
        "from tracking.store import Store; "
        "Store(store_address(Path(sys.argv[1]))).open()"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
        for _ in range(count)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * count
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_folder_without_sweeps_is_named_and_left_empty(tmp_path, capsys):
    assert main(["--runs-dir", str(tmp_path)]) == 2
    assert f"there is no sweep yet: {tmp_path}/mlflow.db does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    store_in(tmp_path)
    assert main(["--runs-dir", str(tmp_path)]) == 2
    assert "there is no sweep yet" in capsys.readouterr().err


def test_a_sweep_without_finished_trials_is_refused(tmp_path, capsys):
    store = store_in(tmp_path)
    # As one that is older than some keys.
    plan = RecordedPlan.from_json(
        {
            "sweep": "empty",
            "notes": [],
            "command": "",
            "trials": {"0" * 12: {"params": {"init.seed": 0}}},
        }
    )
    SweepRun(store, store.open_experiment("empty", tmp_path), plan, launched=1)
    assert main(["--runs-dir", str(tmp_path)]) == 2
    assert "sweep empty has no trials with a result yet" in capsys.readouterr().err


def tables_of(runs_dir, table, sweep):
    """By trial key the files of one table, of finished trials that a sweep has run."""
    finished, store = {"trial_status": "finished", "sweep": sweep}, store_in(runs_dir)
    return {
        key: store.folder_of(run) / f"{table}.parquet"
        for key, run in store.trial_runs().items()
        if finished.items() <= run.data.tags.items()
    }


def test_tables_of_another_schema_are_refused_by_name(finished_sweep, tmp_path):
    runs_dir = moved(finished_sweep, tmp_path / "runs")
    (key, file), *_ = tables_of(runs_dir, "weights", "small").items()
    pl.read_parquet(file).write_parquet(file, metadata={"schema_version": "0"})
    with pytest.raises(InputError, match=f"trial {key} has schema version 0"):
        read_sweeps(store_in(runs_dir), ["small"], None, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["missing", "cut short", "not Parquet"])
def test_a_damaged_table_leaves_its_trial_out_and_the_report_says_so(
    finished_sweep, tmp_path, damage
):
    runs_dir = moved(finished_sweep, tmp_path / "runs")
    file, *_ = tables_of(runs_dir, "token_groups", "small").values()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100] if damage == "cut short" else b"x" * 99)
    out = tmp_path / "report"
    assert main(["--runs-dir", str(runs_dir), "--out", str(out)]) == 0
    findings = json.loads((out / "findings.json").read_text())
    assert findings["trials"]["unreadable"] == 1
    assert findings["trials"]["finished"] == 3
    (note,) = (note for note in findings["notes"] if "left out" in note)
    assert re.match(r"Trial [0-9a-f]{12} is left out: token_groups cannot be read: ", note)
    assert "is left out: token_groups" in (out / "report.html").read_text()


def test_runs_of_which_none_can_be_read_are_no_sweep(finished_sweep, tmp_path):
    runs_dir = moved(finished_sweep, tmp_path / "runs")
    for file in tables_of(runs_dir, "training", "small").values():
        file.unlink()
    says = "no trial can be read; trial [0-9a-f]{12}: training cannot be read: "
    with pytest.raises(InputError, match=says):
        read_sweeps(store_in(runs_dir), ["small"], None, tmp_path / "cache")


@pytest.mark.parametrize(("table", "sweep"), [("histograms", "one"), ("tokens", "two")])
def test_a_damaged_table_of_a_figure_costs_the_figure_that_run(two_sweeps, tmp_path, table, sweep):
    runs_dir = moved(two_sweeps, tmp_path / "runs")
    damaged = tables_of(runs_dir, table, sweep)
    for file in damaged.values():
        file.write_bytes(b"x")
    out = tmp_path / "report"
    names = ["--name", "one", "two"]
    assert main(["--runs-dir", str(runs_dir), "--out", str(out), *names]) == 0
    findings = json.loads((out / "findings.json").read_text())
    left_out = [note for note in findings["notes"] if "left out of a figure" in note]
    # Of histograms both schemes of the first subset are drawn, of tokens one scheme on each.
    assert len(left_out) == (2 if table == "histograms" else 1)
    for note in left_out:
        assert f"{table} cannot be read" in note
        assert note.split()[1] in damaged
    assert findings["trials"]["finished"] == 4  # what is claimed rests on other tables


def test_a_report_over_http_is_that_of_the_same_runs_on_disk(server_sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_sweep)
    out, cache = tmp_path / "report", tmp_path / "cache"
    assert main(["--runs-dir", str(tmp_path), "--out", str(out)]) == 0
    findings = json.loads((out / "findings.json").read_text())
    assert findings["trials"]["finished"] == 4
    files = sorted(cache.rglob("*.parquet"))
    assert len(list(cache.iterdir())) == 4
    assert {file.stem for file in files} == {*READ, *RECORDED, "histograms"}
    before = [file.stat().st_mtime_ns for file in files]
    assert main(["--runs-dir", str(tmp_path), "--out", str(out)]) == 0
    assert [file.stat().st_mtime_ns for file in files] == before  # fetched once
    # What the cache lacks is fetched, what it holds is read.
    files[0].unlink()
    assert main(["--runs-dir", str(tmp_path), "--out", str(out)]) == 0
    assert json.loads((out / "findings.json").read_text()) == findings


def test_a_table_that_a_server_lacks_leaves_its_trial_out(server_sweep, tmp_path, monkeypatch):
    fetch = Client.download_artifacts
    # Other tests may have put trials of their own onto the same server.
    runs = open_store(server_sweep).trial_runs().values()
    lacks, cut = [run.info.run_id for run in runs if run.data.tags["sweep"] == "served"][:2]

    def worse(client, run_id, path, folder):
        if (run_id, path) == (lacks, "init.parquet"):
            return fetch(client, run_id, "nothing.parquet", folder)
        file = fetch(client, run_id, path, folder)
        if (run_id, path) == (cut, "init.parquet"):
            Path(file).write_bytes(Path(file).read_bytes()[:50])
        return file

    listed = Client.list_artifacts
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_sweep)
    monkeypatch.setattr(Client, "download_artifacts", worse)
    monkeypatch.setattr(
        Client,
        "list_artifacts",
        lambda client, run_id: [f for f in listed(client, run_id) if f.path != "init.parquet"],
    )
    assert main(["--runs-dir", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    findings = json.loads((tmp_path / "report" / "findings.json").read_text())
    assert findings["trials"]["unreadable"] == 2
    assert sum("init cannot be read" in note for note in findings["notes"]) == 2


def test_a_server_that_dies_while_tables_are_fetched_is_named(server_sweep, tmp_path, monkeypatch):
    fetch = Client.download_artifacts

    def dies(*_):
        raise MlflowException("the server has gone away")

    def dies_of_tables(client, run_id, path, folder):
        return dies() if path.endswith(".parquet") else fetch(client, run_id, path, folder)

    monkeypatch.setattr(Client, "download_artifacts", dies_of_tables)
    monkeypatch.setattr(Client, "list_artifacts", dies)
    with pytest.raises(
        InputError, match=f"cannot be read from {server_sweep}: the server has gone"
    ):
        read_sweeps(open_store(server_sweep), [], None, tmp_path)


def test_a_plan_that_is_missing_is_told_from_a_server_that_is_away(server_sweep, monkeypatch):
    store = open_store(server_sweep)
    (run,) = store.runs("sweep")
    with pytest.raises(InputError, match=r"lost\.json of sweep \w+ is not at .*: put it there"):
        store.read_json(run, "lost.json")

    def dies(*_):
        raise MlflowException("the server has gone away")

    monkeypatch.setattr(Client, "download_artifacts", dies)
    monkeypatch.setattr(Client, "list_artifacts", dies)
    with pytest.raises(InputError, match=f"cannot be read from {server_sweep}: the server has"):
        store.read_json(run, "plan.json")


def test_every_kind_of_weight_is_read_at_every_step(finished_sweep, tmp_path):
    """Else a claim about weights that no other claim reads would measure nothing, in silence."""
    sweep = read_sweeps(store_in(finished_sweep), ["small"], None, tmp_path / "cache")
    recorded = pl.concat(
        pl.read_parquet(folder / "weights.parquet") for folder in sweep.folders.values()
    )
    read = sweep.tables["weights"]
    assert read.height == recorded.height
    assert set(read["kind"]) == set(recorded["kind"])
    with pytest.raises(KeyError, match=r"the table updates is not read: name it in READ"):
        sweep.tables["updates"]
