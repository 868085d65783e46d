"""Measure the models of an array during training, and bring what was measured to the host.

What the probes compute stays on the device until all of it is copied to the host at once. On a GPU
the probes are recorded (gptcore.replay), and training goes on while the values are copied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcore.probes import PROBES, Subject, moment_of, observe, update_rows
from gptcore.records import Row
from gptcore.replay import Graphs, replayed
from gptcore.steps import Steps
from gptcore.token_probs import Measured


@dataclass(frozen=True)
class Packed:
    """What probes have measured of some models of an array, in one tensor."""

    members: range  # the places of the models in the array
    values_KX: Tensor  # float64, which holds all values of float32 and all counts exactly
    pieces: Sequence[tuple[torch.Size, Callable[[int, Any], Sequence[Row]]]]
    """For each Measured the shape of the values of one model, and what makes rows of them."""

    def rows(self, k: int, step: int, values_X: Tensor) -> Iterator[Row]:
        """Make the rows of model k of the array from its values, which are on the host."""
        start = 0
        for shape, rows in self.pieces:
            stop = start + math.prod(shape)
            yield from rows(step, values_X[start:stop].view(shape).tolist())
            start = stop


def pack(members: range, found: Sequence[Measured]) -> Packed:
    """Copy what was measured into one tensor."""
    return Packed(
        members=members,
        values_KX=torch.cat([each.values.flatten(1).double() for each in found], dim=1),
        pieces=[(each.values.shape[1:], each.rows) for each in found],
    )


class Looks:
    """The probes of an array at the steps where they are due."""

    def __init__(self, subjects: Sequence[Subject], steps: Steps, graphs: Graphs | None) -> None:
        """Prepare to look at the subjects, whose steps are `steps`."""
        self.subjects, self.steps, self.graphs = subjects, steps, graphs
        self.recorded: dict[object, Callable[[], Packed]] = {}

    def before_update(self, probes: Sequence[str], wanted: Collection[int]) -> list[Packed]:
        """Run the probes on the subjects that have a wanted model, after `steps.gradients`."""
        quick = [name for name in probes if not PROBES[name].waits]
        waiting = [name for name in probes if PROBES[name].waits]
        found = []
        for subject in self._subjects(wanted):
            if quick:
                look = functools.partial(self._observe, subject, quick)
                found.append(self._replayed((*quick, subject.members), look))
            if waiting:
                found.append(self._observe(subject, waiting))
        return found

    def remember(self, wanted: Collection[int]) -> None:
        """Keep the weights before an update."""
        with torch.no_grad():
            for subject in self._subjects(wanted):
                subject.weights.remember()

    def after_update(self, wanted: Collection[int]) -> list[Packed]:
        """Measure the update since `remember`."""
        return [
            self._replayed(
                ("update", subject.members),
                functools.partial(
                    lambda subject: pack(subject.members, update_rows(subject)), subject
                ),
            )
            for subject in self._subjects(wanted)
        ]

    def _subjects(self, wanted: Collection[int]) -> list[Subject]:
        return [subject for subject in self.subjects if any(k in wanted for k in subject.members)]

    def _observe(self, subject: Subject, probes: Sequence[str]) -> Packed:
        assert self.steps.output
        return pack(subject.members, observe(moment_of(subject, self.steps.output), probes))

    def _replayed(self, key: object, function: Callable[[], Packed]) -> Packed:
        if key not in self.recorded:
            self.recorded[key] = replayed(function, self.graphs, warm_up_calls=1)
        return self.recorded[key]()


class OnTheWay:
    """Tensors that are being copied to the host, all in one copy, while the device goes on."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Start the copy."""
        self.shapes = [tensor.shape for tensor in tensors]
        values = torch.cat([tensor.flatten() for tensor in tensors])
        self.event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self.values = torch.empty_like(values, device="cpu", pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.values = values

    def arrived(self) -> list[Tensor]:
        """Wait for the copy, and return the tensors on the host."""
        if self.event:
            self.event.synchronize()
        pieces = self.values.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
