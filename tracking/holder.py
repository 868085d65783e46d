"""Which process works on a sweep, for people, and for processes that want to know if it still does.

Importing this module does not import MLflow.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The driver that works on a sweep, as its lock in the runs folder and its lease say."""

    host: str
    user: str
    pid: int
    since: str  # by the host's own clock, for people
    command: str
    machine: str  # tells machines apart, and containers on one
    started: str  # tells processes with the same number apart
    renewal: int = 0  # how often the lease was renewed

    @classmethod
    def here(cls) -> Holder:
        """Return this process."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # an account without a name
            user = str(os.getuid())
        return cls(
            host=platform.node(),
            user=user,
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            command=shlex.join(sys.argv)[:500],
            machine=_machine(),
            started=_started(os.getpid()),
        )

    @classmethod
    def from_json(cls, text: str | None) -> Holder | None:
        """Read what to_json gave; None for anything else."""
        try:
            return cls(**json.loads(text or ""))
        except (TypeError, ValueError):
            return None

    def to_json(self) -> str:
        """Return it as a JSON text."""
        return json.dumps(asdict(self))

    @property
    def is_here(self) -> bool:
        """Whether the driver works on this machine, so that its end can be seen."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def has_ended(self) -> bool:
        """Whether the driver is known to have ended. On another machine nothing is known."""
        return self.is_here and _started(self.pid) != self.started

    def __str__(self) -> str:
        return (
            f"process {self.pid} on {self.host} (user {self.user}) since {self.since}, "
            f"{self.command}"
        )


def _machine() -> str:
    """Return what tells this machine, and this container, from others; empty if nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process of this machine was started, in ticks since boot; empty if it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
