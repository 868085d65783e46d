import math

import numpy as np
import polars as pl
import pytest
from scipy import stats

from analysis.depth_gradient import depth_gradient, gradient_tau, layer_growth


def weights(growth_of_runs, start=0.02):
    """A weights table whose layers grow as planted, with rows of other kinds between."""
    rows = [
        {
            "trial_key": key,
            "step": step,
            "kind": kind,
            "layer": layer,
            "std": start * math.exp(amount * step / 100) * (1 if kind == "qkv" else 5),
            "rms_displacement": abs(amount) * step,
        }
        for key, growth in growth_of_runs.items()
        for layer, amount in enumerate(growth)
        for step in (100, 0, 50)
        for kind in ("qkv", "q")
    ]
    return pl.LazyFrame(rows)


def test_growth_is_the_log_ratio_to_step_0():
    growth = layer_growth(weights({"a": [0.5, 0.1]}))
    assert growth.select("layer", "step").rows() == [
        (0, 0), (0, 50), (0, 100), (1, 0), (1, 50), (1, 100)
    ]  # fmt: skip
    assert growth["growth"].to_list() == pytest.approx([0, 0.25, 0.5, 0, 0.05, 0.1])


def test_planted_gradients_are_found():
    planted = {
        "falling": [0.6, 0.5, 0.4, 0.3],
        "rising": [0.3, 0.4, 0.5, 0.6],
        "first_only": [0.9, 0.1, 0.2, 0.3],
    }
    found = {
        row["trial_key"]: row for row in depth_gradient(layer_growth(weights(planted))).to_dicts()
    }
    assert found["falling"]["tau"] == pytest.approx(1)
    assert found["rising"]["tau"] == pytest.approx(-1)
    assert found["first_only"]["tau"] == pytest.approx(0)
    assert [found[key]["widest_layer"] for key in planted] == [0, 3, 0]
    assert found["falling"]["median_growth"] == pytest.approx(0.45)


def test_layers_that_grow_alike_by_chance_have_no_gradient():
    rng = np.random.default_rng(0)
    runs = {str(i): rng.normal(size=6).tolist() for i in range(400)}
    taus = depth_gradient(layer_growth(weights(runs)))["tau"]
    assert taus.mean() == pytest.approx(0, abs=4 * taus.std() / 20)


def test_an_undefined_gradient_is_null():
    found = depth_gradient(
        layer_growth(weights({"one_layer": [0.5], "all_alike": [0.0, 0.0, 0.0]}))
    )
    assert found["tau"].to_list() == [None, None]


def test_tau_is_scipys():
    rng = np.random.default_rng(0)
    layers = pl.Series(range(8))
    for _ in range(50):
        growth = pl.Series(rng.integers(0, 5, 8) / 10)  # with ties
        expected = stats.kendalltau(layers, growth).statistic
        assert gradient_tau(layers, growth) == pytest.approx(-expected)
    assert gradient_tau(layers, pl.Series([0.1] * 8)) is None
    assert gradient_tau(layers[:1], pl.Series([0.1])) is None
    assert gradient_tau(layers, pl.Series([None, *range(7)], dtype=pl.Float64)) is None
