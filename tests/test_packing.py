"""Which trials train together."""

from dataclasses import replace

import pytest
import ray
from rich.console import Console

from gptcore.config import InputError, TrialConfig
from gptcore.experiment import conflicting_knobs
from helpers.machines import set_machines
from helpers.trials import TINY
from sweeps.estimate import packing
from sweeps.estimate.arrays import check_array, check_together, split, together
from sweeps.estimate.cost import Measured
from sweeps.estimate.packing import arranged, array_size, best_size, known_batches


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


# Steps too long for calls to matter.
ALONE = Measured(
    start_delay=0.0, steps=[1.0] * 6, writing=0.0, rows={}, points=[], bytes={},
    memory=GIB, gpu_memory=0, gpu_size=0, empty=GIB // 2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "trials", "expected", "said"),
    [("off", 8, 1, ""), ("auto", 8, 1, ""), ("4", 8, 4, ""), ("4", 2, 2, ""), ("1", 8, 1, ""),
     ("32", 40, 17, "--array 32: memory is enough only for arrays of 17 trials")],
)  # fmt: skip
def test_an_array_that_memory_does_not_hold_is_made_smaller_and_that_is_said(
    asked, trials, expected, said, monkeypatch
):
    # Two trials at a time: 10 GiB each.
    set_machines(monkeypatch, {"CPU": 2.0, "memory": 20.0 * GIB})
    console = Console(record=True, width=200)
    groups = [[str(i) for i in range(trials)]]
    size = array_size(configured(train__device="cpu"), None, asked, groups, ALONE, console)
    assert (size, console.export_text().strip()) == (expected, said)


class Task:
    """In place of a task of Ray's: what it is asked, it gives or raises."""

    def __init__(self, best):
        self.best, self.asked = best, []

    def remote(self, params, texts, most):
        self.asked.append(most)
        return self.best(most)


@pytest.fixture
def eight_slots(monkeypatch):
    """-> a function that has tasks on a machine of eight cores done in a given way."""
    machine = {"CPU": 8.0, "memory": 800.0 * GIB}
    set_machines(monkeypatch, machine)

    def do(best):
        task = Task(best)
        monkeypatch.setattr(packing.ray, "remote", lambda **_: lambda _: task)
        monkeypatch.setattr(packing.ray, "get", lambda given: given)
        return task

    return do


@pytest.mark.parametrize(
    ("sizes", "most"),
    [([64], 8), ([8] * 8, 8), ([100] * 8, 64), ([20], 3), ([2, 2, 2, 2, 2], 2)],
)
def test_auto_tries_arrays_that_leave_every_slot_something_to_do(sizes, most, eight_slots):
    task = eight_slots(lambda most: most)
    groups = [[f"{i}-{j}" for j in range(size)] for i, size in enumerate(sizes)]
    short = replace(ALONE, steps=[1.0, *[0.01] * 5])
    shape = configured(train__device="cpu")
    assert array_size(shape, None, "auto", groups, short, Console()) == most
    assert task.asked == [most]


@pytest.mark.parametrize("sizes", [[8], [1] * 30])
def test_auto_tries_none_where_there_are_too_few_trials_or_none_go_together(sizes, eight_slots):
    task = eight_slots(lambda most: most)
    groups = [[f"{i}-{j}" for j in range(size)] for i, size in enumerate(sizes)]
    short = replace(ALONE, steps=[0.01] * 6)
    assert array_size(configured(), None, "auto", groups, short, Console()) == 1
    assert task.asked == []


def test_arrays_that_cannot_be_tried_leave_single_trials_and_a_line(eight_slots):
    def break_down(most):
        raise ray.exceptions.RayError("the worker died: out of memory")

    eight_slots(break_down)
    console = Console(record=True, width=200)
    short = replace(ALONE, steps=[0.01] * 6)
    groups = [[str(i) for i in range(64)]]
    assert array_size(configured(), None, "auto", groups, short, console) == 1
    said = "arrays could not be measured: the worker died: out of memory"
    assert console.export_text().strip() == said


def test_an_array_that_breaks_when_it_is_measured_is_halved_until_it_does_not(monkeypatch):
    machine = {"CPU": 2.0, "memory": 800.0 * GIB}
    set_machines(monkeypatch, machine)
    asked = []

    def side_by_side(shape, texts, count, array=1):
        asked.append((count, array))
        if array > 3:
            raise ray.exceptions.RayError("out of memory")
        return [replace(ALONE, array=array)] * count

    monkeypatch.setattr(packing, "side_by_side", side_by_side)
    console = Console(record=True, width=200)
    groups = [[str(i) for i in range(13)]]
    found = arranged(configured(train__device="cpu"), groups, None, "13", console)
    assert asked == [(2, 1), (1, 13), (2, 5), (2, 2)]
    assert (found.array, found.per_gpu, found.cost.memory) == (2, 1, ALONE.memory)
    batches = known_batches(found, configured(train__device="cpu"), groups, "13")
    assert [len(batch.keys) for batch in batches] == [1, 2, 2, 2, 2, 2, 2]
    said = ["arrays of 13 fail: out of memory; trying arrays of 6",
            "arrays of 5 fail: out of memory; trying arrays of 2"]  # fmt: skip
    assert console.export_text().splitlines() == said


@pytest.mark.parametrize(
    ("seconds", "most", "expected"),
    [
        (lambda size: 0.01, 64, 64),  # calls alone
        (lambda size: 0.01 * max(1, size / 8), 64, 8),  # arithmetic from there on
        (lambda size: 0.01 * size, 64, 1),  # all arithmetic
        (lambda size: 0.01, 5, 4),
    ],
)
def test_an_array_grows_while_that_makes_a_step_of_each_trial_shorter(
    seconds, most, expected, monkeypatch
):
    monkeypatch.setattr(
        packing,
        "step_seconds",
        lambda config, sizes, texts: [seconds(size) for size in sizes],
    )
    assert best_size(configured().to_flat(), {}, most) == expected


def test_of_a_real_shape_every_size_up_to_the_most_is_measured(monkeypatch):
    monkeypatch.setattr(packing, "MIN_SPEEDUP", 0.0)
    assert best_size(configured().to_flat(), {}, 4) == 4
