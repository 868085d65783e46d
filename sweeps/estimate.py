"""The plan before the money: what a sweep will take, from a few steps of each of its shapes.

A shape is all that a trial's time and memory depend on: its model, its probes, its optimiser, its
batch. As many trials of a shape as will run at a time are begun side by side on Ray, as the sweep's
own will be; each stops after a few steps, and what they took is scaled to whole trials.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console

from gptcore.config import Scalar, TrialConfig
from gptcore.corpus import GIVEN
from gptcore.experiment import Trial, run_trials
from gptcore.records import MemoryRecorder, Row, TrainingRow
from gptcore.train import READ_EVERY
from sweeps.arrays import LONG_STEP, MOST, WORTH, best_size, split, together
from sweeps.charts import chart_points
from sweeps.cluster import HEADROOM, fit, hardware, machines, needs_of, slots, there
from sweeps.measurements import Cost, Measurable, Measurement, keep, kept
from sweeps.parquet import write_tables
from sweeps.plan import versions
from sweeps.units import clock, peak_memory, size

Texts = Mapping[str, tuple[str, str]]
"""As gptcore.corpus.GIVEN."""

CADENCES = ("every", "text_every", "histogram_every", "spectrum_every")
SHORTEST = 4
"""The shortest cadence of a trial that is measured: between two looks there are plain steps."""
SECONDS_A_SHAPE = 20.0
FILL = 0.9
"""Of a GPU's memory: how much of it trials may fill."""
CONTEXT = 600 * 2**20
"""Bytes of a GPU that CUDA takes of it for a process, beside what PyTorch reserves."""
OVERHEAD = 0.3
"""Seconds that Tune and MLflow take of a trial beside its own: benchmarks/scale_simulation.py."""
POINT_BYTES = 270
"""What a point of a chart takes in MLflow's SQLite file, with its index."""


@dataclass(frozen=True)
class Batch:
    """Trials that train together, by their keys, and what they need of a machine, as needs_of."""

    keys: tuple[str, ...]
    needs: Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """What the missing trials of a plan take."""

    trials: int
    steps: int
    concurrent: int  # trials at a time
    array: int  # of them in one process, at most
    per_gpu: int  # processes on one GPU, at most; 0 without any
    seconds: float
    low: float
    high: float
    memory: int  # bytes, of the largest process
    gpu_memory: int
    disk: int  # bytes, of all trials
    unknown: tuple[str, ...]  # of each shape that could not be measured, why
    dates: tuple[str, ...] = ()  # of the kept measurements that it rests on
    unmeasured: int = 0  # trials of which there is no measurement and, as asked, none was made
    unmeasured_as: str = ""  # how these are to run

    def lines(self) -> list[str]:
        """The estimate for a reader."""
        why = f"not measured (--no-estimate): {self.unmeasured_as}, time and memory not known"
        if self.unmeasured == self.trials:
            return [why]
        gpu = f" and {size(self.gpu_memory)} of a GPU's" if self.gpu_memory else ""
        arrays = f" in arrays of {self.array}" if self.array > 1 else ""
        on_gpu = f", {self.per_gpu * self.array} on a GPU" if self.per_gpu else ""
        at_once = f"{self.concurrent} at a time{arrays}{on_gpu}"
        measured = f", as measured on {' and '.join(self.dates)}" if self.dates else ""
        return [
            f"{self.trials} trials of {self.steps:,} steps in all, {at_once}: "
            f"about {clock(self.seconds)} ({clock(self.low)} to {clock(self.high)}){measured}",
            f"  {size(self.memory)} of memory{gpu} {'an array' if self.array > 1 else 'a trial'}, "
            f"{size(self.disk)} of disk for all",
            *(f"  not measured, and not counted: {why}" for why in self.unknown),
            *([f"  {self.unmeasured} trials not counted, as {why}"] if self.unmeasured else []),
        ]

    def as_tags(self) -> dict[str, str]:
        """The estimate for the sweep's run; none where some trials were not measured, as asked."""
        words = ("unknown", "dates", "unmeasured", "unmeasured_as")
        numbers = {name: value for name, value in asdict(self).items() if name not in words}
        if self.unmeasured:
            return {}
        return {f"estimated_{name}": f"{value:.0f}" for name, value in numbers.items()}


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


class Enough(Exception):
    """A trial has been measured for long enough."""


class Stopwatch(MemoryRecorder):
    """Keeps the rows, and when each step had ended."""

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
                raise Enough


def timed(config: TrialConfig, array: int) -> Stopwatch:
    """Run such a trial, or an array of them, until it ends or has been measured for long enough;
    -> the watch of the first one."""
    stopwatches = [Stopwatch() for _ in range(array)]
    with contextlib.suppress(Enough):
        run_trials(
            [
                Trial(replace(config, init=replace(config.init, seed=seed)), stopwatch)
                for seed, stopwatch in enumerate(stopwatches)
            ]
        )
    return stopwatches[0]


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


def measure(params: Mapping[str, Scalar], texts: Texts, array: int = 1) -> Measured:
    """Run a trial as long as it is worth while; in a process of its own.

    The first trial of a process is slower by half a second, once: a short one is run again, and
    what it took then is what the next ones will.
    """
    GIVEN.update(texts)
    READ_EVERY["cuda"] = 1  # each step is timed by itself
    empty = peak_memory()
    entered, config = time.time(), TrialConfig.from_flat(params)
    first = stopwatch = timed(config, array)
    if first.seconds < SECONDS_A_SHAPE / 8:
        stopwatch = timed(config, array)
    trained = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            file.stem: file.stat().st_size for file in write_tables(stopwatch.rows, Path(folder))
        }
    gpu_memory, gpu_size = peak_gpu_memory()
    moments = [stopwatch.begun, *stopwatch.ends]
    return Measured(
        began=entered + first.seconds - stopwatch.seconds,
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
    """Bytes of its GPU that this process held at most, and that the GPU has; 0 where unused."""
    if not torch.cuda.is_initialized():
        return 0, 0
    return CONTEXT + torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]


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


def side_by_side(
    config: TrialConfig, texts: ray.ObjectRef[Texts], count: int, array: int = 1
) -> list[Measured]:
    """What so many trials of a shape, or arrays of them, take beside each other on one machine, and
    on one GPU where they use any. Raises Ray's error for what they break on."""
    needs = needs_of(config, per_gpu=count)
    together = {name: math.ceil(count * need) for name, need in needs.items()}
    group = ray.util.placement_group([together])
    # A worker ends with its trial: the peak of its memory is that trial's.
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
            pass  # a cluster may have to start a machine
        asked = time.time()
        measured = ray.get([task.remote(params, texts, array) for _ in range(count)])
        return [replace(one, began=one.began - asked) for one in measured]
    finally:
        ray.util.remove_placement_group(group)


def share_of_gpu(
    config: TrialConfig,
    batches: int,
    beside: Callable[[int], list[Measured]],
    measured: list[Measured],
) -> tuple[int, list[Measured]]:
    """How many batches of a shape a GPU is to have at a time, and what they then take.

    One at first, as `measured`, then twice as many each time, `beside` each other, while that makes
    the GPU faster by more than WORTH, the machine has cores and memory, and the GPU memory, for
    them, and there are so many `batches` for each GPU.
    """
    gpus = [machine for machine in machines() if machine.get("GPU")]
    cores = min(machine["CPU"] / machine["GPU"] for machine in gpus)
    memory = min(machine.get("memory", math.inf) / machine["GPU"] for machine in gpus)
    most = min(cores, math.ceil(batches / sum(machine["GPU"] for machine in gpus)))
    count = 1
    while 2 * count <= most:
        if any(
            2 * count * one.gpu_memory > FILL * one.gpu_size
            or 2 * count * one.memory * HEADROOM > memory
            for one in measured
        ):
            break
        try:
            more = beside(2 * count)
        except ray.exceptions.RayError:
            break  # what fits is known only then
        seconds, before = (cost_of(config, some).seconds for some in (more, measured))
        if before / count < WORTH * seconds / (2 * count):
            break
        count, measured = 2 * count, more
    return count, measured


def array_size(
    shape: TrialConfig,
    texts: ray.ObjectRef[Texts],
    asked: str,
    groups: Sequence[Sequence[str]],
    alone: Measured,
    console: Console,
) -> int:
    """How many trials of a shape train together, of groups that can.

    As many as are `asked` for, if memory holds so many times what one that was measured `alone`
    takes beside what its process does; with auto as many as make it faster, and no more than leave
    every slot something to do.
    """
    longest = max(map(len, groups))
    if asked == "off" or longest == 1:
        return 1
    needs = needs_of(shape)
    fits = [machine for machine in machines() if fit(machine, needs)]
    memory = min(machine.get("memory", math.inf) / fit(machine, needs) for machine in fits)
    held = (memory / HEADROOM - alone.empty) / max(1, alone.memory - alone.empty)
    if alone.gpu_memory:
        free = FILL * alone.gpu_size - CONTEXT
        held = min(held, free / max(1, alone.gpu_memory - CONTEXT))
    most = max(1, int(min(longest, held)))
    if asked != "auto":
        if most < min(int(asked), longest):
            console.print(f"--array {asked}: memory holds arrays of {most} of these trials")
        return min(int(asked), most)
    if median(alone.steps) > LONG_STEP:
        return 1
    most = min(most, MOST, math.ceil(sum(map(len, groups)) / slots(needs)))
    if most == 1:
        return 1
    task = ray.remote(
        num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_calls=1, max_retries=0
    )(best_size)
    try:
        best: int = ray.get(task.remote(shape.to_flat(), texts, most))
    except ray.exceptions.RayError as error:
        console.print(f"arrays could not be tried: {_why(error)}", soft_wrap=True)
        return 1
    return best


def arranged(
    shape: TrialConfig,
    groups: Sequence[Sequence[str]],
    texts: ray.ObjectRef[Texts],
    array: str,
    console: Console,
) -> Measurement:
    """Measure how trials of a shape, in groups that can train together, are to run.

    Raises Ray's error for what they break on alone.
    """
    needs = needs_of(shape)
    fits = 1 if "GPU" in needs else max(fit(machine, needs) for machine in machines())

    def beside(count: int, members: int = 1) -> list[Measured]:
        return side_by_side(shape, texts, count, members)

    alone = beside(max(1, min(fits, sum(map(len, groups)))))
    most = array_size(shape, texts, array, groups, alone[0], console)
    while True:
        arrays = [some for group in groups for some in split(group, most)]
        members = max(map(len, arrays))
        try:
            measured = beside(min(fits, len(arrays)), members) if members > 1 else alone
        except ray.exceptions.RayError as error:
            most = members // 2
            console.print(
                f"arrays of {members} cannot be: {_why(error)}; {most} are tried", soft_wrap=True
            )
            continue
        per_gpu = 1
        if "GPU" in needs:
            of_these = functools.partial(beside, members=members)
            per_gpu, measured = share_of_gpu(shape, len(arrays), of_these, measured)
        return Measurement(
            array=members,
            per_gpu=per_gpu,
            begins=max(one.began for one in measured),
            cost=cost_of(shape, measured),
            date=date.today().isoformat(),
        )


def _why(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def known_batches(
    found: Measurement, shape: TrialConfig, groups: Sequence[Sequence[str]], array: str
) -> list[Batch]:
    """Arrange trials of a shape as it was measured to be best, perhaps when there were more."""
    alone, most = needs_of(shape), found.array
    if array == "auto":
        most = min(most, math.ceil(sum(map(len, groups)) / slots(alone)))
    arrays = [some for group in groups for some in split(group, most)]
    gpus = sum(machine.get("GPU", 0.0) for machine in machines())
    per_gpu = min(found.per_gpu, math.ceil(len(arrays) / gpus)) if gpus else 1
    needs = needs_of(shape, found.cost.memory, per_gpu)
    return [Batch(some, needs) for some in arrays]


def unmeasured_batches(
    shape: TrialConfig, groups: Sequence[Sequence[str]], array: str
) -> list[Batch]:
    """Arrange trials of a shape of which nothing is known: in arrays if some number is asked for,
    each on a core, or a GPU where it may use one."""
    most = int(array) if array.isdecimal() else 1
    needs = needs_of(shape)
    return [Batch(some, needs) for group in groups for some in split(group, most)]


def arrangement(batches: Sequence[Batch]) -> str:
    """Say how such trials run: `one trial a core`."""
    largest = max((len(batch.keys) for batch in batches), default=1)
    units = sorted({"GPU" if "GPU" in batch.needs else "core" for batch in batches})
    what = f"one array of up to {largest} trials" if largest > 1 else "one trial"
    return f"{what} a {' or '.join(units)}"


def estimate(
    trials: Mapping[str, TrialConfig],
    texts: Texts,
    console: Console,
    runs_dir: Path,
    array: str = "off",
    measuring: bool = True,
) -> tuple[Estimate, list[Batch]]:
    """Say what these trials take, and how they are to run: as single trials or, as `array` says
    (--array), together.

    Measured on the Ray that runs, and kept in `runs_dir`. Without `measuring` what is kept there is
    used instead, no Ray is needed, and a shape of which nothing is kept is not counted.
    """
    shapes: defaultdict[TrialConfig, list[list[str]]] = defaultdict(list)
    for group in together(trials):
        shapes[shape_of(trials[group[0]])].append(group)
    costs: list[Cost] = []
    batches: list[Batch] = []
    unmeasured: list[Batch] = []
    dates: set[str] = set()
    unknown, beginning, disk = [], 0.0, 0
    given = ray.put(texts) if measuring else None
    with console.status("") as status:
        for done, (shape, groups) in enumerate(shapes.items()):
            needs = needs_of(shape)
            if measuring and not any(fit(one, needs) for one in there()):
                console.print(
                    "waiting for a machine of the cluster: `ray status` on its head says what it "
                    "does, and what keeps it from it"
                )
            status.update(f"a few steps of each of {len(shapes)} shapes, {done} measured")
            of = Measurable(shape, hardware(needs), array, versions())
            if given is None:
                found = kept(of, runs_dir)
                if found is None:
                    unmeasured += unmeasured_batches(shape, groups, array)
                    continue
                dates.add(found.date)
                if array.isdecimal() and found.array < min(int(array), max(map(len, groups))):
                    console.print(
                        f"--array {array}: arrays of {found.array}, as measured on {found.date}"
                    )
            else:
                try:
                    found = arranged(shape, groups, given, array, console)
                except ray.exceptions.RayError as error:
                    keys = [key for group in groups for key in group]
                    unknown.append(f"{len(keys)} trials such as {keys[0]}: {_why(error)}")
                    batches += [Batch((key,), needs) for key in keys]
                    continue
                try:
                    keep(found, of, runs_dir)
                except OSError as error:
                    console.print(f"the measurement is not kept: {error}", soft_wrap=True)
            arrays = known_batches(found, shape, groups, array)
            costs += [found.cost] * len(arrays)
            disk += found.cost.disk * sum(map(len, groups))
            batches += arrays
            beginning = max(beginning, found.begins)
    batches += unmeasured
    order = {key: i for i, key in enumerate(trials)}
    batches.sort(key=lambda batch: order[batch.keys[0]])
    kinds = {str(batch.needs): batch.needs for batch in batches}.values()
    at_once = min(len(batches), *map(slots, kinds))
    largest = max(len(batch.keys) for batch in batches)

    def whole(name: str) -> float:
        return beginning + makespan([getattr(cost, name) for cost in costs], at_once)

    return Estimate(
        trials=len(trials),
        steps=sum(config.train.steps for config in trials.values()),
        concurrent=min(len(trials), at_once * largest),
        array=largest,
        per_gpu=max(
            (round(1 / one.needs["GPU"]) for one in batches if "GPU" in one.needs), default=0
        ),
        seconds=whole("seconds"),
        low=whole("low"),
        high=whole("high"),
        memory=max((cost.memory for cost in costs), default=0),
        gpu_memory=max((cost.gpu_memory for cost in costs), default=0),
        disk=disk,
        unknown=tuple(unknown),
        dates=tuple(sorted(dates)),
        unmeasured=sum(len(batch.keys) for batch in unmeasured),
        unmeasured_as=arrangement(unmeasured),
    ), batches
