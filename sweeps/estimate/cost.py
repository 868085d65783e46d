"""What a batch of trials costs, computed from what a few of its steps took.

A shape is all that a trial's time and memory depend on: its model, its probes, its optimiser, its
batch.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, quantiles

from gptcore.config import TrialConfig

CADENCES = ("every", "text_every", "histogram_every", "spectrum_every")
SHORTEST = 4
"""The shortest cadence of a trial that is measured: between two looks there are plain steps."""
OVERHEAD = 0.3
"""Seconds that Tune and MLflow take of a trial beside its own: benchmarks/scale_simulation.py."""
POINT_BYTES = 270
"""What a point of a chart takes in MLflow's SQLite file, with its index."""


@dataclass(frozen=True)
class Cost:
    """What one batch takes: seconds, also if all steps were as fast as the fastest tenth or as the
    slowest, bytes of memory and of a GPU's memory, and of disk for each of its trials."""

    seconds: float
    low: float
    high: float
    memory: int
    gpu_memory: int
    disk: int


@dataclass(frozen=True)
class Measured:
    """What one shortened trial took, or an array of them."""

    began: float  # seconds after it was asked for, since the epoch at first; the process was warm
    steps: list[float]  # seconds; the first step's are those of all that comes before as well
    writing: float  # seconds
    rows: Mapping[str, list[int | None]]  # by table, the step of each row
    points: list[int]  # the step of each point for MLflow's charts
    bytes: Mapping[str, int]  # by table
    memory: int
    gpu_memory: int
    gpu_size: int
    empty: int = 0  # bytes of memory that the process held before
    array: int = 1  # how many trials; rows, points and bytes are one's


def shape_of(config: TrialConfig) -> TrialConfig:
    """The trial that stands for all of its shape: what does not matter to time is the default's."""
    plain = TrialConfig()
    return replace(
        config,
        init=plain.init,
        corpus=replace(config.corpus, subset="all", data_seed=0),
        optim=replace(plain.optim, name=config.optim.name),
    )


def shortened(config: TrialConfig) -> TrialConfig:
    """The trial with every kind of step of its own, and few of each."""
    cadences = sorted({getattr(config.probes, name) for name in CADENCES})
    shorter = {long: min(long, SHORTEST * 2**i) for i, long in enumerate(cadences)}
    probes = replace(
        config.probes, **{name: shorter[getattr(config.probes, name)] for name in CADENCES}
    )
    steps = min(config.train.steps, 2 * max(shorter.values()))
    return replace(config, probes=probes, train=replace(config.train, steps=steps))


def kind_of(config: TrialConfig, step: int) -> tuple[str, ...]:
    """What of a step decides its time: whether it is the first or the last one, else which looks
    are due."""
    if step in (0, config.train.steps):
        return ("last" if step else "first",)
    return tuple(name for name in CADENCES if step % getattr(config.probes, name) == 0)


def cost_of(config: TrialConfig, measured: Sequence[Measured]) -> Cost:
    """A whole batch's cost from what shortened ones took, each kind of step counted as often as the
    trial has it."""
    short = shortened(config)
    taken: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
    for one in measured:
        for step, seconds in enumerate(one.steps):
            taken[kind_of(short, step)].append(seconds)
    wanted = Counter(kind_of(config, step) for step in range(config.train.steps + 1))
    # What there was no time for is taken for as long as the first step, where all looks are due.
    mean = {kind: fmean(taken.get(kind) or taken[("first",)]) for kind in wanted}
    seconds = sum(count * mean[kind] for kind, count in wanted.items())
    plain = taken.get((), [1.0])
    tenths = quantiles(plain, n=10) if len(plain) > 1 else [plain[0]] * 9
    fixed = measured[0].array * OVERHEAD + fmean(one.writing for one in measured)
    held = Counter(kind_of(short, step) for step in range(len(measured[0].steps)))

    def stands_for(step: int | None) -> float:
        if step is None:
            return 1.0
        kind = kind_of(short, step)
        return wanted[kind] / held[kind]

    disk = sum(
        measured[0].bytes[table] * fmean(map(stands_for, steps))
        for table, steps in measured[0].rows.items()
        if steps
    )
    disk += POINT_BYTES * sum(map(stands_for, measured[0].points))
    return Cost(
        seconds=fixed + seconds,
        low=fixed + seconds * tenths[0] / fmean(plain),
        high=fixed + seconds * tenths[-1] / fmean(plain),
        memory=max(one.memory for one in measured),
        gpu_memory=max(one.gpu_memory for one in measured),
        disk=round(disk),
    )


def makespan(seconds: Iterable[float], slots: int) -> float:
    """When the last of some trials ends that are begun in order, each as soon as a slot is free."""
    ends = [0.0] * slots
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)
