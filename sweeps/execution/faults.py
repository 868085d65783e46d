"""One sentence for each kind of error, with the numbers that explain it.

A fault of the sweep would break every other trial too, such as a full disk or a store that does not
answer: it ends the sweep. A fault of a trial ends only that trial.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path

import torch

from gptcore.config import InputError
from gptcore.units import peak_memory, size
from tracking.address import StoreAddress
from tracking.health import GO_ON, causes, sqlite_code, store_fault

AMPLE = 64 * 2**20
"""Bytes: a disk with so much room is not the one that is full."""


class Fault(Exception):
    """An error that ends a sweep although its input is good. Its text says how to continue."""


def fault_of_sweep(error: BaseException, address: StoreAddress, runs_dir: Path) -> str | None:
    """Return the sentence for a fault that other trials would meet too; None for other errors."""
    if any(
        sqlite_code(cause) == sqlite3.SQLITE_FULL
        or (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        for cause in causes(error)
    ):
        return _full_disk(address, runs_dir)
    return store_fault(error, address)


def has_lost_device(error: BaseException) -> bool:
    """Return whether this process can no longer use its GPU, for any trial."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or str(error).startswith("CUDA error")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of the device or of this machine did not suffice."""
    # PyTorch's allocator for the CPU raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(error)
    )


def fault_of_trial(error: BaseException) -> str:
    """Return the sentence for an error that ended a trial."""
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory on the device: {text.splitlines()[0]}{_device_memory()}"
    if is_out_of_memory(error):
        return f"out of memory: {_host_allocation(text)}; {_host_memory()}"
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _full_disk(address: StoreAddress, runs_dir: Path) -> str:
    wanted = [runs_dir, Path(tempfile.gettempdir())]
    if address.database:
        wanted.append(address.database.parent)
    places = [next(one for one in (place, *place.parents) if one.exists()) for place in wanted]
    place = min(places, key=lambda folder: shutil.disk_usage(folder).free)
    usage = shutil.disk_usage(place)
    if usage.free > AMPLE:
        try:
            os.write(sys.stdout.fileno(), b"\n")
        except OSError as error:
            return f"standard output cannot be written: {error.strerror}"
    return (
        f"the disk of {place} is full, {size(usage.free)} of {size(usage.total)} are free: make "
        f"room, then {GO_ON}"
    )


def _host_allocation(text: str) -> str:
    asked = re.search(r"tried to allocate (\d+) bytes", text)
    if asked:
        return f"an allocation of {size(int(asked[1]))} was refused"
    return text.splitlines()[0] if text else "an allocation was refused"


def _host_memory() -> str:
    """Say how much memory this process held and this machine, or container, has."""
    # Not at the top: Ray takes seconds to import, and --debug needs none.
    from sweeps.execution.private_api import memory_here

    free, total = memory_here()
    return (
        f"this process held at most {size(peak_memory())}, and {size(free)} of the machine's "
        f"{size(total)} are free"
    )


def _device_memory() -> str:
    """Say how much of its GPU's memory this process held; empty without a GPU."""
    if not torch.cuda.is_available():
        return ""
    free, total = map(size, torch.cuda.mem_get_info())
    held = size(torch.cuda.max_memory_allocated())
    return f"; PyTorch held at most {held}, and {free} of the device's {total} are free"
