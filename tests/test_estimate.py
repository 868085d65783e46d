"""What a sweep is said to take, from a few steps of each shape."""

from collections import Counter
from dataclasses import replace

import pytest
import ray

import sweeps.estimate
from gptcore.config import TrialConfig
from gptcore.experiment import run_trial
from gptcore.records import MemoryRecorder
from helpers.trials import TINY
from sweeps.charts import chart_points
from sweeps.estimate import (
    OVERHEAD,
    POINT_BYTES,
    Measured,
    cost_of,
    kind_of,
    makespan,
    measure,
    shape_of,
    share_of_gpu,
    shortened,
)
from sweeps.parquet import write_tables

LONG = {"train.steps": 200, "probes.every": 10, "probes.histogram_every": 50}
CADENCES = [
    {},
    LONG,
    {**LONG, "probes.text_every": 7},
    {**LONG, "probes.spectrum_every": 1},
    {**LONG, "probes.every": 100, "train.steps": 1000},
    {"train.steps": 1},
]


def configured(more):
    return TrialConfig.from_flat({**TINY, **more})


@pytest.mark.parametrize("more", CADENCES, ids=str)
def test_a_shortened_trial_has_plain_steps_and_every_look_that_the_whole_one_has(more):
    config = configured(more)
    short = shortened(config)
    assert short.train.steps <= config.train.steps
    looks = [
        {look for step in range(one.train.steps + 1) for look in kind_of(one, step)}
        for one in (config, short)
    ]
    assert looks[0] == looks[1]


def test_trials_of_one_shape_differ_in_what_takes_no_time():
    config = configured({})
    assert shape_of(config) == shape_of(configured({"init.seed": 3, "init.scheme": "gpt2"}))
    assert shape_of(config) == shape_of(configured({"optim.lr": 0.1, "corpus.subset": "0-0.5"}))
    others = ({"model.n_layer": 1}, {"train.steps": 6}, {"optim.name": "sgd"}, {"probes.every": 1})
    for other in others:
        assert shape_of(config) != shape_of(configured(other))


def test_every_kind_of_step_counts_as_often_as_the_trial_has_it():
    config = configured(LONG)
    short = shortened(config)
    seconds = {"first": 7.0, "last": 5.0, (): 1.0, "look": 3.0}

    def takes(one, step):
        kind = kind_of(one, step)
        return seconds.get(kind) or seconds.get(kind[0], seconds["look"])

    measured = Measured(
        began=0.0,
        steps=[takes(short, step) for step in range(short.train.steps + 1)],
        writing=0.25,
        rows={},
        points=[],
        bytes={},
        memory=10,
        gpu_memory=0,
        gpu_size=0,
    )
    cost = cost_of(config, [measured, replace(measured, memory=30)])
    whole = sum(takes(config, step) for step in range(201))
    assert cost.seconds == pytest.approx(whole + OVERHEAD + 0.25)
    assert cost.memory == 30
    # Twice as slow in half of the plain steps: between 2/3 and 4/3 of the mean.
    plain = [step for step in range(short.train.steps + 1) if kind_of(short, step) == ()]
    slower = [2 * one if step in plain[::2] else one for step, one in enumerate(measured.steps)]
    cost = cost_of(config, [replace(measured, steps=slower)])
    assert cost.low < cost.seconds < cost.high
    assert cost.high - OVERHEAD - 0.25 <= 2 * (cost.seconds - OVERHEAD - 0.25)


def test_what_there_was_no_time_for_is_taken_for_the_first_step():
    config = configured(LONG)
    cut_short = Measured(
        began=0.0, steps=[9.0, 1.0, 1.0], writing=0.0, rows={}, points=[], bytes={},
        memory=1, gpu_memory=0, gpu_size=0,
    )  # fmt: skip
    counts = Counter(kind_of(config, step) for step in range(201))
    plain = counts[()]
    assert cost_of(config, [cut_short]).seconds == pytest.approx(
        plain + 9.0 * (201 - plain) + OVERHEAD
    )


def test_the_disk_foretold_is_that_of_the_whole_trial(tmp_path):
    config = configured({"train.steps": 60})
    recorder = MemoryRecorder()
    run_trial(config, recorder)
    files = write_tables(recorder.rows, tmp_path)
    points = [
        point for rows in recorder.rows.values() for row in rows for point in chart_points(row)
    ]
    found = sum(file.stat().st_size for file in files) + POINT_BYTES * len(points)
    foretold = cost_of(config, [measure(shortened(config).to_flat(), {})])
    assert foretold.disk == pytest.approx(found, rel=0.25)
    assert foretold.memory > 50e6
    assert foretold.low <= foretold.seconds <= foretold.high


@pytest.mark.parametrize(
    ("seconds", "slots", "ends"),
    [([3, 3, 3], 1, 9), ([3, 3, 3], 2, 6), ([1, 5, 1, 1], 2, 5), ([2], 4, 2), ([], 2, 0)],
)
def test_the_last_trial_ends_when_slots_are_filled_in_order(seconds, slots, ends):
    assert makespan(seconds, slots) == ends


GIB = 2**30


@pytest.mark.parametrize(
    ("speed_up", "memory", "cores", "trials", "share"),
    [
        (lambda count: 1.0, 1, 64, 100, 1),  # one trial fills the GPU
        (lambda count: 1.8 if count > 1 else 1.0, 1, 64, 100, 2),  # two do
        (lambda count: float(count), 1, 64, 1000, 16),  # 0.9 of 24 GiB, by doublings
        (lambda count: float(count), 10, 64, 1000, 2),
        (lambda count: float(count), 1, 5, 1000, 4),  # by cores
        (lambda count: float(count), 1, 64, 4, 2),  # there are two GPUs for four trials
        (lambda count: float(count), 1, 64, 2, 1),
    ],
)
def test_a_gpu_is_shared_by_as_many_trials_as_make_it_faster_and_fit(
    speed_up, memory, cores, trials, share, monkeypatch
):
    machine = {"CPU": float(cores), "GPU": 1.0}
    monkeypatch.setattr(sweeps.estimate, "machines", lambda: [machine, machine, {"CPU": 2.0}])
    tried = []

    def beside(count):
        tried.append(count)
        seconds = count / speed_up(count)
        return [
            Measured(
                began=0.0, steps=[seconds] * 6, writing=0.0, rows={}, points=[], bytes={},
                memory=1, gpu_memory=memory * GIB, gpu_size=24 * GIB,
            )
        ] * count  # fmt: skip

    config = configured({"train.steps": 5})
    count, measured = share_of_gpu(config, trials, beside, beside(1))
    assert (count, len(measured)) == (share, share)
    assert all(memory * count <= 0.9 * 24 for count in tried)


def test_what_does_not_fit_beside_another_is_given_a_gpu_of_its_own(monkeypatch):
    machine = {"CPU": 8.0, "GPU": 1.0}
    monkeypatch.setattr(sweeps.estimate, "machines", lambda: [machine])
    alone = [
        Measured(
            began=0.0, steps=[1.0] * 6, writing=0.0, rows={}, points=[], bytes={},
            memory=1, gpu_memory=GIB, gpu_size=24 * GIB,
        )
    ]  # fmt: skip

    def beside(count):
        if count > 1:
            raise ray.exceptions.RayError("out of memory")
        return alone

    assert share_of_gpu(configured({"train.steps": 5}), 100, beside, alone) == (1, alone)


def test_an_array_whose_first_step_takes_all_the_time_there_is_has_a_step_all_the_same(monkeypatch):
    monkeypatch.setattr(sweeps.estimate, "SECONDS_A_SHAPE", 0.0)
    measured = measure(shortened(configured(LONG)).to_flat(), {}, array=3)
    assert len(measured.steps) == 2  # what comes before the first is no pace
    assert 0 < measured.empty <= measured.memory
    cost = cost_of(configured(LONG), [measured])
    assert cost.seconds > 3 * OVERHEAD
