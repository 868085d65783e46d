"""Finding A: do the attention weights of early layers widen fastest?

The growth of a layer is d(log std) of a weight since step 0, of the merged QKV where not said
otherwise. The gradient of a run is tau = -Kendall(layer, growth): 1 where each layer grows less
than the one before it, -1 where more.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

STEPS = (50, 100, 250, 500)
"""At these, beside the last, the course of a number is looked at."""
IS_LAST = pl.col("step") == pl.col("step").max().over("trial_key")


def layer_growth(weights: pl.LazyFrame, kind: str = "qkv") -> pl.DataFrame:
    """Per run, layer and step: trial_key, layer, step, std, growth (log ratio to step 0) and RMS
    displacement, which is comparable over schemes whose stds start apart."""
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
    """The rows of each run's last step."""
    return frame.filter(IS_LAST)


def looked_at(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of STEPS and of each run's last step, with `is_last`."""
    rows = frame.with_columns(is_last=IS_LAST)
    return rows.filter(pl.col("is_last") | pl.col("step").is_in(STEPS))


def depth_gradient(growth: pl.DataFrame) -> pl.DataFrame:
    """Per run, at its last step: trial_key, step, tau, widest_layer, median_growth.

    `growth` is what layer_growth gives. tau is null where it is undefined, as gradient_tau says.
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
    """-Kendall's tau-b of layer and a column, for each combination of the columns `by`; -> by, tau.

    As scipy.stats.kendalltau has it, without its half a millisecond a call. Null where undefined:
    fewer than two layers, growth unknown, or all alike.
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
    """Of each run, a list of as many values as every other: the sign of each value minus each."""
    values = runs.explode().to_numpy().astype(float).reshape(len(runs), -1)
    # A std of 0 at step 0 grows without bound: what is not finite is not known.
    known = np.where(np.isfinite(values), values, np.nan)
    return np.sign(known[:, :, None] - known[:, None, :])
