import math

import numpy as np
import polars as pl
import pytest
from scipy import stats

from analysis.depth_gradient import at_report_steps, depth_gradient, gradient_tau, layer_growth


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
    sizes = {f"run {i}": 3 + i % 6 for i in range(50)}
    grown = {run: rng.integers(0, 5, size) / 10 for run, size in sizes.items()}  # with ties
    frame = pl.DataFrame(
        [
            {"trial_key": run, "layer": layer, "growth": growth}
            for run, values in grown.items()
            for layer, growth in enumerate(values)
        ]
    ).sample(fraction=1.0, shuffle=True, seed=0)
    found = dict(gradient_tau(frame, ["trial_key"]).rows())
    for run, values in grown.items():
        expected = stats.kendalltau(range(len(values)), values).statistic
        assert found[run] == (None if np.isnan(expected) else pytest.approx(-expected))


@pytest.mark.parametrize("growth", [[0.1] * 8, [0.1], [None, 0.1, 0.2], [math.inf, math.inf, 0.1]])
def test_tau_is_null_where_it_is_undefined(growth):
    frame = pl.DataFrame(
        {"trial_key": "a", "layer": range(len(growth)), "growth": growth}, strict=False
    )
    assert gradient_tau(frame, ["trial_key"])["tau"].to_list() == [None]


def test_some_steps_and_each_runs_last_are_at_report_steps():
    frame = pl.DataFrame({"trial_key": ["a"] * 4 + ["b"] * 3, "step": [0, 50, 60, 120, 0, 50, 100]})
    assert at_report_steps(frame).rows() == [
        ("a", 50, False), ("a", 120, True), ("b", 50, False), ("b", 100, True),
    ]  # fmt: skip
