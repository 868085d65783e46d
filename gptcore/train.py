"""The training loop of trials that train side by side as an array; one alone is an array of one.

Step k is the state of a model after k updates. Its loss is taken on batch k, which the model has
not been updated on; then come its gradient and the probes; then the update makes step k + 1. The
last step has no update: it is there to be looked at.
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
from gptcore.probes import Moment, due, observe, update_rows, values_of
from gptcore.records import Recorder, Row, TrainingRow, TrialResult
from gptcore.token_groups import TokenGroups
from gptcore.token_probs import Reading

EXPLOSION = 10.0
"""A loss this many times the larger of its start and ln V ends the trial as diverged."""

DEVICE_SYNC_EVERY = {"cpu": 1, "cuda": 10}
"""Steps after which the host reads what a device has computed: waiting for a GPU leaves it idle."""


@dataclass
class Member:
    """One trial of an array."""

    config: TrialConfig
    model: GPT
    initial: Mapping[str, Tensor]  # step 0's values of the tensors that are looked at, by name
    corpus: Corpus
    groups: TokenGroups
    recorder: Recorder
    checkpoint: Checkpoint | None
    begun: Progress
    state: State | None  # where it goes on, if it has begun, until an array takes it over

    def __post_init__(self) -> None:
        device = self.model.wte.weight.device
        self.fixed_texts = {
            text: upload(windows, device) for text, windows in self.corpus.fixed_texts().items()
        }
        self.rows = self.begun.rows
        self.losses = [
            row.loss for rows in self.rows for row in rows if isinstance(row, TrainingRow)
        ]
        self.status: Literal["finished", "diverged"] = "finished"
        self.reason = ""
        self.errors: tuple[float | None, float | None] = (None, None)

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.corpus.batch(
            step, batch_size=self.config.train.batch_size, seed=self.config.corpus.data_seed
        )

    def log(self, rows: list[Row]) -> None:
        self.recorder.log(rows)
        self.rows.append(rows)

    def has_diverged(self, row: TrainingRow) -> bool:
        """Whether the trial ends with this step's loss, which is kept if not."""
        loss, chance = row.loss, math.log(self.config.model.vocab_size)
        exploded = self.losses and loss > EXPLOSION * max(self.losses[0], chance)
        if exploded or not math.isfinite(loss):
            self.status, self.reason = "diverged", f"loss {loss:.4g} at step {row.step}"
        else:
            self.losses.append(loss)
        return self.status == "diverged"

    def result(self, seconds: float) -> TrialResult:
        train, device = self.config.train, self.model.wte.weight.device
        steps = train.steps if self.status == "finished" else len(self.losses)
        seconds += self.begun.seconds
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
    """Train the models in place, logging rows as they come; -> each trial as it ends, at the last
    step or where it diverges, which the others do not notice.

    They differ in nothing but init and corpus, and have begun equally far. What a member has logged
    before is logged again: a recorder is given what a trial that was never cut off would give it.
    """
    config = members[0].config
    optim, probes, steps = config.optim, config.probes, config.train.steps
    device = members[0].model.wte.weight.device
    layers = config.probed_layers()
    sync_every = sync_every or DEVICE_SYNC_EVERY[device.type]
    for member in members:
        for rows in member.rows:
            member.recorder.log(rows)
    array = array_of(members)
    unread: list[tuple[int, Tensor]] = []  # steps, with the loss, log Z and norm of each, [3, K]
    start = time.perf_counter()
    for step in range(members[0].begun.step, steps + 1):
        if not unread:
            save(members, array, step, time.perf_counter() - start)
        batches = [member.batch(step) for member in members]
        ids_KBT, targets_KBT = (
            upload(np.stack(side), device) for side in zip(*batches, strict=True)
        )
        hidden_KBTD, heads = array.gradients(ids_KBT, targets_KBT)
        norm_K = array.norms()
        loss_K = torch.stack([head.loss for head in heads])
        log_z_K = torch.stack([head.log_z_BT.mean() for head in heads])
        unread.append((step, torch.stack([loss_K.double(), log_z_K.double(), norm_K])))
        looks = due(probes, step, last=step == steps)
        rows_of: dict[int, list[Row]] = {}  # of this step, by member, where it is read now
        if looks or len(unread) >= sync_every:
            for rows_K in training_rows(unread, config):
                for k, (member, row) in enumerate(zip(members, rows_K, strict=True)):
                    if member.status == "diverged" or member.has_diverged(row):
                        continue
                    if row.step < step:
                        member.log([row])
                    else:
                        rows_of[k] = [row]
            unread = []
        for k in rows_of if looks else ():
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
            rows_of[k][:0] = observe(moment, looks)
        if step < steps:
            moves = rows_of if step % probes.every == 0 else ()
            before = {k: values_of(members[k].model, layers) for k in moves}
            array.update(learning_rate(optim, step, steps), optim.clip, norm_K)
            for k, values in before.items():
                rows_of[k][-1:-1] = update_rows(step, members[k].model, layers, values)
        for k, rows in rows_of.items():
            members[k].log(rows)
        if any(member.status == "diverged" for member in members):
            seconds = time.perf_counter() - start
            yield from ((one, one.result(seconds)) for one in members if one.status == "diverged")
            left = [k for k, member in enumerate(members) if member.status != "diverged"]
            if not left:
                return
            for k in left:
                members[k].state = array.state(k)
            members = [members[k] for k in left]
            hidden_KBTD, targets_KBT = hidden_KBTD[left], targets_KBT[left]
            array = array_of(members)
    seconds = time.perf_counter() - start
    for k, member in enumerate(members):
        if array.head_dtype != torch.float32:
            weight = member.model.head.weight
            member.errors = head_errors(hidden_KBTD[k], weight, targets_KBT[k], array.head_dtype)
        yield member, member.result(seconds)


def save(members: Sequence[Member], array: ModelArray, step: int, seconds: float) -> None:
    """Save every trial once it is due for all, so that they go on from one step, as an array."""
    saved = [(k, member, member.checkpoint) for k, member in enumerate(members)]
    if not all(checkpoint and checkpoint.due() for _, _, checkpoint in saved):
        return
    begun = time.perf_counter()
    for k, member, checkpoint in saved:
        assert checkpoint
        progress = Progress(step, member.rows, member.begun.seconds + seconds)
        checkpoint.save(progress, array.state(k), begun)


def array_of(members: Sequence[Member]) -> ModelArray:
    """The models as an array, at the states that they have left off at, which go over to it."""
    array = ModelArray(
        [member.model for member in members],
        members[0].config.optim,
        members[0].config.train.precision,
    )
    states = [member.state for member in members if member.state]
    if len(states) == len(members):  # else no step has been made, and some have saved that
        array.load(states)
    for member in members:
        member.state = None
    return array


def training_rows(
    unread: Sequence[tuple[int, Tensor]], config: TrialConfig
) -> list[list[TrainingRow]]:
    """The rows of some steps, by member; a device is waited for once."""
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
    """The values on the device, for which nobody waits."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
