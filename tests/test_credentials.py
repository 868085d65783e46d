"""User and password of a store: split off its address, and in nothing that is kept or shown."""

import base64
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import requests

from helpers.driving import outcome, start
from helpers.paths import ROOT
from helpers.servers import free_port
from helpers.store import empty_database, open_store
from helpers.trials import TINY
from tracking.address import StoreAddress, mask_password, store_address, without_credentials
from tracking.server import PASSWORD_FILE, USER

ODD = "p@ss/w:rd#?%41\"' and=more&than;32+letters"


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """No user and no password are known; what a test makes known is forgotten."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    "password",
    [ODD, "simple", "a@b", "a/b", "a:b", "a#b", "a?b", "100%", "%zz", "ü", " ", "@", "a@b@c", "%"],
)
@pytest.mark.parametrize(
    "spelled", [str, lambda text: quote(text, safe="")], ids=["raw", "encoded"]
)
def test_any_password_is_split_off(password, spelled):
    for scheme in ("http", "https", "postgresql", "mysql+pymysql"):
        uri = f"{scheme}://me:{spelled(password)}@host:5000/a/b?c=d"
        address, found = without_credentials(uri)
        assert address == f"{scheme}://host:5000/a/b?c=d"
        assert found == {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": password}


def test_a_password_that_is_spelled_as_addresses_spell_it_is_taken_so():
    assert without_credentials("http://a%40b:c%41@h")[1] == {
        "MLFLOW_TRACKING_USERNAME": "a@b",
        "MLFLOW_TRACKING_PASSWORD": "cA",
    }
    assert without_credentials("http://me@h") == ("http://h", {"MLFLOW_TRACKING_USERNAME": "me"})
    for none in ("http://h:5000/a", "sqlite:///a.db", "databricks", "a@b"):
        assert without_credentials(none) == (none, {})


def test_the_address_of_a_store_holds_neither_user_nor_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{ODD}@host:5000")
    address = store_address(tmp_path)
    assert address.uri == os.environ["MLFLOW_TRACKING_URI"] == "http://host:5000"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == ODD
    assert store_address(tmp_path) == address  # again, as a command does
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == ODD
    assert (
        ODD
        not in f"{address!r}{address.masked}{address.mlflow_command(tmp_path, 's')}{vars(address)}"
    )
    assert ODD.encode() not in pickle.dumps(address)
    assert ODD not in mask_password(f"cannot connect to http://me:{ODD}@host")
    assert quote(ODD, safe="") not in mask_password(f"http://{quote(ODD, safe='')}")


def test_an_address_without_a_user_leaves_what_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "known")
    store_address(tmp_path)
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "known"


def test_a_database_is_connected_to_with_the_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql+psycopg://me:{ODD}@host/runs")
    address = store_address(tmp_path)
    assert address.uri == "postgresql+psycopg://host/runs"
    assert address.connection == f"postgresql+psycopg://me:{quote(ODD, safe='')}@host/runs"
    assert StoreAddress("sqlite:////a.db").connection == "sqlite:////a.db"
    assert StoreAddress("http://host").connection == "http://host"


@pytest.fixture
def guarded(tmp_path):
    """The HOST:PORT of a server that asks for the odd password."""
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_database().joinpath().read_bytes())
    secret = tmp_path / "password"
    secret.touch(mode=0o600)  # the server refuses one that others can read
    secret.write_text(ODD)
    address = f"127.0.0.1:{free_port()}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--app-name", "gpt-sweeps", "--workers", "1",
        "--host", "127.0.0.1", "--port", address.rpartition(":")[2],
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    known = {PASSWORD_FILE: str(secret), "PYTHONPATH": str(ROOT),
             "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **known}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            try:
                requests.get(f"http://{address}/health", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.3)
        secret.unlink()  # it is read once, and is not to be found below
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def spellings():
    """How the password may be written somewhere."""
    whole = f"{USER}:{ODD}".encode()
    texts = [ODD, quote(ODD, safe=""), quote(ODD), ODD.replace('"', '\\"'), repr(ODD)[1:-1]]
    return [text.encode() for text in texts] + [base64.b64encode(whole), ODD[:12].encode()]


def found_in(folder):
    """The files below a folder that hold the password."""
    found = []
    # Folders may vanish on the way.
    for file in [Path(at, name) for at, _, names in os.walk(folder) for name in names]:
        try:
            held = file.read_bytes() if file.is_file() else b""
        except OSError:
            continue
        found += [str(file)] * any(one in held for one in spellings())
    return found


@pytest.mark.full
@pytest.mark.parametrize("spelled", ["raw", "encoded"])
def test_a_guarded_server_is_opened_with_a_password_in_the_address(
    guarded, tmp_path, monkeypatch, spelled
):
    password = ODD if spelled == "raw" else quote(ODD, safe="")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{USER}:{password}@{guarded}")
    store = open_store(store_address(tmp_path).uri)
    assert store.open_experiment("a", tmp_path)


@pytest.mark.full
def test_nothing_that_a_sweep_leaves_shows_or_starts_has_the_password(
    guarded, tmp_path, tmp_path_factory
):
    session = Path("/tmp") / f"c{os.getpid()}"  # Ray's sockets take a short path
    session.mkdir(mode=0o700)
    runs_dir, seen = tmp_path / "runs", []
    knobs = {**TINY, "train.steps": 60}
    flags = [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
    try:
        driver = start(
            "init_sweep.py", runs_dir, "--name", "s", "--init.seed", "0", "1", *flags,
            MLFLOW_TRACKING_URI=f"http://{USER}:{ODD}@{guarded}", TMPDIR=str(session),
        )  # fmt: skip
        looks = 0
        while driver.poll() is None:
            listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, check=True)
            seen += [one for one in spellings() if one in listed.stdout]
            seen += found_in(session)
            looks += any("/session_" in at for at, *_ in os.walk(session))  # Ray's folder
            time.sleep(0.2)
        code, output = outcome(driver)
        assert code == 0, output
        assert looks > 5
        assert not seen, seen
        assert not any(one.decode() in output for one in spellings()), output
        left = found_in(tmp_path) + found_in(session) + found_in(os.environ["HOME"])
        assert not left, left
        assert (runs_dir / "reports" / "s" / "report.html").exists()
    finally:
        subprocess.run(["rm", "-rf", str(session)], check=True)
