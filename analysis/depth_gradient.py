"""Finding A: do the attention weights of early layers widen fastest?

The growth of a layer is d(log std) of its merged QKV weight since step 0. The gradient of a run is
tau = -Kendall(layer, growth): 1 where each layer grows less than the one before it, -1 where more.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl


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
    return frame.filter(pl.col("step") == pl.col("step").max().over("trial_key"))


def depth_gradient(growth: pl.DataFrame) -> pl.DataFrame:
    """Per run, at its last step: trial_key, step, tau, widest_layer, median_growth.

    `growth` is what layer_growth gives.
    tau is null where it is undefined: fewer than two layers, or all growth alike.
    """
    rows = []
    for (key,), run in last_steps(growth).group_by("trial_key", maintain_order=True):
        rows.append(
            {
                "trial_key": key,
                "step": run["step"][0],
                "tau": gradient_tau(run["layer"], run["growth"]),
                "widest_layer": run.sort("growth", descending=True, nulls_last=True)["layer"][0],
                "median_growth": run["growth"].median(),
            }
        )
    schema = {
        "trial_key": pl.String,
        "step": pl.Int64,
        "tau": pl.Float64,
        "widest_layer": pl.Int64,
        "median_growth": pl.Float64,
    }
    return pl.DataFrame(rows, schema=schema)


def gradient_tau(layers: pl.Series, growth: pl.Series) -> float | None:
    """-Kendall's tau-b of layer and growth; null where undefined: growth unknown, or all alike.

    As scipy.stats.kendalltau has it, without its half a millisecond a call.
    """
    x, y = (np.sign(values[:, None] - values) for values in (layers.to_numpy(), growth.to_numpy()))
    tau = float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum() or np.nan))
    return None if math.isnan(tau) else -tau
