"""Real servers for a test."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from helpers.store import empty_database


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def start_server(uri: str, folder: Path) -> subprocess.Popen[bytes]:
    """A real MLflow server that answers at `uri` and keeps everything in a folder.

    It is a group of processes, to be ended by os.killpg.
    """
    if not (database := folder / "mlflow.db").exists():
        shutil.copyfile(empty_database(), database)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
        "--port", uri.rpartition(":")[2], "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while True:
        try:
            requests.get(f"{uri}/health", timeout=5).raise_for_status()
            return server
        except requests.RequestException:
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.5)
