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
"""The shortest cadence of a measured trial: some steps between two probes have no probe."""
OVERHEAD = 0.3
"""Seconds that Tune and MLflow add to a trial: benchmarks/scale_simulation.py."""
POINT_BYTES = 270
"""Bytes that a point of a chart takes in MLflow's SQLite file, with its index."""


@dataclass(frozen=True)
class Cost:
    """What one batch of trials takes."""

    seconds: float
    low: float  # seconds, if every step were as fast as the fastest tenth of steps
    high: float  # seconds, if every step were as slow as the slowest tenth
    memory: int  # bytes
    gpu_memory: int  # bytes
    disk: int  # bytes, of each trial


@dataclass(frozen=True)
class Measured:
    """What one shortened trial, or an array of such trials, took."""

    start_delay: float  # seconds from the request to the first step
    steps: list[float]  # seconds of each step; the first includes the preparation
    writing: float  # seconds of writing the tables
    rows: Mapping[str, list[int | None]]  # by table, the step of each row
    points: list[int]  # the step of each point for MLflow's charts
    bytes: Mapping[str, int]  # by table
    memory: int
    gpu_memory: int
    gpu_size: int
    empty: int = 0  # bytes that the process held before it began
    array: int = 1  # trials; rows, points and bytes are those of one trial


def shape_of(config: TrialConfig) -> TrialConfig:
    """Return the trial that represents a shape: knobs that do not change its time are defaults."""
    plain = TrialConfig()
    return replace(
        config,
        init=plain.init,
        corpus=replace(config.corpus, subset="all", data_seed=0),
        optim=replace(plain.optim, name=config.optim.name),
    )


def shortened(config: TrialConfig) -> TrialConfig:
    """Return a shorter trial that has every kind of step of the long one, and few of each."""
    cadences = sorted({getattr(config.probes, name) for name in CADENCES})
    shorter = {long: min(long, SHORTEST * 2**i) for i, long in enumerate(cadences)}
    probes = replace(
        config.probes, **{name: shorter[getattr(config.probes, name)] for name in CADENCES}
    )
    steps = min(config.train.steps, 2 * max(shorter.values()))
    return replace(config, probes=probes, train=replace(config.train, steps=steps))


def kind_of(config: TrialConfig, step: int) -> tuple[str, ...]:
    """Return the kind of a step, which decides its time: `first`, `last`, or the cadences of the
    probes that are due."""
    if step in (0, config.train.steps):
        return ("last" if step else "first",)
    return tuple(name for name in CADENCES if step % getattr(config.probes, name) == 0)


def training_seconds(config: TrialConfig, measured: Sequence[Measured]) -> float:
    """Compute the time of all steps of a batch from shortened batches.

    Each kind of step is counted as often as the full trial has it.
    """
    taken = _steps_by_kind(config, measured)
    # A kind of step that was not reached counts as the first step does, where all probes are due.
    return sum(
        count * fmean(taken.get(kind) or taken[("first",)])
        for kind, count in _kinds(config).items()
    )


def _kinds(config: TrialConfig) -> Counter[tuple[str, ...]]:
    """Count the steps of a trial by their kind."""
    return Counter(kind_of(config, step) for step in range(config.train.steps + 1))


def _steps_by_kind(
    config: TrialConfig, measured: Sequence[Measured]
) -> dict[tuple[str, ...], list[float]]:
    """Sort the seconds of the steps of shortened batches by the kind of the step."""
    short = shortened(config)
    taken: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
    for one in measured:
        for step, seconds in enumerate(one.steps):
            taken[kind_of(short, step)].append(seconds)
    return taken


def cost_of(config: TrialConfig, measured: Sequence[Measured]) -> Cost:
    """Compute the cost of a batch from shortened batches.

    Args:
        config: of the full trial.
        measured: what shortened ones took.
    """
    short, taken = shortened(config), _steps_by_kind(config, measured)
    wanted = _kinds(config)
    seconds = training_seconds(config, measured)
    plain = taken.get((), [1.0])
    tenths = quantiles(plain, n=10) if len(plain) > 1 else [plain[0]] * 9
    fixed = measured[0].array * OVERHEAD + fmean(one.writing for one in measured)
    held = Counter(kind_of(short, step) for step in range(len(measured[0].steps)))

    def repeats(step: int | None) -> float:
        if step is None:
            return 1.0
        kind = kind_of(short, step)
        return wanted[kind] / held[kind]

    disk = sum(
        measured[0].bytes[table] * fmean(map(repeats, steps))
        for table, steps in measured[0].rows.items()
        if steps
    )
    disk += POINT_BYTES * sum(map(repeats, measured[0].points))
    return Cost(
        seconds=fixed + seconds,
        low=fixed + seconds * tenths[0] / fmean(plain),
        high=fixed + seconds * tenths[-1] / fmean(plain),
        memory=max(one.memory for one in measured),
        gpu_memory=max(one.gpu_memory for one in measured),
        disk=round(disk),
    )


def makespan(seconds: Iterable[float], slots: int) -> float:
    """Return when the last batch ends if each starts, in order, as soon as a slot is free."""
    ends = [0.0] * slots
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)
