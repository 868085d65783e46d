"""What a sweep will take, from a few steps of each of its shapes.

As many trials of a shape as will run at a time start together on Ray, as the sweep's own trials
will. Each stops after a few steps, and the costs of these are scaled to full trials. An earlier
measurement is used where a new one would take too large a share of the sweep.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from rich.console import Console

from gptcore.config import TrialConfig
from gptcore.corpus import Texts
from gptcore.units import clock, size
from sweeps.estimate.arrays import Batch, together
from sweeps.estimate.cost import Cost, makespan, shape_of
from sweeps.estimate.measure import SHARE_OF_SWEEP, Budget, wait_for_machine
from sweeps.estimate.measurements import (
    Measurable,
    Measurement,
    read_measurement,
    write_measurement,
)
from sweeps.estimate.packing import (
    arranged,
    arrangement,
    known_batches,
    last_line,
    unmeasured_batches,
)
from sweeps.execution.resources import fit, hardware, live_machines, needs_of, slots
from sweeps.plan import git_commit, versions


@dataclass(frozen=True)
class Estimate:
    """What the missing trials of a plan take."""

    trials: int
    steps: int
    concurrent: int  # trials at a time
    array: int  # trials of one process, at most
    per_gpu: int  # processes on one GPU, at most; 0 without a GPU
    seconds: float
    low: float
    high: float
    memory: int  # bytes, of the largest process
    gpu_memory: int
    disk: int  # bytes, of all trials
    unknown: tuple[str, ...]  # for each shape that could not be measured, why
    dates: tuple[str, ...] = ()  # of the earlier measurements that were used
    unmeasured: int = 0  # trials without a measurement (--no-estimate)
    unmeasured_as: str = ""  # how these run
    measured_for: float = 0.0  # seconds of measuring, if more of it would have cost too much

    def lines(self) -> list[str]:
        """Return the estimate as lines of text."""
        why = f"not measured (--no-estimate): {self.unmeasured_as}, time and memory are not known"
        if self.unmeasured == self.trials:
            return [why]
        gpu = f" and {size(self.gpu_memory)} of a GPU's" if self.gpu_memory else ""
        arrays = f" in arrays of {self.array}" if self.array > 1 else ""
        on_gpu = f", {self.per_gpu * self.array} on a GPU" if self.per_gpu else ""
        at_once = f"{self.concurrent} at a time{arrays}{on_gpu}"
        measured = f", as measured on {' and '.join(self.dates)}" if self.dates else ""
        if self.measured_for:
            measured += f", roughly: measured for {self.measured_for:.0f} s"
        return [
            f"{self.trials} trials of {self.steps:,} steps in all, {at_once}: "
            f"about {clock(self.seconds)} ({clock(self.low)} to {clock(self.high)}){measured}",
            f"  {size(self.memory)} of memory{gpu} {'an array' if self.array > 1 else 'a trial'}, "
            f"{size(self.disk)} of disk for all",
            *(f"  not measured, and not counted: {why}" for why in self.unknown),
            *([f"  {self.unmeasured} trials not counted, as {why}"] if self.unmeasured else []),
        ]

    def as_tags(self) -> dict[str, str]:
        """Return the estimate as tags of the sweep's run; none if trials were not measured."""
        words = ("unknown", "dates", "unmeasured", "unmeasured_as", "measured_for")
        numbers = {name: value for name, value in asdict(self).items() if name not in words}
        if self.unmeasured:
            return {}
        return {f"estimated_{name}": f"{value:.0f}" for name, value in numbers.items()}


def estimate(
    trials: Mapping[str, TrialConfig],
    texts: Texts,
    console: Console,
    runs_dir: Path,
    array: str = "off",
    measuring: bool = True,
) -> tuple[Estimate, list[Batch]]:
    """Estimate what trials take, and decide how they run.

    Args:
        trials: by key.
        texts: corpora that workers are given.
        console: shows what is going on.
        runs_dir: measurements are kept there.
        array: which trials train together, as --array takes it.
        measuring: measure on the Ray that runs, for at most SHARE_OF_SWEEP of the sweep; else use
            what an earlier sweep measured, for which no Ray is needed. A shape that was never
            measured is then not counted.

    Returns:
        The estimate, and which trials train together, with their needs.
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
    known, spent, measured_for = 0.0, 0.0, 0.0
    steps = sum(config.train.steps for config in trials.values())
    with console.status("") as status:
        for done, (shape, groups) in enumerate(shapes.items()):
            needs = needs_of(shape)
            if measuring and not any(fit(one, needs) for one in live_machines()):
                console.print(
                    "waiting for a machine of the cluster: `ray status` on its head says why none "
                    "has started yet"
                )
                wait_for_machine(needs)  # which is no part of measuring
            status.update(f"a few steps of each of {len(shapes)} shapes, {done} measured")
            of = Measurable(shape, hardware(needs), array, versions())
            earlier = read_measurement(of, runs_dir)
            budget = Budget(known, steps / slots(needs), spent)
            steps -= shape.train.steps * sum(map(len, groups))
            if given is not None and (earlier is None or pays_again(earlier, shape, groups, array)):
                begun = time.monotonic()
                try:
                    found = arranged(shape, groups, given, array, console, budget)
                except ray.exceptions.RayError as error:
                    keys = [key for group in groups for key in group]
                    unknown.append(f"{len(keys)} trials such as {keys[0]}: {last_line(error)}")
                    batches += [Batch((key,), needs) for key in keys]
                    continue
                finally:
                    spent += time.monotonic() - begun
                try:
                    write_measurement(found, of, runs_dir)
                except OSError as error:
                    console.print(f"the measurement is not kept: {error}", soft_wrap=True)
                measured_for += found.took if found.cut_short else 0.0
            elif earlier is None:
                unmeasured += unmeasured_batches(shape, groups, array)
                continue
            else:
                found = earlier
                dates.add(found.date)
                if array.isdecimal() and found.array < min(int(array), max(map(len, groups))):
                    console.print(
                        f"--array {array}: arrays of {found.array}, as measured on {found.date}"
                    )
            arrays = known_batches(found, shape, groups, array)
            costs += [found.cost] * len(arrays)
            known += length(found, arrays)
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
        measured_for=measured_for,
    ), batches


def length(found: Measurement, arrays: Sequence[Batch]) -> float:
    """Return the seconds that these arrays of one shape take, all slots together."""
    return makespan([found.cost.seconds] * len(arrays), slots(arrays[0].needs))


def pays_again(
    earlier: Measurement, shape: TrialConfig, groups: Sequence[Sequence[str]], array: str
) -> bool:
    """Return whether these trials are worth measuring although that was done once.

    It is not worth it if it would take more than SHARE_OF_SWEEP of their time. Another commit of
    this project may have another pace.
    """
    if earlier.commit != git_commit():
        return True
    seconds = length(earlier, known_batches(earlier, shape, groups, array))
    return earlier.took <= SHARE_OF_SWEEP * seconds
