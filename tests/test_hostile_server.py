"""Tracking servers that mean harm, or that hold what somebody else has put there."""

import copy
import os
import shutil
import signal

import pytest

from analysis.report import main
from gptcore.config import InputError
from helpers.hostile import Answers, World, answering, check_said, some
from helpers.servers import free_port, start_server
from helpers.store import job_of, moved, open_store, recorder_of
from tracking.sweep_run import SweepRun, read_plan

PASSWORD = "a-password-of-this-test"


@pytest.fixture
def world(tmp_path, finished_sweep, monkeypatch):
    found = World(tmp_path, moved(finished_sweep, tmp_path / "theirs"))
    monkeypatch.setenv("HOME", str(found.home))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def report(world, capsys, monkeypatch):
    """Return a function that reports what a server has, and asserts that nothing else was done."""

    def write(uri):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        ours = world.root / "runs"
        ours.mkdir(exist_ok=True)
        mine = (ours / "reports", ours / "cache", world.runs_dir / "server.log")
        with world.untouched(*mine):
            code = main(["--runs-dir", str(ours)])
        shutil.rmtree(ours)
        out, err = capsys.readouterr()
        check_said(out, err, code)
        return code, err

    return write


@pytest.mark.full
def test_a_server_that_means_no_harm_is_read(world, report):
    with answering(Answers(world)) as (uri, sent):
        assert report(uri)[0] == 0
    assert any(sent)


def evil_place(where):
    """Every run says that its files are elsewhere."""

    def change(answers):
        for run in answers.runs:
            run["info"]["artifact_uri"] = where.format(home=answers.world.home)

    return change


PLACES = [
    "file://{home}/.ssh", "{home}/.ssh", "../home/.ssh", "s3://theirs/x", "ftp://127.0.0.1/x",
    "sftp://127.0.0.1/x", "hdfs://127.0.0.1/x", "dbfs:/x", "runs:/x", "models:/x", "http://[", "",
    "gopher://x", "uc:/x", "mlflow-artifacts://ours@127.0.0.1:1/x",
]  # fmt: skip


@pytest.mark.parametrize("place", some(PLACES, "file://{home}/.ssh"))
def test_files_are_not_where_a_server_says(world, report, place):
    answers = Answers(world)
    evil_place(place)(answers)
    with answering(answers) as (uri, _):
        code, said = report(uri)
    assert code == 2
    assert "where this machine writes and reads nothing" in said


@pytest.mark.parametrize("scheme", some(["http", "mlflow-artifacts"], "http"))
def test_the_password_goes_to_no_other_server(world, report, scheme):
    answers = Answers(world)
    with answering(answers) as (uri, sent), answering(lambda *_: 404) as (other, sent_there):
        evil_place(f"{scheme}://{other.removeprefix('http://')}/x")(answers)
        assert report(uri)[0] == 2
        assert any(sent)
        assert not sent_there
        for code in (301, 302, 307, 308):
            with answering(lambda *_, code=code: (code, other)) as (redirecting, _):
                report(redirecting)
    assert not any(sent_there)


def test_where_files_go_is_asked_once(world):
    """A server might name another place once the first was found good."""
    answers, asked = Answers(world), []

    def answer(method, path, question):
        found = copy.deepcopy(answers(method, path, question))
        if path.endswith("/runs/get"):
            asked.append(question["run_id"])
            if len(asked) > 1:
                found["run"]["info"]["artifact_uri"] = f"file://{world.home}/.ssh"
        return found

    with answering(answer) as (uri, _), world.untouched():
        store = open_store(uri)
        store.client.log_text(world.sweep_run, "text", "note.txt")
        store.client.log_text(world.sweep_run, "text", "authorized_keys")
    assert len(asked) == 1


def of_all(change):
    """A change of every run."""

    def twist(answers):
        for run in answers.runs:
            change(run)

    return twist


def tagged(**tags):
    """A change of the tags of the sweep's own run."""

    def twist(answers):
        (run,) = answers.of_kind("sweep")
        for tag in run["data"]["tags"]:
            tag["value"] = tags.get(tag["key"], tag["value"])

    return twist


TWISTS = {
    "an id that is a path": of_all(lambda run: run["info"].update(run_id="../../../home/.ssh")),
    "no id": of_all(lambda run: run["info"].pop("run_id")),
    "no info": of_all(lambda run: run.pop("info")),
    "no data": of_all(lambda run: run.pop("data")),
    "a time that is a text": of_all(lambda run: run["info"].update(start_time="x")),
    "no time": of_all(lambda run: run["info"].pop("start_time")),
    "a status of its own": of_all(lambda run: run["info"].update(status="EVIL")),
    "an experiment that is a path": of_all(lambda run: run["info"].update(experiment_id="../x")),
    "tags that are numbers": of_all(lambda run: run["data"].update(tags=[{"key": 1, "value": 2}])),
    "tags that are a text": of_all(lambda run: run["data"].update(tags="x")),
    "a name that is a path": tagged(sweep="../../home/.ssh"),
    "a name with a quote": tagged(sweep="a' or tags.kind = 'trial"),
    "experiments that are paths": lambda answers: answers.experiments[0].update(experiment_id="/"),
    "experiments that are a text": lambda answers: setattr(answers, "experiments", "x"),
    "experiments of numbers": lambda answers: setattr(answers, "experiments", [1, 2]),
}


@pytest.mark.parametrize("twist", some(TWISTS, "an id that is a path"))
def test_answers_that_are_none_are_named(world, report, twist):
    answers = Answers(world)
    TWISTS[twist](answers)
    with answering(answers) as (uri, _):
        report(uri)


WHOLES = {
    "a page": b"<html><script>alert(1)</script>\x1b[31m", "nothing": b"", "a list": [],
    "a text": "x", "a number": b"7", "a deep list": b"[" * 100_000, "no text": b"\xff\xfe",
    "half an object": b'{"runs": [{',
    "an error": {"error_code": "\x1b[31m", "message": "\x1b[31m<b>\n"},
    "a refusal": 403, "a failure": 500, "an error of another kind": 418,
}  # fmt: skip


@pytest.mark.parametrize("whole", some(WHOLES, "a page"))
@pytest.mark.parametrize(
    "of", some(["experiments/search", "runs/search", "runs/get", "artifacts"], "runs/search")
)
def test_whatever_a_server_answers_it_is_one_sentence(world, report, whole, of):
    answers = Answers(world)

    def answer(method, path, question):
        return WHOLES[whole] if of in path else answers(method, path, question)

    with answering(answer) as (uri, _):
        report(uri)


def test_pages_without_end_are_not_followed(world, report, monkeypatch):
    monkeypatch.setattr("tracking.store.MOST_PAGES", 5)
    answers = Answers(world)

    def answer(method, path, question):
        found = answers(method, path, question)
        more = {"next_page_token": "x"} if path.endswith("runs/search") else {}
        return {**found, **more} if isinstance(found, dict) else found

    with answering(answer) as (uri, _):
        code, said = report(uri)
    assert code == 2
    assert "more than 5 pages" in said


@pytest.mark.full
@pytest.mark.parametrize(
    "path", ["../../home/.ssh/authorized_keys", "/etc/cron.d/x", "..%2f..%2fx", "weights.parquet/x"]
)
def test_files_that_a_server_lists_elsewhere_are_not_put_there(world, report, path):
    answers = Answers(world)

    def answer(method, url, question):
        if url.endswith("/mlflow-artifacts/artifacts"):
            return {"files": [{"path": path, "is_dir": False}, {"path": path, "is_dir": True}]}
        return answers(method, url, question)

    with answering(answer) as (uri, _):
        report(uri)


@pytest.fixture
def served(world):
    """The address of a real server that has the runs of the folder."""
    world.sql("update runs set artifact_uri = 'mlflow-artifacts:/' || run_uuid || '/artifacts'")
    world.sql("update experiments set artifact_location = 'mlflow-artifacts:/'")
    uri = f"http://127.0.0.1:{free_port()}"
    server = start_server(uri, world.runs_dir)
    try:
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


@pytest.mark.full
def test_what_others_have_put_on_a_server_harms_nobody(world, served, report, tiny):
    """Everyone who may use the server can make such runs and experiments."""
    code, said = report(served)
    assert code == 0, said
    store = open_store(served)
    plan = read_plan(store, store.sweep_runs()["small"])
    theirs = store.client.create_experiment("theirs", artifact_location=f"file://{world.home}/.ssh")
    with world.untouched(world.runs_dir / "server.log"):
        with pytest.raises(InputError, match="where this machine writes and reads nothing"):
            store.open_experiment("theirs", world.root / "runs")
        with pytest.raises(InputError, match="where this machine writes and reads nothing"):
            SweepRun(store, theirs, plan, launched=1)
        with pytest.raises(InputError, match="where this machine writes and reads nothing"):
            recorder_of(store, theirs, job_of(tiny))
    world.tag(world.sweep_run, "sweep", "../../home/.ssh")
    code, said = report(served)
    assert code == 2
    assert "has no usable tag sweep" in said
