"""Every specification of a claim, on real runs and on planted numbers."""

from dataclasses import replace
from itertools import product

import numpy as np
import polars as pl
import pytest

from analysis.claims import CLAIMS, Part
from analysis.frames import trials_to_judge, with_scheme
from analysis.measures import ONCE, UNUSED
from analysis.runs import read_sweeps
from analysis.specifications import SPECIFIED, joint_p, specifications
from analysis.variance import over_units
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
    found = [tuple(one.choices[choice] for choice in choices) for one in specified[claim].all]
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
    (one,) = (one for one in specified[claim].all if choices.items() <= one.choices.items())
    by_seed = (
        CLAIMS[claim].measure(sweep).filter(part=part)
        .join(sweep.trials.select("trial_key", "init.seed"), on="trial_key")
        .group_by("init.seed").agg(pl.col("value").mean())
    )  # fmt: skip
    assert one.estimate.value == pytest.approx(by_seed["value"].mean())
    assert one.estimate.seeds == by_seed.height


def test_a_baseline_shifts_what_it_says(sweep, specified):
    rows = [one for one in specified["rare_falls"].all if one.choices["mask"] == "none"]
    by_baseline = {
        one.choices["baseline"]: one.estimate.value
        for one in rows
        if one.choices["group"] == "all that occur once"
    }
    level = by_baseline["-ln V"] - by_baseline["the untrained level"]
    # -(ln V + d std^2 / 2) is below -ln V, so a number is further above the former.
    std = sweep.tables["init"].filter(kind="wte")["std"].to_numpy()
    assert level == pytest.approx(-(16 * (std**2) / 2).mean(), rel=1e-6)


def curve(rng, n_seeds, effect, ways=40):
    """Draw specifications that agree with each other, because they measure the same seeds."""
    seeds = rng.normal(effect, 1, n_seeds)
    return [
        over_units(
            pl.DataFrame(
                {"config": "", "seed": range(n_seeds), "value": seeds + rng.normal(0, 0.3, n_seeds)}
            )
        )
        for _ in range(ways)
    ]


def test_specifications_that_agree_by_chance_do_not_count_as_many_findings():
    rng, rule = np.random.default_rng(0), Part(centre="mean", low=0.0)
    by_chance = [joint_p(rule, curve(rng, 8, 0.0)) for _ in range(200)]
    assert np.mean(np.array(by_chance) <= 0.05) == pytest.approx(0.05, abs=0.05)
    assert np.mean(by_chance) == pytest.approx(0.5, abs=0.08)
    assert joint_p(rule, curve(rng, 8, 3.0)) == 2**-8
    assert joint_p(rule, []) is None


def test_texts_and_rates_that_differ_are_choices_too(sweep):
    trials = trials_to_judge(sweep).with_columns(
        pl.when(pl.col("seed") == 0).then(pl.lit("all")).otherwise(pl.lit("0-0.5"))
        .alias("corpus.subset")
    )  # fmt: skip
    found = specifications(sweep, trials)["depth_gradient"].all
    assert {one.choices["text"] for one in found} == {"every value", "all", "0-0.5"}
