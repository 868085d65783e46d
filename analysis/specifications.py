"""Measure a claim in every reasonable way, to see which choices change the verdict.

A specification is a combination of choices. Its verdict follows from the rule of the claim over the
seeds of the sweep, without a correction for the number of specifications. All specifications
together are a specification curve (Simonsohn, Simmons & Nelson 2020).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.claims import CLAIMS, Part
from analysis.decisions import ALPHA, only_bound
from analysis.depth_gradient import at_report_steps, gradient_tau
from analysis.jsonable import FLAT
from analysis.measures import ONCE, UNUSED, closed_form, growth_of
from analysis.part_verdicts import judge_units
from analysis.runs import RunTables
from analysis.stats import Estimate
from analysis.variance import Spread
from analysis.verdicts import Trials


@dataclass(frozen=True)
class Specified:
    """The ways to measure the number of a claim."""

    part: str  # the part of the claim whose rule decides
    choices: tuple[str, ...]
    measure: Callable[[RunTables], pl.DataFrame]
    """Returns columns trial_key, the choices, value: one number for each run and specification."""


@dataclass(frozen=True, kw_only=True)
class Specification:
    """One way to measure the number of a claim, with the result."""

    choices: Mapping[str, str] = field(metadata=FLAT)  # the option of each choice
    estimate: Estimate = field(metadata=FLAT)
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """All specifications of one claim."""

    all: list[Specification]
    joint_p: float | None
    """The p-value of one test of all specifications together. None with fewer than two seeds."""


def specifications(
    sweep: RunTables, trials: pl.DataFrame, alpha: float = ALPHA
) -> dict[str, Curve]:
    """Judge every specification of the claims in SPECIFIED.

    A run without a number under a specification is left out of it. A specification without any
    number is left out too.

    Args:
        sweep: the runs.
        trials: as for verdicts.judge, with the columns of ACROSS_TRIALS.
        alpha: the error rate. Intervals have the level 1 - alpha.
    """
    found: dict[str, Curve] = {}
    units = Trials.of(trials).units.join(trials.select("trial_key", *ACROSS_TRIALS), on="trial_key")
    for claim, specified in SPECIFIED.items():
        rule = CLAIMS[claim].rule(specified.part)
        values = specified.measure(sweep).drop_nulls("value").join(units, on="trial_key")
        choices, rows_of_trials = _across_trials(specified.choices, values)
        every: list[Specification] = []
        spreads: list[Spread] = []
        for key, rows in rows_of_trials.sort(*choices, "trial_key").group_by(
            choices, maintain_order=True
        ):
            spread, one = judge_units(rule, rows, general=False, alpha=alpha)
            chosen = dict(zip(choices, map(str, key), strict=True))
            every.append(Specification(choices=chosen, estimate=one.estimate, verdict=one.verdict))
            spreads.append(spread)
        found[claim] = Curve(all=every, joint_p=joint_p(rule, spreads))
    return found


ACROSS_TRIALS = {"corpus.subset": "text", "optim.lr": "rate"}
"""Knobs of which a specification can select one value, and the names of these choices."""


def _across_trials(
    choices: tuple[str, ...], values: pl.DataFrame
) -> tuple[tuple[str, ...], pl.DataFrame]:
    """Add a choice for each knob of ACROSS_TRIALS that varies: all values, or one value."""
    for knob, choice in ACROSS_TRIALS.items():
        if values[knob].n_unique() > 1:
            choices = (*choices, choice)
            together = values.with_columns(pl.lit("every value").alias(choice))
            alone = values.with_columns(pl.col(knob).cast(pl.String).alias(choice))
            values = pl.concat([together, alone])
    return choices, values


def joint_p(rule: Part, spreads: Sequence[Spread]) -> float | None:
    """Return the p-value of one test of all specifications together.

    Specifications of one sweep often agree by chance, because they measure the same seeds.
    Therefore all of them are tested at once (Simonsohn, Simmons & Nelson 2020). Under the null
    hypothesis, a seed lies above the bound as often as below it. The signs of a seed are flipped in
    all specifications together. The test compares the median t over specifications with the same
    median after all flips.

    Args:
        rule: the rule of the part.
        spreads: the units of each specification. Only specifications with the largest number of
            seeds are used.

    Returns:
        None with fewer than two seeds.
    """
    bound, sign = only_bound(rule)
    n = max((len(one.units) for one in spreads if one.error is not None), default=0)
    known = [one.units for one in spreads if one.error is not None and len(one.units) == n]
    if n < 2:
        return None
    units = sign * (np.stack(known) - bound)
    squares = (units**2).sum(1, keepdims=True)

    def medians(signs: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = units @ signs / n
        variance = np.maximum(squares / n - mean**2, 1e-300) / (n - 1)
        found: NDArray[np.float64] = np.median(mean / np.sqrt(variance), axis=0)
        return found

    seen = float(medians(np.ones((n, 1)))[0])
    reached = medians(_flips(n)) >= seen - 1e-9 * abs(seen)
    return float(reached.mean())


EXACT_FLIPS = 12
"""Up to this many seeds, all ways to flip signs are used."""
FLIPS = 4001
"""With more seeds, this many ways to flip signs are drawn at random."""


@functools.lru_cache(maxsize=4)
def _flips(n: int) -> NDArray[np.float64]:
    """Return signs of n seeds, shape (n, ways). The first column flips nothing."""
    if n <= EXACT_FLIPS:
        return np.array(1 - 2 * (np.arange(2**n) >> np.arange(n)[:, None] & 1), dtype=np.float64)
    draws = np.random.default_rng(n).integers(0, 2, size=(n, FLIPS))
    draws[:, 0] = 0
    return np.array(1 - 2 * draws, dtype=np.float64)


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
    """Measure the log-prob of a group minus each baseline, for each mask, group and step (nats).

    Args:
        sweep: the runs.
        groups: the name of each token group in a specification, by token group.
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
