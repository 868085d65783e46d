"""Draw the figures of a report: each fig_* turns a frame into an Altair chart.

A figure has one line for each scheme and subset, with a band over its seeds. Where there are
several schemes, a list below the figure highlights one of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import altair as alt
import polars as pl

from analysis.claims import CLAIMS
from analysis.decisions import CONTRADICTED, NOT_SUPPORTED, SUPPORTED, UNDERPOWERED
from analysis.depth_gradient import last_steps

# Okabe & Ito's colours, which differ for every kind of colour vision; black is last.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
VERDICT_COLOURS = {
    SUPPORTED: "#009E73", NOT_SUPPORTED: "#767676", CONTRADICTED: "#D55E00", UNDERPOWERED: "#E69F00"
}  # fmt: skip
GREY = "#767676"
ERROR = CLAIMS["init_table"].rule("largest error of a kind").high or 0.0
TAU = CLAIMS["depth_gradient"].rule("tau").low or 0.0

Chart = Any
"""A chart of Altair, which has a type for each way to combine charts."""

alt.data_transformers.disable_max_rows()

FROM_THE_DATA = alt.Scale(zero=False, nice=False)
LOG = alt.Scale(type="log", nice=False)
STEP = alt.Axis(tickMinStep=1, format="d")


def over_runs(frame: pl.DataFrame, *axes_and_value: str) -> pl.DataFrame:
    """Summarise a column over the runs of each scheme and subset.

    Args:
        frame: the rows of runs.
        axes_and_value: the column is the last one. For each combination of the columns before it
            there is one row.

    Returns:
        Columns scheme, subset, the axes, mean, low (the smallest), high (the largest), runs.
    """
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


def _scheme() -> alt.Color:
    """Colour by scheme."""
    return alt.Color(
        "scheme:N",
        scale=alt.Scale(range=COLOURS),
        legend=alt.Legend(symbolOpacity=1, labelLimit=0, symbolLimit=0),
    )


def _one_scheme(frame: pl.DataFrame) -> Chart:
    """Make a list from which to choose one of several schemes. The other schemes are dimmed."""
    schemes = frame["scheme"].unique(maintain_order=True).to_list()
    if len(schemes) < 2:
        return alt.selection_point(fields=["scheme"])
    chosen = alt.binding_select(
        options=[None, *schemes], labels=["all", *schemes], name="show the scheme "
    )
    return alt.selection_point(fields=["scheme"], bind=chosen)


def _band_and_line(
    frame: pl.DataFrame, x: str, y_title: str, y_scale: alt.Scale = FROM_THE_DATA
) -> Chart:
    """Draw the rows of over_runs as lines with bands, against the column `x`."""
    one = _one_scheme(frame)
    tooltip: list[Any] = [
        "scheme:N", "subset:N", f"{x}:Q", alt.Tooltip("mean:Q", format=".4f"),
        alt.Tooltip("low:Q", format=".4f"), alt.Tooltip("high:Q", format=".4f"), "runs:Q",
    ]  # fmt: skip
    base = alt.Chart(frame).encode(x=alt.X(f"{x}:Q", title=x, axis=STEP), color=_scheme())
    band = base.mark_area().encode(
        y=alt.Y("low:Q", title=y_title, scale=y_scale),
        y2="high:Q",
        detail="subset:N",
        opacity=alt.condition(one, alt.value(0.2), alt.value(0.02)),
    )
    line = base.mark_line(point=alt.OverlayMarkDef(size=25)).encode(
        y=alt.Y("mean:Q"),
        strokeDash=alt.StrokeDash("subset:N", title="corpus.subset"),
        opacity=alt.condition(one, alt.value(1), alt.value(0.08)),
        tooltip=tooltip,
    )
    return alt.layer(band, line).add_params(one).properties(width=220, height=160)


def _rules(axis: str, *at: float, **style: Any) -> Chart:
    """Draw grey lines across a chart, at values of x or y."""
    rules = alt.Chart(pl.DataFrame({"at": at})).mark_rule(color=GREY, **style)
    return rules.encode(**{axis: "at:Q"})


def fig_init_errors(errors: pl.DataFrame) -> Chart:
    """Draw the error of each kind's std at step 0: a dot for each run, and the claim's margin."""
    runs = alt.Chart(errors).mark_circle(opacity=0.5).encode(
        x=alt.X("error:Q", title="std at step 0 against the scheme's", axis=alt.Axis(format="+%")),
        y=alt.Y("kind:N", title=None, sort=None),
        yOffset="scheme:N",
        color=_scheme(),
        tooltip=["scheme:N", "subset:N", "seed:N", "kind:N",
                 alt.Tooltip("expected:Q", format=".5f"), alt.Tooltip("found:Q", format=".5f")],
    )  # fmt: skip
    margin = _rules("x", -ERROR, ERROR, strokeDash=[4, 3])
    return alt.layer(margin, runs).properties(width=460)


def fig_qkv_std(growth: pl.DataFrame) -> Chart:
    """Draw the std of the merged QKV weight over steps: a panel for each layer."""
    frame = over_runs(growth, "layer", "step", "std")
    return _band_and_line(frame, "step", "std of QKV (log scale)", LOG).facet(
        facet=alt.Facet("layer:O", title="layer"), columns=3
    )


def fig_growth_by_layer(growth: pl.DataFrame) -> Chart:
    """Draw the growth of the QKV std at the last step against depth."""
    frame = over_runs(last_steps(growth), "layer", "growth")
    return _band_and_line(frame, "layer", "d(log std) of QKV").properties(width=460, height=260)


def fig_tau_of_runs(gradients: pl.DataFrame) -> Chart:
    """Draw tau of every run at its last step, and the median of each scheme and subset."""
    base = alt.Chart(gradients.drop_nulls("tau")).encode(
        y=alt.Y("scheme:N", title=None, axis=alt.Axis(labelLimit=0)), yOffset="subset:N"
    )
    x = alt.X("tau:Q", title="tau over depth", scale=alt.Scale(domain=[-1, 1]))
    runs = base.mark_point(filled=True, opacity=0.5, size=50).encode(
        x=x,
        color=alt.Color("scheme:N", scale=alt.Scale(range=COLOURS), legend=None),
        shape=alt.Shape("subset:N", title="corpus.subset"),
        tooltip=["scheme:N", "subset:N", "seed:N", alt.Tooltip("tau:Q", format=".3f"), "trial_key"],
    )
    median = base.mark_tick(color="black", thickness=2, size=16).encode(x="median(tau):Q")
    bounds = _rules("x", 0.0, TAU, strokeDash=[4, 3])
    return alt.layer(bounds, runs, median).properties(width=460)


def fig_tau_over_steps(tau: pl.DataFrame) -> Chart:
    """Draw tau over depth at every step that was recorded."""
    frame = over_runs(tau, "step", "tau")
    scale = alt.Scale(domain=[-1, 1])
    return _band_and_line(frame, "step", "tau over depth", scale).properties(width=460, height=260)


def fig_histograms(bins: pl.DataFrame) -> Chart:
    """Draw the distribution of the QKV weights of each layer, with a slider over the steps."""
    steps = bins["step"].unique().sort().to_list()
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    slider = alt.binding_range(min=steps[0], max=steps[-1], step=min(gaps, default=1), name="step ")
    common = bins.group_by("trial_key").agg(pl.col("step").max())["step"].min()
    step = alt.param(value=common, bind=slider)
    one = _one_scheme(bins)
    return (
        alt.Chart(bins)
        .mark_rule(strokeWidth=2)
        .encode(
            x=alt.X("low:Q", title="weight"),
            x2="high:Q",
            y=alt.Y("density:Q", title="density (log scale)", scale=alt.Scale(type="log")),
            color=_scheme(),
            opacity=alt.condition(one, alt.value(1), alt.value(0.08)),
            tooltip=["scheme:N", "step:Q", alt.Tooltip("low:Q", format=".4f"),
                     alt.Tooltip("high:Q", format=".4f"), alt.Tooltip("density:Q", format=".4g")],
        )
        .transform_filter(alt.datum.step == step)
        .add_params(step, one)
        .properties(width=220, height=160)
        .facet(facet=alt.Facet("layer:O", title="layer"), columns=3)
        .properties(title=f"seed {bins['seed'][0]}, corpus.subset {bins['subset'][0]}")
    )  # fmt: skip


def fig_group_log_probs(token_groups: pl.DataFrame) -> Chart:
    """Draw the mean log-prob of each token group over steps.

    Grey lines are the log-probs of an untrained model (dotted) and of a calibrated one (dashed).

    Args:
        token_groups: the primary rows, with the column level of closed_form.
    """
    groups = token_groups["group"].unique(maintain_order=True).to_list()
    by = ["scheme", "subset", "group"]
    levels = token_groups.group_by(by).agg(
        pl.col("level").mean(), calibrated=(pl.col("mean_logprob") - pl.col("excess")).mean()
    )
    frame = over_runs(token_groups, "group", "step", "mean_logprob").join(levels, on=by)
    base = alt.Chart(frame).encode(x="step:Q", detail=["scheme:N", "subset:N"])
    untrained = base.mark_line(color=GREY, strokeDash=[1, 3]).encode(y="level:Q")
    calibrated = base.mark_line(color=GREY, strokeDash=[8, 4]).encode(
        y="calibrated:Q", tooltip=["subset:N", alt.Tooltip("calibrated:Q", format=".3f")]
    )
    return (
        alt.layer(untrained, calibrated, _band_and_line(frame, "step", "mean log-prob (nats)"))
        .facet(facet=alt.Facet("group:N", title="token group", sort=groups), columns=3)
    )  # fmt: skip


def fig_rare_by_size(changes: pl.DataFrame) -> Chart | None:
    """Draw the change of rare tokens against the number of tokens that a run trains on.

    A dashed line is the change that calibration predicts.

    Args:
        changes: the rows of measures.rare_by_size, with the columns of with_trial.
    """
    if changes["n_tokens"].n_unique() < 2:
        return None
    base = alt.Chart(changes).encode(
        x=alt.X(
            "n_tokens:Q",
            title="tokens trained on (log scale)",
            scale=alt.Scale(type="log", nice=False, padding=20),
        )
    )
    runs = base.mark_circle(opacity=0.5).encode(
        y=alt.Y("change:Q", title="change of rare's mean log-prob (nats)"),
        color=_scheme(),
        tooltip=["scheme:N", "subset:N", "seed:N", "n_tokens:Q",
                 alt.Tooltip("change:Q", format=".3f"), alt.Tooltip("predicted:Q", format=".3f")],
    )  # fmt: skip
    means = base.mark_line().encode(y="mean(change):Q", color=_scheme())
    predicted = base.mark_line(color="black", strokeDash=[6, 4]).encode(y="mean(predicted):Q")
    return alt.layer(_rules("y", 0.0), predicted, means, runs).properties(width=460, height=260)


def fig_same_tokens(tokens: pl.DataFrame) -> Chart:
    """Draw the log-prob of tokens against their count in the text: a panel for each token."""
    return (
        alt.Chart(tokens)
        .mark_point(filled=True, opacity=0.6, size=50)
        .encode(
            x=alt.X("count:Q", title="occurrences", scale=alt.Scale(type="symlog", constant=1),
                    axis=alt.Axis(format="d", tickCount=4)),
            y=alt.Y("log_prob:Q", title="log-prob (nats)", scale=alt.Scale(zero=False)),
            shape=alt.Shape("subset:N", title="corpus.subset"),
            color=alt.Color("subset:N", title="corpus.subset", scale=alt.Scale(range=COLOURS)),
            tooltip=["text:N", "token:Q", "subset:N", "seed:N", "count:Q",
                     alt.Tooltip("log_prob:Q", format=".3f")],
        )
        .properties(width=130, height=110)
        .facet(facet=alt.Facet("text:N", title=None), columns=4)
        .properties(title=tokens["scheme"][0])
    )  # fmt: skip


def fig_mechanism(changes: pl.DataFrame) -> Chart:
    """Draw the change of each group's log-prob, as means over the runs of a scheme.

    Bars are what the logit adds and what log Z adds. A tick is both together.
    """
    parts = {
        "logit": pl.col("logit_change"), "log Z": -pl.col("log_z_change"), "both": pl.col("change")
    }  # fmt: skip
    groups = ["common_100", "rare_100", "never_100", "singletons", "never_used"]
    means = (
        changes.filter(pl.col("group").is_in(groups))
        .group_by("scheme", "group", maintain_order=True)
        .agg(**{part: value.mean() for part, value in parts.items()})
        .unpivot(index=["scheme", "group"], variable_name="part", value_name="nats")
        .drop_nulls("nats")
    )
    base = alt.Chart(means).encode(
        x=alt.X("nats:Q", title="change of mean log-prob (nats)"),
        y=alt.Y("scheme:N", title=None, axis=alt.Axis(labelLimit=0)),
        tooltip=["scheme:N", "group:N", "part:N", alt.Tooltip("nats:Q", format=".3f")],
    )
    bars = base.transform_filter("datum.part != 'both'").mark_bar().encode(
        color=alt.Color("part:N", title="part of", scale=alt.Scale(range=["#0072B2", "#E69F00"])),
        yOffset="part:N",
    )  # fmt: skip
    both = base.transform_filter("datum.part == 'both'").mark_tick(
        color="black", thickness=3, size=18
    )
    return (
        alt.layer(bars, both)
        .properties(width=220)
        .facet(facet=alt.Facet("group:N", title="token group", sort=groups), columns=2)
    )


def fig_specifications(specified: pl.DataFrame) -> Chart:
    """Draw the estimate and interval of every specification, in ascending order, above its choices.

    Args:
        specified: columns seeds, value, low, high, verdict; all other columns are choices.
    """
    results = ["seeds", "value", "low", "high", "verdict"]
    choices = [column for column in specified.columns if column not in results]
    ranked = specified.sort("value").with_row_index("rank")
    x = alt.X("rank:O", title=None, axis=alt.Axis(labels=False, ticks=False))
    verdict = alt.Color(
        "verdict:N",
        scale=alt.Scale(domain=list(VERDICT_COLOURS), range=list(VERDICT_COLOURS.values())),
    )
    ends = (alt.Tooltip(f"{end}:Q", format=".3f") for end in ("value", "low", "high"))
    tooltip: list[Any] = [*(f"{choice}:N" for choice in choices), "verdict:N", *ends]
    base = alt.Chart(ranked).encode(x=x, color=verdict, tooltip=tooltip)
    points = base.mark_circle(size=30, opacity=1).encode(y=alt.Y("value:Q", title="estimate"))
    intervals = base.mark_rule().encode(y="low:Q", y2="high:Q")
    known = [intervals] if ranked["low"].drop_nulls().len() else []
    estimates = alt.layer(_rules("y", 0.0), *known, points).properties(width=720, height=200)
    chosen = ranked.unpivot(
        on=choices, index=["rank", *results], variable_name="choice", value_name="option"
    ).with_columns(chosen=pl.concat_str("choice", pl.lit(": "), "option"))
    rows = chosen["chosen"].unique(maintain_order=True).to_list()
    matrix = (
        alt.Chart(chosen)
        .mark_tick(thickness=3, orient="vertical")
        .encode(
            x=x, color=verdict, tooltip=["chosen:N", "verdict:N"],
            y=alt.Y("chosen:N", title=None, sort=rows, axis=alt.Axis(labelLimit=0)),
        )
        .properties(width=720)
    )  # fmt: skip
    return alt.vconcat(estimates, matrix)
