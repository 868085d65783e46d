"""The training loop of an array of trials; a trial that runs alone is an array of one.

Step k is the state of a model after k updates. The loop computes its loss and gradient on batch k,
on which the model has not been updated yet. Then it runs the probes, and then the update that leads
to step k + 1. The last step is measured like the others, but has no update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcore.array import ModelArray, State
from gptcore.checkpoint import Checkpoint, Progress
from gptcore.config import TrialConfig
from gptcore.corpus import Corpus
from gptcore.looks import Looks, OnTheWay, Packed
from gptcore.model import GPT, head_errors
from gptcore.optimizers import learning_rate
from gptcore.probes import probes_due, subjects_of
from gptcore.records import Recorder, Row, TrainingRow, TrialResult
from gptcore.replay import graphs_for
from gptcore.steps import Steps
from gptcore.token_groups import TokenGroups

EXPLOSION = 10.0
"""A trial has diverged when its loss exceeds this many times its first loss, or ln V if larger."""

DEVICE_SYNC_EVERY = {"cpu": 1, "cuda": 10}
"""Steps between two reads of losses from a device, by its type."""


@dataclass
class Member:
    """One trial of an array."""

    config: TrialConfig
    model: GPT
    initial: Mapping[str, Tensor]  # values at step 0 of the tensors that probes measure, by name
    corpus: Corpus
    groups: TokenGroups
    recorder: Recorder
    checkpoint: Checkpoint | None
    start: Progress  # where this run of the trial starts: step 0, or a checkpoint
    state: State | None  # the state to load into the next array; None for a model at step 0

    def __post_init__(self) -> None:
        device = self.model.wte.weight.device
        self.fixed_texts = {
            text: torch.from_numpy(windows).to(device)
            for text, windows in self.corpus.fixed_texts().items()
        }
        self.rows = self.start.rows
        self.losses = [
            row.loss for rows in self.rows for row in rows if isinstance(row, TrainingRow)
        ]
        self.status: Literal["finished", "diverged"] = "finished"
        self.reason = ""
        self.errors: tuple[float | None, float | None] = (None, None)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the sequences of one step, [batch_size, context + 1]."""
        return self.corpus.batch(
            step, batch_size=self.config.train.batch_size, seed=self.config.corpus.data_seed
        )

    def log(self, rows: list[Row]) -> None:
        """Log the rows of one step, and keep them for the checkpoint."""
        self.recorder.log(rows)
        self.rows.append(rows)

    def has_diverged(self, row: TrainingRow) -> bool:
        """Check the loss of the next step: keep it, or mark the trial as diverged."""
        loss, chance = row.loss, math.log(self.config.model.vocab_size)
        exploded = self.losses and loss > EXPLOSION * max(self.losses[0], chance)
        if exploded or not math.isfinite(loss):
            self.status, self.reason = "diverged", f"loss {loss:.4g} at step {row.step}"
        else:
            self.losses.append(loss)
        return self.status == "diverged"

    def result(self, seconds: float) -> TrialResult:
        """Return the result of the trial, whose loop ran for `seconds` since its start."""
        train, device = self.config.train, self.model.wte.weight.device
        steps = train.steps if self.status == "finished" else len(self.losses)
        seconds += self.start.seconds
        return TrialResult(
            status=self.status,
            steps=steps,
            loss=self.losses[-1] if self.losses else None,
            reason=self.reason,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            seconds=seconds,
            tokens_per_second=steps * train.batch_size * self.config.model.context / seconds,
            loss_error=self.errors[0],
            gradient_error=self.errors[1],
        )


def train(
    members: Sequence[Member], sync_every: int | None = None
) -> Iterator[tuple[Member, TrialResult]]:
    """Train the models in place, log their rows, and yield each trial when it ends.

    A trial ends at the last step or when it diverges, which has no effect on the other trials. The
    rows that a trial had logged before its checkpoint are logged again, so that a recorder gets the
    same rows as from a trial that was never interrupted.

    Args:
        members: trials that differ in PER_TRIAL_KNOBS only, and start at the same step.
        sync_every: steps between two reads from the device; by default DEVICE_SYNC_EVERY.
    """
    for member in members:
        for rows in member.rows:
            member.recorder.log(rows)
    last, step = members[0].config.train.steps, members[0].start.step
    start = time.perf_counter()
    while members:
        training = Training(members, start, sync_every)
        while step <= last and training.may_go_on(step):
            step = training.run_segment(step)
        training.read()
        seconds = time.perf_counter() - start
        for member in members:
            if member.status == "diverged":
                yield member, member.result(seconds)
        left = [k for k, member in enumerate(members) if member.status != "diverged"]
        for k in left:
            if step > last:
                members[k].errors = training.errors(k)
                yield members[k], members[k].result(seconds)
            else:
                members[k].state = training.array.state(k)
        members = [members[k] for k in left] if step <= last else []


@dataclass
class Segment:
    """Steps that were run without reading from the device. Probes run at the last of them only."""

    first_step: int
    stats_M3K: Tensor  # loss, log Z and gradient norm of each step
    packed: list[Packed]
    training: list[list[TrainingRow | None]] | None = None
    """Rows by step and member, once they were read; None for a trial that has diverged."""
    on_the_way: OnTheWay | None = None


class Training:
    """The training of an array until one of its trials ends."""

    def __init__(self, members: Sequence[Member], start: float, sync_every: int | None) -> None:
        """Make the array.

        Args:
            members: the trials.
            start: when their loop began, by time.perf_counter().
            sync_every: as in train.
        """
        self.members, self.config, self.start = members, members[0].config, start
        device = members[0].model.wte.weight.device
        graphs = graphs_for(device)
        self.array = make_array(members, capturable=graphs is not None)
        self.sync_every = sync_every or DEVICE_SYNC_EVERY[device.type]
        batch_shape = (self.config.train.batch_size, self.config.model.context + 1)
        clip = self.config.optim.clip
        self.steps = Steps(self.array, clip, batch_shape, self.sync_every, graphs)
        subjects = subjects_of(self.array, members, self.config.probed_layers())
        self.looks = Looks(subjects, self.steps, graphs)
        self.runs_ahead = graphs is not None
        """Whether the next steps are started before the values of these have been read."""
        self.unread: Segment | None = None

    def may_go_on(self, step: int) -> bool:
        """Save due checkpoints before a step. Return False if a trial has diverged."""
        if self._has_diverged():
            return False
        if is_save_due(self.members):
            self.read()
            if self._has_diverged():
                return False
            save(self.members, self.array, step, time.perf_counter() - self.start)
        return True

    def errors(self, k: int) -> tuple[float | None, float | None]:
        """Measure the error of the precision at the latest step, for the result of trial k."""
        output = self.steps.output
        precision = self.config.train.precision
        if precision == "float32" or output is None:
            return None, None
        weight = self.members[k].model.head.weight
        return head_errors(output.hidden_KBTD[k], weight, output.targets_KBT[k], precision)

    def _has_diverged(self) -> bool:
        return any(member.status == "diverged" for member in self.members)

    def run_segment(self, first_step: int) -> int:
        """Run a segment: the steps up to the next probes, or to the next read from the device.

        Returns:
            The next step to compute.
        """
        probes, last = self.config.probes, self.config.train.steps
        stop = first_step
        due: list[str] = []
        while stop <= last and stop < first_step + self.sync_every and not due:
            due = probes_due(probes, stop, last=stop == last)
            stop += 1
        self.steps.load(
            [[member.batch(step) for member in self.members] for step in range(first_step, stop)],
            [
                learning_rate(self.config.optim, step, last) if step < last else 0.0
                for step in range(first_step, stop)
            ],
        )
        for _ in range(first_step, stop - 1):
            self.steps.step()
        stats_M3K = self.steps.stats_M3K[: stop - first_step]
        segment = Segment(first_step, stats_M3K, [])
        if not due:
            self.steps.step()
        else:
            self._look(segment, stop - 1, due)
        values = [packed.values_KX for packed in segment.packed]
        segment.on_the_way = OnTheWay([stats_M3K, *values])
        if self.runs_ahead:
            self.read()  # the previous segment, while the device computes this one
        self.unread = segment
        if not self.runs_ahead:
            self.read()
        return stop

    def read(self) -> None:
        """Wait for the values of the last unread segment, and log its rows."""
        if self.unread is not None:
            self._log(self.unread)
            self.unread = None

    def _look(self, segment: Segment, step: int, due: Sequence[str]) -> None:
        """Run a step, with the probes between its gradients and its update."""
        self.steps.gradients()
        wanted = list(range(len(self.members)))
        if not self.runs_ahead:
            segment.training = self._training_rows(segment.first_step, segment.stats_M3K)
            wanted = [k for k, row in enumerate(segment.training[-1]) if row]
        segment.packed += self.looks.before_update(due, wanted)
        if step == self.config.train.steps:
            return
        measures_update = step % self.config.probes.every == 0
        if measures_update:
            self.looks.remember(wanted)
        self.steps.update()
        if measures_update:
            segment.packed += self.looks.after_update(wanted)

    def _training_rows(self, first_step: int, stats_M3K: Tensor) -> list[list[TrainingRow | None]]:
        """Make rows of statistics on the host, and mark the trials that have diverged."""
        optim, steps = self.config.optim, self.config.train.steps
        found = []
        for step, (losses, log_zs, norms) in enumerate(stats_M3K.tolist(), first_step):
            lr = learning_rate(optim, step, steps) if step < steps else None
            rows: list[TrainingRow | None] = []
            for member, loss, log_z, norm in zip(self.members, losses, log_zs, norms, strict=True):
                row = TrainingRow(step=step, loss=loss, log_z=log_z, lr=lr, grad_norm=norm)
                ended = member.status == "diverged" or member.has_diverged(row)
                rows.append(None if ended else row)
            found.append(rows)
        return found

    def _log(self, segment: Segment) -> None:
        """Wait for the values of a segment, and log the rows of all trials."""
        assert segment.on_the_way
        stats_M3K, *values = segment.on_the_way.arrived()
        training = segment.training or self._training_rows(segment.first_step, stats_M3K)
        for step, rows_K in enumerate(training, segment.first_step):
            is_measured = step == segment.first_step + len(training) - 1
            for k, (member, row) in enumerate(zip(self.members, rows_K, strict=True)):
                if row is None:
                    continue
                rows: list[Row] = []
                for packed, values_KX in zip(segment.packed, values, strict=True):
                    if is_measured and k in packed.members:
                        rows += packed.rows(k, step, values_KX[k - packed.members.start])
                member.log([*rows, row])


def is_save_due(members: Sequence[Member]) -> bool:
    """Return whether every trial of an array has a checkpoint that is due."""
    return all(member.checkpoint and member.checkpoint.due() for member in members)


def save(members: Sequence[Member], array: ModelArray, step: int, seconds: float) -> None:
    """Save the checkpoints of all trials of an array, once each of them is due.

    They are saved at one step, so that the trials can continue as one array.

    Args:
        step: the next step to compute.
        seconds: time of the loop since the start of the members.
    """
    if not is_save_due(members):
        return
    start = time.perf_counter()
    for k, member in enumerate(members):
        assert member.checkpoint
        progress = Progress(step, member.rows, member.start.seconds + seconds)
        member.checkpoint.save(progress, array.state(k), start)


def make_array(members: Sequence[Member], *, capturable: bool = False) -> ModelArray:
    """Make an array of the models, and load into it the states that the members carry."""
    array = ModelArray(
        [member.model for member in members],
        members[0].config.optim,
        members[0].config.train.precision,
        capturable,
    )
    states = [member.state for member in members if member.state]
    # Where a member has no state, all are at step 0, which only some of them had saved.
    if len(states) == len(members):
        array.load(states)
    for member in members:
        member.state = None
    return array
