"""Which choices change a verdict: a claim's number under every reasonable way to measure it.

Each way is a specification: a combination of choices. Its verdict is that of the claim's rule over
the seeds of the sweep, without a correction for the number of specifications. All of them together
are a specification curve (Simonsohn, Simmons & Nelson 2020).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import polars as pl

from analysis.claims import CLAIMS
from analysis.decisions import ALPHA
from analysis.depth_gradient import at_report_steps, gradient_tau
from analysis.jsonable import FLAT
from analysis.measures import ONCE, UNUSED, closed_form, growth_of
from analysis.runs import RunTables
from analysis.stats import Estimate
from analysis.verdicts import judge_part, with_units


@dataclass(frozen=True)
class Specified:
    """The ways to measure the number of a claim."""

    part: str  # the part of the claim whose rule decides
    choices: tuple[str, ...]
    measure: Callable[[RunTables], pl.DataFrame]
    """Columns trial_key, the choices, value: a number for each run and specification."""


@dataclass(frozen=True, kw_only=True)
class Specification:
    """One way to measure the number of a claim, and what it gives."""

    choices: Mapping[str, str] = field(metadata=FLAT)  # by name, the option that is chosen
    estimate: Estimate = field(metadata=FLAT)
    verdict: str


def specifications(
    sweep: RunTables, trials: pl.DataFrame, alpha: float = ALPHA
) -> dict[str, list[Specification]]:
    """Judge every specification of the claims in SPECIFIED.

    A run that has no number under a specification is left out of it. A specification for which no
    run has a number is left out.

    Args:
        sweep: the runs.
        trials: as for verdicts.judge.
        alpha: the error rate. Intervals are of 1 - alpha.
    """
    found: dict[str, list[Specification]] = {}
    for claim, specified in SPECIFIED.items():
        choices, rule = specified.choices, CLAIMS[claim].rule(specified.part)
        values = specified.measure(sweep).drop_nulls("value")
        rows_of_trials = values.join(with_units(trials), on="trial_key").sort(*choices, "trial_key")
        found[claim] = []
        for key, rows in rows_of_trials.group_by(choices, maintain_order=True):
            one = judge_part(rule, rows, general=False, alpha=alpha)
            chosen = dict(zip(choices, map(str, key), strict=True))
            found[claim].append(
                Specification(choices=chosen, estimate=one.estimate, verdict=one.verdict)
            )
    return found


STEP = pl.when("is_last").then(pl.lit("the last")).otherwise(pl.col("step").cast(pl.String))


def _gradients(sweep: RunTables) -> pl.DataFrame:
    """Measure tau of each run, for each weight, measure and step."""
    frames = []
    for kind in ("qkv", "q", "k", "v"):
        growth = at_report_steps(growth_of(sweep, kind))
        for column, measure in (("growth", "d(log std)"), ("displacement", "RMS displacement")):
            tau = gradient_tau(growth, ["trial_key", "step", "is_last"], column)
            frames.append(
                tau.select("trial_key", weight=pl.lit(kind), measure=pl.lit(measure), step=STEP,
                           value="tau")
            )  # fmt: skip
    return pl.concat(frames)


def _changes(sweep: RunTables, groups: Mapping[str, str]) -> pl.DataFrame:
    """Measure how far a group's log-prob is above each baseline, for each mask, group and step.

    Args:
        sweep: the runs.
        groups: by token group, the name of the group in a specification.
    """
    rows = sweep.tables["token_groups"].filter(pl.col("group").is_in(list(groups)))
    start = rows.filter(step=0).select("trial_key", "group", "mask", start="mean_logprob")
    knobs = sweep.trials.select("trial_key", vocab_size="model.vocab_size")
    seen = (
        at_report_steps(rows.filter(pl.col("step") > 0))
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
    "rare_falls": Specified(ONCE, OF_GROUPS, functools.partial(_changes, groups=RARE)),
    "never_suppressed": Specified(UNUSED, OF_GROUPS, functools.partial(_changes, groups=NEVER)),
}
