"""List the figures of a report: the frame, the section and the caption of each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import polars.selectors as cs

from analysis import plots, verdict_plots
from analysis.chart_parts import GREY, INK, MOST_SCHEMES, Chart, first_schemes
from analysis.claims import CLAIMS
from gptcore.config import InputError, did_you_mean
from gptcore.files import Json, JsonObject
from tracking.colours import COLOURS

FIRST_SCREEN, ALL_CLAIMS, RECORDED = "first screen", "all claims", "recorded"
"""Sections of the report that contain no claims."""


@dataclass(frozen=True)
class Figure:
    """One figure of the report."""

    section: str  # a key of analysis.page.SECTIONS, or one of the constants above
    frame: str  # the name of the frame that is drawn, and of its Parquet file
    draw: Callable[[pl.DataFrame], Chart | None]  # returns None if there is nothing to show
    caption: str


LINES = "Thick line: mean over seeds. Thin line: one seed."
BY_SCHEME = f"Each panel is one scheme; at most {MOST_SCHEMES} are drawn."
ONE_RUN = "In one run of each scheme; MLflow has the table of every run."


def _of_claim(name: str) -> Callable[[pl.DataFrame], Chart | None]:
    """Return the function that draws the figure of one claim."""

    def draw(rows: pl.DataFrame) -> Chart | None:
        some = rows.filter(pl.col("decides"), claim=name)
        return verdict_plots.fig_claim(some) if some.height else None

    return draw


FIGURES: dict[str, Figure] = {
    "qkv_std": Figure(
        FIRST_SCREEN, "layer_growth", plots.fig_qkv_std,
        "Do attention weights widen, and where? Standard deviation of the merged QKV weight of "
        f"each layer over steps. {LINES} {BY_SCHEME}",
    ),
    "group_log_probs": Figure(
        FIRST_SCREEN, "group_log_probs", plots.fig_group_log_probs,
        "What happens to common, rare and unused tokens? Mean log-probability of token groups over "
        "steps. Grey: an untrained model, -(ln V + d std^2 / 2). Dotted: the smoothed "
        f"unigram model of the text. {LINES} {BY_SCHEME}",
    ),
    "forest": Figure(
        ALL_CLAIMS, "forest", verdict_plots.fig_forest,
        "Every claim under every scheme: the centre over seeds and its interval, coloured by the "
        "verdict. Tall grey tick: the centre has to lie above or below it. Short grey tick: beyond "
        "it, the claim is contradicted. If a claim has several numbers, the figure shows the "
        "number that is furthest from support.",
    ),
    "losses": Figure(
        "trained", "losses", plots.fig_losses,
        f"Did it train? Loss over steps, on the batches and on two fixed texts. {LINES}",
    ),
    "init_errors": Figure(
        "start", "init_errors", plots.fig_init_errors,
        "Standard deviation of each kind of weight at step 0, relative to that of the init scheme. "
        "Each dot is one run. Dashed line: the bound of the claim.",
    ),
    "growth_by_layer": Figure(
        "widening", "growth_of_kinds", plots.fig_growth_by_layer,
        "Q, K and V of each layer: growth of the std and RMS displacement at the last step, and "
        f"the std at the start, on which the growth depends. {LINES}",
    ),
    "law": Figure(
        "widening", "growth_of_kinds", plots.fig_law,
        "Growth of Q, K and V against their displacement. Each dot is one layer, as a mean over "
        "runs. Dashed line: 1/2 ln(1 + x^2), the growth of a weight that moves in random "
        "directions.",
    ),
    "tau_over_steps": Figure(
        "depth", "tau_over_steps", plots.fig_tau_over_steps,
        f"tau over the steps of training. {LINES}",
    ),
    "tau_by_rate": Figure(
        "depth", "depth_gradient", plots.fig_tau_by_rate,
        "tau at the last step against the learning rate. Each dot is one run. Line: median.",
    ),
    "histograms": Figure(
        "tails", "histograms", plots.fig_histograms,
        "Distribution of the QKV weights of each layer at one step, in one run of each of the "
        f"first {plots.MOST_HISTOGRAMS} schemes. Choose the step with the slider. A normal "
        "distribution is a parabola here.",
    ),
    "rare_by_size": Figure(
        "rare", "rare_by_size", plots.fig_rare_by_size,
        "Change of the tokens that occur once from step 0 to the last step, against the number of "
        "tokens in the text that a run trains on. Each dot is one run. Dashed line: the change to "
        "ln(1 / N), which a calibrated model gives to a token that occurs once in N tokens.",
    ),
    "same_tokens": Figure(
        "rare", "same_tokens", plots.fig_same_tokens,
        "The same tokens on different subsets: tokens that one subset never uses and another uses "
        "often, in up to 4 runs of one scheme on each subset. If the frequency of a token decides, "
        "its log-prob rises with its count. If the token itself decides, its log-prob stays.",
    ),
    "mechanism": Figure(
        "unused", "group_changes", plots.fig_mechanism,
        "Does a group's log-probability change because of its logits, or because of log Z, which "
        "is the same for all tokens? Bars: means over runs. Tick: the sum of both.",
    ),
    **{
        f"specifications_{claim}": Figure(
            section, f"specifications_{claim}", verdict_plots.fig_specifications,
            f"{number}, over all schemes together, measured in every way, in ascending order. The "
            "choices of each way are marked below. Colour: the verdict, without a correction for "
            "the number of ways.",
        )
        for claim, section, number in (
            ("depth_gradient", "depth", "Median tau"),
            ("rare_falls", "rare", "Log-prob of rare tokens above the baseline"),
            ("never_suppressed", "unused", "Log-prob of unused tokens above the baseline"),
        )
    },
    **{
        f"claim_{name}": Figure(
            claim.section, "claims", _of_claim(name),
            f"{claim.says} Each grey mark is one run. The coloured mark is the centre over seeds "
            "with its interval, and the colour is the verdict on the claim. Tall grey tick: the "
            "centre has to lie above or below it. Short grey tick: beyond it, the claim is "
            "contradicted.",
        )
        for name, claim in CLAIMS.items()
    },
    "variance": Figure(
        RECORDED, "variance", verdict_plots.fig_variance,
        "The sources of the variance of each claim's number between runs, as shares.",
    ),
    "updates": Figure(
        RECORDED, "updates",
        functools.partial(plots.fig_by_kind, value="ratio", title="update / weight (log scale)"),
        f"RMS of an update over the RMS of its weight, mean over layers. {ONE_RUN}",
    ),
    "spectra": Figure(
        RECORDED, "spectra",
        functools.partial(plots.fig_by_kind, value="stable_rank", title="stable rank (log scale)"),
        f"Stable rank of weight matrices, mean over layers. {ONE_RUN}",
    ),
    "activations": Figure(
        RECORDED, "activations", plots.fig_activations,
        f"RMS of the residual stream after each block, on the probe text. {ONE_RUN}",
    ),
    "attention": Figure(
        RECORDED, "attention",
        functools.partial(plots.fig_by_layer, value="entropy_share", title="entropy / its maximum"),
        "Entropy of attention, as a share of that of uniform attention, mean over heads. "
        f"{ONE_RUN}",
    ),
}  # fmt: skip


def check_figures(names: Sequence[str]) -> None:
    """Raise InputError if one of the names is not the name of a figure."""
    for name in names:
        if name not in FIGURES:
            raise InputError(
                f"there is no figure {name}: {did_you_mean(name, FIGURES)}the figures are "
                f"{', '.join(FIGURES)}"
            )


def drawn(frames: Mapping[str, pl.DataFrame], names: Sequence[str] = ()) -> dict[str, JsonObject]:
    """Draw the figures for which there are numbers.

    Args:
        frames: the data frames, by name.
        names: the names of the figures. Without names, all figures.

    Returns:
        The Vega-Lite specifications, by the name of the figure.
    """
    specs = {}
    trials = frames.get("trials")
    schemes: list[str] = []
    if trials is not None:
        schemes = first_schemes(trials)["scheme"].unique(maintain_order=True).to_list()
    for name in names or FIGURES:
        figure = FIGURES[name]
        frame = frames.get(figure.frame)
        if frame is None or frame.is_empty():
            continue
        if "scheme" in frame.columns:
            frame = first_schemes(frame)
        # More digits cannot be seen, and the page holds many numbers.
        chart = figure.draw(frame.with_columns(cs.float().cast(pl.Float64).round_sig_figs(4)))
        if chart is not None:
            spec = chart.properties(description=figure.caption).to_dict(validate=False)
            specs[name] = {**_with_colours(spec, schemes), "config": STYLE}
    return specs


def _with_colours(part: Json, schemes: Sequence[str]) -> Json:
    """Give every scheme the same colour in all figures, even if a figure lacks some schemes."""
    if isinstance(part, list):
        return [_with_colours(one, schemes) for one in part]
    if not isinstance(part, dict):
        return part
    found = {key: one if key == "datasets" else _with_colours(one, schemes)
             for key, one in part.items()}  # fmt: skip
    scale = found.get("scale")
    if found.get("field") == "scheme" and isinstance(scale, dict) and "range" in scale:
        colours = itertools.islice(itertools.cycle(COLOURS), len(schemes))
        found["scale"] = {**scale, "domain": list(schemes), "range": list(colours)}
    return found


STYLE: JsonObject = {
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "titleFontWeight": "normal",
        "domainColor": GREY,
        "tickColor": GREY,
        "gridColor": "#80808040",
    },
    "legend": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"},
    "header": {"labelColor": INK, "titleColor": INK},
    "title": {"color": INK, "fontSize": 11, "anchor": "start"},
}
"""The style of all figures. The text has the same colour as the text of the page."""
