"""Every specification of a claim, on real runs and on planted numbers."""

from dataclasses import replace
from itertools import product

import polars as pl
import pytest

from analysis.claims import CLAIMS
from analysis.frames import trials_to_judge, with_scheme
from analysis.measures import ONCE, UNUSED
from analysis.runs import read_sweeps
from analysis.specifications import SPECIFIED, specifications
from helpers.store import store_in


@pytest.fixture(scope="module")
def sweep(finished_sweep):
    found = read_sweeps(store_in(finished_sweep), ["small"], None, finished_sweep / "cache")
    return replace(found, trials=with_scheme(found.trials))


@pytest.fixture(scope="module")
def specified(sweep):
    return specifications(sweep, trials_to_judge(sweep))


@pytest.mark.parametrize("claim", SPECIFIED)
def test_every_combination_of_choices_is_there_once(claim, specified):
    choices = SPECIFIED[claim].choices
    found = [tuple(one.choices[choice] for choice in choices) for one in specified[claim]]
    options = [list(dict.fromkeys(column)) for column in zip(*found, strict=True)]
    assert all(len(some) > 1 for some in options[:2])
    assert len(options) == len(choices)
    assert sorted(found) == sorted(product(*options))


@pytest.mark.parametrize(
    ("claim", "part", "choices"),
    [
        ("depth_gradient", "tau",
         {"weight": "qkv", "measure": "d(log std)", "step": "the last"}),
        ("rare_falls", ONCE,
         {"mask": "sequence", "group": "all that occur once", "step": "the last",
          "baseline": "its own start"}),
        ("never_suppressed", UNUSED,
         {"mask": "sequence", "group": "all unused", "step": "the last",
          "baseline": "its own start"}),
    ],
)  # fmt: skip
def test_the_claim_itself_is_one_of_them(claim, part, choices, sweep, specified):
    (one,) = (one for one in specified[claim] if choices.items() <= one.choices.items())
    by_seed = (
        CLAIMS[claim].measure(sweep).filter(part=part)
        .join(sweep.trials.select("trial_key", "init.seed"), on="trial_key")
        .group_by("init.seed").agg(pl.col("value").mean())
    )  # fmt: skip
    assert one.estimate.value == pytest.approx(by_seed["value"].mean())
    assert one.estimate.seeds == by_seed.height


def test_a_baseline_shifts_what_it_says(sweep, specified):
    rows = [one for one in specified["rare_falls"] if one.choices["mask"] == "none"]
    by_baseline = {
        one.choices["baseline"]: one.estimate.value
        for one in rows
        if one.choices["group"] == "all that occur once"
    }
    level = by_baseline["-ln V"] - by_baseline["the untrained level"]
    # -(ln V + d std^2 / 2) is below -ln V, so a number is further above the former.
    std = sweep.tables["init"].filter(kind="wte")["std"].to_numpy()
    assert level == pytest.approx(-(16 * (std**2) / 2).mean(), rel=1e-6)
