"""The estimate of the time and memory of a sweep, from a few steps of each shape.

This is one file because these tests share what they measure and the machines that they invent.
"""

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import ray
from rich.console import Console

from gptcore.config import TrialConfig
from gptcore.experiment import run_trial
from gptcore.records import MemoryRecorder
from helpers.machines import set_machines
from helpers.trials import TINY, flags
from sweeps.estimate import estimate as estimating
from sweeps.estimate import measure as measuring
from sweeps.estimate import packing
from sweeps.estimate.cost import (
    OVERHEAD,
    POINT_BYTES,
    Cost,
    Measured,
    cost_of,
    kind_of,
    makespan,
    shape_of,
    shortened,
)
from sweeps.estimate.estimate import estimate
from sweeps.estimate.measure import measure
from sweeps.estimate.measurements import (
    Measurable,
    Measurement,
    file_of,
    read_measurement,
    write_measurement,
)
from sweeps.execution import resources
from sweeps.launch import main
from sweeps.plan import versions
from sweeps.presets import PRESETS
from tracking.address import store_address
from tracking.charts import chart_points
from tracking.store import Store
from tracking.tables import write_tables

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
        start_delay=0.0,
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
        start_delay=0.0, steps=[9.0, 1.0, 1.0], writing=0.0, rows={}, points=[], bytes={},
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
    foretold = cost_of(config, measure(config.to_flat(), {}).measured)
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


def test_an_array_whose_first_step_takes_all_the_time_there_is_has_a_step_all_the_same(monkeypatch):
    monkeypatch.setattr(measuring, "SECONDS_A_WORKER", 0.0)
    (measured,) = measure(configured(LONG).to_flat(), {}, [3]).measured
    assert len(measured.steps) == 2  # what comes before the first is no pace
    assert 0 < measured.empty <= measured.memory
    cost = cost_of(configured(LONG), [measured])
    assert cost.seconds > 3 * OVERHEAD


FOUND = Measurement(
    array=3,
    per_gpu=1,
    begins=0.5,
    cost=Cost(seconds=60.0, low=40.0, high=90.0, memory=GIB, gpu_memory=0, disk=10**6),
    date="2026-11-28",
    took=6.0,
)


@pytest.fixture
def two_cores(monkeypatch):
    """This machine has two cores, and a Ray that nobody may ask anything."""
    machine = {"CPU": 2.0, "memory": 8.0 * GIB}
    set_machines(monkeypatch, machine)
    monkeypatch.setattr(resources, "cpu_model", lambda: "a CPU")
    monkeypatch.setattr(ray, "put", lambda _: pytest.fail("something was given to Ray"))


OF = Measurable(shape_of(configured({})), "a CPU; 2 CPU", "3", versions())


@pytest.mark.parametrize(
    "change",
    [{"shape": configured({"train.steps": 6})}, {"hardware": "a CPU; 4 CPU"}, {"array": "auto"},
     {"versions": "torch 1.0"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_measurement_is_kept_for_the_same_alone(change, tmp_path):
    assert read_measurement(OF, tmp_path) is None
    write_measurement(replace(FOUND, array=2), OF, tmp_path)
    write_measurement(FOUND, OF, tmp_path)
    assert read_measurement(OF, tmp_path) == FOUND
    other = replace(OF, **change)
    assert read_measurement(other, tmp_path) is None
    write_measurement(replace(FOUND, array=7), other, tmp_path)
    assert read_measurement(OF, tmp_path) == FOUND


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:100]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text("[" * 100_000),
        lambda file: file.write_text(
            re.sub('"seconds": [^,]+', '"seconds": null', file.read_text())
        ),
        lambda file: file.write_text(re.sub('"array": [^,"]+', '"array": 0', file.read_text())),
        lambda file: file.write_text(file.read_text().replace("seconds", "minutes")),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_measurement_that_cannot_be_read_counts_as_none(damage, tmp_path):
    write_measurement(FOUND, OF, tmp_path)
    damage(file_of(OF, tmp_path))
    assert read_measurement(OF, tmp_path) is None


def test_a_measurement_that_cannot_be_kept_costs_the_sweep_nothing(tmp_path, monkeypatch):
    (tmp_path / "measurements").write_text("a file in the place of the folder")
    monkeypatch.setattr(ray, "put", lambda texts: texts)
    monkeypatch.setattr(estimating, "arranged", lambda *_: FOUND)
    console = Console(record=True, width=200)
    _, batches = estimate({"k": configured({})}, {}, console, tmp_path)
    assert "the measurement is not kept: " in console.export_text()
    assert [batch.keys for batch in batches] == [("k",)]


@pytest.mark.parametrize(
    ("change", "trials", "measured_again"),
    [
        ({}, 2, False),  # a minute, of which measuring may take six seconds
        ({"took": 5.9}, 2, True),
        ({}, 4, True),
        ({"commit": "another"}, 2, True),
    ],
)
def test_a_sweep_is_measured_again_only_if_that_takes_at_most_a_tenth_of_it(
    change, trials, measured_again, two_cores, tmp_path, monkeypatch
):
    asked = []

    def arranged(shape, groups, texts, array, console, budget):
        asked.append(budget)
        return replace(FOUND, array=1)

    monkeypatch.setattr(ray, "put", lambda texts: texts)
    monkeypatch.setattr(estimating, "arranged", arranged)
    monkeypatch.setattr(estimating, "live_machines", resources.schedulable_machines)
    monkeypatch.setattr(estimating, "git_commit", lambda: "")
    earlier = replace(FOUND, **{"array": 1, "took": 6.1, **change})
    write_measurement(earlier, replace(OF, array="off"), tmp_path)
    found, _ = estimate(seeds(trials), {}, Console(), tmp_path)
    assert bool(asked) == measured_again
    assert found.dates == (() if measured_again else (FOUND.date,))


def test_what_a_shape_took_is_taken_from_the_budget_of_the_next(two_cores, tmp_path, monkeypatch):
    budgets = []

    def arranged(shape, groups, texts, array, console, budget):
        budgets.append(budget)
        return replace(FOUND, array=1, took=3.0, cut_short=True)

    monkeypatch.setattr(ray, "put", lambda texts: texts)
    monkeypatch.setattr(estimating, "arranged", arranged)
    monkeypatch.setattr(estimating, "live_machines", resources.schedulable_machines)
    trials = {**seeds(2), "long": configured({"train.steps": 90})}
    found, _ = estimate(trials, {}, Console(), tmp_path)
    # Two cores: 50 steps each, of which the first two trials make 5 in a minute.
    assert [(one.known, one.steps) for one in budgets] == [(0.0, 50.0), (60.0, 45.0)]
    assert budgets[0].spent == 0.0 < budgets[1].spent
    assert found.lines()[0].endswith(", roughly: measured for 6 s")
    assert not any("measured_for" in tag for tag in found.as_tags())


def test_drivers_that_write_at_once_leave_whole_measurements(tmp_path):
    other = replace(OF, array="auto")
    written = [(replace(FOUND, array=i), of) for i in range(1, 50) for of in (OF, other)]
    with ThreadPoolExecutor(max_workers=4) as drivers:
        done = [drivers.submit(write_measurement, found, of, tmp_path) for found, of in written]
        while not all(one.done() for one in done):
            for of in (OF, other):
                # In this order: the first write may end at any moment.
                assert not file_of(of, tmp_path).exists() or read_measurement(of, tmp_path)
    for one in done:
        one.result()
    assert {
        read_measurement(of, tmp_path) in [found for found, _ in written] for of in (OF, other)
    } == {True}
    assert len(list((tmp_path / "measurements").iterdir())) == 2


def seeds(count, **more):
    return {str(i): configured({"init.seed": i, **more}) for i in range(count)}


def expected(trials, array, runs_dir):
    """-> what is said, the tags, the sizes of arrays and what one needs."""
    console = Console(record=True, width=200)
    found, batches = estimate(trials, {}, console, runs_dir, array, measuring=False)
    said = [line for line in console.export_text().splitlines() if line.strip()]
    sizes = [len(batch.keys) for batch in batches]
    return said + found.lines(), found.as_tags(), sizes, dict(batches[0].needs)


def test_what_was_measured_before_is_used_as_if_it_were_now(two_cores, tmp_path):
    write_measurement(FOUND, OF, tmp_path)
    said, tags, sizes, needs = expected(seeds(6), "3", tmp_path)
    assert (sizes, needs) == (
        [3, 3],
        {"CPU": 1.0, "memory": resources.HEADROOM * GIB},
    )
    assert said == [
        "6 trials of 30 steps in all, 6 at a time in arrays of 3: about 1:00 min "
        "(0:40 min to 1:30 min), "
        "as measured on 2026-11-28",
        "  1.07 GB of memory an array, 6 MB of disk for all",
    ]
    assert tags["estimated_seconds"] == "60"
    write_measurement(replace(FOUND, array=2), OF, tmp_path)
    said, _, sizes, _ = expected(seeds(6), "3", tmp_path)
    assert (said[0], sizes) == ("--array 3: arrays of 2, as measured on 2026-11-28", [2, 2, 2])


def test_arrays_measured_when_there_were_more_trials_leave_every_core_something_to_do(
    two_cores, tmp_path
):
    write_measurement(FOUND, replace(OF, array="auto"), tmp_path)
    sizes = [expected(seeds(count), "auto", tmp_path)[2] for count in (2, 4, 9)]
    assert sizes == [[1, 1], [2, 2], [3, 3, 3]]


@pytest.mark.parametrize(
    ("array", "sizes", "run_as"),
    [("off", [1] * 5, "one trial"), ("auto", [1] * 5, "one trial"),
     ("2", [1, 2, 2], "one array of up to 2 trials"),
     ("9", [5], "one array of up to 5 trials")],
)  # fmt: skip
def test_without_a_measurement_trials_run_singly_or_as_asked(
    array, sizes, run_as, two_cores, tmp_path
):
    line = f"not measured (--no-estimate): {run_as} per core, time and memory are not known"
    assert expected(seeds(5), array, tmp_path) == ([line], {}, sizes, {"CPU": 1.0})


def test_without_a_measurement_a_trial_that_may_use_a_gpu_has_one_to_itself(
    two_cores, tmp_path, monkeypatch
):
    machine = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0, "memory": 8.0 * GIB}
    set_machines(monkeypatch, machine)
    said, _, sizes, needs = expected(seeds(2, **{"train.device": "auto"}), "auto", tmp_path)
    assert (sizes, needs) == ([1, 1], {"CPU": 1.0, "GPU": 1.0})
    assert "one trial per GPU" in said[0]
    assert resources.hardware(needs) == "a CPU; 8 CPU, 2 GPU, 1 accelerator_type:H100"
    assert resources.hardware({"CPU": 1.0}) == "a CPU; 8 CPU"


def test_of_shapes_some_of_which_were_measured_the_others_are_named(two_cores, tmp_path):
    write_measurement(FOUND, OF, tmp_path)
    longer = configured({"train.steps": 9})
    said, tags, sizes, _ = expected({**seeds(3), "long": longer}, "3", tmp_path)
    assert (sizes, tags) == ([3, 1], {})
    assert "as measured on 2026-11-28" in said[0]
    assert said[2] == (
        "  1 trials not counted, as not measured (--no-estimate): one trial per core, time and "
        "memory are not known"
    )


@pytest.mark.full
def test_a_sweep_goes_by_what_an_earlier_one_measured_and_measures_nothing(
    tmp_path, monkeypatch, capsys
):
    def run(*more):
        wanted = ["--name", "kept", "--no-report", *flags(configured({})), *more]
        assert main("doc", PRESETS, ["--runs-dir", str(tmp_path), *wanted]) == 0
        return capsys.readouterr().out

    def tags():
        (sweep,) = Store(store_address(tmp_path)).runs("sweep")
        return {name for name in sweep.data.tags if name.startswith("estimated_")}

    assert ", as measured on" not in run()
    (file,) = (tmp_path / "measurements").iterdir()
    found = json.loads(file.read_text())
    assert (found["array"], found["versions"]) == ("auto", versions())
    assert "estimated_seconds" in tags()
    monkeypatch.setattr(packing, "side_by_side", lambda *_: pytest.fail("it was measured"))
    output = run("--no-estimate", "--init.seed", "0", "1")
    date = found["measurement"]["date"]
    assert re.search(rf"\n1 trials of 5 steps in all.*, as measured on {date}\n", output)
    assert re.search(r"\ntook .+, estimated .+\n", output)
    assert "estimated_seconds" in tags()
    output = run("--no-estimate", "--train.steps", "6")
    assert "\nnot measured (--no-estimate): one trial per core, time and memory are" in output
    assert re.search(r"\ntook [^,]+\n", output)
    assert not tags()
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    output = run("--no-estimate", "--dry-run", "--init.seed", "0", "1", "2", "3")
    assert re.search(rf"\n2 trials of 10 steps in all.*, as measured on {date}\n", output)
    assert [one.name for one in (tmp_path / "measurements").iterdir()] == [file.name]
