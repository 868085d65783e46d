"""Draw claims: numbers, intervals and bounds, shares of variance, and specifications."""

from __future__ import annotations

import altair as alt
import polars as pl

from analysis.chart_parts import (
    GREY,
    MOST_ROWS,
    Chart,
    grey_rules,
    in_panels,
    tooltips,
)
from analysis.decisions import (
    CONTRADICTED,
    DEPENDS,
    NOT_MEASURED,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDERPOWERED,
)
from tracking.colours import COLOURS

VERDICT_COLOURS = {
    SUPPORTED: "#009E73", CONTRADICTED: "#D55E00", DEPENDS: "#CC79A7", NOT_SUPPORTED: "#767676",
    UNDERPOWERED: "#E69F00", NOT_MEASURED: "#56B4E9",
}  # fmt: skip
VERDICT_SHAPES = {
    SUPPORTED: "circle", CONTRADICTED: "cross", DEPENDS: "diamond", NOT_SUPPORTED: "square",
    UNDERPOWERED: "triangle-up", NOT_MEASURED: "triangle-down",
}  # fmt: skip


def fig_claim(rows: pl.DataFrame) -> Chart:
    """Draw the numbers of one claim, run by run, with interval and bound: a panel for each part.

    Args:
        rows: rows of analysis.claim_table.of_claims, for the parts that decide one claim.
    """
    seeds = MOST_ROWS // 2 // max(1, rows.filter(pl.col("seed").is_null()).height)
    rank = pl.col("seed").rank("dense").over("part", "scheme", "subset")
    some = rows.filter(pl.col("seed").is_null() | (rank <= max(1, seeds)))
    some = some.with_columns(panel="part", verdict="claim_verdict")
    unit = str(rows["unit"].drop_nulls()[0])
    base = _by_scheme(_with_bounds(some))
    runs = (
        base.transform_filter("isValid(datum.seed)")
        .mark_point(filled=True, opacity=0.45, size=28, color=GREY)
        .encode(
            x=alt.X("value:Q", title=unit, scale=alt.Scale(zero=False)),
            shape=alt.Shape("subset:N", title="corpus.subset", sort=None),
            tooltip=tooltips("scheme:N", "subset:N", "seed:N", alt.Tooltip("value:Q", format=".4g"),
                          "trial_key:N"),
        )
    )  # fmt: skip
    layers = alt.layer(_bounds(base), runs, *_estimates(base, unit)).resolve_scale(
        shape="independent"
    )
    panel = layers.properties(width=420, height=alt.Step(20))
    return in_panels(panel, some, 1, of="panel", header=LEFT).resolve_scale(x="independent")


LEFT = alt.Header(title=None, labelAnchor="start", labelFontWeight="bold", labelLimit=420)


def _by_scheme(rows: pl.DataFrame) -> Chart:
    """Begin a chart with one row for each scheme. The row of all schemes comes first."""
    schemes = rows["scheme"].unique(maintain_order=True).to_list()
    axis = alt.Axis(labelLimit=200)
    return alt.Chart(rows).encode(y=alt.Y("scheme:N", title=None, sort=schemes, axis=axis))


BOUNDS = {"above": "has to be", "below": "has to be", "against": "contradicted beyond"}


def _with_bounds(rows: pl.DataFrame) -> pl.DataFrame:
    """Add one row for each bound of a part, with the columns rule and bound."""
    bounds = (
        rows.filter(pl.col("seed").is_null())
        .unpivot(list(BOUNDS), index=["panel", "scheme"], variable_name="rule", value_name="bound")
        .drop_nulls("bound")
        .with_columns(pl.col("rule").replace(BOUNDS))
        .unique(maintain_order=True)
    )
    return pl.concat([rows.drop(list(BOUNDS)), bounds], how="diagonal").with_columns(
        # A centre without an interval becomes a point, because Vega warns of empty panels.
        start=pl.coalesce("low", "value"),
        end=pl.coalesce("high", "value"),
    )


def _bounds(base: Chart) -> Chart:
    """Draw the bounds: tall ticks for support, and short ticks for contradiction."""
    size = alt.Size(
        "rule:O", legend=None,
        scale=alt.Scale(domain=list(dict.fromkeys(BOUNDS.values())), range=[18, 6]),
    )  # fmt: skip
    return (
        base.transform_filter("isValid(datum.bound)")
        .mark_tick(color=GREY, thickness=1.5)
        .encode(x=alt.X("bound:Q"), size=size, tooltip=tooltips("rule:N", "bound:Q"))
    )


def _estimates(base: Chart, title: str) -> list[Chart]:
    """Draw the centre over seeds with the interval. Colour and shape show the verdict."""
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
    tooltip = tooltips("scheme:N", "part:N", "verdict:N", "seeds:Q", *numbers)
    centres = centres.encode(color=colour, tooltip=tooltip)
    intervals = centres.mark_rule(strokeWidth=2)
    points = centres.mark_point(filled=True, opacity=1, size=70)
    axis = alt.Axis(tickCount=4)
    return [
        intervals.encode(x=alt.X("start:Q", title=title, axis=axis), x2=alt.X2("end")),
        points.encode(x=alt.X("value:Q", title=title, axis=axis), shape=shape),
    ]


def fig_forest(estimates: pl.DataFrame) -> Chart:
    """Draw the interval of every claim under every scheme, with the bounds of the claim.

    Args:
        estimates: rows of analysis.claim_table.estimates, one part for each claim: the part that is
            furthest from support.
    """
    some = estimates.with_columns(
        panel=pl.format("{}: {} ({})", "claim", "part", "unit"), seed=pl.lit(None, pl.Int64)
    )
    base = _by_scheme(_with_bounds(some))
    layers = alt.layer(_bounds(base), *_estimates(base, ""))
    header = alt.Header(title=None, labelAnchor="start", labelLimit=250, labelFontSize=10)
    panel = layers.properties(width=200, height=alt.Step(14))
    return in_panels(panel, some, 3, of="panel", header=header).resolve_scale(x="independent")


def fig_variance(shares: pl.DataFrame) -> Chart:
    """Draw the sources of the variance of each number, as shares of 1.

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
            tooltip=tooltips("number:N", "source:N", alt.Tooltip("share:Q", format=".0%")),
        )
        .properties(width=380)
    )  # fmt: skip


def fig_specifications(specified: pl.DataFrame) -> Chart:
    """Draw the estimate and interval of every specification in ascending order, and its choices.

    Args:
        specified: columns seeds, value, low, high, verdict. All other columns are choices.
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
    tooltip = tooltips(*(f"{choice}:N" for choice in choices), "verdict:N", *ends)
    base = alt.Chart(ranked).encode(x=x, color=verdict, tooltip=tooltip)
    points = base.mark_circle(size=30, opacity=1).encode(y=alt.Y("value:Q", title="estimate"))
    intervals = base.mark_rule().encode(y=alt.Y("low:Q"), y2=alt.Y2("high"))
    known = [intervals] if ranked["low"].drop_nulls().len() else []
    estimates = alt.layer(grey_rules("y", 0.0), *known, points).properties(width=720, height=200)
    chosen = ranked.unpivot(
        on=choices, index=["rank", *results], variable_name="choice", value_name="option"
    ).with_columns(chosen=pl.concat_str("choice", pl.lit(": "), "option"))
    rows = chosen["chosen"].unique(maintain_order=True).to_list()
    matrix = (
        alt.Chart(chosen)
        .mark_tick(thickness=3, orient="vertical")
        .encode(
            x=x, color=verdict, tooltip=tooltips("chosen:N", "verdict:N"),
            y=alt.Y("chosen:N", title=None, sort=rows, axis=alt.Axis(labelLimit=0)),
        )
        .properties(width=720)
    )  # fmt: skip
    return alt.vconcat(estimates, matrix)
