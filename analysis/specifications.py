"""Which choices turn a verdict: a claim's number under every way to measure it that has a defence.

Each specification is one way, and gets the verdict that the claim's rule gives it over the seeds of
the sweep, uncorrected. That is a specification curve (Simonsohn, Simmons & Nelson 2020).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.claims import CLAIMS, closed_form, growth_of
from analysis.depth_gradient import gradient_tau, looked_at
from analysis.runs import RunTables
from analysis.verdicts import ALPHA, judge_part


@dataclass(frozen=True)
class Specified:
    part: str  # of the claim, whose rule decides
    choices: tuple[str, ...]
    measure: Callable[[RunTables], pl.DataFrame]
    """Columns trial_key, the choices, value: a number of each run for each specification."""


def specifications(
    sweep: RunTables, trials: pl.DataFrame, alpha: float = ALPHA
) -> dict[str, list[dict[str, Any]]]:
    """Per claim of SPECIFIED: of each specification its choices, estimate and verdict.

    `trials` and `alpha`: as verdicts.judge takes them. Where a choice leaves a run no number, the
    run is left out; where it leaves none, the specification is.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for claim, specified in SPECIFIED.items():
        choices, rule = specified.choices, CLAIMS[claim].rule(specified.part)
        values = specified.measure(sweep).drop_nulls("value")
        placed = values.join(trials, on="trial_key").sort(*choices, "trial_key")
        found[claim] = []
        for key, rows in placed.group_by(choices, maintain_order=True):
            runs = rows.select("seed", "config", "value").rows()
            one = judge_part(rule, runs, general=False, alpha=alpha)
            if one is not None:
                chosen = dict(zip(choices, key, strict=True))
                found[claim].append({**chosen, **one["estimate"], "verdict": one["verdict"]})
    return found


STEP = pl.when("is_last").then(pl.lit("the last")).otherwise(pl.col("step").cast(pl.String))


def _gradients(sweep: RunTables) -> pl.DataFrame:
    """tau of each run, by weight, measure and step."""
    frames = []
    for kind in ("qkv", "q", "k", "v"):
        growth = looked_at(growth_of(sweep, kind))
        for column, measure in (("growth", "d(log std)"), ("displacement", "RMS displacement")):
            tau = gradient_tau(growth, ["trial_key", "step", "is_last"], column)
            frames.append(
                tau.select("trial_key", weight=pl.lit(kind), measure=pl.lit(measure), step=STEP,
                           value="tau")
            )  # fmt: skip
    return pl.concat(frames)


def _changes(sweep: RunTables, groups: Mapping[str, str]) -> pl.DataFrame:
    """How far a group's log-prob lies above each baseline, by mask, group and step.

    `groups`: the names that the specifications give to token groups.
    """
    rows = sweep.tables["token_groups"].filter(pl.col("group").is_in(list(groups)))
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
            seen.select("trial_key", "mask", pl.col("group").replace_strict(groups), step=STEP,
                        baseline=pl.lit(baseline), value=value)
            for baseline, value in baselines.items()
        ]
    )  # fmt: skip


RARE = {"rare_100": "100 rarest, drawn", "singletons": "all that occur once"}
NEVER = {"never_100": "100 unused, drawn", "never_used": "all unused"}
OF_GROUPS = ("mask", "group", "step", "baseline")

SPECIFIED: dict[str, Specified] = {
    "depth_gradient": Specified("tau", ("weight", "measure", "step"), _gradients),
    "rare_falls": Specified("rare", OF_GROUPS, functools.partial(_changes, groups=RARE)),
    "never_suppressed": Specified("never", OF_GROUPS, functools.partial(_changes, groups=NEVER)),
}
