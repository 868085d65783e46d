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
from pathlib import Path

import torch

from gptcore.config import InputError
from gptcore.units import peak_memory, size
from tracking.health import GO_ON, causes, sqlite_code, store_fault
from tracking.store import StoreAddress


class Fault(Exception):
    """What ended a sweep though its input is good; says how to go on."""


def fault_of_sweep(error: BaseException, address: StoreAddress, runs_dir: Path) -> str | None:
    """Return the sentence for a fault that other trials would meet too; None for other errors."""
    if any(
        sqlite_code(cause) == sqlite3.SQLITE_FULL
        or (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        for cause in causes(error)
    ):
        return _full_disk(address, runs_dir)
    return store_fault(error, address.uri)


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


def _full_disk(address: StoreAddress, runs_dir: Path) -> str:
    places = [runs_dir, Path(tempfile.gettempdir())]
    if address.database:
        places.append(address.database.parent)
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
    # Not at the top: Ray takes seconds to import, and --debug needs none.
    from sweeps.execution.private_api import memory_here

    free, total = memory_here()
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
