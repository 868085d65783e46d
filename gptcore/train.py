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
from gptcore.model import GPT, head_errors
from gptcore.optimizers import learning_rate
from gptcore.probes import Moment, observe, probes_due, update_rows, values_of
from gptcore.records import Recorder, Row, TrainingRow, TrialResult
from gptcore.token_groups import TokenGroups
from gptcore.token_probs import Reading

EXPLOSION = 10.0
"""A trial has diverged when its loss exceeds this many times its first loss, or ln V if larger."""

DEVICE_SYNC_EVERY = {"cpu": 1, "cuda": 10}
"""Steps between two reads of losses from a device, by its type. A GPU is idle during each read."""


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
            text: upload(windows, device) for text, windows in self.corpus.fixed_texts().items()
        }
        self.rows = self.start.rows
        self.losses = [
            row.loss for rows in self.rows for row in rows if isinstance(row, TrainingRow)
        ]
        self.status: Literal["finished", "diverged"] = "finished"
        self.reason = ""
        self.errors: tuple[float | None, float | None] = (None, None)

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the inputs and targets of one step, [batch_size, context] each."""
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
    config = members[0].config
    optim, probes, steps = config.optim, config.probes, config.train.steps
    device = members[0].model.wte.weight.device
    layers = config.probed_layers()
    sync_every = sync_every or DEVICE_SYNC_EVERY[device.type]
    for member in members:
        for rows in member.rows:
            member.recorder.log(rows)
    array = make_array(members)
    # Steps with their loss, log Z and gradient norm, [3, K], that are still on the device.
    unread: list[tuple[int, Tensor]] = []
    start = time.perf_counter()
    for step in range(members[0].start.step, steps + 1):
        if not unread:
            save(members, array, step, time.perf_counter() - start)
        batches = [member.batch(step) for member in members]
        ids_KBT, targets_KBT = (
            upload(np.stack(values), device) for values in zip(*batches, strict=True)
        )
        hidden_KBTD, heads = array.gradients(ids_KBT, targets_KBT)
        norm_K = array.norms()
        loss_K = torch.stack([head.loss for head in heads])
        log_z_K = torch.stack([head.log_z_BT.mean() for head in heads])
        unread.append((step, torch.stack([loss_K.double(), log_z_K.double(), norm_K])))
        due_probes = probes_due(probes, step, last=step == steps)
        # The rows of this step by member, if it is read now; without trials that diverged.
        step_rows: dict[int, list[Row]] = {}
        if due_probes or len(unread) >= sync_every:
            for rows_K in training_rows(unread, config):
                for k, (member, row) in enumerate(zip(members, rows_K, strict=True)):
                    if member.status == "diverged" or member.has_diverged(row):
                        continue
                    if row.step < step:
                        member.log([row])
                    else:
                        step_rows[k] = [row]
            unread = []
        for k in step_rows if due_probes else ():
            member = members[k]
            moment = Moment(
                step=step,
                model=member.model,
                initial=member.initial,
                layers=layers,
                groups=member.groups,
                fixed_texts=member.fixed_texts,
                batch=Reading(
                    text="batch",
                    ids_BT=ids_KBT[k],
                    hidden_BTD=hidden_KBTD[k],
                    log_z_BT=heads[k].log_z_BT,
                ),
            )
            step_rows[k][:0] = observe(moment, due_probes)
        if step < steps:
            measured = step_rows if step % probes.every == 0 else ()
            before = {k: values_of(members[k].model, layers) for k in measured}
            array.update(learning_rate(optim, step, steps), optim.clip, norm_K)
            for k, values in before.items():
                step_rows[k][-1:-1] = update_rows(step, members[k].model, layers, values)
        for k, rows in step_rows.items():
            members[k].log(rows)
        if any(member.status == "diverged" for member in members):
            seconds = time.perf_counter() - start
            for member in members:
                if member.status == "diverged":
                    yield member, member.result(seconds)
            left = [k for k, member in enumerate(members) if member.status != "diverged"]
            if not left:
                return
            for k in left:
                members[k].state = array.state(k)
            members = [members[k] for k in left]
            hidden_KBTD, targets_KBT = hidden_KBTD[left], targets_KBT[left]
            array = make_array(members)
    seconds = time.perf_counter() - start
    for k, member in enumerate(members):
        if array.head_dtype != torch.float32:
            weight = member.model.head.weight
            member.errors = head_errors(hidden_KBTD[k], weight, targets_KBT[k], array.head_dtype)
        yield member, member.result(seconds)


def save(members: Sequence[Member], array: ModelArray, step: int, seconds: float) -> None:
    """Save the checkpoints of all trials of an array, once each of them is due.

    They are saved at one step, so that the trials can continue as one array.

    Args:
        step: the next step to compute.
        seconds: time of the loop since the start of the members.
    """
    checkpoints = [member.checkpoint for member in members]
    if not all(checkpoint and checkpoint.due() for checkpoint in checkpoints):
        return
    start = time.perf_counter()
    for k, (member, checkpoint) in enumerate(zip(members, checkpoints, strict=True)):
        assert checkpoint
        progress = Progress(step, member.rows, member.start.seconds + seconds)
        checkpoint.save(progress, array.state(k), start)


def make_array(members: Sequence[Member]) -> ModelArray:
    """Make an array of the models, and load into it the states that the members carry."""
    array = ModelArray(
        [member.model for member in members],
        members[0].config.optim,
        members[0].config.train.precision,
    )
    states = [member.state for member in members if member.state]
    # Where a member has no state, all are at step 0, which only some of them had saved.
    if len(states) == len(members):
        array.load(states)
    for member in members:
        member.state = None
    return array


def training_rows(
    unread: Sequence[tuple[int, Tensor]], config: TrialConfig
) -> list[list[TrainingRow]]:
    """Read the statistics of some steps from the device, all at once.

    Args:
        unread: steps with their loss, log Z and gradient norm, [3, K].

    Returns:
        For each step, the rows of the K members.
    """
    optim, steps = config.optim, config.train.steps
    values = torch.stack([stats_3K for _, stats_3K in unread]).tolist()
    return [
        [
            TrainingRow(
                step=step,
                loss=loss,
                log_z=log_z,
                lr=learning_rate(optim, step, steps) if step < steps else None,
                grad_norm=norm,
            )
            for loss, log_z, norm in zip(*stats_3K, strict=True)
        ]
        for (step, _), stats_3K in zip(unread, values, strict=True)
    ]


def upload(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy to the device asynchronously."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
