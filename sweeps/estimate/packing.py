"""How trials are packed: which train together as an array, and how many batches share a GPU.

Both are one choice: the one with which all trials of a shape end first. An array spares the device
work, since its trials share every call. Several processes on a GPU spare it waiting: one of them
trains while another opens its trials' runs, or writes their tables.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date

import ray
from rich.console import Console

from gptcore.config import TrialConfig
from gptcore.corpus import Texts
from sweeps.estimate.arrays import Batch, split
from sweeps.estimate.cost import Cost, Measured, cost_of, makespan
from sweeps.estimate.measure import (
    GPU_FILL_FRACTION,
    MIN_SPEEDUP,
    Budget,
    side_by_side,
)
from sweeps.estimate.measurements import Measurement
from sweeps.execution.resources import (
    HEADROOM,
    fit,
    needs_of,
    schedulable_machines,
    slots,
)
from sweeps.plan import git_commit

MAX_ARRAY_SIZE = 64
"""The most trials of an array with --array auto."""


@dataclass(frozen=True)
class Packing:
    """A way to run the trials of a shape, and what that takes."""

    per_gpu: int  # processes on one GPU; 1 without a GPU
    measured: list[Measured]  # by those that ran side by side
    cost: Cost  # of one array
    seconds: float  # until all trials of the shape have ended

    @property
    def array(self) -> int:
        """Trials that train together, at most."""
        return min(one.array for one in self.measured)


def packing_of(
    shape: TrialConfig, groups: Sequence[Sequence[str]], measured: list[Measured], per_gpu: int = 1
) -> Packing:
    """Compute how long all trials of a shape take in arrays as they were measured."""
    cost, size = cost_of(shape, measured), min(one.array for one in measured)
    arrays = sum(len(split(group, size)) for group in groups)
    at_once = slots(needs_of(shape, per_gpu=per_gpu))
    return Packing(per_gpu, measured, cost, makespan([cost.seconds] * arrays, at_once))


def best_of(packings: Sequence[Packing]) -> Packing:
    """Return the fastest way; of two that hardly differ, the one that was tried first."""
    best = packings[0]
    for other in packings[1:]:
        if best.seconds > MIN_SPEEDUP * other.seconds:
            best = other
    return best


def sizes_to_try(asked: str, groups: Sequence[Sequence[str]], at_once: int) -> list[int]:
    """Return the sizes of arrays to try, in growing order.

    Args:
        asked: --array: off is 1; a number is that many; auto is every size that leaves each slot
            something to do, each at most twice the one before.
        groups: keys of trials that can train together.
        at_once: slots.
    """
    longest = max(map(len, groups))
    if asked == "off":
        return [1]
    if asked != "auto":
        return sorted({1, largest(groups, int(asked))})
    most = min(longest, MAX_ARRAY_SIZE, math.ceil(sum(map(len, groups)) / at_once))
    sizes = [most]
    while sizes[0] > 1:
        sizes.insert(0, math.ceil(sizes[0] / 2))
    return sizes


def largest(groups: Sequence[Sequence[str]], most: int) -> int:
    """Return how many trials the largest array has, if an array may have so many."""
    return max(len(some) for group in groups for some in split(group, most))


def measured_arrays(
    shape: TrialConfig,
    groups: Sequence[Sequence[str]],
    texts: ray.ObjectRef[Texts],
    asked: str,
    console: Console,
    budget: Budget,
) -> tuple[list[Packing], bool]:
    """Measure single trials of a shape and arrays of them, a process for each core or GPU.

    Returns:
        What was tried, in growing order of size, and whether the budget ended it. If arrays of a
        number were asked for, these alone count, or those that memory allows.

    Raises:
        ray.exceptions.RayError: a trial fails even alone.
    """
    needs = needs_of(shape)
    fits = [machine for machine in schedulable_machines() if fit(machine, needs)]
    most_at_once = 1 if "GPU" in needs else max((fit(one, needs) for one in fits), default=1)
    count = min(most_at_once, sum(map(len, groups)))
    memory = (machine.get("memory", math.inf) / fit(machine, needs) for machine in fits)
    room = min(memory, default=math.inf) / HEADROOM
    sizes, growing = sizes_to_try(asked, groups, slots(needs)), asked == "auto"
    while True:
        wanted, failure = sizes[-1], ""
        try:
            tried = side_by_side(shape, texts, count, sizes, budget, growing, room)
            failure = next((one.failure for one in tried if one.failure), "")
        except ray.exceptions.RayTaskError:
            raise  # the first size failed, a single trial
        except ray.exceptions.RayError as error:
            if wanted == 1:
                raise
            tried, failure = [], f"arrays of {wanted} fail: {last_line(error)}"
        if failure and not (growing and tried):
            smaller = 1 if growing else largest(groups, wanted // 2)
            console.print(f"{failure}; trying arrays of {smaller}", soft_wrap=True)
            sizes = sorted({1, smaller})
            continue
        if failure:
            console.print(failure, soft_wrap=True)
        number = min(len(one.measured) for one in tried)
        packings = [
            packing_of(shape, groups, [one.measured[i] for one in tried]) for i in range(number)
        ]
        if not growing:
            packings = packings[-1:]
            if packings[0].array < wanted:
                console.print(
                    f"--array {asked}: memory is enough only for arrays of {packings[0].array} "
                    "trials"
                )
        return packings, any(one.cut_short for one in tried)


def shared_gpus(
    shape: TrialConfig,
    groups: Sequence[Sequence[str]],
    texts: ray.ObjectRef[Texts],
    alone: Sequence[Packing],
    asked: str,
    budget: Budget,
    begun: float,
) -> tuple[list[Packing], bool]:
    """Measure several processes on a GPU.

    Their number is doubled while that makes trials end sooner by more than MIN_SPEEDUP, and while
    cores, memory, GPU memory, the number of trials and the budget suffice. What an array spares the
    device for one process, it spares it for each of several: their arrays are as large, unless
    there are too few trials. Where the budget is spent, the next number is foretold.

    Args:
        shape: of the trials.
        groups: keys of trials that can train together.
        texts: corpora, in Ray's object store.
        alone: what was measured for one process; the last one has the largest array that pays.
        asked: as --array takes it.
        budget: of the sweep, before this shape was measured.
        begun: when the measuring of this shape began, by time.monotonic().

    Returns:
        What was tried, perhaps with one more that was foretold, and whether the budget ended it.
    """
    gpus = [machine for machine in schedulable_machines() if machine.get("GPU")]
    number = sum(machine["GPU"] for machine in gpus)
    cores = min(machine["CPU"] / machine["GPU"] for machine in gpus)
    memory = min(machine.get("memory", math.inf) / machine["GPU"] for machine in gpus)
    trials = sum(map(len, groups))
    last, lasted = alone[-1], time.monotonic() - begun
    pace = last.seconds / (trials * shape.train.steps / slots(needs_of(shape)))
    tried: list[Packing] = []
    while True:
        count, size = 2 * last.per_gpu, alone[-1].array
        if asked == "auto":
            size = min(size, math.ceil(trials / (count * number)))
        size = largest(groups, size)
        arrays = sum(len(split(group, size)) for group in groups)
        if count > min(cores, math.ceil(arrays / number)) or any(
            count * one.gpu_memory > GPU_FILL_FRACTION * one.gpu_size
            or count * one.memory * HEADROOM > memory
            for one in last.measured
        ):
            return tried, False
        started = time.monotonic()
        if budget.left(pace) - (started - begun) < lasted:
            like = last if tried else next(one for one in alone if one.array >= size)
            return [*tried, foretold(shape, groups, like, size)], True
        try:
            found = side_by_side(shape, texts, count, [size])
        except ray.exceptions.RayError:
            return tried, False  # what fits is known only then
        lasted = time.monotonic() - started
        now = packing_of(shape, groups, [one.measured[0] for one in found], count)
        if last.seconds < MIN_SPEEDUP * now.seconds:
            return tried, False
        tried.append(now)
        last = now


def foretold(
    shape: TrialConfig, groups: Sequence[Sequence[str]], like: Packing, size: int
) -> Packing:
    """Foretell what twice as many processes on a GPU take, from what these took.

    The device is assumed to be busy already, so that each process trains half as fast. What a
    process writes takes no longer beside another process.
    """
    measured = [
        replace(one, array=size, steps=[2 * seconds for seconds in one.steps])
        for one in like.measured
    ]
    return packing_of(shape, groups, measured, 2 * like.per_gpu)


def arranged(
    shape: TrialConfig,
    groups: Sequence[Sequence[str]],
    texts: ray.ObjectRef[Texts],
    array: str,
    console: Console,
    budget: Budget,
) -> Measurement:
    """Measure how trials of a shape run fastest.

    Args:
        shape: of the trials.
        groups: keys of trials that can train together.
        texts: corpora, in Ray's object store.
        array: as --array takes it.
        console: for a line if an array fails.
        budget: of the sweep.

    Raises:
        ray.exceptions.RayError: a trial fails even alone.
    """
    begun = time.monotonic()
    packings, cut_short = measured_arrays(shape, groups, texts, array, console, budget)
    if "GPU" in needs_of(shape):
        shared, ended = shared_gpus(shape, groups, texts, packings, array, budget, begun)
        packings, cut_short = packings + shared, cut_short or ended
    best = best_of(packings)
    return Measurement(
        array=best.array,
        per_gpu=best.per_gpu,
        begins=max(one.start_delay for one in best.measured),
        cost=best.cost,
        date=date.today().isoformat(),
        took=time.monotonic() - begun,
        cut_short=cut_short,
        commit=git_commit(),
    )


def known_batches(
    found: Measurement, shape: TrialConfig, groups: Sequence[Sequence[str]], array: str
) -> list[Batch]:
    """Arrange trials of a shape as a measurement found best, perhaps one of more trials."""
    alone, most = needs_of(shape), found.array
    if array == "auto":
        most = min(most, math.ceil(sum(map(len, groups)) / slots(alone)))
    arrays = [some for group in groups for some in split(group, most)]
    gpus = sum(machine.get("GPU", 0.0) for machine in schedulable_machines())
    per_gpu = min(found.per_gpu, math.ceil(len(arrays) / gpus)) if gpus else 1
    needs = needs_of(shape, found.cost.memory, per_gpu)
    return [Batch(some, needs) for some in arrays]


def unmeasured_batches(
    shape: TrialConfig, groups: Sequence[Sequence[str]], array: str
) -> list[Batch]:
    """Arrange trials of a shape that was never measured.

    Each batch has a core, or a GPU if it may use one; it is an array only if --array is a number.
    """
    most = int(array) if array.isdecimal() else 1
    needs = needs_of(shape)
    return [Batch(some, needs) for group in groups for some in split(group, most)]


def arrangement(batches: Sequence[Batch]) -> str:
    """Say how batches run: `one trial per core`."""
    largest = max((len(batch.keys) for batch in batches), default=1)
    units = sorted({"GPU" if "GPU" in batch.needs else "core" for batch in batches})
    what = f"one array of up to {largest} trials" if largest > 1 else "one trial"
    return f"{what} per {' or '.join(units)}"


def last_line(error: Exception) -> str:
    """Return the last line of an error, which in Ray's says what happened."""
    return str(error).strip().splitlines()[-1].strip()
