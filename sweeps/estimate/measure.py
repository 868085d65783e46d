"""Measure a few steps of trials, in as many Ray workers as will run at a time.

Measuring takes at most SHARE_OF_SWEEP of the sweep it is for. How long the sweep is shows only in
the first steps that are measured, so a worker decides itself when to stop.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gptcore.config import Scalar, TrialConfig
from gptcore.corpus import Texts
from gptcore.experiment import Trial, run_trials
from gptcore.records import MemoryRecorder, Row, TrainingRow
from gptcore.units import peak_memory
from sweeps.estimate.cost import Measured, shortened, training_seconds
from sweeps.execution.faults import fault_of_trial
from sweeps.execution.resources import Resources, needs_of
from tracking.charts import chart_points
from tracking.tables import write_tables

SHARE_OF_SWEEP = 0.1
"""The largest share of a sweep that its measuring may take."""
MIN_SECONDS = 2.0
"""Seconds of steps that a worker measures in any case. Its start takes longer than that, so that to
stop even sooner would save little. Each shape has one such measurement: memory is known only then.
"""
SECONDS_A_WORKER = 20.0
"""Seconds of steps that a worker measures at most, however long the sweep is."""
MIN_SPEEDUP = 1.1
"""The number of trials at a time is doubled if that makes a machine at least this many times as
fast."""
LONG_STEP = 0.1
"""Seconds: an array saves only the overhead of calls, a fraction of a millisecond each."""
GPU_FILL_FRACTION = 0.9
"""The share of a GPU's memory that trials may fill."""
CUDA_CONTEXT_BYTES = 600 * 2**20
"""Bytes of a GPU's memory that CUDA takes for each process, besides what PyTorch reserves."""


@dataclass(frozen=True)
class Budget:
    """What decides how long may be measured."""

    known: float = 0.0  # seconds of the sweep that are known from earlier measurements
    steps: float = math.inf  # steps of trials that each slot makes besides: their time is not known
    spent: float = 0.0  # seconds of measuring so far

    def left(self, step_seconds: float) -> float:
        """Return the seconds left for measuring, if a step of a trial takes so long."""
        return SHARE_OF_SWEEP * (self.known + self.steps * step_seconds) - self.spent


@dataclass(frozen=True)
class Tried:
    """What one worker measured."""

    measured: list[Measured]  # arrays of growing size, each of which paid
    cut_short: bool  # the budget was spent before every size was tried, and each for long enough
    failure: str  # why the next size failed; empty if none did


class MeasuringTimeUp(Exception):
    """Ends a trial that has been measured for long enough."""


class Limit:
    """Tells a worker when it has measured for long enough."""

    def __init__(self, budget: Budget, requested_at: float) -> None:
        """Begin to count at the end of the worker's first step.

        Args:
            budget: of the sweep, when the measurement was requested.
            requested_at: when that was, in seconds since the epoch.
        """
        self.budget, self.requested_at = budget, requested_at
        self.begun: float | None = None
        self.waited = 0.0  # seconds from the request to the first step
        self.cut_short = False

    def begin(self) -> None:
        """Note that a step has ended: measuring begins with the first one."""
        if self.begun is None:
            self.begun, self.waited = time.perf_counter(), time.time() - self.requested_at

    def left(self, step_seconds: float) -> float:
        """Return the seconds left for this worker, if a step of a trial takes so long."""
        affordable = max(MIN_SECONDS, self.budget.left(step_seconds) - self.waited)
        passed = time.perf_counter() - self.begun if self.begun else 0.0
        return min(SECONDS_A_WORKER, affordable) - passed

    def allows(self, seconds: float, step_seconds: float) -> bool:
        """Return whether so many seconds more may be measured. If not, note why."""
        if self.left(step_seconds) >= seconds:
            return True
        affordable = self.budget.left(step_seconds) - self.waited
        self.cut_short = self.cut_short or affordable < SECONDS_A_WORKER
        return False


class Stopwatch(MemoryRecorder):
    """Keeps the rows of a trial, and the time at which each step ended."""

    def __init__(self, limit: Limit, array: int) -> None:
        super().__init__()
        self.limit, self.array = limit, array
        self.begun = time.perf_counter()
        self.ends: list[float] = []  # by step

    @property
    def seconds(self) -> float:
        return (self.ends or [self.begun])[-1] - self.begun

    @property
    def step_seconds(self) -> float:
        """The median of a step, for each trial of the array; the first step is left out."""
        pairs = itertools.pairwise(self.ends)
        return median(end - start for start, end in pairs) / self.array

    def log(self, rows: Sequence[Row]) -> None:
        super().log(rows)
        if any(isinstance(row, TrainingRow) for row in rows):
            self.ends.append(time.perf_counter())
            self.limit.begin()
            if len(self.ends) > 1 and not self.limit.allows(0.0, self.step_seconds):
                raise MeasuringTimeUp


def timed(config: TrialConfig, array: int, texts: Texts, limit: Limit) -> Stopwatch:
    """Run an array of such trials until it ends or has been measured for long enough.

    Returns:
        The stopwatch of the first trial.
    """
    stopwatches = [Stopwatch(limit, array) for _ in range(array)]
    with contextlib.suppress(MeasuringTimeUp):
        run_trials(
            [
                Trial(replace(config, init=replace(config.init, seed=seed)), stopwatch)
                for seed, stopwatch in enumerate(stopwatches)
            ],
            preloaded_texts=texts,
            sync_every=1,  # each step is timed by itself
        )
    return stopwatches[0]


def measure(
    params: Mapping[str, Scalar],
    texts: Texts,
    sizes: Sequence[int] = (1,),
    budget: Budget | None = None,
    growing: bool = False,
    room: float = math.inf,
    requested_at: float | None = None,
) -> Tried:
    """Measure shortened trials in a Ray worker: an array of the first size, then of the others.

    A process's first trial is slower than its later ones. So a trial that leaves enough time is run
    twice, and the second run counts.

    Args:
        params: knobs of the full trial.
        texts: corpora that need not be on this machine.
        sizes: trials that train together, in growing order.
        budget: without one, only SECONDS_A_WORKER limits the time.
        growing: try a larger size only while there is time for it, and while each makes the steps
            of a trial shorter by more than MIN_SPEEDUP; else try all.
        room: bytes of memory that the process may take. A size is reduced to what they hold.
        requested_at: when the measurement was requested, in seconds since the epoch.
    """
    empty, entered = peak_memory(), time.time()
    requested_at = requested_at or entered
    config, limit = TrialConfig.from_flat(params), Limit(budget or Budget(), requested_at)
    short, found, failure = shortened(config), list[Measured](), ""
    warm: Stopwatch | None = None
    for size in sizes:
        if warm:
            size = min(size, held(found[-1], room))
            if size <= found[-1].array or (growing and median(found[0].steps) > LONG_STEP):
                break
            if growing and not limit.allows(warm.seconds, warm.step_seconds):
                break
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            first = stopwatch = timed(short, size, texts, limit)
        except Exception as error:
            if not found:
                raise
            failure = f"arrays of {size} fail: {fault_of_trial(error)}"
            break
        is_short = not found and first.seconds < SECONDS_A_WORKER / 8
        if is_short and limit.allows(first.seconds, first.step_seconds):
            stopwatch = timed(short, size, texts, limit)
        warm = stopwatch
        delay = entered + first.seconds - stopwatch.seconds - requested_at
        found.append(_measured(stopwatch, found[0].start_delay if found else delay, empty))
        if growing and len(found) > 1:
            before, now = (training_seconds(config, [one]) / one.array for one in found[-2:])
            if before < MIN_SPEEDUP * now:
                found.pop()
                break
    return Tried(found, limit.cut_short, failure)


def held(measured: Measured, room: float) -> int:
    """Return how many trials of an array this memory, and that of the GPU, hold.

    Args:
        measured: what a smaller array took.
        room: bytes of memory for the process.
    """
    one = max(1.0, (measured.memory - measured.empty) / measured.array)
    most = (room - measured.empty) / one
    if measured.gpu_memory:
        one = max(1.0, (measured.gpu_memory - CUDA_CONTEXT_BYTES) / measured.array)
        most = min(most, (GPU_FILL_FRACTION * measured.gpu_size - CUDA_CONTEXT_BYTES) / one)
    return int(min(most, 10**6))


def _measured(stopwatch: Stopwatch, start_delay: float, empty: int) -> Measured:
    """Collect what an array took whose first trial this stopwatch has timed."""
    trained = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            file.stem: file.stat().st_size for file in write_tables(stopwatch.rows, Path(folder))
        }
    gpu_memory, gpu_size = peak_gpu_memory()
    moments = [stopwatch.begun, *stopwatch.ends]
    return Measured(
        start_delay=start_delay,
        steps=[end - start for start, end in itertools.pairwise(moments)],
        writing=stopwatch.array * (time.perf_counter() - trained),
        rows={
            table: [getattr(row, "step", None) for row in rows]
            for table, rows in stopwatch.rows.items()
        },
        points=[
            step
            for rows in stopwatch.rows.values()
            for row in rows
            for _, step, _ in chart_points(row)
        ],
        bytes=sizes,
        memory=peak_memory(),
        gpu_memory=gpu_memory,
        gpu_size=gpu_size,
        empty=empty,
        array=stopwatch.array,
    )


def peak_gpu_memory() -> tuple[int, int]:
    """Return the peak of this process's GPU memory and the GPU's size, in bytes; 0, 0 if unused."""
    if not torch.cuda.is_initialized():
        return 0, 0
    return CUDA_CONTEXT_BYTES + torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]


def wait_for_machine(needs: Resources) -> None:
    """Wait until the cluster has a machine for a trial with these needs."""
    group = ray.util.placement_group([dict(needs)])
    try:
        while not group.wait(1):
            pass
    finally:
        ray.util.remove_placement_group(group)


def side_by_side(
    config: TrialConfig,
    texts: ray.ObjectRef[Texts],
    count: int,
    sizes: Sequence[int] = (1,),
    budget: Budget | None = None,
    growing: bool = False,
    room: float = math.inf,
) -> list[Tried]:
    """Measure in `count` concurrent workers on one machine, and on one GPU if they use a GPU.

    Args:
        config: of the full trial.
        texts: corpora, in Ray's object store.
        count: workers at a time.
        sizes: as `measure` takes them, as all that follow.
        budget: see there.
        growing: see there.
        room: see there.

    Raises:
        ray.exceptions.RayError: a worker failed.
    """
    needs = needs_of(config, per_gpu=count)
    together = {name: math.ceil(count * need) for name, need in needs.items()}
    group = ray.util.placement_group([together])
    # A worker ends with its trials: the peak of its memory is then the peak of these.
    task: Any = ray.remote(
        num_cpus=needs["CPU"],
        num_gpus=needs.get("GPU", 0),
        max_calls=1,
        max_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )(measure)
    params = config.to_flat()
    try:
        while not group.wait(1):
            pass  # a cluster may have to start a machine first
        requests = [
            task.remote(params, texts, sizes, budget, growing, room, time.time())
            for _ in range(count)
        ]
        tried: list[Tried] = ray.get(requests)
        return tried
    finally:
        ray.util.remove_placement_group(group)
