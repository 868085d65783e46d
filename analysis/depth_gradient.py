"""Finding A: do the attention weights of early layers widen fastest?

The growth of a layer is d(log std) of a weight since step 0. The weight is the merged QKV where
nothing else is said. The gradient of a run is tau = -Kendall(layer, growth): 1 where each layer
grows less than the layer before it, -1 where each grows more.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

STEPS = (50, 100, 250, 500)
"""The steps before the last one at which a report follows a number through training."""
IS_LAST = pl.col("step") == pl.col("step").max().over("trial_key")


def layer_growth(weights: pl.LazyFrame, kind: str = "qkv") -> pl.DataFrame:
    """Compute how much each layer's weight has grown since step 0.

    Returns:
        One row for each run, layer and step: trial_key, layer, step, std, growth (the log ratio to
        step 0), and displacement, the RMS displacement since step 0. The displacement can be
        compared between schemes whose stds differ at step 0.
    """
    qkv = weights.filter(pl.col("kind") == kind)
    start = qkv.filter(pl.col("step") == 0).select("trial_key", "layer", start="std")
    return (
        qkv.join(start, on=["trial_key", "layer"])
        .with_columns(growth=(pl.col("std") / pl.col("start")).log())
        .select("trial_key", "layer", "step", "std", "growth", displacement="rms_displacement")
        .sort("trial_key", "layer", "step")
        .collect()
    )


def last_steps(frame: pl.DataFrame) -> pl.DataFrame:
    """Select the rows of each run's last step."""
    return frame.filter(IS_LAST)


def at_report_steps(frame: pl.DataFrame) -> pl.DataFrame:
    """Select the rows of STEPS and of each run's last step, and add a column is_last."""
    rows = frame.with_columns(is_last=IS_LAST)
    return rows.filter(pl.col("is_last") | pl.col("step").is_in(STEPS))


def depth_gradient(growth: pl.DataFrame) -> pl.DataFrame:
    """Compute the gradient over depth of each run, at its last step.

    Args:
        growth: the rows of layer_growth.

    Returns:
        One row for each run: trial_key, step, tau, widest_layer, median_growth. tau is null where
        gradient_tau gives null.
    """
    last = last_steps(growth).sort("trial_key", "layer")
    widest = last.group_by("trial_key", maintain_order=True).agg(
        step=pl.col("step").first(),
        widest_layer=pl.col("layer").sort_by("growth", descending=True, nulls_last=True).first(),
        median_growth=pl.col("growth").median(),
    )
    tau = gradient_tau(last, ["trial_key"])
    return widest.join(tau, on="trial_key", maintain_order="left").select(
        "trial_key", "step", "tau", "widest_layer", "median_growth"
    )


def gradient_tau(growth: pl.DataFrame, by: list[str], column: str = "growth") -> pl.DataFrame:
    """Compute -Kendall's tau-b of layer and a column, for each group of rows.

    The numbers are those of scipy.stats.kendalltau, which takes half a millisecond for each group.

    Args:
        growth: the rows of layer_growth, or some of them.
        by: the columns that make the groups.
        column: the number that is compared with the layer.

    Returns:
        The columns of `by`, and tau. tau is null for fewer than two layers, for a number that is
        not finite, and where all numbers are equal.
    """
    runs = growth.sort(*by, "layer").group_by(by, maintain_order=True).agg("layer", column)
    sizes = runs["layer"].list.len().to_numpy()
    tau = np.full(runs.height, np.nan)
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        of_layers, of_growth = _signs(runs["layer"][rows]), _signs(runs[column][rows])
        pairs = np.sqrt((of_layers**2).sum((1, 2)) * (of_growth**2).sum((1, 2)))
        agree = (of_layers * of_growth).sum((1, 2))
        tau[rows] = -np.divide(agree, pairs, out=np.full(len(rows), np.nan), where=pairs != 0)
    return runs.select(*by, tau=pl.Series(tau).fill_nan(None))


def _signs(runs: pl.Series) -> NDArray[np.float64]:
    """Return the sign of the difference of every two values of each run.

    Args:
        runs: one list of n values for each run.

    Returns:
        An array of shape (runs, n, n): sign(value i - value j). A difference with a value that is
        not finite is NaN.
    """
    values = runs.explode().to_numpy().astype(float).reshape(len(runs), -1)
    # The growth of a layer whose std was 0 at step 0 is infinite.
    known = np.where(np.isfinite(values), values, np.nan)
    signs: NDArray[np.float64] = np.sign(known[:, :, None] - known[:, None, :])
    return signs
