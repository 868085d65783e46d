"""What other accounts of the machine can read, change and join: nothing of a sweep's.

A second account is a second user id, which only root can make.
"""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from gptcore.config import InputError, TrialConfig
from helpers.driving import kill, outcome, start, wait_for
from helpers.paths import ROOT
from helpers.trials import KILLED, TINY, flags
from sweeps.execution.ray_token import close_to_others, own_token
from sweeps.execution.resources import cluster_address
from sweeps.launch import main
from sweeps.presets import PRESETS
from tracking.access import is_shared, private_files, share, write_for
from tracking.address import store_address
from tracking.arguments import check_writable
from tracking.store import Store

OTHER = 12345
"""The user id of the other account."""

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can act as a second account: not root"
)


def open_to_others(*folders):
    """What in these folders, or they themselves, anyone but the owner can use, with its mode."""
    found = {
        place: place.lstat().st_mode for folder in folders for place in (folder, *folder.rglob("*"))
    }
    return {
        str(place): oct(mode) for place, mode in found.items()
        if stat.S_IMODE(mode) & 0o077 and not stat.S_ISLNK(mode)
    }  # fmt: skip


@pytest.fixture
def careless():
    """An account whose files everyone can write, unless a command says otherwise."""
    before = os.umask(0)
    yield
    assert os.umask(before) == 0, "a command has left its own umask behind"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that does not exist yet."""
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def debug(runs_dir, *more):
    tiny = flags(TrialConfig.from_flat(TINY))
    return main("doc", PRESETS, ["--debug", "--runs-dir", str(runs_dir), *tiny, *more])


def test_what_a_command_writes_is_for_its_account_alone(tmp_path, cache, careless):
    assert debug(tmp_path / "new" / "runs") == 0
    assert list((tmp_path / "new" / "runs" / "debug").rglob("*.parquet"))
    assert list(cache.glob("*.npy"))
    assert open_to_others(tmp_path / "new", cache) == {}


def test_share_opens_the_runs_folder_to_its_group_for_every_later_command(
    tmp_path, cache, careless
):
    runs_dir = tmp_path / "runs"
    assert debug(runs_dir) == 0  # private at first
    assert debug(runs_dir, "--share") == 0
    assert debug(runs_dir, "--init.seed", "7") == 0
    assert len(list((runs_dir / "debug").iterdir())) == 2
    Store(store_address(runs_dir)).open()
    for place in (runs_dir, *runs_dir.rglob("*")):
        wanted = 0o2770 if place.is_dir() else 0o660
        assert stat.S_IMODE(place.stat().st_mode) == wanted, place
    assert open_to_others(cache) == {}


def test_a_folder_that_its_owner_has_made_keeps_its_mode(tmp_path, cache, careless):
    (tmp_path / "runs").mkdir(mode=0o755)
    assert debug(tmp_path / "runs") == 0
    assert list(open_to_others(tmp_path / "runs")) == [str(tmp_path / "runs")]


@needs_root
def test_only_its_owner_can_share_a_folder(tmp_path):
    os.chown(tmp_path, OTHER, OTHER)
    with pytest.raises(InputError, match="belongs to another account, which alone can share it"):
        share(tmp_path)


def test_a_new_runs_folder_is_private_whatever_the_umask_was(tmp_path):
    """A job of Slurm makes it before the command does."""
    before = os.umask(0)
    try:
        check_writable(tmp_path / "runs")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "runs").stat().st_mode) == 0o700


def test_files_are_made_for_those_who_share_the_folder(tmp_path, careless):
    modes = []
    with private_files():
        for shared in (False, True):
            if shared:
                share(tmp_path)
            assert is_shared(tmp_path) is shared
            write_for(tmp_path)
            (tmp_path / f"{shared}").touch()
            modes.append(stat.S_IMODE((tmp_path / f"{shared}").stat().st_mode))
    assert modes == [0o600, 0o660]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_cache_that_others_can_write_is_refused(mode, cache, tmp_path, capsys):
    cache.mkdir()
    cache.chmod(mode)
    assert debug(tmp_path / "runs") == 2
    said = capsys.readouterr().err
    assert f"error: other accounts can write into the corpus cache {cache}: set GPTCORE_" in said
    assert not (tmp_path / "runs").exists()


@needs_root
def test_a_cache_of_another_account_is_refused(cache, tmp_path, capsys):
    cache.mkdir(mode=0o755)
    os.chown(cache, OTHER, OTHER)
    assert debug(tmp_path / "runs") == 2
    assert "other accounts can write into the corpus cache" in capsys.readouterr().err


@needs_root
def test_tokens_that_another_account_has_left_are_made_anew(cache, tmp_path):
    """In a cache that was open once, and is no longer."""
    assert debug(tmp_path / "runs") == 0
    (file,) = cache.iterdir()
    os.chown(file, OTHER, OTHER)
    assert debug(tmp_path / "runs") == 0
    assert file.stat().st_uid == 0


def test_a_cluster_is_joined_only_where_its_address_is_given(monkeypatch, tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where Ray would look, in place of /tmp
    for given, joined in {"": None, "local": None, "10.0.0.5:6379": "10.0.0.5:6379"}.items():
        monkeypatch.setenv("RAY_ADDRESS", given)
        assert cluster_address() == joined
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster_address() is None


def test_rays_own_token_is_there_while_ray_is(tmp_path, monkeypatch):
    given = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "t", "RAY_AUTH_TOKEN_PATH": "/cluster"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = os.umask(0)
    try:
        with own_token(tmp_path):
            file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
            assert file.parent == tmp_path
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert len(file.read_text()) == 64
            assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(os.environ)
    finally:
        os.umask(before)
    assert {name: os.environ[name] for name in given} == given


def test_a_token_that_others_can_read_is_closed_to_them(tmp_path):
    token = tmp_path / "auth_token"
    close_to_others(token)  # there is none
    token.write_text("0" * 64)
    token.chmod(0o644)
    close_to_others(token)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


@needs_root
def test_a_token_of_another_account_that_others_can_read_is_refused(tmp_path):
    token = tmp_path / "auth_token"
    token.write_text("0" * 64)
    token.chmod(0o644)
    os.chown(token, OTHER, OTHER)
    with pytest.raises(
        InputError, match=r"other accounts can use Ray's token, .*auth_token: RAY_A"
    ):
        close_to_others(token)
    assert stat.S_IMODE(token.stat().st_mode) == 0o644


def test_what_is_no_file_is_not_taken_for_a_token():
    before = Path(os.devnull).stat().st_mode
    close_to_others(Path(os.devnull))
    assert Path(os.devnull).stat().st_mode == before


ATTACKS = """
import json, os, socket, sys, urllib.error, urllib.request
from pathlib import Path
import grpc
os.environ["RAY_AUTH_MODE"] = "disabled"
from ray._raylet import GcsClient

METHODS = (
    "CoreWorkerService/NumPendingTasks", "NodeManagerService/GetResourceLoad",
    "NodeInfoGcsService/GetAllNodeInfo", "ObjectManagerService/Pull",
    "ReporterService/GetTraceback", "LogService/ListLogs",
)

def call(port, method):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=5)
            return "OK"
        except grpc.RpcError as error:
            return error.code().name

def http(port, path):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).read().decode()
    except urllib.error.HTTPError as error:
        return str(error.code)
    except Exception as error:
        return type(error).__name__

def gcs(port, token):
    os.environ.update(RAY_AUTH_MODE="token" if token else "disabled", RAY_AUTH_TOKEN=token)
    GcsClient(address=f"127.0.0.1:{port}")

def connect(path):
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(path)

def tried(function, *arguments):
    try:
        function(*arguments)
        return "done"
    except Exception as error:
        return type(error).__name__

def reached(folder):
    "Everything that can be read or written, and every folder that can be listed."
    found = []
    for place, folders, files in os.walk(folder):
        found += [place] if place != folder or os.access(place, os.W_OK) else []
        for file in (os.path.join(place, name) for name in files):
            found += [file for mode in ("rb", "r+b") if tried(open, file, mode) == "done"]
    return found

call(1, METHODS[0]), http(1, "/")  # all that they import is imported before the account changes
asked = json.loads(sys.stdin.readline())
os.setgroups([]), os.setgid(asked["other"]), os.setuid(asked["other"])
json.dump({
    "id": os.getresuid(),
    "reached": reached(asked["folder"]),
    "opened": {file: tried(open, file, "rb") for file in asked["files"]},
    "written": {folder: tried(Path(folder, "planted").touch) for folder in asked["closed"]},
    "sockets": {path: tried(connect, path) for path in asked["sockets"]},
    "calls": {port: [call(port, method) for method in METHODS] for port in asked["ports"]},
    "http": {port: http(port, "/") for port in asked["ports"]},
    "gcs": [tried(gcs, asked["gcs"], token) for token in ("", "0" * 64)],
}, sys.stdout)
"""


@pytest.fixture
def reachable():
    """A folder that every account can enter, of a short name; pytest's folders are private."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="p-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@needs_root
@pytest.mark.full
def test_another_account_gets_at_nothing_of_a_sweep_that_runs(reachable, monkeypatch):
    """A real sweep of one trial: it takes as long as Ray takes to start, train and end."""
    home, temporary, cache, runs_dir = (reachable / name for name in ("home", "t", "cache", "runs"))
    home.mkdir(mode=0o755)
    temporary.mkdir()
    temporary.chmod(0o1777)
    # What another account would leave in /tmp: the address of a cluster of its own.
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        (temporary / "ray").mkdir(mode=0o755)
        (temporary / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{trap.getsockname()[1]}")
        for planted in (temporary / "ray", temporary / "ray" / "ray_current_cluster"):
            os.chown(planted, OTHER, OTHER)
        monkeypatch.delenv("RAY_ADDRESS")
        attacker = subprocess.Popen(
            [sys.executable, "-c", ATTACKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=ROOT,
        )  # fmt: skip
        tiny = TrialConfig.from_flat({**KILLED, "train.steps": 2500})
        sweep = start(
            "init_sweep.py", runs_dir, "--name", "private", "--no-estimate", *flags(tiny),
            HOME=str(home), TMPDIR=str(temporary), GPTCORE_CACHE=str(cache),
        )  # fmt: skip
        try:
            wait_for(lambda: sweep.poll() is not None or list(runs_dir.glob("checkpoints/*.pt")))
            assert sweep.poll() is None, outcome(sweep)
            processes = [one := psutil.Process(sweep.pid), *one.children(recursive=True)]
            connections = [each for one in processes for each in one.net_connections("all")]
            listening = [each.laddr for each in connections if each.status == psutil.CONN_LISTEN]
            sockets = {each.laddr for each in connections if each.family == socket.AF_UNIX}
            commands = [" ".join(one.cmdline()) for one in processes]
            (folder,) = temporary.glob("gs-*")
            gcs = {match[1] for match in re.finditer(r"gcs[-_]address=[\d.]+:(\d+)", str(commands))}
            shared = {
                mapped.path for one in processes for mapped in one.memory_maps()
                if mapped.path.startswith("/dev/shm")
            }  # fmt: skip
            asked = {
                "other": OTHER,
                "folder": str(reachable),
                "files": [
                    str(folder / "token"), str(runs_dir / "mlflow.db"), *shared,
                    *(f"/proc/{one.pid}/environ" for one in processes),
                ],
                "closed": [str(place) for place in (runs_dir, cache, folder, home)],
                "sockets": sorted(filter(None, sockets)),
                "ports": sorted({address.port for address in listening}),
                "gcs": int(*gcs),
            }  # fmt: skip
            said, _ = attacker.communicate(json.dumps(asked) + "\n", timeout=120)
            token = (folder / "token").read_text()
            assert sweep.poll() is None, "the sweep ended before it was attacked"
            code, printed = outcome(sweep)
        finally:
            attacker.kill()
            kill(sweep)
        with pytest.raises(BlockingIOError):
            trap.accept()
    found = json.loads(said)
    print(json.dumps(found, indent=1))
    assert found["id"] == [OTHER] * 3
    # What the test itself has made for everyone, or in the other account's name, and no more.
    for_all = {home, temporary, temporary / "ray", temporary / "ray" / "ray_current_cluster"}
    assert set(found["reached"]) == set(map(str, for_all))
    assert set(found["opened"].values()) <= {"PermissionError", "FileNotFoundError"}
    assert found["opened"][str(folder / "token")] == "PermissionError"
    assert set(found["written"].values()) == {"PermissionError"}
    assert len(found["sockets"]) == 2
    assert set(found["sockets"].values()) == {"PermissionError"}
    assert {address.ip for address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    for port, answers in found["calls"].items():
        # Either a port of Ray's own protocol or one of HTTP; its numbers on itself are for all.
        if set(answers) == {"UNAVAILABLE"}:
            assert found["http"][port] == "401" or found["http"][port].startswith("# HELP "), port
        else:
            assert set(answers) <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, port
    refused = [
        answers.count("UNAUTHENTICATED") for answers in zip(*found["calls"].values(), strict=True)
    ]
    assert all(refused[:3]), "the driver and workers, the raylet and the GCS"
    assert found["gcs"] == ["AuthenticationError", "AuthenticationError"]
    assert token not in str(commands)
    assert code == 0, printed
    assert "Ray: this machine, " in printed
    assert (runs_dir / "reports" / "private" / "report.html").exists()
    assert set(open_to_others(reachable)) == {*map(str, for_all), str(reachable)}
    assert list(home.iterdir()) == []
    assert list(temporary.iterdir()) == [temporary / "ray"]
