"""How far a sweep is: what became of each trial, a bar, and lines about all of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from gptcore.units import clock
from sweeps.execution.private_api import error_text
from sweeps.execution.trainable import TrialReport
from tracking.job import Job

LINE_EVERY = 15.0
"""Seconds between lines where the console is no terminal."""
REDRAW_EVERY = 0.5
"""Seconds between two pictures of the same bar: a cluster reports more often than anybody reads."""
MOST_SCHEMES = 8
"""The line of losses names no more schemes."""
BAR_WIDTH = 40


class StopTune(Exception):
    """Ends Tune's loop before all trials have run."""


class TrialOutcomes:
    """Keeps what became of each trial, from the reports of workers and the callbacks of Tune.

    Methods for an event return the line to print, or an empty text.
    """

    def __init__(
        self, steps: Mapping[str, int], trials: int, schemes: Mapping[str, str] | None = None
    ) -> None:
        """Begin with no trial started.

        Args:
            steps: updates that each trial will make, by its key; a search adds its own later.
            trials: how many trials there will be.
            schemes: the scheme of each trial, by its key; a search adds its own later.
        """
        self.steps, self.trials, self.schemes = dict(steps), trials, dict(schemes or {})
        # By scheme the latest step and loss that a trial of it has told, in the order of the plan.
        self.losses: dict[str, tuple[int, float] | None] = dict.fromkeys(self.schemes.values())
        self.done = dict.fromkeys(steps, 0)  # the last step that was heard of
        self.first_step: dict[str, int] = {}  # the first one, far from 0 after a checkpoint
        self.running: set[str] = set()
        self.finished: set[str] = set()
        self.pruned: dict[str, str] = {}  # by trial key, at which step
        self.failed: dict[str, str] = {}  # by trial key, why
        self.retried: dict[str, list[str]] = {}  # by trial key, why, each time
        self.fault = ""  # of the sweep: every other trial would fail in the same way

    @property
    def ended(self) -> int:
        """How many trials have ended by themselves or were pruned, well or not."""
        return len(self.finished) + len(self.pruned) + len(self.failed)

    @property
    def steps_made(self) -> int:
        """Steps that this driver has heard being made."""
        return sum(self.done[key] - step for key, step in self.first_step.items())

    @property
    def steps_left(self) -> int:
        """Steps still to make, by trials that run, and by those not known yet."""
        known = sum(
            total - self.done[key]
            for key, total in self.steps.items()
            if key not in self.failed and key not in self.pruned
        )
        return known + self._steps_unknown

    @property
    def _steps_unknown(self) -> int:
        """Steps of the trials that a search has not suggested yet."""
        return (self.trials - len(self.steps)) * max(self.steps.values(), default=0)

    @property
    def share_done(self) -> float:
        """Which share of all steps needs no work any more."""
        every = sum(self.steps.values()) + self._steps_unknown
        return 1 - self.steps_left / every if every else 0.0

    def started(self, jobs: Sequence[Job]) -> None:
        """Note that a worker was given trials."""
        for job in jobs:
            if job.key in self.finished or job.key in self.failed:
                continue  # the array goes on without it
            self.running.add(job.key)
            self.steps.setdefault(job.key, int(job.params["train.steps"]))
            self.done.setdefault(job.key, 0)
            self.schemes.setdefault(job.key, str(job.params["init.scheme"]))

    def reported(self, report: TrialReport) -> str:
        """Take a worker's report on one trial."""
        key, status = report.trial_key, report.status
        if report.ends_sweep:
            self.fault = report.reason or ""
        if key in self.finished or key in self.failed:
            return ""  # Tune repeats a batch's last report, and a retried batch its first
        if status:
            self.running.discard(key)
        if status == "failed":
            self.failed[key] = report.reason or ""
            return f"trial {key} failed: {self.failed[key]}"
        step = report.step or 0
        # A trial that was not heard of before its end was too short to begin far from there.
        self.first_step.setdefault(key, 0 if status else step)
        self.done[key] = self.steps[key] if status == "diverged" else step
        if report.loss is not None:
            self.losses[self.schemes[key]] = (step, report.loss)
        if status:
            self.finished.add(key)
        return f"trial {key} {status}" if status else ""

    def unfinished(self, jobs: Sequence[Job]) -> list[str]:
        """List the keys of trials that have no result."""
        keys = [job.key for job in jobs]
        return [key for key in keys if key not in self.finished and key not in self.failed]

    def stopped_at(self, jobs: Sequence[Job], step: int) -> str:
        """Note that a search pruned the trials of a worker."""
        # A fault of the sweep also leaves trials without results, and that is no pruning.
        keys = [] if self.fault else self.unfinished(jobs)
        self.running.difference_update(keys)
        self.pruned.update(dict.fromkeys(keys, f"pruned at step {step}"))
        return "\n".join(f"trial {key} {self.pruned[key]}" for key in keys)

    def lost_worker(self, jobs: Sequence[Job], why: str) -> str:
        """Note that a worker died, and that its trials continue in another one."""
        keys = self.unfinished(jobs)
        self.running.difference_update(keys)
        for key in keys:
            self.retried.setdefault(key, []).append(why)
        return "\n".join(f"trial {key} continues in another worker: {why}" for key in keys)

    def may_be_harmful(self, jobs: Sequence[Job]) -> bool:
        """Return whether trials have cost two workers: one of them is then to fail alone."""
        return any(len(self.retried.get(key, ())) > 1 for key in self.unfinished(jobs))

    def gave_up(self, jobs: Sequence[Job], why: str) -> str:
        """Note that Tune does not try a batch again."""
        keys = self.unfinished(jobs)
        self.running.difference_update(keys)
        self.failed.update(dict.fromkeys(keys, why))
        return "\n".join(f"trial {key} failed: {why}" for key in keys)


class SweepProgress(tune.Callback):
    """Shows how far the sweep is: a bar on a terminal, lines from time to time anywhere else.

    The time left is that of the steps that remain, at the pace of all steps so far.
    """

    def __init__(
        self,
        console: Console,
        outcomes: TrialOutcomes,
        errors: Sequence[Exception] = (),
        take_signals: Callable[[], object] = lambda: None,
        tell: Callable[[SweepProgress], object] = lambda progress: None,
    ) -> None:
        """Show what becomes of trials.

        Args:
            console: where to.
            outcomes: records every event.
            errors: what was raised where Tune keeps it to itself: raised at the next step.
            take_signals: called at each step of Tune's loop, because Tune takes SIGUSR1 for itself.
            tell: called whenever there is something new to show.
        """
        self.console, self.outcomes, self.errors = console, outcomes, errors
        self.take_signals, self.tell = take_signals, tell
        self.interrupted = False  # by Ctrl-C
        self.first_report: float | None = None
        self.last_shown = self.last_line = self.last_losses = time.monotonic()
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> SweepProgress:
        if self.console.is_terminal:
            self.live.start()
        self._show()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its callbacks, and nobody reads that."""
        return {}

    def line(self) -> str:
        """Return `3 of 12 finished, 2 running, 0 failed, 1:40 left`."""
        outcomes = self.outcomes
        counts = (
            f"{len(outcomes.finished)} of {outcomes.trials} finished, "
            + (f"{len(outcomes.pruned)} pruned, " if outcomes.pruned else "")
            + f"{len(outcomes.running)} running, {len(outcomes.failed)} failed"
        )
        if outcomes.ended == outcomes.trials:
            return counts
        if self.first_report is None or not outcomes.steps_made:
            return f"{counts}, starting"
        pace = (time.monotonic() - self.first_report) / outcomes.steps_made
        return f"{counts}, {clock(int(outcomes.steps_left * pace))} left"

    def losses(self) -> str:
        """Return `last loss: model5 9.81 (step 60), gpt2 10.2 (step 80)`, empty without any."""
        told = [
            f"{scheme} {last[1]:.4g} (step {last[0]})"
            for scheme, last in self.outcomes.losses.items()
            if last
        ]
        more = f", and {len(told) - MOST_SCHEMES} more" if len(told) > MOST_SCHEMES else ""
        return f"last loss: {', '.join(told[:MOST_SCHEMES])}{more}" if told else ""

    def bar(self) -> Group:
        """Return what a terminal shows: a bar, and the lines about the sweep."""
        bar, share = Table.grid(padding=(0, 1)), self.outcomes.share_done
        bar.add_row(ProgressBar(total=1, completed=share, width=BAR_WIDTH), f"{share:.0%}")
        return Group(bar, *filter(None, (self.line(), self.losses())))

    def _show(self, event: str = "") -> None:
        now = self.last_shown = time.monotonic()
        if event:
            self.console.print(event, soft_wrap=True, highlight=False)
        if self.console.is_terminal:
            self.live.update(self.bar(), refresh=True)
        elif event or now - self.last_line > LINE_EVERY:
            self.last_line = now
            self.console.print(self.line(), highlight=False)
            if now - self.last_losses > LINE_EVERY and (losses := self.losses()):
                self.last_losses = now
                self.console.print(f"  {losses}", soft_wrap=True, highlight=False)
        self.tell(self)

    def interrupt(self) -> None:
        """End at the next step of Tune's loop."""
        self.interrupted = True
        self._show("stopping; Ctrl-C again stops at once")

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **_: Any) -> None:
        """Take back the signals that Tune has taken."""
        self.take_signals()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **_: Any) -> None:
        """Raise what Tune keeps to itself, or StopTune where the sweep is to end."""
        if self.errors:
            raise self.errors[0]
        if self.outcomes.fault or self.interrupted:
            raise StopTune

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any
    ) -> None:
        """Count the trials of a batch as running."""
        self.outcomes.started(trial.config["batch"])
        self._show()

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **_: Any,
    ) -> None:
        """Take what a worker reported."""
        if self.first_report is None:
            self.first_report = time.monotonic()
        said = self.outcomes.reported(TrialReport.of(result))
        if said or time.monotonic() - self.last_shown >= REDRAW_EVERY:
            self._show(said)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any
    ) -> None:
        """Count unfinished trials of a batch that has ended as pruned."""
        step = (trial.last_result or {}).get("step") or 0
        if said := self.outcomes.stopped_at(trial.config["batch"], step):
            self._show(said)

    def on_trial_recover(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any
    ) -> None:
        """Note that Tune gives a batch to another worker."""
        jobs = trial.config["batch"]
        if said := self.outcomes.lost_worker(jobs, reason_of(error_text(trial))):
            self._show(said)
        trial.config["isolate"] = self.outcomes.may_be_harmful(jobs)

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any
    ) -> None:
        """Count the trials of a batch as failed."""
        if said := self.outcomes.gave_up(trial.config["batch"], reason_of(error_text(trial))):
            self._show(said)


def reason_of(text: str) -> str:
    """Return one sentence for an error of Tune's, which need not say that a worker died."""
    if memory := re.search("Memory on the node .*", text):
        held = re.search("Selected to kill:.*actual memory used=([^,]*)", text)
        own = f"; it held {held[1]}" if held else ""
        return f"out of memory, the worker was killed by Ray: {memory[0]}{own}"
    why = text.splitlines()[-1].strip()
    # A machine that is gone is `unavailable` for as long as Ray is not sure.
    gone = "The actor died" in text or re.search(r"The actor \w+ is unavailable", text)
    return f"the worker died: {why}" if gone else why


def key_of(config: Mapping[str, Any]) -> str:
    """Return the key of the first trial that a worker is given, known before the trial is."""
    key: str = config["key"]
    return key
