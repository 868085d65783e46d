"""The training loop of one trial.

Step k is the state of the model after k updates. Its loss is taken on batch k, which the model has
not been updated on; then come its gradient and the probes; then the update makes step k + 1. The
last step has no update: it is there to be looked at.
"""

from __future__ import annotations

import math
import time
from typing import Literal

import torch

from gptcore.config import TrialConfig
from gptcore.corpus import Corpus
from gptcore.model import GPT, loss_of
from gptcore.optimizers import learning_rate, make_optimizer
from gptcore.probes import Moment, observe, update_rows, values_of
from gptcore.records import Recorder, TrainingRow, TrialResult
from gptcore.token_groups import TokenGroups

EXPLOSION = 10.0
"""A loss this many times the larger of its start and ln V ends the trial as diverged."""


def train(
    model: GPT, corpus: Corpus, groups: TokenGroups, config: TrialConfig, recorder: Recorder
) -> TrialResult:
    """Train the model in place, logging rows as they come, until the last step or divergence."""
    device = model.wte.weight.device
    optim, steps = config.optim, config.train.steps
    optimizer = make_optimizer(model, optim)
    parameters = list(model.parameters())
    initial = values_of(model)
    status: Literal["finished", "diverged"] = "finished"
    reason, ceiling = "", EXPLOSION * math.log(config.model.vocab_size)
    last_loss: float | None = None
    start = time.perf_counter()
    for step in range(steps + 1):
        ids_BT, targets_BT = (
            torch.from_numpy(side).to(device)
            for side in corpus.batch(
                step,
                batch_size=config.train.batch_size,
                context=config.model.context,
                seed=config.corpus.data_seed,
            )
        )
        hidden_BTD = model(ids_BT)
        loss, log_z_BT = loss_of(hidden_BTD, model.head.weight, targets_BT)
        loss_value = loss.item()
        if step == 0 and math.isfinite(loss_value):
            ceiling = max(ceiling, EXPLOSION * loss_value)
        if not loss_value <= ceiling:  # NaN too
            status, reason = "diverged", f"loss {loss_value:.4g} at step {step}"
            break
        loss.backward()
        moment = Moment(
            step=step,
            model=model,
            initial=initial,
            groups=groups,
            ids_BT=ids_BT,
            hidden_BTD=hidden_BTD,
            log_z_BT=log_z_BT,
        )
        rows = observe(moment, config.probes, last=step == steps)
        norm = torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in parameters if parameter.grad is not None]
        )
        lr = None
        if step < steps:
            if optim.clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, optim.clip, norm)
            lr = learning_rate(optim, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            before = values_of(model) if step % config.probes.every == 0 else None
            optimizer.step()
            if before:
                rows.extend(update_rows(step, model, before))
        optimizer.zero_grad()
        rows.append(TrainingRow(step=step, loss=loss_value, lr=lr, grad_norm=norm.item()))
        recorder.log(rows)
        last_loss = loss_value
    seconds = time.perf_counter() - start
    return TrialResult(
        status=status,
        steps=step,
        loss=last_loss,
        reason=reason,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seconds=seconds,
        tokens_per_second=step * config.train.batch_size * config.model.context / seconds,
    )
