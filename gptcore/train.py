"""The training loop of one trial.

Step k is the state of the model after k updates. Its loss is taken on batch k, which the model has
not been updated on; then come its gradient and the probes; then the update makes step k + 1. The
last step has no update: it is there to be looked at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gptcore.checkpoint import Checkpoint, Progress
from gptcore.config import TrialConfig
from gptcore.corpus import Corpus
from gptcore.model import GPT, loss_of
from gptcore.optimizers import learning_rate, make_optimizer
from gptcore.probes import Moment, observe, update_rows, values_of
from gptcore.records import Recorder, TrainingRow, TrialResult
from gptcore.token_groups import TokenGroups
from gptcore.token_probs import Reading

EXPLOSION = 10.0
"""A loss this many times the larger of its start and ln V ends the trial as diverged."""


def train(
    model: GPT,
    corpus: Corpus,
    groups: TokenGroups,
    config: TrialConfig,
    recorder: Recorder,
    checkpoint: Checkpoint | None,
) -> TrialResult:
    """Train the model in place, logging rows as they come, until the last step or divergence.

    Where the checkpoint's file exists, begins where that ends, after its rows are logged again: the
    recorder is given what it would have been given by a trial that was never cut off.
    """
    device = model.wte.weight.device
    optim, steps = config.optim, config.train.steps
    optimizer = make_optimizer(model, optim)
    parameters = list(model.parameters())
    layers = config.probed_layers()
    initial = values_of(model, layers)
    fixed_texts = {
        text: torch.from_numpy(windows).to(device) for text, windows in corpus.fixed_texts().items()
    }
    status: Literal["finished", "diverged"] = "finished"
    reason, chance = "", math.log(config.model.vocab_size)
    begun = checkpoint.load(model, optimizer) if checkpoint else Progress(0, [], 0.0)
    logged = begun.rows
    for rows in logged:
        recorder.log(rows)
    losses = [row.loss for rows in logged for row in rows if isinstance(row, TrainingRow)]
    start = time.perf_counter() - begun.seconds
    for step in range(begun.step, steps + 1):
        if checkpoint and checkpoint.due():
            progress = Progress(step, logged, time.perf_counter() - start)
            checkpoint.save(progress, model, optimizer)
        ids_BT, targets_BT = (
            torch.from_numpy(side).to(device)
            for side in corpus.batch(
                step, batch_size=config.train.batch_size, seed=config.corpus.data_seed
            )
        )
        hidden_BTD = model(ids_BT)
        loss, log_z_BT = loss_of(hidden_BTD, model.head.weight, targets_BT)
        loss_value = loss.item()
        exploded = losses and loss_value > EXPLOSION * max(losses[0], chance)
        if exploded or not math.isfinite(loss_value):
            status, reason = "diverged", f"loss {loss_value:.4g} at step {step}"
            break
        loss.backward()
        moment = Moment(
            step=step,
            model=model,
            initial=initial,
            layers=layers,
            groups=groups,
            fixed_texts=fixed_texts,
            batch=Reading(text="batch", ids_BT=ids_BT, hidden_BTD=hidden_BTD, log_z_BT=log_z_BT),
        )
        rows = observe(moment, config.probes, last=step == steps)
        norm = norm_of([parameter.grad for parameter in parameters if parameter.grad is not None])
        lr = None
        if step < steps:
            if optim.clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, optim.clip, norm)
            lr = learning_rate(optim, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            before = values_of(model, layers) if step % config.probes.every == 0 else None
            optimizer.step()
            if before:
                rows.extend(update_rows(step, model, layers, before))
        optimizer.zero_grad()
        rows.append(
            TrainingRow(
                step=step,
                loss=loss_value,
                log_z=log_z_BT.mean().item(),
                lr=lr,
                grad_norm=norm.item(),
            )
        )
        recorder.log(rows)
        logged.append(rows)
        losses.append(loss_value)
    seconds = time.perf_counter() - start
    return TrialResult(
        status=status,
        steps=step,
        loss=losses[-1] if losses else None,
        reason=reason,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seconds=seconds,
        tokens_per_second=step * config.train.batch_size * config.model.context / seconds,
    )


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm over all elements, [], float64.

    Row by row first: a float32 sum over a whole embedding loses a thousandth.
    """
    return torch.cat([tensor.norm(dim=-1).flatten() for tensor in tensors]).double().norm()
