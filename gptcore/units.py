"""Times and sizes in units that people read, and the memory of this process."""

from __future__ import annotations

import resource
import sys


def clock(seconds: float) -> str:
    """Format a duration: `1:05:09 h`, or `5:09 min` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 trial`, `2 trials`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def peak_memory() -> int:
    """Return the largest amount of memory that this process has used so far, in bytes."""
    # The operating system counts in kB, but macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def size(count: float) -> str:
    """Format a number of bytes: `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
