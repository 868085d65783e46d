"""Which trials train together."""

import pytest
from rich.console import Console

import sweeps.arrays
import sweeps.estimate
from conftest import TINY
from gptcore.config import InputError, TrialConfig
from sweeps.arrays import best_size, check_array, check_together, split, together
from sweeps.estimate import Measured, array_size


def configured(**more):
    knobs = {key.replace("__", "."): value for key, value in more.items()}
    return TrialConfig.from_flat({**TINY, **knobs})


def test_trials_go_together_that_differ_in_init_and_corpus_alone():
    trials = {
        "a": configured(),
        "b": configured(optim__lr=0.5),
        "c": configured(init__seed=3, init__scheme="gpt2", corpus__subset="0-0.5"),
        "d": configured(optim__lr=0.5, corpus__data_seed=7),
    }
    assert together(trials) == [["a", "c"], ["b", "d"]]


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
    began=0.0, steps=[1.0] * 6, writing=0.0, rows={}, points=[], bytes={},
    memory=GIB, gpu_memory=0, gpu_size=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "trials", "expected", "said"),
    [("off", 8, 1, ""), ("auto", 8, 1, ""), ("4", 8, 4, ""), ("4", 2, 2, ""), ("1", 8, 1, ""),
     ("32", 40, 9, "--array 32: memory holds arrays of 9 of these trials")],
)  # fmt: skip
def test_an_array_that_memory_does_not_hold_is_made_smaller_and_that_is_said(
    asked, trials, expected, said, monkeypatch
):
    # Two trials at a time: 10 GiB each.
    monkeypatch.setattr(sweeps.estimate, "machines", lambda: [{"CPU": 2.0, "memory": 20.0 * GIB}])
    console = Console(record=True, width=200)
    groups = [[str(i) for i in range(trials)]]
    size = array_size(configured(train__device="cpu"), None, asked, groups, ALONE, console)
    assert (size, console.export_text().strip()) == (expected, said)


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
        sweeps.arrays, "step_seconds", lambda config, sizes: [seconds(size) for size in sizes]
    )
    assert best_size(configured().to_flat(), {}, most) == expected


def test_a_real_shape_is_measured():
    assert best_size(configured().to_flat(), {}, 4) in (1, 2, 4)
