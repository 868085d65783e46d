import polars as pl
import pytest

from analysis.findings import of_seeds
from analysis.frames import with_scheme
from analysis.runs import read_sweeps
from gptcore.config import TrialConfig
from helpers.store import store_in


def test_runs_of_one_seed_count_once():
    runs = pl.DataFrame({"seed": [0, 0, 1, 2], "subset": "all", "x": [1.0, 3.0, 5.0, None]})
    assert of_seeds(runs, "x") == pytest.approx([2.0, 5.0])
    assert of_seeds(runs.with_columns(x=pl.col("x") > 2), "x") == pytest.approx([0.5, 1.0])
    halves = runs.with_columns(pl.Series("subset", ["all", "0-0.5", "all", "all"]))
    assert of_seeds(halves, "x") == pytest.approx(
        [1.0, 5.0]
    )  # one run shows nothing of how a subset varies


def test_knobs_that_vary_besides_seeds_and_subsets_are_in_the_scheme():
    trials = pl.DataFrame(
        {
            "init.scheme": ["model5", "model5", "gpt2"],
            "init.seed": [0, 1, 0],
            "corpus.subset": ["all", "0-0.5", "all"],
            "optim.lr": [0.1, 0.1, 0.1],
        }
    )
    others = TrialConfig().to_flat()
    trials = trials.with_columns(
        pl.lit(value).alias(knob) for knob, value in others.items() if knob not in trials.columns
    )
    assert with_scheme(trials)["scheme"].to_list() == ["model5", "model5", "gpt2"]
    wider = trials.with_columns(
        pl.Series("model.tied", [True, True, False]), pl.Series("optim.lr", [0.1, 0.1, 1.0])
    )
    assert with_scheme(wider)["scheme"].to_list() == [
        "model5, model.tied true, optim.lr 0.1",
        "model5, model.tied true, optim.lr 0.1",
        "gpt2, model.tied false, optim.lr 1.0",
    ]


def test_knobs_that_do_not_name_configurations_are_not_in_the_scheme(two_sweeps):
    sweep = read_sweeps(store_in(two_sweeps), ["one"], None, two_sweeps / "cache")
    trials = sweep.trials.with_columns(
        pl.Series("train.device", ["cpu", "auto"]), pl.Series("probes.every", [1, 2])
    )
    assert with_scheme(trials)["scheme"].to_list() == ["model5", "gpt2"]
