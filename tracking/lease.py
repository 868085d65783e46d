"""Leases: who works on a sweep, and on a trial, kept where the runs are recorded.

A runs folder has the locks of the operating system (sweeps/ledger.py). A store that several folders
share has none. So each driver writes there that it works on a sweep, and renews that every few
seconds.

MLflow decides only one thing between two processes that ask at the same time: the value of a param,
which cannot be changed later. So the n-th owner of a run is the value of its param `owner.n`, and
whoever writes it first owns the run. Two processes may also make a run for the same sweep or trial
at the same time. A process lists the runs after it has made its own, so at least one of the two
sees both, and whoever works has to own all that it sees.

Clocks of different machines are never compared. A lease has run out when a process that watches it
has seen no renewal for SECONDS_TO_EXPIRE of its own clock.

This is one file because the leases of sweeps and of trials follow the same rules.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from gptcore.config import InputError
from tracking.health import server_answers
from tracking.holder import Holder
from tracking.store import DONE, MADE_BY, Store, delete_twins, set_aside, trial_status

SECONDS_TO_RENEW = 5.0
"""How often a driver renews its lease."""
SECONDS_TO_EXPIRE = 60.0
"""A lease that is not renewed for so long is free. Before that, Ray has ended the workers of a
machine that is cut off."""
SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_PAUSE = 10.0
"""After a longer pause between two looks, a lease is watched from the beginning."""
NOBODY = "nobody"
"""The owner of a run that its last owner has released."""


@dataclass(frozen=True)
class Claim:
    """The latest owner of a run, and how many there have been."""

    number: int  # 0 for a run that nobody has owned
    owner: str


def latest_claim(run: Run) -> Claim:
    """Return who owns a run."""
    numbers = [
        int(name.removeprefix("owner.")) for name in run.data.params if OWNER.fullmatch(name)
    ]
    number = max(numbers, default=0)
    return Claim(number, run.data.params.get(f"owner.{number}", ""))


OWNER = re.compile(r"owner\.[0-9]{1,9}")


def _holder(sweep_run: Run, number: int) -> Holder | None:
    """Return the driver that is the n-th owner of a sweep; None before it has said so."""
    return Holder.from_json(sweep_run.data.tags.get(f"lease.{number}"))


class Watch:
    """Notices leases that are not renewed, by the clock of this process."""

    def __init__(self) -> None:
        # By sweep run and owner: the tag, since when it is the same, and when it was last read.
        self._seen: dict[tuple[str, int], tuple[str | None, float, float]] = {}
        self.has_seen_renewal = False

    def has_run_out(self, sweep_run: Run, number: int) -> bool:
        """Return whether a lease is free: its driver has ended, or has not renewed it in time.

        Args:
            sweep_run: the sweep's own run, as it is now.
            number: of its owner.
        """
        text = sweep_run.data.tags.get(f"lease.{number}")
        holder = Holder.from_json(text)
        if holder and holder.has_ended:
            return True
        key, now = (sweep_run.info.run_id, number), time.monotonic()
        before, since, looked = self._seen.get(key, (text, now, now))
        if before != text:
            self.has_seen_renewal, since = True, now
        if now - looked > LONGEST_PAUSE:
            since = now  # the store was away, or this process asleep: so may have been the driver
        self._seen[key] = text, since, now
        return now - since > SECONDS_TO_EXPIRE


def own_all(
    store: Store, runs: Sequence[Run], me: str, is_free: Callable[[Run], bool]
) -> Run | None:
    """Own all of some runs. If another process owns one, release the others and return that run.

    Args:
        store: where the runs are.
        runs: all that exist for a sweep or a trial.
        me: the name of the owner.
        is_free: whether the owner of a run no longer works.
    """
    runs = sorted(runs, key=lambda run: run.info.run_id)
    for run in runs:
        if latest_claim(run).owner not in ("", NOBODY, me) and not is_free(run):
            return store.client.get_run(run.info.run_id)
    mine = []
    for run in runs:
        claim = latest_claim(run)
        if claim.owner != me:
            try:
                store.client.log_param(run.info.run_id, f"owner.{claim.number + 1}", me)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                break  # another process was faster, or has deleted the run
            claim = Claim(claim.number + 1, me)
        mine.append((run, claim))
    else:
        return None
    for owned, claim in mine:
        release(store, owned.info.run_id, claim.number)
    return store.client.get_run(run.info.run_id)


def delete_twin(store: Store, run_id: str, me: str) -> bool:
    """Delete a run that this process has just made, unless another process owns it or has used it.

    Returns:
        Whether it is deleted. Another process may own it only for a moment.
    """
    run = store.client.get_run(run_id)
    is_used = run.data.tags.get("kind") == "sweep" or any(
        not OWNER.fullmatch(name) for name in run.data.params
    )
    if is_used or own_all(store, [run], me, lambda _: False) is not None:
        return False
    store.client.delete_run(run_id)
    return True


def _owned_by(store: Store, run: Run, me: str) -> int:
    """Return the number of the owner that this process is of a run."""
    claim = latest_claim(store.client.get_run(run.info.run_id))
    assert claim.owner == me
    return claim.number


def release(store: Store, run_id: str, number: int) -> None:
    """Free a run that this process owns as the n-th."""
    with contextlib.suppress(MlflowException):  # a waiting process took a lease that had run out
        store.client.log_param(run_id, f"owner.{number + 1}", NOBODY)


class SweepLease:
    """The lease of a sweep, renewed in the background until it is released or lost."""

    def __init__(
        self, store: Store, run_id: str, number: int, on_loss: Callable[[], object]
    ) -> None:
        """Begin to renew.

        Args:
            store: where the sweep is recorded.
            run_id: the sweep's own run.
            number: of the owner that this process is.
            on_loss: called, from another thread, when another driver has taken the lease.
        """
        self.run_id, self.number = run_id, number
        self.taken_by: str | None = None
        """Who has taken the lease, because it was not renewed in time."""
        self._store, self._on_loss = store, on_loss
        self._over = threading.Event()
        self._writing = threading.Lock()
        self._renewals = 0
        self._me = Holder.here()
        store.delete_tags(run_id, "lease.")
        self._write()
        threading.Thread(target=self._renew, daemon=True).start()

    @property
    def owner(self) -> str:
        """The name by which this driver owns trials."""
        return f"{self.run_id}/{self.number}"

    def _write(self) -> None:
        holder = replace(self._me, renewal=self._renewals)
        self._store.client.set_tag(self.run_id, f"lease.{self.number}", holder.to_json())

    def _renew(self) -> None:
        address = self._store.address
        while not self._over.wait(SECONDS_TO_RENEW):
            self._renewals += 1
            # A store that does not answer is no reason to stop: nobody can take the lease there.
            with contextlib.suppress(MlflowException, OSError), self._writing:
                # MLflow would try again only after minutes.
                if address.is_server and not server_answers(address.uri):
                    continue
                if self._over.is_set():
                    return
                run = self._store.client.get_run(self.run_id)
                claim = latest_claim(run)
                if claim.number == self.number:
                    self._write()
                    continue
                by = _holder(run, claim.number)
                self.taken_by = str(by or "another process")
                self._on_loss()
                return

    def release(self, is_new: bool) -> None:
        """Free the sweep for the next driver.

        Args:
            is_new: whether this driver has made the sweep's run. It is deleted where the driver
                ends before it has recorded a plan.
        """
        self._over.set()
        # A renewal that waits for a server that is away would keep the driver from ending.
        if self.taken_by or not self._writing.acquire(timeout=SECONDS_TO_RENEW):
            return
        run = self._store.client.get_run(self.run_id)
        if latest_claim(run).number != self.number:
            return
        if is_new and "kind" not in run.data.tags:
            self._store.client.delete_run(self.run_id)
            return
        release(self._store, self.run_id, self.number)
        self._store.client.delete_tag(self.run_id, f"lease.{self.number}")


@contextmanager
def sweep_lease(
    store: Store,
    experiment_id: str,
    sweep: str,
    *,
    wait: bool,
    say: Callable[[str], object],
    on_loss: Callable[[], object],
) -> Iterator[SweepLease]:
    """Inside, this driver is the only one that works on the sweep, wherever the others run.

    Args:
        store: where the sweep is recorded.
        experiment_id: the sweep's experiment.
        sweep: its name.
        wait: whether to wait for a driver that works on it.
        say: called with a sentence where this process has to wait.
        on_loss: called, from another thread, when another driver has taken the lease.

    Raises:
        InputError: another driver works on the sweep; the message says which.
    """
    me, watch, made, has_said = uuid.uuid4().hex, Watch(), "", False

    def is_free(run: Run) -> bool:
        return watch.has_run_out(run, latest_claim(run).number)

    while True:
        runs = _runs_of_sweep(store, experiment_id, sweep)
        if not runs:
            made = store.client.create_run(
                experiment_id,
                run_name=f"sweep {sweep}",
                tags={"lease_of": sweep, "sweep": sweep, **MADE_BY},
            ).info.run_id
            runs = _runs_of_sweep(store, experiment_id, sweep)
        other = own_all(store, runs, me, is_free)
        if other is None:
            break
        if made and (delete_twin(store, made, me) or made not in [run.info.run_id for run in runs]):
            made = ""  # another process has made one at the same time
        holder = _holder(other, latest_claim(other).number)
        if holder and made == other.info.run_id:
            made = ""  # another driver was faster to own it, and now works with it
        by = str(holder or "another process")
        if made:
            pass  # another process owns it for a moment
        elif not wait and (watch.has_seen_renewal or (holder and holder.is_here)):
            if holder and not holder.has_ended:
                raise InputError(
                    f"sweep {sweep} is being run by {by}: wait for it (--wait), stop it, or take "
                    "another --name"
                )
        elif holder and not has_said:
            has_said = True
            say(
                f"sweep {sweep} is being run by {by}: waiting for it"
                if wait
                else f"sweep {sweep} was being run by {by}: waiting up to "
                f"{SECONDS_TO_EXPIRE:.0f} seconds to see whether it still is"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
    first = min(runs, key=lambda run: ("kind" not in run.data.tags, run.info.run_id != made))
    for twin in runs:
        if twin is not first:  # whoever made it was killed, or will find it replaced
            number = _owned_by(store, twin, me)
            set_aside(store, twin)
            store.client.delete_tag(twin.info.run_id, "lease_of")
            release(store, twin.info.run_id, number)
    number = _owned_by(store, first, me)
    lease = SweepLease(store, first.info.run_id, number, on_loss)
    try:
        yield lease
    finally:
        lease.release(made == lease.run_id)


def _runs_of_sweep(store: Store, experiment_id: str, sweep: str) -> list[Run]:
    """List the own runs of a sweep, also one that has no plan yet."""
    found = [
        *store.find_runs("sweep", experiment_id, sweep=sweep),
        *store.search(f"tags.lease_of = '{sweep}'", experiment_id),
    ]
    return list({run.info.run_id: run for run in found}.values())


def holder_of(store: Store, sweep_run: Run) -> str | None:
    """Return the driver that seems to work on a sweep; None where none does."""
    run = store.client.get_run(sweep_run.info.run_id)  # with params
    claim = latest_claim(run)
    holder = _holder(run, claim.number)
    if claim.owner in ("", NOBODY) or (holder and holder.has_ended):
        return None
    return str(holder or "another process")


def works_elsewhere(store: Store, run: Run, me: str) -> bool:
    """Return whether another driver than this one may still train the trial of a run.

    Args:
        store: where the run is.
        run: of a trial, with its params.
        me: the owner that this driver is.
    """
    claim = latest_claim(run)
    return claim.owner not in ("", NOBODY, me) and not _lease_is_over(store, claim.owner, None)


def _lease_is_over(store: Store, owner: str, watch: Watch | None) -> bool:
    """Return whether the driver that owns trials by this name works no more."""
    run_id, _, number = owner.rpartition("/")
    try:
        sweep_run = store.client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return True  # somebody has deleted it
        raise
    if sweep_run.info.lifecycle_stage != "active" or not number.isdigit():
        return True
    if latest_claim(sweep_run).number != int(number):
        return True
    holder = _holder(sweep_run, int(number))
    if watch is None:
        return bool(holder and holder.has_ended)
    return watch.has_run_out(sweep_run, int(number))


def own_trial(
    store: Store, key: str, me: str, make: Callable[[], Run], *, is_new: bool = False
) -> Run | None:
    """Own the run of a trial, unless it has a result. Wait while another driver trains it.

    Args:
        store: where trials are recorded.
        key: of the trial.
        me: the owner that this driver is.
        make: makes a run for the trial.
        is_new: whether the trial had no run a moment ago. A run is then made before any is looked
            for, which saves two requests.

    Returns:
        The run; None where the trial has a result, perhaps since a moment ago.
    """
    watch, made = Watch(), ""

    def is_free(run: Run) -> bool:
        # A run that is not RUNNING was ended by whoever owned it.
        return run.info.status != "RUNNING" or _lease_is_over(store, latest_claim(run).owner, watch)

    while True:
        runs = [] if is_new else store.find_runs("trial", trial_key=key)
        if not runs:
            new = make()
            made = new.info.run_id
            runs = delete_twins(store, new, store.find_runs("trial", trial_key=key))
        is_new = False
        open_runs = [run for run in runs if trial_status(run) not in DONE]
        if len(open_runs) == len(runs):
            for run in runs:
                # First this, then the claim: who sees the claim has to see that it is used.
                if run.info.status != "RUNNING":
                    store.client.update_run(run.info.run_id, status="RUNNING")
            other = own_all(store, runs, me, is_free)
            if other is None:
                if any(latest_claim(run).owner not in ("", me) for run in runs):
                    # The owner before may have finished it after the runs were listed.
                    runs = store.find_runs("trial", trial_key=key)
                    if done := [run for run in runs if trial_status(run) in DONE]:
                        store.client.set_terminated(done[0].info.run_id, "FINISHED")
                        return None
                first = next((run for run in runs if run.info.run_id == made), runs[0])
                for twin in runs:
                    if twin is not first:
                        set_aside(store, twin)
                return first
            if trial_status(other) in DONE:
                store.client.set_terminated(other.info.run_id, "FINISHED")
        is_done = len(open_runs) < len(runs)
        if made:  # another process has made one at the same time
            is_left = made in [run.info.run_id for run in open_runs]
            if not is_left or delete_twin(store, made, me):
                made = ""
        if is_done and not made:
            return None
        time.sleep(SECONDS_BETWEEN_LOOKS)
