"""What breaks, in a sentence with the numbers that explain it: a sweep's own faults, and a trial's.

A fault of the sweep is one that its next trial would meet as well, a full disk or a store that does
not answer: it ends the sweep. A fault of a trial ends that trial alone.
"""

from __future__ import annotations

import errno
import re
import shutil
import sqlite3
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import requests
import torch

from gptcore.config import InputError
from sweeps.units import peak_memory, size

GO_ON = "the same command goes on"

DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

LOOK_EVERY = 5.0
"""Seconds between looks at a tracking server."""


class Fault(Exception):
    """What ended a sweep though its input is good; says how to go on."""


def fault_of_sweep(error: BaseException, uri: str, runs_dir: Path) -> str | None:
    """The sentence for a fault that other trials would meet as well; None for any other error.

    `uri` is the tracking store's.
    """
    # Not at the top: a plan and --debug need neither.
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    causes = list(_causes(error))
    # What SQLite itself says, where it says so in a number.
    codes = {getattr(cause, "sqlite_errorcode", 0) & 0xFF for cause in causes}
    if sqlite3.SQLITE_FULL in codes or any(
        isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        for cause in causes
    ):
        return _full_disk(uri, runs_dir)
    if not isinstance(error, (MlflowException, requests.RequestException, SQLAlchemyError)):
        return None
    if getattr(error, "error_code", None) in (
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_DOES_NOT_EXIST",
    ):
        return None  # the store is well, and refuses what this trial wants of it
    said = _without_password(str(causes[-1]).strip().splitlines()[0])
    if uri.startswith(("http://", "https://")):
        return f"the tracking server at {_server(uri)} fails ({said}): once it works, {GO_ON}"
    file = _without_password(uri).removeprefix("sqlite:///")
    if codes & DAMAGE:
        return _damaged(file, said)
    return f"the database {file} cannot be used ({said}): once it can, {GO_ON}"


def has_lost_device(error: BaseException) -> bool:
    """Whether this process can use its GPU no more, whatever it is given to run there."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or str(error).startswith("CUDA error")


def fault_of_trial(error: BaseException) -> str:
    """The sentence for what a trial broke on."""
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory on the device: {text.splitlines()[0]}{_device_memory()}"
    # PyTorch's allocator for the CPU has no error of its own.
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"out of memory: {_host_allocation(text)}; {_host_memory()}"
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def check_database(file: Path) -> None:
    """Read a SQLite store from end to end, a tenth of a second for 100 MB. Raises InputError for a
    damaged one: MLflow would find out later, having written to it."""
    if file.stat().st_size == 0:
        raise InputError(_damaged(file, "it is empty"))
    with closing(sqlite3.connect(file, timeout=60)) as store:
        try:
            said = store.execute("pragma quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGE:
                raise InputError(_damaged(file, str(error))) from error
            raise InputError(f"the database {file} cannot be read: {error}") from error
    if said != "ok":
        raise InputError(_damaged(file, said.splitlines()[-1]))


def _without_password(text: str) -> str:
    return re.sub(r"//[^/\s@]*@", "//", text)


def _server(uri: str) -> str:
    return urllib.parse.urlsplit(_without_password(uri)).netloc


def _damaged(file: object, how: str) -> str:
    return (
        f"the database {file} is damaged ({how}): put a copy of it in its place, or move it away "
        "to begin anew"
    )


def answers_again(uri: str) -> bool:
    """Wait ten minutes at most for a tracking server; -> whether it answers. False of a file."""
    if not uri.startswith("http"):
        return False
    deadline = time.monotonic() + 600
    while not (answers := _answers(uri)) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY)
    return answers


def _answers(uri: str) -> bool:
    """Whether a tracking server does."""
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=LOOK_EVERY).raise_for_status()
    except requests.RequestException:
        return False
    return True


@contextmanager
def saying_when_away(uri: str, say: Callable[[str], object]) -> Iterator[None]:
    """Inside, say when a tracking server stops answering, and when it answers again."""
    if not uri.startswith("http"):
        yield
        return
    over, server = threading.Event(), f"the tracking server at {_server(uri)}"

    def watch() -> None:
        away = False
        while not over.wait(LOOK_EVERY):
            was_away, away = away, not _answers(uri)
            if away != was_away:
                say(
                    f"{server} does not answer: it is waited for"
                    if away
                    else f"{server} answers again"
                )

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _full_disk(uri: str, runs_dir: Path) -> str:
    places = [runs_dir, Path(tempfile.gettempdir())]
    if uri.startswith("sqlite:///"):
        places.append(Path(uri.removeprefix("sqlite:///")).parent)
    place = min(places, key=lambda folder: shutil.disk_usage(folder).free)
    usage = shutil.disk_usage(place)
    return (
        f"no room on the disk of {place} for what was to be written, {size(usage.free)} of "
        f"{size(usage.total)} are free: make room, then {GO_ON}"
    )


def _host_allocation(text: str) -> str:
    asked = re.search(r"tried to allocate (\d+) bytes", text)
    if asked:
        return f"{size(int(asked[1]))} in one piece were refused"
    return text.splitlines()[0] if text else "an allocation was refused"


def _host_memory() -> str:
    """What this process and its machine, or container, have."""
    # As Ray's memory monitor counts, containers and all.
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    total = int(get_system_memory())
    free = total - int(get_used_memory())
    return (
        f"this process held {size(peak_memory())} at most, the machine has {size(free)} of "
        f"{size(total)} free"
    )


def _device_memory() -> str:
    """What this process and its GPU have; empty where there is none."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    return (
        f"; PyTorch held {size(torch.cuda.max_memory_allocated())} at most, the device has "
        f"{size(free)} of {size(total)} free"
    )
