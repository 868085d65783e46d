"""Ctrl-C: pressed once it stops a sweep cleanly, pressed twice at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from tracking.health import GO_ON

SHOW_CURSOR = b"\x1b[?25h"
"""The terminal's code that shows the cursor again, which a progress line has hidden."""


class CtrlC:
    """What Ctrl-C does while a driver works on a sweep.

    The first press raises KeyboardInterrupt, and the second ends the process at once. Nothing is
    lost by that: every file on disk is complete, and the next driver ends the runs that are left
    open.
    """

    def __init__(self) -> None:
        self._is_pressed = False
        self._on_first: Callable[[], object] | None = None

    def _press(self, *_: object) -> None:
        if self._is_pressed:
            _leave()
        self._is_pressed = True
        if self._on_first is None:
            raise KeyboardInterrupt
        self._on_first()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Inside, Ctrl-C is handled here."""
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def calling(self, first: Callable[[], object]) -> Iterator[None]:
        """Inside, the first press calls `first` instead of raising KeyboardInterrupt."""
        if self._is_pressed:  # an import of Ray has swallowed the exception
            raise KeyboardInterrupt
        self._on_first = first
        try:
            yield
        finally:
            self._on_first = None


def _leave() -> NoReturn:
    """Kill all processes that this one has started, and end this one."""
    # Ray's agents outlive their raylet if it dies while they start.
    for pid in _descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os.write(2, f"stopped at once: {GO_ON}\n".encode())
    if os.isatty(1):
        os.write(1, SHOW_CURSOR)
    os._exit(130)


def _descendants(pid: int) -> list[int]:
    """List the processes that a process has started, and those that these have, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]
