"""Whether a tracking store is there and sound, and a sentence for what is wrong with it."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import requests

from gptcore.config import InputError
from tracking.address import StoreAddress, mask_password

GO_ON = "run the same command again to continue"

DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""SQLite's error codes for a file that is damaged."""

HEALTH_TIMEOUT = 5.0
"""Seconds that a tracking server may take to answer a health check."""
CHECK_EVERY = 5.0
"""Seconds between two health checks of a tracking server."""
PATIENCE = 600.0
"""How many seconds to wait for a tracking server that does not answer."""


def check_server(uri: str) -> None:
    """Raise requests.RequestException where a tracking server does not answer."""
    health = f"{uri.rstrip('/')}/health"
    requests.get(health, timeout=HEALTH_TIMEOUT).raise_for_status()


def server_answers(uri: str) -> bool:
    """Return whether a tracking server answers."""
    try:
        check_server(uri)
    except requests.RequestException:
        return False
    return True


def wait_for_server(uri: str, patience: float = PATIENCE) -> bool:
    """Wait up to `patience` seconds for a tracking server. Return whether it answers."""
    deadline = time.monotonic() + patience
    while not (answers := server_answers(uri)) and time.monotonic() < deadline:
        time.sleep(CHECK_EVERY)
    return answers


@contextmanager
def reporting_absence(address: StoreAddress, say: Callable[[str], object]) -> Iterator[None]:
    """Inside, say when a tracking server stops answering, and when it answers again.

    Args:
        address: of the server, or of a database, which is not watched.
        say: called with each sentence, from another thread.
    """
    if not address.is_server:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        away = False
        while not over.wait(CHECK_EVERY):
            was_away, away = away, not server_answers(address.uri)
            if away != was_away:
                say(
                    f"{address.server} does not answer: waiting for it"
                    if away
                    else f"{address.server} answers again"
                )

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def check_database(file: Path) -> None:
    """Check every page of an SQLite store, which takes a tenth of a second for 100 MB.

    Raises:
        InputError: the file is damaged or cannot be read. MLflow would find out only later, after
            it has written to the file.
    """
    if file.stat().st_size == 0:
        raise InputError(damaged(file, "it is empty"))
    with closing(sqlite3.connect(file, timeout=60)) as store:
        try:
            said = store.execute("pragma quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if sqlite_code(error) in DAMAGE:
                raise InputError(damaged(file, str(error))) from error
            raise InputError(f"the database {file} cannot be read: {error}") from error
    if said != "ok":
        raise InputError(damaged(file, said.splitlines()[-1]))


def damaged(file: object, how: str) -> str:
    """Return the sentence for a damaged SQLite store."""
    return (
        f"the database {file} is damaged ({how}): put a copy of it in its place, or move it away "
        "to start a new one"
    )


def sqlite_code(error: BaseException) -> int:
    """Return SQLite's primary error code; 0 for an error of anything else."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that it was raised from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def store_fault(error: BaseException, address: StoreAddress) -> str | None:
    """Return the sentence for a store that fails; None for an error of anything else.

    Args:
        error: what was raised.
        address: of the store.
    """
    # Not at the top: a plan and --debug need neither.
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if not isinstance(error, (MlflowException, requests.RequestException, SQLAlchemyError)):
        return None
    if getattr(error, "error_code", None) in (
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_DOES_NOT_EXIST",
    ):
        return None  # the store is well, and refuses what this trial asks of it
    chain = list(causes(error))
    why = mask_password(str(chain[-1]).strip().splitlines()[0])
    if address.is_server:
        return f"{address.server} fails ({why}): once it works, {GO_ON}"
    file = address.database or address.masked
    if any(sqlite_code(cause) in DAMAGE for cause in chain):
        return damaged(file, why)
    return f"the database {file} cannot be used ({why}): once it can, {GO_ON}"
