"""Show the progress of a sweep: the outcome of each trial, a bar, and lines of text."""

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
"""Seconds between two lines, if the output is not a terminal."""
REDRAW_EVERY = 0.5
"""Seconds between two updates of the bar. A cluster may report more often."""
MOST_SCHEMES = 8
"""The largest number of schemes in the line of losses."""
BAR_WIDTH = 40


class StopTune(Exception):
    """Ends Tune's loop before all trials have run."""


class TrialOutcomes:
    """The outcome of each trial, from the reports of workers and the callbacks of Tune.

    Methods for an event return the line to print, or an empty text.
    """

    def __init__(
        self, steps: Mapping[str, int], trials: int, schemes: Mapping[str, str] | None = None
    ) -> None:
        """Begin with no trial started.

        Args:
            steps: the number of updates of each trial, by trial key. A search adds trials later.
            trials: the number of trials.
            schemes: the scheme of each trial, by trial key. A search adds trials later.
        """
        self.steps, self.trials, self.schemes = dict(steps), trials, dict(schemes or {})
        # The latest reported step and loss of each scheme, in the order of the plan.
        self.losses: dict[str, tuple[int, float] | None] = dict.fromkeys(self.schemes.values())
        self.done = dict.fromkeys(steps, 0)  # the last step that was reported
        self.first_step: dict[str, int] = {}  # the first step that was reported
        self.running: set[str] = set()
        self.finished: set[str] = set()
        self.pruned: dict[str, str] = {}  # by trial key, the step as text
        self.failed: dict[str, str] = {}  # by trial key, the reason
        self.retried: dict[str, list[str]] = {}  # by trial key, the reason of each retry
        self.fault = ""  # the reason that would make every other trial fail, too

    @property
    def ended(self) -> int:
        """The number of trials that have finished, failed or were pruned."""
        return len(self.finished) + len(self.pruned) + len(self.failed)

    @property
    def steps_made(self) -> int:
        """The number of steps that were made since this driver started."""
        return sum(self.done[key] - step for key, step in self.first_step.items())

    @property
    def steps_left(self) -> int:
        """The number of steps that remain, including trials that a search has not suggested yet."""
        known = sum(
            total - self.done[key]
            for key, total in self.steps.items()
            if key not in self.failed and key not in self.pruned
        )
        return known + self._steps_unknown

    @property
    def _steps_unknown(self) -> int:
        """The number of steps of the trials that a search has not suggested yet."""
        return (self.trials - len(self.steps)) * max(self.steps.values(), default=0)

    @property
    def share_done(self) -> float:
        """The share of all steps that need no more work."""
        every = sum(self.steps.values()) + self._steps_unknown
        return 1 - self.steps_left / every if every else 0.0

    def started(self, jobs: Sequence[Job]) -> None:
        """Note that a worker starts trials."""
        for job in jobs:
            if job.key in self.finished or job.key in self.failed:
                continue  # the array continues without this trial
            self.running.add(job.key)
            self.steps.setdefault(job.key, int(job.params["train.steps"]))
            self.done.setdefault(job.key, 0)
            self.schemes.setdefault(job.key, str(job.params["init.scheme"]))

    def reported(self, report: TrialReport) -> str:
        """Process the report of a worker about one trial."""
        key, status = report.trial_key, report.status
        if report.ends_sweep:
            self.fault = report.reason or ""
        if key in self.finished or key in self.failed:
            return ""  # Tune repeats the last report of a batch; a retried batch repeats the first
        if status:
            self.running.discard(key)
        if status == "failed":
            self.failed[key] = report.reason or ""
            return f"trial {key} failed: {self.failed[key]}"
        step = report.step or 0
        # A trial without an earlier report was too short for a checkpoint, so it began at step 0.
        self.first_step.setdefault(key, 0 if status else step)
        self.done[key] = self.steps[key] if status == "diverged" else step
        if report.loss is not None:
            self.losses[self.schemes[key]] = (step, report.loss)
        if status:
            self.finished.add(key)
        return f"trial {key} {status}" if status else ""

    def unfinished(self, jobs: Sequence[Job]) -> list[str]:
        """List the keys of the trials without a result."""
        keys = [job.key for job in jobs]
        return [key for key in keys if key not in self.finished and key not in self.failed]

    def stopped_at(self, jobs: Sequence[Job], step: int) -> str:
        """Note that a search pruned the trials of a worker."""
        # After a fault of the sweep, trials also have no result, but they were not pruned.
        keys = [] if self.fault else self.unfinished(jobs)
        self.running.difference_update(keys)
        self.pruned.update(dict.fromkeys(keys, f"pruned at step {step}"))
        return "\n".join(f"trial {key} {self.pruned[key]}" for key in keys)

    def lost_worker(self, jobs: Sequence[Job], why: str) -> str:
        """Note that a worker died, and that its trials continue in another worker."""
        keys = self.unfinished(jobs)
        self.running.difference_update(keys)
        for key in keys:
            self.retried.setdefault(key, []).append(why)
        return "\n".join(f"trial {key} continues in another worker: {why}" for key in keys)

    def may_be_harmful(self, jobs: Sequence[Job]) -> bool:
        """Return whether two workers died with these trials. The trials are then separated."""
        return any(len(self.retried.get(key, ())) > 1 for key in self.unfinished(jobs))

    def gave_up(self, jobs: Sequence[Job], why: str) -> str:
        """Note that Tune does not run a batch again."""
        keys = self.unfinished(jobs)
        self.running.difference_update(keys)
        self.failed.update(dict.fromkeys(keys, why))
        return "\n".join(f"trial {key} failed: {why}" for key in keys)


class SweepProgress(tune.Callback):
    """The progress of a sweep: a bar on a terminal, or else a line from time to time.

    The time left assumes that the remaining steps are as fast as the steps so far.
    """

    def __init__(
        self,
        console: Console,
        outcomes: TrialOutcomes,
        errors: Sequence[Exception] = (),
        take_signals: Callable[[], object] = lambda: None,
        tell: Callable[[SweepProgress], object] = lambda progress: None,
    ) -> None:
        """Start with no trial.

        Args:
            console: prints the progress.
            outcomes: records every event.
            errors: errors that Tune would hide. The first one is raised at the next step of Tune.
            take_signals: called at each step of Tune's loop, because Tune handles SIGUSR1, too.
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
        """Return nothing. Tune pickles its callbacks, but the result is never read."""
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
        """Return `last loss: model5 9.81 (step 60), gpt2 10.2 (step 80)`, or an empty text."""
        known = [
            f"{scheme} {last[1]:.4g} (step {last[0]})"
            for scheme, last in self.outcomes.losses.items()
            if last
        ]
        more = f", and {len(known) - MOST_SCHEMES} more" if len(known) > MOST_SCHEMES else ""
        return f"last loss: {', '.join(known[:MOST_SCHEMES])}{more}" if known else ""

    def bar(self) -> Group:
        """Return the bar and the lines that a terminal shows."""
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
        """Stop at the next step of Tune's loop."""
        self.interrupted = True
        self._show("stopping; Ctrl-C again stops at once")

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **_: Any) -> None:
        """Set the signal handlers again, because Tune sets its own."""
        self.take_signals()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **_: Any) -> None:
        """Raise an error that Tune would hide, or StopTune if the sweep has to end."""
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
        """Process the report of a worker."""
        if self.first_report is None:
            self.first_report = time.monotonic()
        said = self.outcomes.reported(TrialReport.of(result))
        if said or time.monotonic() - self.last_shown >= REDRAW_EVERY:
            self._show(said)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any
    ) -> None:
        """Count the unfinished trials of an ended batch as pruned."""
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
    """Return one sentence for an error text of Tune."""
    if memory := re.search("Memory on the node .*", text):
        held = re.search("Selected to kill:.*actual memory used=([^,]*)", text)
        own = f"; it held {held[1]}" if held else ""
        return f"out of memory, the worker was killed by Ray: {memory[0]}{own}"
    why = text.splitlines()[-1].strip()
    # Ray first calls a lost machine `unavailable`, until it is sure.
    gone = "The actor died" in text or re.search(r"The actor \w+ is unavailable", text)
    return f"the worker died: {why}" if gone else why


def key_of(config: Mapping[str, Any]) -> str:
    """Return the key in the config of a Tune trial: that of the first trial of a batch."""
    key: str = config["key"]
    return key
