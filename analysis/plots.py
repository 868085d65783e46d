"""Draw the runs: each fig_* turns a frame of analysis.frames into an Altair chart.

In figures over steps or layers, a thin line is one seed, and a thick line is the mean over seeds.
Lines are averaged over subsets, unless the figure shows each subset.
"""

from __future__ import annotations

import itertools

import altair as alt
import polars as pl

from analysis.chart_parts import (
    GREY,
    INK,
    LOG,
    SOLID,
    Chart,
    colour_by_layer,
    colour_by_scheme,
    each,
    first_schemes,
    grey_rules,
    in_panels,
    one_scheme,
    panel_size,
    seed_lines,
    seeds_and_mean,
    tooltips,
)
from analysis.claims import CLAIMS
from tracking.colours import COLOURS

ERROR = CLAIMS["init_table"].rule("largest error of a kind").high or 0.0
MOST_HISTOGRAMS = 4
"""The largest number of schemes in the figure of histograms. Each scheme has thousands of bins."""


def fig_init_errors(errors: pl.DataFrame) -> Chart:
    """Draw the relative error of the std of each kind of weight at step 0: one dot for each run."""
    runs = alt.Chart(errors).mark_circle(opacity=0.5).encode(
        x=alt.X("error:Q", title="std at step 0 against the scheme's", axis=alt.Axis(format="+%")),
        y=alt.Y("kind:N", title=None, sort=None),
        yOffset=alt.YOffset("scheme:N", sort=None),
        color=colour_by_scheme(),
        tooltip=tooltips("scheme:N", "subset:N", "seed:N", "kind:N",
                      alt.Tooltip("expected:Q", format=".5f"),
                      alt.Tooltip("found:Q", format=".5f")),
    )  # fmt: skip
    margin = grey_rules("x", -ERROR, ERROR, strokeDash=[4, 3])
    return alt.layer(margin, runs).properties(width=460)


def fig_qkv_std(growth: pl.DataFrame) -> Chart:
    """Draw the std of the merged QKV weight over steps: a panel for each scheme."""
    frame = seeds_and_mean(growth.filter(pl.col("std") > 0), "layer", "step", "std")
    size = panel_size(frame)
    chart = seed_lines(
        frame, "std", "std of QKV (log scale)", colour_by_layer(), y_scale=LOG, size=size
    )
    return in_panels(chart, frame).resolve_scale(y="independent")


def fig_group_log_probs(token_groups: pl.DataFrame) -> Chart:
    """Draw the mean log-prob of token groups over steps: a panel for each scheme.

    Grey lines belong to an untrained model, and dotted lines to a calibrated model.

    Args:
        token_groups: the primary rows, with the column level of closed_form.
    """
    some = token_groups.filter(pl.col("group").is_in(list(GROUP_NAMES)))
    some = some.with_columns(group=pl.col("group").replace(GROUP_NAMES))
    by = ["scheme", "group", "subset"]
    levels = some.group_by(by).agg(
        pl.col("level").mean(), calibrated=(pl.col("mean_logprob") - pl.col("excess")).mean()
    )
    frame = seeds_and_mean(some, "group", "subset", "step", "mean_logprob")
    frame = frame.join(levels, on=by, maintain_order="left")
    colour = alt.Color("group:N", title="tokens", sort=list(GROUP_NAMES.values()),
                       scale=alt.Scale(range=COLOURS), legend=SOLID)  # fmt: skip
    dash = "subset" if frame["subset"].n_unique() > 1 else None
    base = (
        alt.Chart(frame)
        .transform_filter("!isValid(datum.seed)")
        .encode(x=alt.X("step:Q"), detail=each("scheme:N", "group:N", "subset:N"))
    )
    untrained = base.mark_line(color=GREY, strokeWidth=1).encode(y=alt.Y("level:Q"))
    calibrated = base.mark_line(strokeDash=[1, 3]).encode(
        y=alt.Y("calibrated:Q"), color=colour,
        tooltip=tooltips("group:N", "subset:N", alt.Tooltip("calibrated:Q", format=".3f")),
    )  # fmt: skip
    lines = seed_lines(
        frame, "mean_logprob", "mean log-prob (nats)", colour, dash=dash, size=panel_size(frame)
    )
    return in_panels(alt.layer(untrained, calibrated, lines), frame)


GROUP_NAMES = {
    "common_100": "100 most common", "singletons": "occur once", "never_used": "never occur"
}  # fmt: skip
"""The token groups of the main figure, and their names there."""


def fig_losses(losses: pl.DataFrame) -> Chart:
    """Draw the loss over steps: on the batches, on the probe text, on held-out text."""
    frame = seeds_and_mean(losses, "text", "step", "loss")
    chart = seed_lines(frame, "loss", "loss (nats per token)", colour_by_scheme(), choose=True)
    return in_panels(chart, frame, 3, of="text")


QUANTITIES = {
    "growth": "growth, d(log std)", "displacement": "RMS displacement", "start": "std at the start"
}  # fmt: skip


def fig_growth_by_layer(growth: pl.DataFrame) -> Chart:
    """Draw growth, displacement and the std at the start against depth, for each of Q, K and V."""
    rows = growth.unpivot(
        list(QUANTITIES), index=["scheme", "seed", "kind", "layer"], variable_name="quantity"
    ).with_columns(pl.col("quantity").replace(QUANTITIES), pl.col("kind").str.to_uppercase())
    frame = seeds_and_mean(rows, "quantity", "kind", "layer", "value")
    chart = seed_lines(frame, "value", "", colour_by_scheme(), x="layer", size=(165, 105))
    return chart.facet(
        row=alt.Row("quantity:N", sort=list(QUANTITIES.values()), header=alt.Header(title=None)),
        column=alt.Column("kind:N", sort=["Q", "K", "V"], header=alt.Header(title=None)),
    ).resolve_scale(y="independent")


def fig_law(growth: pl.DataFrame) -> Chart:
    """Draw the growth of Q, K and V of each layer against displacement over std at the start.

    The dashed line is the growth of a weight that moves in random directions.
    """
    points = (
        growth.filter(pl.col("start") > 0)
        .group_by("scheme", "kind", "layer", maintain_order=True)
        .agg(
            moved=(pl.col("displacement") / pl.col("start")).mean(), growth=pl.col("growth").mean()
        )
        .filter(pl.col("moved") > 0)
    )
    if points.is_empty():
        return None
    ends = [float(points["moved"].min()), float(points["moved"].max())]  # type: ignore[arg-type]
    moved = pl.Series("moved", [ends[0] * (ends[1] / ends[0]) ** (i / 60) for i in range(61)])
    law = pl.DataFrame(moved).with_columns(growth=(1 + pl.col("moved") ** 2).log() / 2)
    x = alt.X("moved:Q", title="RMS displacement / std at the start (log scale)", scale=LOG)
    line = alt.Chart(law).mark_line(color=INK, strokeDash=[6, 4]).encode(x=x, y=alt.Y("growth:Q"))
    dots = (
        alt.Chart(points)
        .mark_point(filled=True, opacity=0.6, size=45)
        .encode(
            x=x,
            y=alt.Y("growth:Q", title="growth, d(log std)"),
            color=colour_by_scheme(),
            shape=alt.Shape("kind:N", title="weight"),
            tooltip=tooltips("scheme:N", "kind:N", "layer:O", alt.Tooltip("moved:Q", format=".3f"),
                          alt.Tooltip("growth:Q", format=".4f")),
        )
    )  # fmt: skip
    return alt.layer(line, dots).properties(width=420, height=240)


def fig_tau_over_steps(tau: pl.DataFrame) -> Chart:
    """Draw tau over depth at every recorded step."""
    frame = seeds_and_mean(tau, "step", "tau")
    chart = seed_lines(
        frame, "tau", "tau over depth", colour_by_scheme(), choose=True, size=(420, 220),
        y_scale=alt.Scale(domain=[-1, 1]),
    )  # fmt: skip
    return alt.layer(grey_rules("y", 0.0), chart)


def fig_tau_by_rate(gradients: pl.DataFrame) -> Chart | None:
    """Draw tau at the last step against the learning rate. Return None for a single rate.

    Args:
        gradients: tau of runs, with the columns lr and init_scheme.
    """
    if gradients["lr"].n_unique() < 2:
        return None
    base = alt.Chart(gradients.drop_nulls("tau")).encode(
        x=alt.X("lr:Q", title="learning rate (log scale)", scale=alt.Scale(type="log", padding=20)),
        color=alt.Color("init_scheme:N", title="init.scheme", sort=None,
                        scale=alt.Scale(range=COLOURS)),
    )  # fmt: skip
    runs = base.mark_circle(opacity=0.4).encode(
        y=alt.Y("tau:Q", title="tau over depth", scale=alt.Scale(domain=[-1, 1])),
        tooltip=tooltips("init_scheme:N", "seed:N", "subset:N", "lr:Q",
                      alt.Tooltip("tau:Q", format=".3f")),
    )  # fmt: skip
    medians = base.mark_line(point=True).encode(y=alt.Y("median(tau):Q"))
    return alt.layer(grey_rules("y", 0.0), runs, medians).properties(width=420, height=220)


def fig_histograms(bins: pl.DataFrame) -> Chart:
    """Draw the distribution of the QKV weights of each layer, with a slider over the steps."""
    label = f"seed {bins['seed'][0]}, corpus.subset {bins['subset'][0]}"
    bins = first_schemes(bins, MOST_HISTOGRAMS).drop("trial_key", "seed", "subset")
    steps = bins["step"].unique().sort().to_list()
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    slider = alt.binding_range(min=steps[0], max=steps[-1], step=min(gaps, default=1), name="step ")
    common = bins.group_by("scheme").agg(pl.col("step").max())["step"].min()
    step = alt.param(value=common, bind=slider)
    one = one_scheme(bins)
    return (
        alt.Chart(bins)
        .mark_rule(strokeWidth=2)
        .encode(
            x=alt.X("low:Q", title="weight"),
            x2=alt.X2("high"),
            y=alt.Y("density:Q", title="density (log scale)", scale=alt.Scale(type="log")),
            color=colour_by_scheme(),
            opacity=alt.condition(one, alt.value(1), alt.value(0.08)),
            tooltip=tooltips("scheme:N", "step:Q", alt.Tooltip("low:Q", format=".4f"),
                          alt.Tooltip("high:Q", format=".4f"),
                          alt.Tooltip("density:Q", format=".4g")),
        )
        .transform_filter(alt.datum.step == step)
        .add_params(step, one)
        .properties(width=220, height=160)
        .facet(facet=alt.Facet("layer:O", title="layer"), columns=3)
        .properties(title=label)
    )  # fmt: skip


def fig_rare_by_size(changes: pl.DataFrame) -> Chart | None:
    """Draw the change of rare tokens against the size of the training text in tokens.

    A dashed line is the change that calibration predicts.

    Args:
        changes: the rows of measures.rare_by_size, with the columns of with_trial.
    """
    if changes["n_tokens"].n_unique() < 2:
        return None
    base = alt.Chart(changes).encode(
        x=alt.X(
            "n_tokens:Q",
            title="tokens in the training text (log scale)",
            scale=alt.Scale(type="log", nice=False, padding=20),
        )
    )
    runs = base.mark_circle(opacity=0.5).encode(
        y=alt.Y("change:Q", title="change of mean log-prob of rare tokens (nats)"),
        color=colour_by_scheme(),
        tooltip=tooltips("scheme:N", "subset:N", "seed:N", "n_tokens:Q",
                      alt.Tooltip("change:Q", format=".3f"),
                      alt.Tooltip("predicted:Q", format=".3f")),
    )  # fmt: skip
    means = base.mark_line().encode(y=alt.Y("mean(change):Q"), color=colour_by_scheme())
    predicted = base.mark_line(color=INK, strokeDash=[6, 4]).encode(y=alt.Y("mean(predicted):Q"))
    return alt.layer(grey_rules("y", 0.0), predicted, means, runs).properties(width=460, height=260)


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
            tooltip=tooltips("text:N", "token:Q", "subset:N", "seed:N", "count:Q",
                          alt.Tooltip("log_prob:Q", format=".3f")),
        )
        .properties(width=130, height=110)
        .facet(facet=alt.Facet("text:N", title=None), columns=4)
        .properties(title=tokens["scheme"][0])
    )  # fmt: skip


def fig_mechanism(changes: pl.DataFrame) -> Chart:
    """Draw the change of each group's log-prob, as means over the runs of a scheme.

    The bars are the parts of the logit and of log Z. A tick is their sum.
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
        y=alt.Y("scheme:N", title=None, sort=None, axis=alt.Axis(labelLimit=0)),
        tooltip=tooltips("scheme:N", "group:N", "part:N", alt.Tooltip("nats:Q", format=".3f")),
    )
    bars = base.transform_filter("datum.part != 'both'").mark_bar().encode(
        color=alt.Color("part:N", title="part of", scale=alt.Scale(range=["#0072B2", "#E69F00"])),
        yOffset=alt.YOffset("part:N"),
    )  # fmt: skip
    both = base.transform_filter("datum.part == 'both'").mark_tick(color=INK, thickness=3, size=18)
    return (
        alt.layer(bars, both)
        .properties(width=220)
        .facet(facet=alt.Facet("group:N", title="token group", sort=groups), columns=2)
    )


def fig_by_kind(rows: pl.DataFrame, value: str, title: str) -> Chart:
    """Draw a number of each kind of weight over steps: a panel for each scheme."""
    frame = seeds_and_mean(rows.filter(pl.col(value) > 0), "kind", "step", value)
    scale = alt.Scale(scheme="tableau20")
    colour = alt.Color("kind:N", title="weight", sort=None, scale=scale, legend=SOLID)
    return in_panels(seed_lines(frame, value, title, colour, y_scale=LOG), frame)


def fig_by_layer(rows: pl.DataFrame, value: str, title: str) -> Chart:
    """Draw a number of each layer over steps: a panel for each scheme."""
    frame = seeds_and_mean(rows, "layer", "step", value)
    return in_panels(seed_lines(frame, value, title, colour_by_layer()), frame)


def fig_activations(rows: pl.DataFrame) -> Chart:
    """Draw the size of the residual stream behind each block over steps."""
    return fig_by_layer(rows.filter(site="residual"), "rms", "RMS of the residual stream")
