"""Measure a few steps of trials, in as many Ray workers as will run at a time."""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gptcore.config import Scalar, TrialConfig
from gptcore.corpus import Texts
from gptcore.experiment import Trial, run_trials
from gptcore.records import MemoryRecorder, Row, TrainingRow
from gptcore.units import peak_memory
from sweeps.estimate.cost import Measured, shortened
from sweeps.execution.resources import needs_of
from tracking.charts import chart_points
from tracking.tables import write_tables

SECONDS_A_SHAPE = 20.0
CUDA_CONTEXT_BYTES = 600 * 2**20
"""Bytes of a GPU's memory that CUDA takes for each process, besides what PyTorch reserves."""


class MeasuringTimeUp(Exception):
    """Ends a trial that has been measured for long enough."""


class Stopwatch(MemoryRecorder):
    """Keeps the rows, and the time at which each step ended."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = time.perf_counter()
        self.ends: list[float] = []  # by step

    @property
    def seconds(self) -> float:
        return (self.ends or [self.begun])[-1] - self.begun

    def log(self, rows: Sequence[Row]) -> None:
        super().log(rows)
        if any(isinstance(row, TrainingRow) for row in rows):
            self.ends.append(time.perf_counter())
            if self.ends[-1] - self.ends[0] > SECONDS_A_SHAPE:
                raise MeasuringTimeUp


def timed(config: TrialConfig, array: int, texts: Texts) -> Stopwatch:
    """Run an array of such trials until it ends or has been measured for long enough.

    Returns:
        The stopwatch of the first trial.
    """
    stopwatches = [Stopwatch() for _ in range(array)]
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
    params: Mapping[str, Scalar], texts: Texts, array: int = 1, requested_at: float | None = None
) -> Measured:
    """Measure a shortened trial in a Ray worker.

    The first trial of a process is half a second slower than the next ones: a short trial is run
    twice, and the second run counts.

    Args:
        params: knobs of the trial.
        texts: corpora that need not be on this machine.
        array: trials that train together.
        requested_at: when the measurement was requested, in seconds since the epoch.
    """
    empty = peak_memory()
    entered, config = time.time(), TrialConfig.from_flat(params)
    first = stopwatch = timed(config, array, texts)
    if first.seconds < SECONDS_A_SHAPE / 8:
        stopwatch = timed(config, array, texts)
    trained = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            file.stem: file.stat().st_size for file in write_tables(stopwatch.rows, Path(folder))
        }
    gpu_memory, gpu_size = peak_gpu_memory()
    moments = [stopwatch.begun, *stopwatch.ends]
    return Measured(
        start_delay=entered + first.seconds - stopwatch.seconds - (requested_at or entered),
        steps=[end - start for start, end in itertools.pairwise(moments)],
        writing=array * (time.perf_counter() - trained),
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
        array=array,
    )


def peak_gpu_memory() -> tuple[int, int]:
    """Return the peak of this process's GPU memory and the GPU's size, in bytes; 0, 0 if unused."""
    if not torch.cuda.is_initialized():
        return 0, 0
    return CUDA_CONTEXT_BYTES + torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]


def side_by_side(
    config: TrialConfig, texts: ray.ObjectRef[Texts], count: int, array: int = 1
) -> list[Measured]:
    """Measure `count` concurrent batches on one machine, and on one GPU if they use a GPU.

    Args:
        config: of the full trial.
        texts: corpora, in Ray's object store.
        count: batches at a time.
        array: trials of a batch.

    Raises:
        ray.exceptions.RayError: a batch failed.
    """
    needs = needs_of(config, per_gpu=count)
    together = {name: math.ceil(count * need) for name, need in needs.items()}
    group = ray.util.placement_group([together])
    # A worker ends with its trial: the peak of its memory is then the peak of that trial.
    task: Any = ray.remote(
        num_cpus=needs["CPU"],
        num_gpus=needs.get("GPU", 0),
        max_calls=1,
        max_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )(measure)
    params = shortened(config).to_flat()
    try:
        while not group.wait(1):
            pass  # a cluster may have to start a machine first
        requests = [task.remote(params, texts, array, time.time()) for _ in range(count)]
        measured: list[Measured] = ray.get(requests)
        return measured
    finally:
        ray.util.remove_placement_group(group)
