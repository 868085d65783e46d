"""Commands of sweeps/ as a user runs them, in processes of their own, and their workers."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.paths import ROOT


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
    return found


def start(
    script: str, runs_dir: Path, *arguments: str, **environment: str
) -> subprocess.Popen[str]:
    """A command of sweeps/, under way in another folder than the checkout, as a user may stand in.

    It is a group of processes of its own.
    """
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sweeps" / script), "--runs-dir", runs_dir.name, *arguments],
        cwd=runs_dir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def outcome(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str]:
    """The exit code of a command, which ends within so many seconds, and what it has printed."""
    output, _ = process.communicate(timeout=seconds)
    assert "Traceback" not in output, output
    return process.returncode, output


def workers() -> list[int]:
    """Process ids of our own Ray workers in the middle of a trial."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title, environment = (
                (process / name).read_bytes().decode(errors="replace")
                for name in ("cmdline", "environ")
            )
        except OSError:
            continue
        if title.startswith("ray::ImplicitFunc") and f"HOME={os.environ['HOME']}\0" in environment:
            found.append(int(process.name))
    return found


def running_in(space: str, but: str) -> list[str]:
    """Command lines of what runs in a network namespace, without those that match a pattern."""
    import psutil

    inode = Path(f"/run/netns/{space}").stat().st_ino
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            inside = Path(f"/proc/{process.pid}/ns/net").stat().st_ino == inode
        except OSError:
            continue
        line = " ".join(process.info["cmdline"] or ())
        if inside and line and not re.search(but, line):
            found.append(line[:150])
    return found


def kill_worker() -> int:
    """Kill a worker in the middle of a trial as soon as there is one, and see it gone."""
    victim = wait_for(workers)[0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: victim not in workers())
    return victim


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a driver, and wait for its workers, which outlive it for a moment and save."""
    process.kill()
    process.communicate()
    wait_for(lambda: not workers(), seconds=120)
