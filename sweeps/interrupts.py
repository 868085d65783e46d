"""Ctrl-C: once stops cleanly, twice at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHOW_CURSOR = b"\x1b[?25h"
"""For the terminal whose cursor a progress line has hidden."""


@contextmanager
def two_presses() -> Iterator[None]:
    """Inside, the first Ctrl-C raises KeyboardInterrupt and the second leaves the process at once.

    Nothing is lost by that: all that is on disk is whole, Ray's processes end with their driver,
    and the next driver closes the runs that are left open.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            os.write(2, b"stopped at once: the same command goes on\n")
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            os._exit(130)
        pressed = True
        _first()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt() -> None:
    raise KeyboardInterrupt


_first: Callable[[], object] = _interrupt


@contextmanager
def on_interrupt(first: Callable[[], object]) -> Iterator[None]:
    """Inside, the first Ctrl-C calls `first` in place of raising KeyboardInterrupt."""
    global _first
    _first = first
    try:
        yield
    finally:
        _first = _interrupt
