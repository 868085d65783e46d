"""MLflow's pages behind links that open once: a real server, asked by those who have one or not."""

import html
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.parse
from contextlib import contextmanager

import psutil
import pytest
import requests

from gptcore.config import InputError
from helpers.driving import wait_for
from helpers.paths import ROOT, SCREENSHOTS
from helpers.servers import free_port
from helpers.store import store_in
from tracking.address import StoreAddress, chart_path
from tracking.pages import ALLOWED, listen, main, page_of

API = "ajax-api/2.0/mlflow"


@contextmanager
def serving(runs_dir, *arguments):
    """The process of the command, and a function that returns the links printed so far."""
    log = runs_dir.parent / "pages.log"
    with log.open("w") as opened:
        server = subprocess.Popen(
            [sys.executable, "-m", "tracking.pages", "--runs-dir", str(runs_dir), *arguments],
            cwd=ROOT, stdout=opened, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def links():
        return re.findall(r"^  (http://\S+)$", log.read_text(), re.M)

    try:
        wait_for(lambda: links() or server.poll() is not None, 120)
        assert server.poll() is None, log.read_text()
        yield server, links
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()


def make_runs(runs_dir):
    """The id of the own run, which has one file, of the sweep `small` in a runs folder."""
    runs_dir.mkdir()
    store = store_in(runs_dir)
    experiment = store.open_experiment("small", runs_dir)
    tags = {"kind": "sweep", "sweep": "small", "launched": "1.0"}
    run_id = store.client.create_run(experiment, tags=tags).info.run_id
    store.client.log_text(run_id, "a note", "note.txt")
    return run_id


class Visitor(requests.Session):
    """Somebody who asks one server. What it says is a status and a text."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def ask(self, path, method="GET", **more):
        answer = self.request(method, self.base + path, timeout=30, **more)
        return answer.status_code, answer.text


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The links of a server, a visitor that has opened one, and the id of the run."""
    runs_dir = tmp_path_factory.mktemp("pages") / "runs"
    run_id = make_runs(runs_dir)
    with serving(runs_dir) as (server, links):
        link = links()[0]
        visitor = Visitor(link.partition("open?")[0])
        assert visitor.get(link, timeout=30).status_code == 200
        yield {"server": server, "links": links, "visitor": visitor, "run": run_id,
               "runs_dir": runs_dir}  # fmt: skip


@pytest.fixture
def visitor(served):
    return served["visitor"]


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """A server of a folder that was moved, at a port that was asked for; as `served`."""
    made = tmp_path_factory.mktemp("another")
    run_id = make_runs(made / "runs")
    runs_dir = (made / "runs").rename(made / "moved")
    port, begun = free_port(), time.monotonic()
    with serving(runs_dir, "--port", str(port), "--name", "small") as (server, links):
        print(f"the link was there after {time.monotonic() - begun:.1f} s")
        visitor = Visitor(links()[0].partition("open?")[0])
        yield {"server": server, "links": links, "visitor": visitor, "run": run_id, "port": port}


def test_a_link_opens_once_and_the_next_one_is_printed(served):
    links = served["links"]
    last = links()[-1]
    count = len(links())
    opened = requests.get(last, timeout=30)
    assert opened.status_code == 200
    folder = urllib.parse.urlsplit(last).path.removesuffix("open")
    assert html.escape(f"{folder}{chart_path('1')}") in opened.text
    cookie = opened.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert f"Path={folder};" in cookie  # not sent to other ports, which other accounts may have
    again = requests.get(last, timeout=30)
    assert again.status_code == 401
    assert "each link opens only once" in again.text
    assert "Set-Cookie" not in again.headers
    wait_for(lambda: len(links()) == count + 1)
    assert requests.get(links()[-1], timeout=30).status_code == 200


def test_who_has_opened_one_may_open_it_again_and_spends_none(served, visitor):
    count = len(served["links"]())
    assert visitor.ask(f"open?token={'x' * 43}")[0] == 200
    assert len(served["links"]()) == count


@pytest.mark.parametrize(
    "path",
    ["", "static-files/main.js", "version", "health", "graphql", "get-artifact?path=note.txt",
     f"{API}/experiments/search", "api/2.0/mlflow/experiments/search", "open", "open?token=",
     "open?token=x", "open?token=%C3%A4", "../", "../health", "../version", "../open"],
)  # fmt: skip
@pytest.mark.parametrize("cookie", ["", "gpt-sweeps=", "gpt-sweeps=x", "gpt-sweeps=ä".encode()])
def test_who_has_opened_none_sees_nothing(visitor, path, cookie):
    answer = requests.get(visitor.base + path, headers={"Cookie": cookie}, timeout=30)
    assert answer.status_code == 401
    assert "need the link" in answer.text


def test_a_link_of_another_start_opens_nothing(visitor, another):
    theirs = urllib.parse.urlsplit(another["links"]()[0])
    for place in (f"open?{theirs.query}", f"{theirs.path}?{theirs.query}"):
        answer = requests.get(urllib.parse.urljoin(visitor.base, place), timeout=30)
        assert answer.status_code == 401


def test_a_folder_that_was_moved_shows_its_files(another):
    visitor = another["visitor"]
    visitor.get(another["links"]()[-1], timeout=30)
    assert visitor.ask(f"get-artifact?run_id={another['run']}&path=note.txt") == (200, "a note")


def test_it_is_at_the_port_that_was_asked_for_which_is_then_taken(another):
    port = another["port"]
    assert another["links"]()[0].startswith(f"http://127.0.0.1:{port}/")
    with pytest.raises(InputError, match=f"--port {port} cannot be used .*: give another one"):
        listen(port)


def test_it_listens_on_loopback_alone_and_its_secrets_are_not_among_the_processes(served):
    process = psutil.Process(served["server"].pid)
    assert process.children() == []
    listening = [one.laddr.ip for one in process.net_connections("inet") if one.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    for link in served["links"]():
        secret = link.partition("token=")[2]
        assert secret not in " ".join(process.cmdline())
        assert secret not in str(process.environ())


@pytest.mark.parametrize(
    ("host", "status"),
    [("elsewhere.example:5000", 403), ("127.0.0.1.elsewhere.example", 403), ("10.0.0.1:5000", 403),
     ("127.0.0.1:5000", 200), ("localhost:80", 200), ("localhost", 200)],
)  # fmt: skip
def test_a_name_that_was_made_to_point_here_is_refused(visitor, host, status):
    """Own names are right with every port: a tunnel may have another one at its other end."""
    cookie = "; ".join(f"{one.name}={one.value}" for one in visitor.cookies)
    answer = requests.get(
        f"{visitor.base}version", headers={"Host": host, "Cookie": cookie}, timeout=30
    )
    assert answer.status_code == status
    assert status == 200 or answer.text == "these pages are at 127.0.0.1 alone\n"


@pytest.mark.parametrize("origin", ["http://127.0.0.1:1", "http://elsewhere.example", "null"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_others_cannot_use_a_browser_that_has_opened_one(visitor, origin, method):
    """MLflow itself trusts every page of this machine, whoever serves it."""
    status, said = visitor.ask(f"{API}/experiments/search", method, headers={"Origin": origin})
    assert (status, said) == (403, "a page of another site asked for this\n")


def test_its_own_pages_look_and_tidy_up(served, visitor):
    origin = {"Origin": visitor.base[: visitor.base.index("/", 7)]}
    answer = visitor.ask("")
    assert answer[0] == 200
    assert "static-files/" in answer[1]
    run = {"run_id": served["run"], "key": "note", "value": "looked at"}
    assert visitor.ask(f"{API}/runs/set-tag", "POST", json=run, headers=origin)[0] == 200
    assert "looked at" in visitor.ask(f"{API}/runs/get?run_id={served['run']}")[1]
    assert visitor.ask(f"get-artifact?run_id={served['run']}&path=note.txt") == (200, "a note")
    assert "note.txt" in visitor.ask(f"{API}/artifacts/list?run_id={served['run']}")[1]


@pytest.mark.parametrize(
    ("path", "method", "asked"),
    [
        (f"{API}/experiments/create", "POST", {"name": "x", "artifact_location": "file:///etc"}),
        (f"{API}/runs/create", "POST", {"experiment_id": "0"}),
        (f"{API}/runs/log-batch", "POST", {}),
        (f"{API}/model-versions/create", "POST", {"name": "x", "source": "file:///etc"}),
        (f"{API}/logged-models", "POST", {"experiment_id": "0"}),
        (f"{API}/upload-artifact?path=x", "POST", {}),
        (f"{API}/gateway-proxy", "POST", {}),
        (f"{API}/webhooks", "POST", {}),
        ("api/2.0/mlflow-artifacts/artifacts/x", "PUT", {}),
        ("api/2.0/mlflow-artifacts/artifacts/x", "GET", {}),
        ("ajax-api/3.0/mlflow/assistant/message", "POST", {"message": "id"}),
        ("model-versions/get-artifact?name=x&version=1&path=passwd", "GET", None),
        (f"{API}/get-trace-artifact?request_id=x&path=passwd", "GET", None),
        (f"{API}/logged-models/x/artifacts/files?artifact_file_path=passwd", "GET", None),
        (f"/{API}/experiments/create", "POST", {"name": "x"}),
        (f"static-files/%2e%2e/{API}/experiments/create", "POST", {"name": "x"}),
    ],
)
def test_what_could_reach_other_files_and_machines_is_refused(visitor, path, method, asked):
    status, said = visitor.ask(path, method, json=asked)
    assert status == 403
    assert "these pages rename, tag, delete and restore runs and experiments" in said


def test_only_files_of_runs_are_shown(served, visitor, tmp_path):
    """A database and a folder made by somebody else, who wants the pages to show other files."""
    (tmp_path / "secret").write_text("a secret")
    run, artifacts = served["run"], served["runs_dir"] / "artifacts"
    shown = artifacts / run / "artifacts"
    (shown / "link").symlink_to(tmp_path / "secret")
    (shown / "linked").symlink_to(tmp_path)
    (artifacts / "0linked").symlink_to(tmp_path)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "secret").write_text("a secret")
    hostile = {"0far": f"file://{tmp_path}", "0linked": "", f"../../../{tmp_path.name}": ""}
    hostile |= {"0proxied": "mlflow-artifacts:/", "0path": "/etc"}
    database = sqlite3.connect(served["runs_dir"] / "mlflow.db")
    names = [row[1] for row in database.execute("pragma table_info(runs)")]
    for name, uri in hostile.items():
        row = dict(zip(names, database.execute("select * from runs").fetchone(), strict=True))
        row |= {"run_uuid": name, "artifact_uri": uri}
        database.execute(f"insert into runs values ({','.join('?' * len(row))})", [*row.values()])
    # Where MLflow itself would look.
    database.execute("update runs set artifact_uri = ? where run_uuid = ?", ["file:///etc", run])
    database.commit()
    database.close()
    for name in (run, *hostile):
        for path in ("secret", "link", "linked/secret", "passwd", "../mlflow.db", "/etc/passwd",
                     "..%2F..%2F..%2Fmlflow.db", "%252e%252e/mlflow.db",
                     "file:///etc/passwd"):  # fmt: skip
            status, said = visitor.ask(f"get-artifact?run_id={name}&path={path}")
            assert status >= 400, (name, path, said)
        for path in ("", "..", "linked"):
            status, said = visitor.ask(f"{API}/artifacts/list?run_id={name}&path={path}")
            assert not re.search(r"passwd|secret|mlflow\.db", said), (name, path, said)
    assert visitor.ask(f"get-artifact?run_id={run}&path=note.txt") == (200, "a note")


def test_a_sweep_that_was_renamed_in_mlflow_is_found(tmp_path):
    make_runs(tmp_path / "runs")
    store = store_in(tmp_path / "runs")
    store.client.rename_experiment("1", "other")
    assert page_of(store.address, ["small"]) == page_of(store.address, []) == chart_path("1")


REFUSED = {
    "no store": ([], "there is no sweep yet: "),
    "no such sweep": (["--name", "smal"], "there is no sweep smal: did you mean small?"),
    "no such port": (["--port", "65536"], "a port is a number from 0 to 65535, not '65536'"),
    "a word for a port": (["--port", "http"], "a port is a number from 0 to 65535, not 'http'"),
    "a port that is taken": ([], "give another one, or none for a free one"),
    "two names": (["--name", "a", "b"], "unrecognized arguments: b"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_serve_is_one_sentence(why, tmp_path, capsys):
    given, sentence = REFUSED[why]
    runs_dir = tmp_path / "runs"
    if why != "no store":
        make_runs(runs_dir)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if why == "a port that is taken":
            given = ["--port", str(taken.getsockname()[1])]
        assert main(["--runs-dir", str(runs_dir), *given]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert why != "no store" or not runs_dir.exists()


def test_a_tracking_server_has_pages_of_its_own():
    with pytest.raises(InputError, match=r"the tracking server at h:5000, .* open http://h:5000"):
        page_of(StoreAddress("http://h:5000"), [])


def test_nothing_that_makes_or_uploads_is_allowed():
    """Of all that MLflow's server answers, what is allowed is named here: a new name is seen."""
    # In a process of its own: MLflow takes one that has it for a server.
    code = (
        "from mlflow.server import app\n"
        "for rule in app.url_map.iter_rules():\n"
        "    for method in rule.methods: print(method, rule.rule)\n"
    )
    every = subprocess.check_output(
        [sys.executable, "-c", code], text=True, cwd=ROOT, env={**os.environ}
    ).splitlines()
    changing = {line for line in every if ALLOWED.fullmatch(line) and not line.startswith("GET")}
    assert {line.rpartition("mlflow/")[2] for line in changing} == {
        "POST /graphql", "experiments/search", "runs/search", "logged-models/search",
        "traces/search", "experiments/search-datasets", "experiments/update",
        "experiments/delete", "experiments/restore", "experiments/set-experiment-tag",
        "experiments/delete-experiment-tag", "runs/update", "runs/delete", "runs/restore",
        "runs/set-tag", "runs/delete-tag",
    }  # fmt: skip


@pytest.mark.browser
def test_a_browser_opens_the_link_and_sees_the_charts_of_the_sweep(finished_sweep, page):
    page.set_viewport_size({"width": 1900, "height": 1100})
    refused = []
    page.on("response", lambda got: refused.append(got.url) if got.status in (401, 403) else None)
    with serving(finished_sweep, "--name", "small") as (_, links):
        page.goto(links()[0])
        page.get_by_text("What the claims are about").wait_for(timeout=60_000)
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length >= 4")
        page.get_by_text("loss/val").first.wait_for(timeout=30_000)
        assert "token" not in page.url
        assert page.evaluate("document.cookie") == ""  # no script can read it
        SCREENSHOTS.mkdir(exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "pages.png")
        text = page.inner_text("body")
        assert "matching runs" in text
        assert "Model registry" in text
        assert "Prompts" not in text
    print("not allowed:", *sorted({url.partition("/ajax-api")[2] for url in refused}))
