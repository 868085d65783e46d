"""How trials are packed: which train together as an array, and how many batches share a GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from statistics import median

import ray
import torch
from rich.console import Console

from gptcore.config import Scalar, TrialConfig
from gptcore.corpus import Texts
from gptcore.experiment import step_seconds
from sweeps.estimate.arrays import Batch, split
from sweeps.estimate.cost import Measured, cost_of
from sweeps.estimate.measure import CUDA_CONTEXT_BYTES, side_by_side
from sweeps.estimate.measurements import Measurement
from sweeps.execution.resources import (
    HEADROOM,
    fit,
    needs_of,
    schedulable_machines,
    slots,
)

MIN_SPEEDUP = 1.1
"""The number of trials at a time is doubled if that makes a machine at least this many times as
fast."""
MAX_ARRAY_SIZE = 64
"""The most trials of an array with --array auto."""
LONG_STEP = 0.1
"""Seconds: an array saves only the overhead of calls, a fraction of a millisecond each."""
GPU_FILL_FRACTION = 0.9
"""The share of a GPU's memory that trials may fill."""


def best_size(params: Mapping[str, Scalar], texts: Texts, most: int) -> int:
    """Find how many trials of a shape train together fastest on this machine.

    The size is doubled while that makes the step of each trial shorter by more than MIN_SPEEDUP.

    Args:
        params: knobs of the shape.
        texts: corpora that need not be on this machine.
        most: the largest size.
    """
    config, size = TrialConfig.from_flat(params), 1
    while 2 * size <= most:
        try:
            now, twice = step_seconds(config, (size, 2 * size), texts)
        except torch.OutOfMemoryError:
            break
        if now / size < MIN_SPEEDUP * twice / (2 * size):
            break
        size *= 2
    return size


def array_size(
    shape: TrialConfig,
    texts: ray.ObjectRef[Texts],
    asked: str,
    groups: Sequence[Sequence[str]],
    alone: Measured,
    console: Console,
) -> int:
    """Return how many trials of a shape train together.

    Args:
        shape: of the trials.
        texts: corpora, in Ray's object store.
        asked: --array: off is 1; a number is that many, or fewer if memory does not hold them; auto
            is as many as make trials faster, but leaves every slot something to do.
        groups: keys of trials that can train together.
        alone: what one trial took.
        console: for a line if memory is too small.
    """
    longest = max(map(len, groups))
    if asked == "off" or longest == 1:
        return 1
    needs = needs_of(shape)
    fits = [machine for machine in schedulable_machines() if fit(machine, needs)]
    memory = min(machine.get("memory", math.inf) / fit(machine, needs) for machine in fits)
    held = (memory / HEADROOM - alone.empty) / max(1, alone.memory - alone.empty)
    if alone.gpu_memory:
        free = GPU_FILL_FRACTION * alone.gpu_size - CUDA_CONTEXT_BYTES
        held = min(held, free / max(1, alone.gpu_memory - CUDA_CONTEXT_BYTES))
    most = max(1, int(min(longest, held)))
    if asked != "auto":
        if most < min(int(asked), longest):
            console.print(f"--array {asked}: memory is enough only for arrays of {most} trials")
        return min(int(asked), most)
    if median(alone.steps) > LONG_STEP:
        return 1
    most = min(most, MAX_ARRAY_SIZE, math.ceil(sum(map(len, groups)) / slots(needs)))
    if most == 1:
        return 1
    task = ray.remote(
        num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_calls=1, max_retries=0
    )(best_size)
    try:
        best: int = ray.get(task.remote(shape.to_flat(), texts, most))
    except ray.exceptions.RayError as error:
        console.print(f"arrays could not be measured: {last_line(error)}", soft_wrap=True)
        return 1
    return best


def share_of_gpu(
    config: TrialConfig,
    batches: int,
    measure_concurrent: Callable[[int], list[Measured]],
    measured: list[Measured],
) -> tuple[int, list[Measured]]:
    """Find how many batches of a shape a GPU runs at a time.

    The number is doubled while that makes the GPU faster by more than MIN_SPEEDUP, and while cores,
    memory, GPU memory and the number of batches suffice.

    Args:
        config: of the full trial.
        batches: how many batches there are.
        measure_concurrent: measures that many concurrent batches.
        measured: what one batch took.

    Returns:
        The number, and what the batches then took.
    """
    gpus = [machine for machine in schedulable_machines() if machine.get("GPU")]
    cores = min(machine["CPU"] / machine["GPU"] for machine in gpus)
    memory = min(machine.get("memory", math.inf) / machine["GPU"] for machine in gpus)
    most = min(cores, math.ceil(batches / sum(machine["GPU"] for machine in gpus)))
    count = 1
    while 2 * count <= most:
        if any(
            2 * count * one.gpu_memory > GPU_FILL_FRACTION * one.gpu_size
            or 2 * count * one.memory * HEADROOM > memory
            for one in measured
        ):
            break
        try:
            more = measure_concurrent(2 * count)
        except ray.exceptions.RayError:
            break  # what fits is known only then
        seconds, before = (cost_of(config, some).seconds for some in (more, measured))
        if before / count < MIN_SPEEDUP * seconds / (2 * count):
            break
        count, measured = 2 * count, more
    return count, measured


def arranged(
    shape: TrialConfig,
    groups: Sequence[Sequence[str]],
    texts: ray.ObjectRef[Texts],
    array: str,
    console: Console,
) -> Measurement:
    """Measure how trials of a shape run fastest.

    Args:
        shape: of the trials.
        groups: keys of trials that can train together.
        texts: corpora, in Ray's object store.
        array: as --array takes it.
        console: for a line if an array fails.

    Raises:
        ray.exceptions.RayError: a trial fails even alone.
    """
    needs = needs_of(shape)
    fits = 1 if "GPU" in needs else max(fit(machine, needs) for machine in schedulable_machines())

    def measure_concurrent(count: int, members: int = 1) -> list[Measured]:
        return side_by_side(shape, texts, count, members)

    alone = measure_concurrent(max(1, min(fits, sum(map(len, groups)))))
    most = array_size(shape, texts, array, groups, alone[0], console)
    while True:
        arrays = [some for group in groups for some in split(group, most)]
        members = max(map(len, arrays))
        try:
            measured = measure_concurrent(min(fits, len(arrays)), members) if members > 1 else alone
        except ray.exceptions.RayError as error:
            most = members // 2
            console.print(
                f"arrays of {members} fail: {last_line(error)}; trying arrays of {most}",
                soft_wrap=True,
            )
            continue
        per_gpu = 1
        if "GPU" in needs:
            of_these = functools.partial(measure_concurrent, members=members)
            per_gpu, measured = share_of_gpu(shape, len(arrays), of_these, measured)
        return Measurement(
            array=members,
            per_gpu=per_gpu,
            begins=max(one.start_delay for one in measured),
            cost=cost_of(shape, measured),
            date=date.today().isoformat(),
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
