"""The names and colours that a plan gives to trials."""

import pytest

from gptcore.config import KNOBS, knob_type
from helpers.trials import TINY
from sweeps.plan import jobs_of, make_plan
from tracking.colours import COLOURS


def plan_of(**space):
    tiny = {knob: [value] for knob, value in TINY.items()}
    return make_plan("n", "p", [{**tiny, **space}])


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({}, ["gpt2, seed 0"]),
        ({"init.seed": [0, 7]}, ["gpt2, seed 0", "gpt2, seed 7"]),
        ({"corpus.subset": ["all", "0-0.25"]}, ["gpt2, all, seed 0", "gpt2, 0-0.25, seed 0"]),
        ({"optim.lr": [0.001, 1e-5]}, ["gpt2, lr 0.001, seed 0", "gpt2, lr 1e-05, seed 0"]),
        ({"model.tied": [True, False]}, ["gpt2, tied true, seed 0", "gpt2, tied false, seed 0"]),
        ({"optim.name": ["adamw", "sgd"]}, ["gpt2, adamw, seed 0", "gpt2, sgd, seed 0"]),
        (
            {"corpus.data_seed": [0, 1]},
            ["gpt2, data_seed 0, seed 0", "gpt2, data_seed 1, seed 0"],
        ),
    ],
)
def test_a_name_has_the_knobs_in_which_trials_differ(space, named):
    plan = plan_of(**{"init.scheme": ["gpt2"], "init.seed": [0], **space})
    assert [job.name for job in jobs_of(plan, plan.trials)] == named


def test_the_last_part_of_every_numeric_knob_is_unique():
    numbers = [knob.rpartition(".")[2] for knob in KNOBS if knob_type(knob) is not str]
    assert len(set(numbers)) == len(numbers)


def test_a_text_file_is_named_without_its_folder(tmp_path):
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for text in texts:
        text.write_text(f"{text.name} and nothing more. " * 300)
    plan = plan_of(**{"corpus.name": [str(text) for text in texts], "init.scheme": ["gpt2"]})
    assert [job.name.split(", ")[1] for job in jobs_of(plan, plan.trials)] == ["one.txt", "two.txt"]


def test_trials_of_one_configuration_have_one_colour_in_the_order_of_the_plan():
    schemes = ["model5", "gpt2", "normal", "uniform", "laplace", "orthogonal", "xavier_normal",
               "kaiming_normal"]  # fmt: skip
    plan = plan_of(**{"init.seed": [0, 1], "init.scheme": schemes})
    for job in jobs_of(plan, plan.trials):
        place = schemes.index(plan.trials[job.key].init.scheme)
        assert job.colour == COLOURS[place % len(COLOURS)]


def test_a_scheme_has_all_compared_knobs_and_a_colour_of_its_own():
    plan = plan_of(**{"optim.lr": [0.001, 0.01], "init.scheme": ["model5", "gpt2"]})
    jobs = jobs_of(plan, plan.trials)
    assert {job.scheme for job in jobs} == {
        f"{scheme}, optim.lr {lr}" for scheme in ("model5", "gpt2") for lr in (0.001, 0.01)
    }
    assert [job.colour for job in jobs] == COLOURS[:4]


def test_a_scheme_keeps_its_name_and_colour_when_only_some_trials_are_left_to_run():
    plan = plan_of(**{"optim.lr": [0.001, 0.01], "init.scheme": ["model5"]})
    (last,) = jobs_of(plan, list(plan.trials)[1:])
    assert (last.scheme, last.colour) == ("model5, optim.lr 0.01", COLOURS[1])
