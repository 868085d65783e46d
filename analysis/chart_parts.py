"""Draw the parts that figures share: lines of seeds, panels, colours, tooltips."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from tracking.colours import COLOURS

INK = "currentColor"
"""The text colour of the page: dark on a light page, and light on a dark page."""
GREY = "#767676"

MOST_SCHEMES = 24
"""The largest number of schemes in a figure. The file of the figure has all schemes."""
MOST_ROWS = 3000
"""The largest number of rows in a figure, which limits the seeds. The file has all seeds."""

BOLD = alt.Header(title=None, labelLimit=220, labelFontWeight="bold", labelPadding=2)
"""The heading of a panel."""

Chart = Any
"""A chart of Altair. Altair has one type for each way to combine charts."""

alt.data_transformers.disable_max_rows()

FROM_THE_DATA = alt.Scale(zero=False, nice=False)
LOG = alt.Scale(type="log", nice=False)
STEP = alt.Axis(tickMinStep=1, format="d", tickCount=4)


def seeds_and_mean(frame: pl.DataFrame, *axes_and_value: str) -> pl.DataFrame:
    """Average a column over the runs of each seed, and these numbers over seeds.

    Args:
        frame: the rows of runs, with the columns scheme and seed.
        axes_and_value: the last name is the column to average. For each combination of the other
            columns, there is one number for each seed.

    Returns:
        Columns scheme, the axes, the averaged column, seed (null in the rows of the mean), seeds
        (the number of seeds, in the rows of the mean). Only the lowest seeds that fit into
        MOST_ROWS have rows.
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
    several = pl.col("seed").n_unique().over("scheme") > 1  # a single seed equals the mean
    shown = seeds.filter(several, rank <= MOST_ROWS // max(1, means.height))
    return pl.concat([means, shown], how="diagonal")


def first_schemes(frame: pl.DataFrame, most: int = MOST_SCHEMES) -> pl.DataFrame:
    """Keep the rows of the first schemes."""
    schemes = frame["scheme"].unique(maintain_order=True).head(most)
    return frame.filter(pl.col("scheme").is_in(schemes.implode()))


def tooltips(*names: str | alt.Tooltip) -> list[alt.Tooltip]:
    """Make tooltips from column names. This saves the 10 ms that Altair takes for each name."""
    return [alt.Tooltip(name) if isinstance(name, str) else name for name in names]


def each(*names: str) -> list[alt.Detail]:
    """Separate the lines of a chart by the values of these columns."""
    return [alt.Detail(name) for name in names]


def colour_by_scheme(title: str | None = "scheme") -> alt.Color:
    """Colour by scheme."""
    return alt.Color(
        "scheme:N",
        sort=None,
        scale=alt.Scale(range=COLOURS),
        legend=alt.Legend(title=title, symbolOpacity=1, labelLimit=260, symbolLimit=60),
    )


SOLID = alt.Legend(symbolOpacity=1, symbolStrokeWidth=2)
"""A legend with thick lines, even if the first line of the figure is thin."""


def colour_by_layer() -> alt.Color:
    """Colour by layer. The colours are visible on dark and light pages."""
    scale = alt.Scale(scheme=alt.SchemeParams(name="plasma", extent=[0.1, 0.88]))
    return alt.Color("layer:O", title="layer", scale=scale, legend=SOLID)


def one_scheme(frame: pl.DataFrame) -> Chart:
    """Make a menu that selects one of several schemes. The other schemes are dimmed."""
    schemes = frame["scheme"].unique(maintain_order=True).to_list()
    if len(schemes) < 2:
        return alt.selection_point(fields=["scheme"])
    chosen = alt.binding_select(
        options=[None, *schemes], labels=["all", *schemes], name="show the scheme "
    )
    return alt.selection_point(fields=["scheme"], bind=chosen)


def in_panels(
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
    # Vega draws an axis in an empty cell of a grid, so three panels get a row of three.
    return chart.facet(facet=facet, columns=3 if len(values) == 3 and columns > 1 else columns)


def panel_size(frame: pl.DataFrame) -> tuple[int, int]:
    """Return width and height of a panel in pixels. Three panels are as wide as two usually are."""
    return (125, 130) if frame["scheme"].n_unique() == 3 else (180, 130)


def seed_lines(
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
    """Draw rows of seeds_and_mean: thin lines for seeds, and thick lines for the means.

    Args:
        frame: the rows.
        y: the column of the y axis.
        y_title: the title of the y axis.
        colour: the colour of the lines.
        x: the column of the x axis.
        dash: the column that the dashes of a line encode, if any.
        y_scale: the scale of the y axis.
        choose: whether the reader can select one scheme.
        size: width and height of the chart in pixels.
    """
    others = [name for name in frame.columns if name not in (x, y, "seed", "seeds")]
    base = alt.Chart(frame).encode(
        x=alt.X(f"{x}:Q", title=x, axis=STEP),
        y=alt.Y(f"{y}:Q", title=y_title, scale=y_scale),
        color=colour,
        detail=each("scheme:N", "seed:N"),
    )
    if dash:
        base = base.encode(
            strokeDash=alt.StrokeDash(f"{dash}:N", title=dash, sort=None, legend=SOLID)
        )
    number = alt.Tooltip(f"{y}:Q", format=".4f")
    tooltip = tooltips(*(f"{name}:N" for name in others), f"{x}:Q", number, "seeds:Q")
    means = base.mark_line(strokeWidth=2).transform_filter("!isValid(datum.seed)")
    layers = [means.encode(tooltip=tooltip)]
    if frame["seed"].drop_nulls().len():
        seeds = base.mark_line(strokeWidth=0.7).transform_filter("isValid(datum.seed)")
        layers.insert(0, seeds.encode(opacity=alt.value(0.35)))
    if choose:
        one = one_scheme(frame)
        dimmed = [(0.35, 0.03), (1.0, 0.08)][-len(layers) :]
        layers = [
            layer.encode(opacity=alt.condition(one, alt.value(plain), alt.value(pale)))
            for layer, (plain, pale) in zip(layers, dimmed, strict=True)
        ]
        return alt.layer(*layers).add_params(one).properties(width=size[0], height=size[1])
    return alt.layer(*layers).properties(width=size[0], height=size[1])


def grey_rules(axis: str, *at: float, **style: Any) -> Chart:
    """Draw grey lines across a chart, at some values of x or y."""
    rules = alt.Chart(pl.DataFrame({"at": at})).mark_rule(color=GREY, **style)
    return rules.encode(alt.X("at:Q") if axis == "x" else alt.Y("at:Q"))
