"""Figures of a report: fig_*(frame) -> Altair chart.

One line a scheme and subset, a band over its seeds.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from analysis.depth_gradient import last_steps

# Okabe & Ito's colours, told apart with any kind of colour vision; black last.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

FROM_THE_DATA = alt.Scale(zero=False, nice=False)
LOG = alt.Scale(type="log", nice=False)


def over_runs(frame: pl.DataFrame, *axes_and_value: str) -> pl.DataFrame:
    """Mean, smallest and largest of the last column named, over the runs of each scheme and subset
    at each combination of the other columns named."""
    *axes, value = axes_and_value
    by = ["scheme", "subset", *axes]
    return (
        frame.drop_nulls(value)
        .group_by(by)
        .agg(
            mean=pl.col(value).mean(),
            low=pl.col(value).min(),
            high=pl.col(value).max(),
            runs=pl.col("trial_key").n_unique(),
        )
        .sort(by)
    )


def _band_and_line(
    frame: pl.DataFrame, x: str, y_title: str, y_scale: alt.Scale = FROM_THE_DATA
) -> Any:
    """A layer chart of what over_runs gives, against column `x`."""
    scheme = alt.Color(
        "scheme:N",
        title="scheme",
        scale=alt.Scale(range=COLOURS),
        legend=alt.Legend(symbolOpacity=1, labelLimit=0),
    )
    dash = alt.StrokeDash("subset:N", title="corpus.subset")
    tooltip: list[Any] = [
        "scheme:N",
        "subset:N",
        f"{x}:Q",
        alt.Tooltip("mean:Q", format=".4f"),
        alt.Tooltip("low:Q", format=".4f"),
        alt.Tooltip("high:Q", format=".4f"),
        "runs:Q",
    ]
    axis = alt.Axis(tickMinStep=1, format="d")
    base = alt.Chart(frame).encode(x=alt.X(f"{x}:Q", title=x, axis=axis))
    band = base.mark_area(opacity=0.2).encode(
        y=alt.Y("low:Q", title=y_title, scale=y_scale),
        y2="high:Q",
        detail="subset:N",
        color=scheme,
    )
    line = base.mark_line().encode(
        y=alt.Y("mean:Q"), color=scheme, strokeDash=dash, tooltip=tooltip
    )
    return alt.layer(band, line).properties(width=220, height=160)


def fig_qkv_std(growth: pl.DataFrame) -> alt.FacetChart:
    """Std of the merged QKV weight over steps, a panel a layer. `growth` has column scheme."""
    frame = over_runs(growth, "layer", "step", "std")
    return (
        _band_and_line(frame, "step", "std of QKV (log scale)", LOG)
        .facet(facet=alt.Facet("layer:O", title="layer"), columns=3)
        .properties(description="Standard deviation of each layer's QKV weights over steps")
    )


def fig_growth_by_layer(growth: pl.DataFrame) -> alt.LayerChart:
    """Growth of QKV std at the last step against depth."""
    frame = over_runs(last_steps(growth), "layer", "growth")
    return _band_and_line(frame, "layer", "d(log std) of QKV").properties(
        width=460, height=260, description="Growth of QKV weight spread against depth, by scheme"
    )


def fig_rare_by_size(changes: pl.DataFrame) -> Any:
    """Change of rare tokens against the number of tokens trained on, with the one that calibration
    predicts. `changes`: as analysis.claims.rare_by_size, with scheme."""
    base = alt.Chart(changes).encode(
        x=alt.X("n_tokens:Q", title="tokens trained on (log scale)", scale=LOG)
    )
    colour = alt.Color("scheme:N", title="scheme", scale=alt.Scale(range=COLOURS))
    runs = base.mark_circle(opacity=0.5).encode(
        y=alt.Y("change:Q", title="change of rare's mean log-prob (nats)"),
        color=colour,
        tooltip=["scheme:N", "n_tokens:Q", alt.Tooltip("change:Q", format=".3f")],
    )
    means = base.mark_line().encode(y="mean(change):Q", color=colour)
    predicted = base.mark_line(color="black", strokeDash=[6, 4]).encode(y="mean(predicted):Q")
    zero = alt.Chart().mark_rule(color="#767676").encode(y=alt.datum(0))
    return alt.layer(zero, predicted, means, runs).properties(
        width=460, height=260, description="Change of rare tokens against the size of the text"
    )


def fig_group_log_prob(token_groups: pl.DataFrame) -> alt.FacetChart:
    """Mean log-prob of each token group over steps. `token_groups`: of one mask, with scheme."""
    groups = token_groups["group"].unique(maintain_order=True).to_list()
    frame = over_runs(token_groups, "group", "step", "mean_logprob")
    return (
        _band_and_line(frame, "step", "mean log-prob (nats)")
        .facet(facet=alt.Facet("group:N", title="token group", sort=groups), columns=3)
        .properties(description="Mean log-probability of each token group over steps")
    )
