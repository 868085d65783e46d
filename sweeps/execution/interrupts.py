"""Stop a sweep on a signal: Ctrl-C, the end of a time limit, a terminal that is closed."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from tracking.health import GO_ON

SHOW_CURSOR = b"\x1b[?25h"
"""The terminal's code that shows the cursor again, which a progress line has hidden."""


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The signals that stop a sweep: Ctrl-C; the end of a time limit; a terminal that is gone; and the
warning that Slurm's --signal sends before a time limit."""


class Interrupts:
    """What Ctrl-C and the other signals of STOPPING do while a driver works on a sweep.

    The first one raises KeyboardInterrupt. A second Ctrl-C or SIGTERM ends the process at once.
    Nothing is lost by that: every file on disk is complete, and the next driver ends the runs that
    are left open.
    """

    def __init__(self) -> None:
        self.has_come = False
        self._on_first: Callable[[], object] | None = None
        self._installed: list[int] = []

    def _receive(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if self.has_come:
            if number in (signal.SIGINT, signal.SIGTERM):
                _leave()
            return  # whatever sends a warning may repeat it
        self.has_come = True
        if self._on_first is None:
            raise KeyboardInterrupt
        self._on_first()

    def stop(self) -> None:
        """Stop as the first Ctrl-C does. Any thread may call it."""
        os.kill(os.getpid(), signal.SIGUSR1)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Inside, the signals are handled here."""
        # `nohup` has a command ignore SIGHUP, and it is to stay so.
        before = {
            number: signal.getsignal(number)
            for number in STOPPING
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
        }
        self._installed = list(before)
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Set the signal handlers. Call this again after Tune has set its own."""
        for number in self._installed:
            signal.signal(number, self._receive)

    @contextmanager
    def calling(self, first: Callable[[], object]) -> Iterator[None]:
        """Inside, the first signal calls `first` instead of raising KeyboardInterrupt."""
        if self.has_come:  # an import of Ray has swallowed the exception
            raise KeyboardInterrupt
        self._on_first = first
        try:
            yield
        finally:
            self._on_first = None

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Inside, the first signal is only noted. Raise KeyboardInterrupt afterwards if it came."""
        had_come, self._on_first = self.has_come, lambda: None
        try:
            yield
        finally:
            self._on_first = None
        if self.has_come and not had_come:
            raise KeyboardInterrupt


HANGUP_MILLISECONDS = 200
"""A terminal may send SIGHUP a moment before it closes."""


def _leave_terminal() -> None:
    """Write nothing more to a terminal that is gone: each attempt would be an error."""
    gone = select.poll()
    for stream in (1, 2):
        gone.register(stream, 0)  # errors are always reported
    broken = [stream for stream, _ in gone.poll(HANGUP_MILLISECONDS)]
    with Path(os.devnull).open("wb") as nowhere:
        for stream in broken:
            os.dup2(nowhere.fileno(), stream)


def _leave() -> NoReturn:
    """Kill all processes that this one has started, and end this one."""
    # Ray's agents outlive their raylet if it dies while they start.
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os.write(2, f"stopped at once: {GO_ON}\n".encode())
    if os.isatty(1):
        os.write(1, SHOW_CURSOR)
    os._exit(130)


def descendants(pid: int) -> list[int]:
    """List the processes that a process has started, and those that these have, from /proc."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(file.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]
