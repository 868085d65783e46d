"""Which choices turn a verdict: a claim's number under every way to measure it that has a defence.

Each specification is one way, and gets the verdict that the claim's rule gives it over the seeds of
the sweep, uncorrected. That is a specification curve (Simonsohn, Simmons & Nelson 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

from analysis.claims import CLAIMS, Part, closed_form, growth_of
from analysis.depth_gradient import gradient_tau, looked_at
from analysis.runs import RunTables
from analysis.verdicts import judge_part

CHOICES = {
    "depth_gradient": ("weight", "measure", "step"),
    "rare_falls": ("mask", "group", "step", "baseline"),
    "never_suppressed": ("mask", "group", "step", "baseline"),
}
"""The claims that are looked at so, and what is chosen."""

TIE_BREAKS = {
    "rare_falls": {"rare_100": "100 rarest, drawn", "singletons": "all that occur once"},
    "never_suppressed": {"never_100": "100 unused, drawn", "never_used": "all unused"},
}
RULES: dict[str, Part] = {
    "depth_gradient": CLAIMS["depth_gradient"].parts["tau"],
    "rare_falls": CLAIMS["rare_falls"].parts["rare"],
    "never_suppressed": CLAIMS["never_suppressed"].parts["never"],
}


def specifications(sweep: RunTables, trials: pl.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Per claim of CHOICES: of each specification its choices, estimate and verdict.

    `trials`: as verdicts.judge takes them. Where a choice leaves a run no number, the run is left
    out; where it leaves none, the specification is.
    """
    found = {}
    step = pl.col("step").str.replace("step ", "").str.replace(" step", "")
    for claim, choices in CHOICES.items():
        values = VALUES[claim](sweep, claim).drop_nulls("value").with_columns(step=step)
        placed = values.join(trials, on="trial_key").sort(*choices, "trial_key")
        found[claim] = [
            {**dict(zip(choices, key, strict=True)), **_verdict(RULES[claim], rows)}
            for key, rows in placed.group_by(choices, maintain_order=True)
        ]
    return found


def _verdict(rule: Part, rows: pl.DataFrame) -> dict[str, Any]:
    one = judge_part(rule, rows.select("seed", "config", "value").rows())
    return {**one["estimate"], "verdict": one["verdict"]}


def _gradients(sweep: RunTables, claim: str) -> pl.DataFrame:
    """tau of each run, by weight, measure and step."""
    frames = []
    for kind in ("qkv", "q", "k", "v"):
        growth = looked_at(growth_of(sweep, kind))
        for column, measure in (("growth", "d(log std)"), ("displacement", "RMS displacement")):
            tau = gradient_tau(growth, ["trial_key", "at"], column)
            frames.append(
                tau.select("trial_key", weight=pl.lit(kind), measure=pl.lit(measure), step="at",
                           value="tau")
            )  # fmt: skip
    return pl.concat(frames)


def _changes(sweep: RunTables, claim: str) -> pl.DataFrame:
    """How far a group's log-prob lies above each baseline, by mask, group and step."""
    names = TIE_BREAKS[claim]
    rows = sweep.tables["token_groups"].filter(pl.col("group").is_in(list(names)))
    start = rows.filter(step=0).select("trial_key", "group", "mask", start="mean_logprob")
    knobs = sweep.trials.select("trial_key", vocab_size="model.vocab_size")
    seen = (
        looked_at(rows.filter(pl.col("step") > 0))
        .join(start, on=["trial_key", "group", "mask"])
        .join(closed_form(sweep), on="trial_key")
        .join(knobs, on="trial_key")
    )
    baselines = {
        "its own start": pl.col("mean_logprob") - pl.col("start"),
        "the untrained level": pl.col("mean_logprob") - pl.col("level"),
        "-ln V": pl.col("mean_logprob") + pl.col("vocab_size").log(),
        "the smoothed unigram": pl.col("excess"),
    }
    return pl.concat(
        [
            seen.select("trial_key", "mask", pl.col("group").replace_strict(names), step="at",
                        baseline=pl.lit(baseline), value=value)
            for baseline, value in baselines.items()
        ]
    )  # fmt: skip


VALUES: Mapping[str, Callable[[RunTables, str], pl.DataFrame]] = {
    "depth_gradient": _gradients,
    "rare_falls": _changes,
    "never_suppressed": _changes,
}
