"""Draw the figures of a report: each fig_* turns frames into an Altair chart.

Where a figure follows runs, a thin line is one seed, averaged over subsets unless the figure tells
subsets apart. A thick line is the mean over seeds. Intervals are those of the verdicts.
"""

from __future__ import annotations

import itertools
from typing import Any

import altair as alt
import polars as pl

from analysis.claims import CLAIMS
from analysis.decisions import (
    CONTRADICTED,
    DEPENDS,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDERPOWERED,
)
from tracking.colours import COLOURS

VERDICT_COLOURS = {
    SUPPORTED: "#009E73", CONTRADICTED: "#D55E00", DEPENDS: "#CC79A7", NOT_SUPPORTED: "#767676",
    UNDERPOWERED: "#E69F00",
}  # fmt: skip
VERDICT_SHAPES = {
    SUPPORTED: "circle", CONTRADICTED: "cross", DEPENDS: "diamond", NOT_SUPPORTED: "square",
    UNDERPOWERED: "triangle-up",
}  # fmt: skip
INK = "currentColor"
"""The colour of the page's text, which is light on a dark page."""
GREY = "#767676"
ERROR = CLAIMS["init_table"].rule("largest error of a kind").high or 0.0
TAU = CLAIMS["depth_gradient"].rule("tau").low or 0.0

MOST_SCHEMES = 24
"""A figure shows the first schemes of a sweep; the file has all."""
MOST_HISTOGRAMS = 4
"""The figure of histograms, which has thousands of bins for each, shows so many schemes."""
MOST_ROWS = 3000
"""A figure shows as many seeds as fit into this number of rows; the file has all."""

BOLD = alt.Header(title=None, labelLimit=220, labelFontWeight="bold", labelPadding=2)
"""How a panel is headed."""

Chart = Any
"""A chart of Altair, which has a type for each way to combine charts."""

alt.data_transformers.disable_max_rows()

FROM_THE_DATA = alt.Scale(zero=False, nice=False)
LOG = alt.Scale(type="log", nice=False)
STEP = alt.Axis(tickMinStep=1, format="d", tickCount=4)


def seeds_and_mean(frame: pl.DataFrame, *axes_and_value: str) -> pl.DataFrame:
    """Average a column over the runs of each seed, and these numbers over seeds.

    Args:
        frame: the rows of runs, with the columns scheme and seed.
        axes_and_value: the column is the last one. For each combination of the columns before it
            there is one number for each seed.

    Returns:
        Columns scheme, the axes, the column, seed (null in the rows of the mean), seeds (their
        number, in the rows of the mean). Of seeds, the lowest ones that fit into MOST_ROWS.
    """
    *axes, value = axes_and_value
    by = ["scheme", *axes]
    seeds = (
        frame.drop_nulls(value)
        .group_by(*by, "seed", maintain_order=True)
        .agg(pl.col(value).mean())
        .select(*by, value, pl.col("seed").cast(pl.Int64))
    )
    means = seeds.group_by(by, maintain_order=True).agg(
        pl.col(value).mean(), seed=pl.lit(None, pl.Int64), seeds=pl.len()
    )
    rank = pl.col("seed").rank("dense").over("scheme")
    several = pl.col("seed").n_unique().over("scheme") > 1  # the line of one seed is the mean
    shown = seeds.filter(several, rank <= MOST_ROWS // max(1, means.height))
    return pl.concat([means, shown], how="diagonal")


def first_schemes(frame: pl.DataFrame, most: int = MOST_SCHEMES) -> pl.DataFrame:
    """Keep the schemes for which a figure has space."""
    schemes = frame["scheme"].unique(maintain_order=True).head(most)
    return frame.filter(pl.col("scheme").is_in(schemes.implode()))


def _told(*names: str | alt.Tooltip) -> list[alt.Tooltip]:
    """Return what a tooltip tells. Altair takes 10 ms for each name that it wraps itself."""
    return [alt.Tooltip(name) if isinstance(name, str) else name for name in names]


def _each(*names: str) -> list[alt.Detail]:
    """Draw a line for each combination of the values of these columns."""
    return [alt.Detail(name) for name in names]


def _scheme(title: str | None = "scheme") -> alt.Color:
    """Colour by scheme."""
    return alt.Color(
        "scheme:N",
        sort=None,
        scale=alt.Scale(range=COLOURS),
        legend=alt.Legend(title=title, symbolOpacity=1, labelLimit=260, symbolLimit=60),
    )


SOLID = alt.Legend(symbolOpacity=1, symbolStrokeWidth=2)
"""A legend of lines that stand out, also where the first line of a figure is a thin one."""


def _layer() -> alt.Color:
    """Colour by layer. The ends of the scale would vanish on a dark page or on a light one."""
    scale = alt.Scale(scheme=alt.SchemeParams(name="viridis", extent=[0.2, 0.92]))
    return alt.Color("layer:O", title="layer", scale=scale, legend=SOLID)


def _one_scheme(frame: pl.DataFrame) -> Chart:
    """Make a list from which to choose one of several schemes. The other schemes are dimmed."""
    schemes = frame["scheme"].unique(maintain_order=True).to_list()
    if len(schemes) < 2:
        return alt.selection_point(fields=["scheme"])
    chosen = alt.binding_select(
        options=[None, *schemes], labels=["all", *schemes], name="show the scheme "
    )
    return alt.selection_point(fields=["scheme"], bind=chosen)


def _panels(
    chart: Chart,
    frame: pl.DataFrame,
    columns: int = 2,
    *,
    of: str = "scheme",
    header: alt.Header = BOLD,
) -> Chart:
    """Draw a chart once for each value of a column, in the order of the frame."""
    values = frame[of].drop_nulls().unique(maintain_order=True).to_list()
    facet = alt.Facet(f"{of}:N", sort=values, header=header)
    return chart.facet(facet=facet, columns=min(columns, len(values)))


def _lines(
    frame: pl.DataFrame,
    y: str,
    y_title: str,
    colour: alt.Color,
    *,
    x: str = "step",
    dash: str | None = None,
    y_scale: alt.Scale = FROM_THE_DATA,
    choose: bool = False,
    size: tuple[int, int] = (180, 130),
) -> Chart:
    """Draw rows of seeds_and_mean: thin lines of seeds, and thick ones of their mean.

    Args:
        frame: the rows.
        y: the column that is drawn, with the title of its axis.
        colour: what the colour says.
        x: the column of the other axis.
        dash: the column that the dashes of a line tell, if any.
        choose: whether the reader can choose one scheme.
        size: width and height of the chart in pixels.
    """
    told = [name for name in frame.columns if name not in (x, y, "seed", "seeds")]
    base = alt.Chart(frame).encode(
        x=alt.X(f"{x}:Q", title=x, axis=STEP),
        y=alt.Y(f"{y}:Q", title=y_title, scale=y_scale),
        color=colour,
        detail=_each("scheme:N", "seed:N"),
    )
    if dash:
        base = base.encode(strokeDash=alt.StrokeDash(f"{dash}:N", title=dash, sort=None))
    number = alt.Tooltip(f"{y}:Q", format=".4f")
    tooltip = _told(*(f"{name}:N" for name in told), f"{x}:Q", number, "seeds:Q")
    means = base.mark_line(strokeWidth=2).transform_filter("!isValid(datum.seed)")
    layers = [means.encode(tooltip=tooltip)]
    if frame["seed"].drop_nulls().len():
        seeds = base.mark_line(strokeWidth=0.7).transform_filter("isValid(datum.seed)")
        layers.insert(0, seeds.encode(opacity=alt.value(0.35)))
    if choose:
        one = _one_scheme(frame)
        dimmed = [(0.35, 0.03), (1.0, 0.08)][-len(layers) :]
        layers = [
            layer.encode(opacity=alt.condition(one, alt.value(plain), alt.value(pale)))
            for layer, (plain, pale) in zip(layers, dimmed, strict=True)
        ]
        return alt.layer(*layers).add_params(one).properties(width=size[0], height=size[1])
    return alt.layer(*layers).properties(width=size[0], height=size[1])


def _rules(axis: str, *at: float, **style: Any) -> Chart:
    """Draw grey lines across a chart, at values of x or y."""
    rules = alt.Chart(pl.DataFrame({"at": at})).mark_rule(color=GREY, **style)
    return rules.encode(alt.X("at:Q") if axis == "x" else alt.Y("at:Q"))


def fig_init_errors(errors: pl.DataFrame) -> Chart:
    """Draw the error of each kind's std at step 0: a dot for each run, and the claim's margin."""
    runs = alt.Chart(errors).mark_circle(opacity=0.5).encode(
        x=alt.X("error:Q", title="std at step 0 against the scheme's", axis=alt.Axis(format="+%")),
        y=alt.Y("kind:N", title=None, sort=None),
        yOffset=alt.YOffset("scheme:N"),
        color=_scheme(),
        tooltip=_told("scheme:N", "subset:N", "seed:N", "kind:N",
                      alt.Tooltip("expected:Q", format=".5f"),
                      alt.Tooltip("found:Q", format=".5f")),
    )  # fmt: skip
    margin = _rules("x", -ERROR, ERROR, strokeDash=[4, 3])
    return alt.layer(margin, runs).properties(width=460)


def fig_qkv_std(growth: pl.DataFrame) -> Chart:
    """Draw the std of the merged QKV weight over steps: a panel for each scheme."""
    frame = seeds_and_mean(growth, "layer", "step", "std")
    chart = _lines(frame, "std", "std of QKV (log scale)", _layer(), y_scale=LOG)
    return _panels(chart, frame).resolve_scale(y="independent")


def fig_group_log_probs(token_groups: pl.DataFrame) -> Chart:
    """Draw the mean log-prob of token groups over steps: a panel for each scheme.

    Grey lines are the log-probs of an untrained model. Dotted lines are those of a calibrated one.

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
        .encode(x=alt.X("step:Q"), detail=_each("scheme:N", "group:N", "subset:N"))
    )
    untrained = base.mark_line(color=GREY, strokeDash=[6, 3]).encode(y=alt.Y("level:Q"))
    calibrated = base.mark_line(strokeDash=[1, 3]).encode(
        y=alt.Y("calibrated:Q"), color=colour,
        tooltip=_told("group:N", "subset:N", alt.Tooltip("calibrated:Q", format=".3f")),
    )  # fmt: skip
    lines = _lines(frame, "mean_logprob", "mean log-prob (nats)", colour, dash=dash)
    return _panels(alt.layer(untrained, calibrated, lines), frame)


GROUP_NAMES = {
    "common_100": "100 most common", "singletons": "occur once", "never_used": "never occur"
}  # fmt: skip
"""The groups of the main figure of tokens, and what they are called there."""


def fig_losses(losses: pl.DataFrame) -> Chart:
    """Draw the loss over steps: on the batches, on the probe text, on held-out text."""
    frame = seeds_and_mean(losses, "text", "step", "loss")
    chart = _lines(frame, "loss", "loss (nats per token)", _scheme(), choose=True)
    return _panels(chart, frame, 3, of="text")


QUANTITIES = {
    "growth": "growth, d(log std)", "displacement": "RMS displacement", "start": "std at the start"
}  # fmt: skip


def fig_growth_by_layer(growth: pl.DataFrame) -> Chart:
    """Draw growth, displacement and the std at the start against depth, for Q, K and V each."""
    rows = growth.unpivot(
        list(QUANTITIES), index=["scheme", "seed", "kind", "layer"], variable_name="quantity"
    ).with_columns(pl.col("quantity").replace(QUANTITIES), pl.col("kind").str.to_uppercase())
    frame = seeds_and_mean(rows, "quantity", "kind", "layer", "value")
    chart = _lines(frame, "value", "", _scheme(), x="layer", size=(165, 105))
    return chart.facet(
        row=alt.Row("quantity:N", sort=list(QUANTITIES.values()), header=alt.Header(title=None)),
        column=alt.Column("kind:N", sort=["Q", "K", "V"], header=alt.Header(title=None)),
    ).resolve_scale(y="independent")


def fig_law(growth: pl.DataFrame) -> Chart:
    """Draw the growth of Q, K and V of each layer against displacement over std at the start.

    The line is what a weight grows by that moves in random directions.
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
            color=_scheme(),
            shape=alt.Shape("kind:N", title="weight"),
            tooltip=_told("scheme:N", "kind:N", "layer:O", alt.Tooltip("moved:Q", format=".3f"),
                          alt.Tooltip("growth:Q", format=".4f")),
        )
    )  # fmt: skip
    return alt.layer(line, dots).properties(width=420, height=240)


def fig_tau_over_steps(tau: pl.DataFrame) -> Chart:
    """Draw tau over depth at every step that was recorded."""
    frame = seeds_and_mean(tau, "step", "tau")
    chart = _lines(frame, "tau", "tau over depth", _scheme(), choose=True, size=(420, 220),
                   y_scale=alt.Scale(domain=[-1, 1]))  # fmt: skip
    return alt.layer(_rules("y", 0.0), chart)


def fig_tau_by_rate(gradients: pl.DataFrame) -> Chart | None:
    """Draw tau at the last step against the learning rate, where that varies.

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
        tooltip=_told("init_scheme:N", "seed:N", "subset:N", "lr:Q",
                      alt.Tooltip("tau:Q", format=".3f")),
    )  # fmt: skip
    medians = base.mark_line(point=True).encode(y=alt.Y("median(tau):Q"))
    return alt.layer(_rules("y", 0.0), runs, medians).properties(width=420, height=220)


def fig_histograms(bins: pl.DataFrame) -> Chart:
    """Draw the distribution of the QKV weights of each layer, with a slider over the steps."""
    label = f"seed {bins['seed'][0]}, corpus.subset {bins['subset'][0]}"
    bins = first_schemes(bins, MOST_HISTOGRAMS).drop("trial_key", "seed", "subset")
    steps = bins["step"].unique().sort().to_list()
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    slider = alt.binding_range(min=steps[0], max=steps[-1], step=min(gaps, default=1), name="step ")
    common = bins.group_by("scheme").agg(pl.col("step").max())["step"].min()
    step = alt.param(value=common, bind=slider)
    one = _one_scheme(bins)
    return (
        alt.Chart(bins)
        .mark_rule(strokeWidth=2)
        .encode(
            x=alt.X("low:Q", title="weight"),
            x2=alt.X2("high"),
            y=alt.Y("density:Q", title="density (log scale)", scale=alt.Scale(type="log")),
            color=_scheme(),
            opacity=alt.condition(one, alt.value(1), alt.value(0.08)),
            tooltip=_told("scheme:N", "step:Q", alt.Tooltip("low:Q", format=".4f"),
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
        tooltip=_told("scheme:N", "subset:N", "seed:N", "n_tokens:Q",
                      alt.Tooltip("change:Q", format=".3f"),
                      alt.Tooltip("predicted:Q", format=".3f")),
    )  # fmt: skip
    means = base.mark_line().encode(y=alt.Y("mean(change):Q"), color=_scheme())
    predicted = base.mark_line(color=INK, strokeDash=[6, 4]).encode(y=alt.Y("mean(predicted):Q"))
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
            tooltip=_told("text:N", "token:Q", "subset:N", "seed:N", "count:Q",
                          alt.Tooltip("log_prob:Q", format=".3f")),
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
        tooltip=_told("scheme:N", "group:N", "part:N", alt.Tooltip("nats:Q", format=".3f")),
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


def fig_claim(rows: pl.DataFrame) -> Chart:
    """Draw the numbers of one claim, run by run, with interval and bound: a panel for each part.

    Args:
        rows: as analysis.claim_table.of_claims gives them, for the parts that decide one claim.
    """
    seeds = MOST_ROWS // 2 // max(1, rows.filter(pl.col("seed").is_null()).height)
    rank = pl.col("seed").rank("dense").over("part", "scheme", "subset")
    some = rows.filter(pl.col("seed").is_null() | (rank <= max(1, seeds)))
    some = some.with_columns(panel="part")
    unit = str(rows["unit"].drop_nulls()[0])
    base = _by_scheme(_with_bounds(some))
    runs = (
        base.transform_filter("isValid(datum.seed)")
        .mark_point(filled=True, opacity=0.45, size=28, color=GREY)
        .encode(
            x=alt.X("value:Q", title=unit, scale=alt.Scale(zero=False)),
            shape=alt.Shape("subset:N", title="corpus.subset", sort=None),
            tooltip=_told("scheme:N", "subset:N", "seed:N", alt.Tooltip("value:Q", format=".4g"),
                          "trial_key:N"),
        )
    )  # fmt: skip
    layers = alt.layer(_bounds(base), runs, *_estimates(base, unit))
    panel = layers.properties(width=420, height=alt.Step(20))
    return _panels(panel, some, 1, of="panel", header=LEFT).resolve_scale(x="independent")


LEFT = alt.Header(title=None, labelAnchor="start", labelFontWeight="bold", labelLimit=420)


def _by_scheme(rows: pl.DataFrame) -> Chart:
    """Begin a chart that has a line for each scheme, those of all schemes first."""
    schemes = rows["scheme"].unique(maintain_order=True).to_list()
    axis = alt.Axis(labelLimit=200)
    return alt.Chart(rows).encode(y=alt.Y("scheme:N", title=None, sort=schemes, axis=axis))


BOUNDS = {"above": "has to be", "below": "has to be", "against": "contradicted beyond"}


def _with_bounds(rows: pl.DataFrame) -> pl.DataFrame:
    """Add rows for what a part has to be: one for each bound, in the column bound."""
    bounds = (
        rows.filter(pl.col("seed").is_null())
        .unpivot(list(BOUNDS), index=["panel", "scheme"], variable_name="rule", value_name="bound")
        .drop_nulls("bound")
        .with_columns(pl.col("rule").replace(BOUNDS))
        .unique(maintain_order=True)
    )
    return pl.concat([rows.drop(list(BOUNDS)), bounds], how="diagonal").with_columns(
        # A centre without an interval is a point: Vega warns of a panel with nothing to draw.
        start=pl.coalesce("low", "value"),
        end=pl.coalesce("high", "value"),
    )


def _bounds(base: Chart) -> Chart:
    """Draw the rows of _with_bounds: tall ticks, and short ones where a claim is contradicted."""
    size = alt.Size(
        "rule:O", legend=None,
        scale=alt.Scale(domain=list(dict.fromkeys(BOUNDS.values())), range=[18, 6]),
    )  # fmt: skip
    return (
        base.transform_filter("isValid(datum.bound)")
        .mark_tick(color=GREY, thickness=1.5)
        .encode(x=alt.X("bound:Q"), size=size, tooltip=_told("rule:N", "bound:Q"))
    )


def _estimates(base: Chart, title: str) -> list[Chart]:
    """Draw the centre over seeds with its interval. Colour and shape tell the verdict."""
    centres = base.transform_filter("isValid(datum.value) && !isValid(datum.seed)")
    domain = list(VERDICT_COLOURS)
    colour = alt.Color(
        "verdict:N", title="verdict",
        scale=alt.Scale(domain=domain, range=list(VERDICT_COLOURS.values())),
    )  # fmt: skip
    shape = alt.Shape(
        "verdict:N", title="verdict",
        scale=alt.Scale(domain=domain, range=[VERDICT_SHAPES[one] for one in domain]),
    )  # fmt: skip
    numbers = (alt.Tooltip(f"{one}:Q", format=".4g") for one in ("value", "low", "high"))
    tooltip = _told("scheme:N", "part:N", "verdict:N", "seeds:Q", *numbers)
    centres = centres.encode(color=colour, tooltip=tooltip)
    intervals = centres.mark_rule(strokeWidth=2)
    points = centres.mark_point(filled=True, opacity=1, size=70)
    axis = alt.Axis(tickCount=4)
    return [
        intervals.encode(x=alt.X("start:Q", title=title, axis=axis), x2=alt.X2("end")),
        points.encode(x=alt.X("value:Q", title=title, axis=axis), shape=shape),
    ]


def fig_forest(estimates: pl.DataFrame) -> Chart:
    """Draw the interval of every claim under every scheme, with what it has to be.

    Args:
        estimates: rows of analysis.claim_table.estimates. Of a claim with several parts, the part
            that is furthest from support.
    """
    some = estimates.with_columns(
        panel=pl.format("{}: {} ({})", "claim", "part", "unit"), seed=pl.lit(None, pl.Int64)
    )
    base = _by_scheme(_with_bounds(some))
    layers = alt.layer(_bounds(base), *_estimates(base, ""))
    header = alt.Header(title=None, labelAnchor="start", labelLimit=250, labelFontSize=10)
    panel = layers.properties(width=200, height=alt.Step(14))
    return _panels(panel, some, 3, of="panel", header=header).resolve_scale(x="independent")


def fig_variance(shares: pl.DataFrame) -> Chart:
    """Draw how the variance of each number splits, as shares of 1.

    Args:
        shares: columns number, source, share.
    """
    return (
        alt.Chart(shares)
        .mark_bar()
        .encode(
            x=alt.X("share:Q", title="share of the variance of runs", axis=alt.Axis(format="%"),
                    stack="normalize"),
            y=alt.Y("number:N", title=None, sort=None, axis=alt.Axis(labelLimit=320)),
            color=alt.Color("source:N", title="between", sort=None,
                            scale=alt.Scale(range=COLOURS)),
            tooltip=_told("number:N", "source:N", alt.Tooltip("share:Q", format=".0%")),
        )
        .properties(width=380)
    )  # fmt: skip


def fig_by_kind(rows: pl.DataFrame, value: str, title: str) -> Chart:
    """Draw a number of each kind of weight over steps: a panel for each scheme."""
    frame = seeds_and_mean(rows, "kind", "step", value)
    scale = alt.Scale(scheme="tableau10")
    colour = alt.Color("kind:N", title="weight", sort=None, scale=scale, legend=SOLID)
    return _panels(_lines(frame, value, title, colour, y_scale=LOG), frame)


def fig_by_layer(rows: pl.DataFrame, value: str, title: str) -> Chart:
    """Draw a number of each layer over steps: a panel for each scheme."""
    frame = seeds_and_mean(rows, "layer", "step", value)
    return _panels(_lines(frame, value, title, _layer()), frame)


def fig_activations(rows: pl.DataFrame) -> Chart:
    """Draw the size of the residual stream behind each block over steps."""
    return fig_by_layer(rows.filter(site="residual"), "rms", "RMS of the residual stream")


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
    tooltip = _told(*(f"{choice}:N" for choice in choices), "verdict:N", *ends)
    base = alt.Chart(ranked).encode(x=x, color=verdict, tooltip=tooltip)
    points = base.mark_circle(size=30, opacity=1).encode(y=alt.Y("value:Q", title="estimate"))
    intervals = base.mark_rule().encode(y=alt.Y("low:Q"), y2=alt.Y2("high"))
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
            x=x, color=verdict, tooltip=_told("chosen:N", "verdict:N"),
            y=alt.Y("chosen:N", title=None, sort=rows, axis=alt.Axis(labelLimit=0)),
        )
        .properties(width=720)
    )  # fmt: skip
    return alt.vconcat(estimates, matrix)
