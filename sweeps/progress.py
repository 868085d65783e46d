"""How far a sweep is: finished, running, failed, and the time left."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from rich.console import Console
from rich.live import Live

from sweeps.units import clock

LINE_EVERY = 15.0
"""Seconds between lines where the console is no terminal."""


class Ended(Exception):
    """Ends Tune's loop before all trials have run."""


class SweepProgress(tune.Callback):
    """One line about the sweep, live on a terminal, now and then anywhere else.

    Time left is the steps that remain at the pace of all steps so far.
    """

    def __init__(self, console: Console, steps: dict[str, int], trials: int | None = None) -> None:
        """`steps`: how many each trial will make, by its key; of `trials` that there will be the
        others are told as they start."""
        self.console, self.steps = console, steps
        self.trials = trials or len(steps)
        self.done = dict.fromkeys(steps, 0)
        self.begun: dict[str, int] = {}  # the step that each trial was first heard of at
        self.running: set[str] = set()
        self.finished: set[str] = set()
        self.pruned: dict[str, str] = {}  # at which step, by trial key
        self.failed: dict[str, str] = {}  # why, by trial key
        self.retried: dict[str, list[str]] = {}  # why, each time, by trial key
        self.fault = ""  # of the sweep: every other trial would fail alike
        self.interrupted = False  # by Ctrl-C
        self.errors: list[Exception] = []  # raised where Tune keeps them to itself
        self.first_report: float | None = None
        self.last_line = time.monotonic()
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> SweepProgress:
        if self.console.is_terminal:
            self.live.start()
        self._show()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks beside the experiment, where nothing reads them."""
        return {}

    @property
    def ended(self) -> int:
        """How many trials have ended by themselves or were pruned, well or not."""
        return len(self.finished) + len(self.pruned) + len(self.failed)

    def line(self) -> str:
        """`3 of 12 finished, 2 running, 0 failed, 1:40 left`."""
        counts = (
            f"{len(self.finished)} of {self.trials} finished, "
            + (f"{len(self.pruned)} pruned, " if self.pruned else "")
            + f"{len(self.running)} running, {len(self.failed)} failed"
        )
        if self.ended == self.trials:
            return counts
        # A trial that goes on from a checkpoint begins far from step 0.
        made = sum(self.done[key] - step for key, step in self.begun.items())
        if self.first_report is None or not made:
            return f"{counts}, starting"
        remain = sum(
            total - self.done[key]
            for key, total in self.steps.items()
            if key not in self.failed and key not in self.pruned
        )
        remain += (self.trials - len(self.steps)) * max(self.steps.values())
        seconds = int(remain * (time.monotonic() - self.first_report) / made)
        return f"{counts}, {clock(seconds)} left"

    def _show(self, event: str = "") -> None:
        if event:
            self.console.print(event, soft_wrap=True, highlight=False)
        if self.console.is_terminal:
            self.live.update(self.line(), refresh=True)
        elif event or time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            self.console.print(self.line(), highlight=False)

    def interrupt(self) -> None:
        """End at the next step of Tune's loop."""
        self.interrupted = True
        self._show("stopping; Ctrl-C again stops at once")

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        if self.errors:
            raise self.errors[0]
        if self.fault or self.interrupted:
            raise Ended

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        for job in trial.config["batch"]:
            if job["key"] in self.finished or job["key"] in self.failed:
                continue  # its array goes on without it
            self.running.add(job["key"])
            self.steps.setdefault(job["key"], job["params"]["train.steps"])
            self.done.setdefault(job["key"], 0)
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        if self.first_report is None:
            self.first_report = time.monotonic()
        key, status = result["trial_key"], result.get("status")
        if result.get("ends_sweep"):
            self.fault = result["reason"]
        if key in self.finished or key in self.failed:
            return  # said before: Tune repeats a batch's last result, and a retried one its first
        if status:
            self.running.discard(key)
        if status == "failed":
            self.failed[key] = result["reason"]
            self._show(f"trial {key} failed: {self.failed[key]}")
            return
        # Not heard of before its end: it was too short to begin far from there.
        self.begun.setdefault(key, 0 if status else result["step"])
        self.done[key] = self.steps[key] if status == "diverged" else result["step"]
        if status:
            self.finished.add(key)
        self._show(f"trial {key} {status}" if status else "")

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        # What ends the sweep leaves its batch without results, and that is no pruning.
        for key in () if self.fault else self._left(trial):
            self.running.discard(key)
            self.pruned[key] = f"pruned at step {trial.last_result['step']}"
            self._show(f"trial {key} {self.pruned[key]}")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        for key in self._left(trial):
            self.running.discard(key)
            self.retried.setdefault(key, []).append(_why(trial))
            self._show(f"trial {key} goes on with another worker: {self.retried[key][-1]}")
            # What has cost two workers may be one of its trials: that one is to fail alone.
            trial.config["apart"] = len(self.retried[key]) > 1

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        for key in self._left(trial):
            self.running.discard(key)
            self.failed[key] = _why(trial)
            self._show(f"trial {key} failed: {self.failed[key]}")

    def _left(self, trial: Trial) -> list[str]:
        """The keys of Tune's trial that have no result."""
        keys = [job["key"] for job in trial.config["batch"]]
        return [key for key in keys if key not in self.finished and key not in self.failed]


def _why(trial: Trial) -> str:
    """What Tune knows of its latest error, which of a dead worker need not say that it died."""
    # Tune's own copy, of all errors so far: what get_error() reads has not reached the storage yet.
    text = Path(trial.error_file).read_text().rpartition("Failure # ")[2].strip()
    if memory := re.search("Memory on the node .*", text):
        held = re.search("Selected to kill:.*actual memory used=([^,]*)", text)
        its = f"; it held {held[1]}" if held else ""
        return f"out of memory, the worker was killed by Ray: {memory[0]}{its}"
    why = text.splitlines()[-1].strip()
    # A machine that is gone is `unavailable` for as long as Ray is not sure.
    gone = "The actor died" in text or re.search(r"The actor \w+ is unavailable", text)
    return f"the worker died: {why}" if gone else why


def key_of(config: Mapping[str, Any]) -> str:
    """The key of the first trial that a worker is given, known before the trial is."""
    key: str = config["key"]
    return key
