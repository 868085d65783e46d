"""The training steps of an array, between which only the inputs change.

All that a step reads and writes is in fixed memory on the device. So a step can be recorded once
and then be repeated by one call (gptcore.replay). Shapes are those of gptcore.array, with M steps
that run without a pause, and S = T + 1 tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcore.array import ModelArray
from gptcore.replay import Graphs, replayed


class StepOutput(NamedTuple):
    """What a step has computed besides gradients. The next step overwrites it."""

    ids_KBT: Tensor  # the inputs
    targets_KBT: Tensor
    hidden_KBTD: Tensor
    log_z_KBT: Tensor


class Steps:
    """The steps of an array. Call `load`, and then for each step `step`, which is `gradients` and
    `update`; or `gradients` alone to look at the models before the update."""

    def __init__(
        self,
        array: ModelArray,
        clip: float,
        batch_shape: Sequence[int],
        max_steps: int,
        graphs: Graphs | None,
    ) -> None:
        """Allocate the memory of the inputs and of the statistics.

        Args:
            array: the models; capturable if there are `graphs`.
            clip: the largest norm of a gradient, as in ModelArray.update.
            batch_shape: (B, S).
            max_steps: the largest M.
            graphs: what records the steps; None to run them as they are.
        """
        self.array, self.clip, self.graphs = array, clip, graphs
        K, device = len(array.models), array.models[0].wte.weight.device
        self.windows_MKBS = torch.zeros(
            max_steps, K, *batch_shape, dtype=torch.int64, device=device
        )
        self.lr_M = torch.zeros(max_steps, device=device)
        self.lrs: Sequence[float] = []
        self.stats_M3K = torch.zeros(max_steps, 3, K, dtype=torch.float64, device=device)
        """Loss, log Z and norm of the gradient of each step."""
        # Which of the M steps is next: a tensor where steps are recorded, else a number.
        self.next, self.next_1 = 0, torch.zeros(1, dtype=torch.int64, device=device)
        self.output: StepOutput | None = None
        self.step = replayed(self._step, graphs)
        self.gradients = replayed(self._gradients, graphs)
        self.update = replayed(self._update, graphs)

    def load(self, windows: Sequence[Sequence[NDArray[np.int64]]], lrs: Sequence[float]) -> None:
        """Copy the inputs of the next steps to the device, asynchronously.

        Args:
            windows: for each step and each model its sequences, [B, S].
            lrs: the learning rate of the update of each step.
        """
        windows_MKBS = torch.from_numpy(np.array(windows))
        self.windows_MKBS[: len(windows)].copy_(
            pinned(windows_MKBS, self.next_1.device), non_blocking=True
        )
        self.lrs = lrs
        if self.graphs:
            lr_M = pinned(torch.tensor(lrs), self.next_1.device)
            self.lr_M[: len(lrs)].copy_(lr_M, non_blocking=True)
        self.next = 0
        self.next_1.zero_()

    def _step(self) -> None:
        self._gradients()
        self._update()

    def _gradients(self) -> None:
        """Compute the gradients of a step, its statistics and its output."""
        windows_KBS = self._now(self.windows_MKBS)
        ids_KBT, targets_KBT = windows_KBS[..., :-1], windows_KBS[..., 1:]
        hidden_KBTD, heads = self.array.gradients(ids_KBT, targets_KBT)
        log_z_KBT = torch.stack([head.log_z_BT for head in heads])
        loss_K = torch.stack([head.loss for head in heads]).double()
        log_z_K = torch.stack([head.log_z_BT.mean() for head in heads]).double()
        stats_3K = torch.stack([loss_K, log_z_K, self.array.norms()])
        if self.graphs:
            self.stats_M3K.index_copy_(0, self.next_1, stats_3K[None])
        else:
            self.stats_M3K[self.next] = stats_3K
        output = StepOutput(ids_KBT, targets_KBT, hidden_KBTD, log_z_KBT)
        if self.output is None or self.graphs is None:
            self.output = output
        else:  # in the memory of the first step, where whatever was recorded will look for it
            for kept, values in zip(self.output, output, strict=True):
                kept.copy_(values)

    def _update(self) -> None:
        """Update the models by the gradients of the step, and go on to the next one."""
        lr = self._now(self.lr_M) if self.graphs else self.lrs[self.next]
        self.array.update(lr, self.clip, self._now(self.stats_M3K)[2])
        if self.graphs:
            self.next_1 += 1
        else:
            self.next += 1

    def _now(self, values_MX: Tensor) -> Tensor:
        """Return the values of the next step. Where steps are recorded, its number is a tensor."""
        return values_MX.index_select(0, self.next_1)[0] if self.graphs else values_MX[self.next]


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Return the values in memory from which they can be copied to the device asynchronously."""
    return values.pin_memory() if device.type == "cuda" else values
