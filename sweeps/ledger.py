"""Which of a sweep's trials exist already, and the lock of the one driver that runs the others.

A trial exists if some MLflow run has its key, whichever sweep asked for it first. One driver at a
time works on a sweep. The lock is the operating system's, which releases it when a driver dies.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlflow.entities import Run

from gptcore.config import InputError
from sweeps.execution.checkpoints import with_checkpoint
from tracking.store import DONE, Store, trial_status
from tracking.tags import TrialStatus
from tracking.untrusted import check_no_link

EntryStatus = TrialStatus | Literal["cut off"]
"""Also `cut off`: the trial's run is RUNNING, and no driver works on it."""


@dataclass(frozen=True)
class Entry:
    """The state of one trial: its status, a note for the user, its MLflow run."""

    status: EntryStatus
    why: str  # what the user has to know about it; may be empty
    run: Run | None

    @property
    def is_done(self) -> bool:
        """Whether the trial has a result."""
        return self.status in DONE


def read_ledger(keys: Iterable[str], sweep: str, store: Store, runs_dir: Path) -> dict[str, Entry]:
    """Return the state of each trial, by key; `missing` for all where there is no store yet."""
    runs: dict[str, Run] = {}
    if store.address.exists:
        store.open()
        runs = store.trial_runs()
    held, kept = holder(runs_dir, sweep) is not None, with_checkpoint(runs_dir)
    return {key: _entry(runs.get(key), sweep, held, key in kept) for key in keys}


def _entry(run: Run | None, sweep: str, held: bool, has_checkpoint: bool) -> Entry:
    status: EntryStatus = trial_status(run)
    why = []
    if run is not None:
        of_sweep = run.data.tags.get("sweep", sweep)
        if of_sweep != sweep:
            why.append(f"run by sweep {of_sweep}")
        elif status == "running" and not held:
            status = "cut off"
        if run.data.tags.get("reason"):
            why.append(run.data.tags["reason"])
    if status not in DONE and has_checkpoint:
        why.append("continues from its checkpoint")
    elif status in ("stopped", "cut off"):
        why.append("has no checkpoint: starts from step 0")
    return Entry(status, "; ".join(why), run)


def to_redo(ledger: Mapping[str, Entry], wanted: Sequence[str]) -> list[str]:
    """Return the keys that --redo names: `all` that have a run, all that `failed`, or keys.

    Raises:
        InputError: a key is not of this sweep, or has no run yet.
    """
    with_run = [key for key, entry in ledger.items() if entry.run is not None]
    keys: dict[str, None] = {}
    for name in wanted:
        if name == "all":
            keys.update(dict.fromkeys(with_run))
        elif name == "failed":
            keys.update({key: None for key in with_run if ledger[key].status == "failed"})
        elif name in with_run:
            keys[name] = None
        elif name in ledger:
            raise InputError(f"--redo {name}: this trial has no run yet, leave it out")
        else:
            raise InputError(
                f"--redo takes all, failed, or keys of this sweep's trials, not {name!r}: "
                "--dry-run lists them"
            )
    return list(keys)


def _lock_file(runs_dir: Path, sweep: str) -> Path:
    return runs_dir / "locks" / f"{sweep}.json"


@contextmanager
def sweep_lock(runs_dir: Path, sweep: str) -> Iterator[None]:
    """Inside, this driver is the only one that works on the sweep.

    Raises:
        InputError: another driver works on it; the message says which.
    """
    file = _lock_file(runs_dir, sweep)
    file.parent.mkdir(parents=True, exist_ok=True)
    check_no_link(file, runs_dir)
    with file.open("a+", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                # None where another process only asked who holds the lock.
                if by := holder(runs_dir, sweep):
                    raise InputError(
                        f"sweep {sweep} is being run by {by}: wait for it, stop it, or take "
                        "another --name"
                    ) from error
        me = {
            "host": platform.node(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": shlex.join(sys.argv),
        }
        lock.truncate(0)
        lock.write(json.dumps(me))
        lock.flush()
        yield


def holder(runs_dir: Path, sweep: str) -> str | None:
    """Return the driver that works on the sweep now; None where none does."""
    try:
        lock = _lock_file(runs_dir, sweep).open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            return None
        try:
            by = json.load(lock)
        except json.JSONDecodeError:  # the driver has just started
            return "another process"
    return f"process {by['pid']} on {by['host']} since {by['since']}, {by['command']}"
