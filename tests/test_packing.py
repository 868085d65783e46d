"""Which trials train together."""

from dataclasses import replace

import pytest
import ray
from rich.console import Console

from gptcore.config import InputError, TrialConfig
from gptcore.experiment import conflicting_knobs
from gptcore.records import TrainingRow
from helpers.machines import set_machines
from helpers.trials import TINY
from sweeps.estimate import measure as measuring
from sweeps.estimate import packing
from sweeps.estimate.arrays import check_array, check_together, split, together
from sweeps.estimate.cost import Measured
from sweeps.estimate.measure import Budget, Tried, measure
from sweeps.estimate.packing import arranged, known_batches, sizes_to_try


def configured(**more):
    knobs = {key.replace("__", "."): value for key, value in more.items()}
    return TrialConfig.from_flat({**TINY, **knobs})


def test_trials_go_together_that_differ_in_init_and_corpus_alone():
    trials = {
        "a": configured(),
        "b": configured(optim__lr=0.5),
        "c": configured(init__seed=3, init__scheme="gpt2", corpus__subset="0-0.5"),
        "d": configured(optim__lr=0.5, corpus__data_seed=7),
        "e": configured(corpus__tokenizer="gpt2", model__vocab_size=50257),
        "f": configured(corpus__tokenizer="bytes", model__vocab_size=50257),
    }
    assert together(trials) == [["a", "c"], ["b", "d"], ["e"], ["f"]]
    assert conflicting_knobs([trials["e"], trials["f"]]) == ["corpus.tokenizer"]


def test_arrays_are_of_nearly_one_length():
    assert split("abcdefg", 3) == [("a", "b"), ("c", "d"), ("e", "f", "g")]
    assert split("abc", 1) == [("a",), ("b",), ("c",)]
    assert split("abc", 8) == [("a", "b", "c")]


@pytest.mark.parametrize("text", ["some", "0", "-1", "1.5", ""])
def test_what_the_option_does_not_take_is_refused(text):
    with pytest.raises(InputError, match=r"--array takes auto, off or how many trials"):
        check_array(text)


def test_arrays_asked_for_where_none_can_be_are_refused_by_what_differs():
    trials = {str(lr): configured(optim__lr=lr, init__seed=i) for i, lr in enumerate((0.1, 0.2))}
    with pytest.raises(
        InputError, match=r"--array 2: no two of these .* differ in optim\.lr: an array shares"
    ):
        check_together("2", trials)
    for harmless in ("auto", "off", "1"):
        check_together(harmless, trials)
    check_together("2", {**trials, "c": configured(optim__lr=0.1, init__seed=9)})


GIB = 2**30


ALONE = Measured(
    start_delay=0.0, steps=[1.0] * 6, writing=0.0, rows={}, points=[], bytes={},
    memory=GIB, gpu_memory=0, gpu_size=0, empty=GIB // 2,
)  # fmt: skip


def keys_of(*lengths):
    """Groups of so many trials that can train together."""
    return [[f"{i}-{j}" for j in range(length)] for i, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("asked", "lengths", "sizes"),
    [
        ("off", [64], [1]),
        ("auto", [64], [1, 2, 4, 8]),
        ("auto", [8] * 8, [1, 2, 4, 8]),
        ("auto", [100] * 8, [1, 2, 4, 8, 16, 32, 64]),
        ("auto", [20], [1, 2, 3]),
        ("auto", [2, 2, 2, 2, 2], [1, 2]),
        ("auto", [8], [1]),
        ("auto", [1] * 30, [1]),
        ("4", [8], [1, 4]),
        ("5", [8], [1, 4]),
        ("32", [3], [1, 3]),
        ("1", [8], [1]),
    ],
)
def test_sizes_are_tried_that_leave_each_of_eight_slots_something_to_do(asked, lengths, sizes):
    assert sizes_to_try(asked, keys_of(*lengths), 8) == sizes


@pytest.fixture
def tried(monkeypatch):
    """-> a function that has measurements give what a function of the number of workers and of the
    size of an array returns or raises; it returns what was asked for."""

    def plan(take):
        asked = []

        def side_by_side(shape, texts, count, sizes=(1,), *_):
            asked.append((count, list(sizes)))
            measured, failure = [], ""
            for size in sizes:
                try:
                    measured.append(replace(take(count, size), array=size))
                except ArithmeticError as error:
                    failure = f"arrays of {size} fail: {error}"
                    break
            return [Tried(measured, cut_short=False, failure=failure)] * count

        monkeypatch.setattr(packing, "side_by_side", side_by_side)
        return asked

    return plan


def arrange(lengths, array, console=None, budget=None, **knobs):
    shape, groups = configured(**knobs), keys_of(*lengths)
    return arranged(shape, groups, None, array, console or Console(), budget or Budget())


@pytest.mark.parametrize("dies", [ray.exceptions.RayError, ArithmeticError])
def test_an_array_that_breaks_when_it_is_measured_is_halved_until_it_does_not(
    tried, dies, monkeypatch
):
    set_machines(monkeypatch, {"CPU": 2.0, "memory": 800.0 * GIB})

    def take(count, size):
        if size > 3:
            raise dies("out of memory")
        return ALONE

    asked, console = tried(take), Console(record=True, width=200)
    found = arrange([13], "13", console, train__device="cpu")
    assert asked == [(2, [1, 13]), (2, [1, 5]), (2, [1, 2])]
    assert (found.array, found.per_gpu, found.cost.memory) == (2, 1, ALONE.memory)
    batches = known_batches(found, configured(train__device="cpu"), keys_of(13), "13")
    assert [len(batch.keys) for batch in batches] == [1, 2, 2, 2, 2, 2, 2]
    said = ["arrays of 13 fail: out of memory; trying arrays of 5",
            "arrays of 5 fail: out of memory; trying arrays of 2"]  # fmt: skip
    assert console.export_text().splitlines() == said


@pytest.mark.parametrize(
    ("dies", "asked_for", "said"),
    [
        # The worker's smaller arrays are known, and one of them is taken.
        (ArithmeticError, [(2, [1, 2, 4, 8])], "arrays of 8 fail: no room"),
        (ray.exceptions.RayError, [(2, [1, 2, 4, 8]), (2, [1])],
         "arrays of 8 fail: no room; trying arrays of 1"),
    ],
)  # fmt: skip
def test_of_arrays_that_nobody_asked_for_those_are_taken_that_do_not_break(
    tried, dies, asked_for, said, monkeypatch
):
    set_machines(monkeypatch, {"CPU": 2.0, "memory": 800.0 * GIB})

    def take(count, size):
        if size == 8:
            raise dies("no room")
        return replace(ALONE, steps=[1.0 + size] * 6)

    asked, console = tried(take), Console(record=True, width=200)
    found = arrange([16], "auto", console, train__device="cpu")
    assert (asked, found.array) == (asked_for, 4 if len(asked_for) == 1 else 1)
    assert console.export_text().strip() == said


def test_a_trial_that_fails_even_alone_is_reported(tried, monkeypatch):
    set_machines(monkeypatch, {"CPU": 2.0, "memory": 800.0 * GIB})

    def take(count, size):
        raise ray.exceptions.RayError("the worker died")

    asked = tried(take)
    with pytest.raises(ray.exceptions.RayError):
        arrange([8], "auto", train__device="cpu")
    assert asked == [(2, [1, 2, 4]), (2, [1])]


def on_a_gpu(device_seconds):
    """-> what a step takes that keeps a GPU busy for some seconds, and a core for a tenth."""

    def take(count, size):
        seconds = max(0.1, count * device_seconds(size))
        return replace(ALONE, steps=[seconds] * 6, gpu_memory=GIB, gpu_size=24 * GIB)

    return take


@pytest.mark.parametrize(
    ("device_seconds", "trials", "array", "packed"),
    [
        # Writing takes 0.3 s of a trial, six steps take 0.6 s: a second process writes meanwhile.
        (lambda size: 0.1, 256, "auto", (64, 4)),
        (lambda size: 0.1, 64, "auto", (16, 4)),  # fewer trials for each process
        (lambda size: 0.1, 2, "auto", (2, 1)),
        (lambda size: 0.01, 2, "auto", (1, 2)),  # the device has room for both
        (lambda size: 10.0 * max(1, size / 8), 256, "auto", (8, 1)),  # the device is full
        (lambda size: 10.0 * size, 256, "auto", (1, 1)),
        (lambda size: 0.01, 256, "8", (8, 4)),
        (lambda size: 0.01, 256, "off", (1, 4)),
    ],
)
def test_the_array_and_the_processes_of_a_gpu_are_chosen_by_when_all_trials_end(
    tried, device_seconds, trials, array, packed, monkeypatch
):
    set_machines(monkeypatch, {"CPU": 4.0, "GPU": 1.0, "memory": 800.0 * GIB})
    tried(on_a_gpu(device_seconds))
    found = arrange([trials], array, train__device="auto")
    assert (found.array, found.per_gpu) == packed
    assert not found.cut_short


@pytest.mark.parametrize(
    ("machine", "trials", "per_gpu"),
    [
        ({"CPU": 64.0}, 1000, 16),  # 0.9 of 24 GiB, by doublings
        ({"CPU": 5.0}, 1000, 4),
        ({"CPU": 64.0}, 4, 2),  # there are two GPUs for four trials
        ({"CPU": 64.0}, 2, 1),
        ({"CPU": 64.0, "memory": 6.0 * GIB}, 1000, 4),
    ],
)
def test_a_gpu_is_shared_by_as_many_processes_as_fit(tried, machine, trials, per_gpu, monkeypatch):
    set_machines(monkeypatch, *[{**machine, "GPU": 1.0}] * 2, {"CPU": 2.0})
    tried(on_a_gpu(lambda size: 0.001))
    assert arrange([1] * trials, "auto", train__device="auto").per_gpu == per_gpu


def test_what_does_not_fit_beside_another_is_given_a_gpu_of_its_own(tried, monkeypatch):
    set_machines(monkeypatch, {"CPU": 8.0, "GPU": 1.0})
    alone = on_a_gpu(lambda size: 0.001)

    def take(count, size):
        if count > 1:
            raise ray.exceptions.RayError("out of memory")
        return alone(count, size)

    asked = tried(take)
    assert arrange([1] * 100, "auto", train__device="auto").per_gpu == 1
    assert asked == [(1, [1]), (2, [1])]


@pytest.mark.parametrize(
    ("step", "per_gpu"),
    # A trial of six steps: writing takes 0.3 s, in which another process could train.
    [(0.1, 2), (10.0, 1)],
)
def test_where_the_budget_is_spent_a_second_process_is_taken_only_if_writing_takes_long(
    tried, step, per_gpu, monkeypatch
):
    set_machines(monkeypatch, {"CPU": 8.0, "GPU": 1.0})
    asked = tried(on_a_gpu(lambda size: step))
    spent = Budget(known=0.0, steps=500.0, spent=1000.0)
    found = arrange([1] * 100, "auto", budget=spent, train__device="auto")
    assert (asked, found.per_gpu, found.cut_short) == ([(1, [1])], per_gpu, True)


class Timer:
    """Stands in for run_trials: a step of an array takes as long as a function says."""

    def __init__(self, seconds, monkeypatch):
        self.seconds, self.sizes = seconds, []
        self.passed = 1000.0
        monkeypatch.setattr(measuring, "run_trials", self.run)
        monkeypatch.setattr(measuring.time, "perf_counter", lambda: self.passed)

    def run(self, trials, preloaded_texts, sync_every):
        self.sizes.append(len(trials))
        for step in range(trials[0].config.train.steps + 1):
            self.passed += self.seconds(len(trials))
            row = TrainingRow(step=step, loss=1.0, log_z=0.0, grad_norm=1.0, lr=0.1)
            for trial in trials:
                trial.recorder.log([row])


@pytest.mark.parametrize(
    ("seconds", "most", "sizes"),
    [
        (lambda size: 0.01, 64, [1, 2, 4, 8, 16, 32, 64]),  # calls alone
        (lambda size: 0.01 * max(1, size / 8), 64, [1, 2, 4, 8]),  # arithmetic from there on
        (lambda size: 0.01 * size, 64, [1]),  # all arithmetic
        (lambda size: 0.01, 5, [1, 2, 4]),
        (lambda size: 0.2, 64, [1]),  # steps too long for calls to matter
    ],
)
def test_an_array_grows_while_that_makes_a_step_of_each_trial_shorter(
    seconds, most, sizes, monkeypatch
):
    Timer(seconds, monkeypatch)
    to_try = [2**i for i in range(7) if 2**i <= most]
    found = measure(configured().to_flat(), {}, to_try, growing=True)
    assert [one.array for one in found.measured] == sizes
    assert not found.cut_short


@pytest.mark.parametrize(
    ("steps", "sizes", "cut_short"),
    # Six steps of 0.09 s: in two seconds, the least there is, a trial runs twice, and an array of
    # two once. Six hundred steps of a trial in such an array take 27 s.
    [(10, [1, 1, 2], True), (600, [1, 1, 2, 4], True), (10**6, [1, 1, 2, 4, 8], False)],
)
def test_measuring_ends_when_it_has_taken_its_share_of_the_sweep(
    steps, sizes, cut_short, monkeypatch
):
    timer = Timer(lambda size: 0.09, monkeypatch)
    budget = Budget(known=0.0, steps=float(steps), spent=0.0)
    found = measure(configured().to_flat(), {}, [1, 2, 4, 8], budget, growing=True)
    assert timer.sizes == sizes
    assert found.cut_short == cut_short
    assert [one.array for one in found.measured] == sizes[1:]


def test_a_trial_that_is_measured_longer_than_the_sweep_warrants_is_cut_off(monkeypatch):
    Timer(lambda size: 1.0, monkeypatch)
    budget = Budget(known=0.0, steps=30.0, spent=0.0)
    found = measure(configured(train__steps=40, probes__every=20).to_flat(), {}, [1], budget)
    assert found.cut_short
    assert len(found.measured[0].steps) == 4  # the first, and three in three seconds


@pytest.mark.parametrize(("room", "sizes"), [(1.0, [1]), (10.0**15, [1, 4])])
def test_a_real_array_is_as_large_as_memory_holds(room, sizes):
    found = measure(configured().to_flat(), {}, [1, 4], room=room)
    assert [one.array for one in found.measured] == sizes
    assert not found.failure


def test_an_array_that_breaks_leaves_what_was_measured_before(monkeypatch):
    run = measuring.run_trials

    def break_arrays(trials, **more):
        if len(trials) > 1:
            raise ArithmeticError("no such number")
        return run(trials, **more)

    monkeypatch.setattr(measuring, "run_trials", break_arrays)
    found = measure(configured().to_flat(), {}, [1, 2, 4], growing=True)
    assert [one.array for one in found.measured] == [1]
    assert found.failure == "arrays of 2 fail: ArithmeticError: no such number"


@pytest.mark.parametrize(
    ("asked", "trials", "expected", "said"),
    [("4", 8, 4, ""), ("4", 2, 2, ""),
     ("32", 40, 17, "--array 32: memory is enough only for arrays of 17 trials")],
)  # fmt: skip
def test_an_array_that_memory_does_not_hold_is_made_smaller_and_that_is_said(
    asked, trials, expected, said, monkeypatch
):
    # Two trials at a time: 10 GiB each.
    set_machines(monkeypatch, {"CPU": 2.0, "memory": 20.0 * GIB})

    def side_by_side(shape, texts, count, sizes, budget, growing, room):
        size = min(sizes[-1], measuring.held(ALONE, room))
        return [Tried([ALONE, replace(ALONE, array=size)], cut_short=False, failure="")] * count

    monkeypatch.setattr(packing, "side_by_side", side_by_side)
    console = Console(record=True, width=200)
    found = arrange([trials], asked, console, train__device="cpu")
    assert (found.array, console.export_text().strip()) == (expected, said)
