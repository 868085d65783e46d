"""Which of a sweep's trials exist already, and the lock of the one driver that runs the others.

A trial exists if some MLflow run has its key, whichever sweep asked for it first. One driver at a
time works on a sweep. The lock is the operating system's, which releases it when a driver dies. In
a store that several runs folders share, the sweep has a lease as well (tracking/lease.py).
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlflow.entities import Run
from rich.console import Console
from rich.table import Column, Table

from gptcore.config import KEY_LENGTH, InputError, spelling
from gptcore.units import counted
from sweeps.execution.checkpoints import with_checkpoint
from sweeps.plan import Plan
from tracking.holder import Holder
from tracking.lease import SECONDS_BETWEEN_LOOKS, holder_of
from tracking.store import DONE, Store, trial_status
from tracking.tags import TrialStatus, say_incomplete
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
    held, kept = holder(runs_dir, sweep, store) is not None, with_checkpoint(runs_dir)
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
def sweep_lock(
    runs_dir: Path, sweep: str, *, wait: bool = False, say: Callable[[str], object] = print
) -> Iterator[None]:
    """Inside, this driver is the only one with this runs folder that works on the sweep.

    Args:
        runs_dir: the runs folder.
        sweep: the name of the sweep.
        wait: whether to wait for a driver that works on it.
        say: called with a sentence where this process has to wait.

    Raises:
        InputError: another driver works on it, and the message says which; or the folder's file
            system has no locks.
    """
    file = _lock_file(runs_dir, sweep)
    file.parent.mkdir(parents=True, exist_ok=True)
    check_no_link(file, runs_dir)
    has_said = False
    with file.open("a+", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                # None where another process only asked who holds the lock.
                by = _lock_holder(runs_dir, sweep)
                if by and not wait:
                    raise InputError(
                        f"sweep {sweep} is being run by {by}: wait for it (--wait), stop it, or "
                        "take another --name"
                    ) from error
                if by and not has_said:
                    has_said = True
                    say(f"sweep {sweep} is being run by {by}: waiting for it")
                time.sleep(SECONDS_BETWEEN_LOOKS if by else 0)
            except OSError as error:
                raise InputError(
                    f"--runs-dir {runs_dir} is on a file system without file locks "
                    f"({error.strerror}): take another folder"
                ) from error
        lock.truncate(0)
        lock.write(Holder.here().to_json())
        lock.flush()
        yield


def holder(runs_dir: Path, sweep: str, store: Store) -> str | None:
    """Return the driver that works on the sweep, by the folder's lock or by the store's lease."""
    if by := _lock_holder(runs_dir, sweep):
        return by
    if store.address.is_of(runs_dir) or not store.address.exists:
        return None
    sweep_run = store.sweep_runs().get(sweep)
    return holder_of(store, sweep_run) if sweep_run else None


def _lock_holder(runs_dir: Path, sweep: str) -> str | None:
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
        return str(Holder.from_json(lock.read()) or "another process")  # one that has just started


def say_how_far(
    plan: Plan,
    ledger: Mapping[str, Entry],
    again: Sequence[str],
    store: Store,
    console: Console,
) -> None:
    """Say how many trials of the plan are done and missing, and which runs cannot be read."""
    for run in store.incomplete.values():
        console.print(f"NOTE: {say_incomplete(run)}", style="bold", soft_wrap=True)
    done = sum(entry.is_done and key not in again for key, entry in ledger.items())
    trials, missing = counted(len(ledger), "trial"), len(ledger) - done
    line = f"sweep {plan.name}: {trials}, {done} done, {missing} missing"
    console.print(line + (f", {len(again)} of them to be run again" if again else ""))


def trial_table(plan: Plan, ledger: Mapping[str, Entry], again: Sequence[str] = ()) -> Table:
    """Return a table of a plan's trials: what they vary, and what became of each."""
    varied = plan.varied()
    has_reasons = any(entry.why for entry in ledger.values()) or bool(again)
    table = Table(Column("trial", no_wrap=True, min_width=KEY_LENGTH))
    for column in (*varied, "status", *(["why"] if has_reasons else [])):
        table.add_column(column, overflow="fold")  # cut, a value could not be told from another
    for key, config in plan.trials.items():
        flat, entry = config.to_flat(), ledger[key]
        why = "; ".join(filter(None, ["to be run again" if key in again else "", entry.why]))
        row = [key, *(spelling(flat[knob]) for knob in varied), entry.status]
        table.add_row(*row, *([why] if has_reasons else []))
    return table
