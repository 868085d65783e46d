"""The figures of a report: what each shows, and in which section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import polars as pl
import polars.selectors as cs

from analysis import plots
from gptcore.files import JsonObject


@dataclass(frozen=True)
class Figure:
    """One figure of the report."""

    section: str  # a key of analysis.report.SECTIONS
    frame: str  # the name of the frame that is drawn, and of its Parquet file
    draw: Callable[[pl.DataFrame], plots.Chart | None]  # None where there is nothing to show
    caption: str


BAND = "Line: mean over the seeds of a scheme and subset. Band: smallest to largest."

FIGURES: dict[str, Figure] = {
    "init_errors": Figure(
        "start", "init_errors", plots.fig_init_errors,
        "Standard deviation of each kind of weight at step 0, relative to that of the init scheme. "
        "A dot is one run. Dashed: the claim's margin.",
    ),
    "qkv_std": Figure(
        "widening", "layer_growth", plots.fig_qkv_std,
        f"Standard deviation of the merged QKV weight of each layer over steps. {BAND}",
    ),
    "growth_by_layer": Figure(
        "widening", "layer_growth", plots.fig_growth_by_layer,
        f"Growth at the last step against depth. {BAND}",
    ),
    "tau_of_runs": Figure(
        "depth", "depth_gradient", plots.fig_tau_of_runs,
        f"tau of every run at its last step. Bar: median. Dashed: 0, and {plots.TAU}: the interval "
        "of the median has to lie above it.",
    ),
    "tau_over_steps": Figure(
        "depth", "tau_over_steps", plots.fig_tau_over_steps,
        f"tau over the steps of training. {BAND}",
    ),
    "histograms": Figure(
        "tails", "histograms", plots.fig_histograms,
        "Distribution of the QKV weights of each layer at one step, in one run of each scheme. "
        "Choose the step with the slider. A normal distribution is a parabola here.",
    ),
    "group_log_probs": Figure(
        "tokens", "group_log_probs", plots.fig_group_log_probs,
        "Mean log-probability of each group of tokens over steps. Dotted: an untrained model, "
        f"-(ln V + d std^2 / 2). Dashed: the smoothed unigram model of the text. {BAND}",
    ),
    "rare_by_size": Figure(
        "rare", "rare_by_size", plots.fig_rare_by_size,
        "Change of the source's rare tokens from step 0 to the last step, against the number of "
        "tokens that a run trains on. A dot is one run. Dashed: the change to ln(1 / N), which a "
        "calibrated model gives to a token that occurs once in N tokens.",
    ),
    "same_tokens": Figure(
        "rare", "same_tokens", plots.fig_same_tokens,
        "The same tokens on different subsets: tokens that one subset never uses and another uses "
        "often, in up to 4 runs of one scheme on each subset. If the frequency of a token decides, "
        "its log-prob rises with its count. If the token itself decides, its log-prob stays.",
    ),
    "mechanism": Figure(
        "unused", "group_changes", plots.fig_mechanism,
        "What changes a group's log-probability: its logits, or log Z, which is the same for all "
        "tokens. Bars: means over runs. Tick: both together.",
    ),
    **{
        f"specifications_{claim}": Figure(
            section, f"specifications_{claim}", plots.fig_specifications,
            f"{number}, measured in every way, in ascending order. The choices of each way are "
            "below it. Colour: the verdict of the claim's rule, without a correction for their "
            "number.",
        )
        for claim, section, number in (
            ("depth_gradient", "depth", "Median tau"),
            ("rare_falls", "rare", "Last log-prob of rare tokens above the baseline"),
            ("never_suppressed", "unused", "Last log-prob of unused tokens above the baseline"),
        )
    },
}  # fmt: skip


def drawn(frames: Mapping[str, pl.DataFrame]) -> dict[str, JsonObject]:
    """Draw the figures for which there are numbers. Return their Vega-Lite by name."""
    specs = {}
    for name, figure in FIGURES.items():
        frame = frames.get(figure.frame)
        if frame is None or frame.is_empty():
            continue
        # More digits cannot be seen, and the page holds many numbers.
        chart = figure.draw(frame.with_columns(cs.float().round_sig_figs(5)))
        if chart is not None:
            specs[name] = chart.properties(description=figure.caption).to_dict()
    return specs
