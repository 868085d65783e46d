"""Turn the numbers of runs into a verdict on one part of a claim.

This verdict is not corrected for the number of claims: analysis.verdicts does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from analysis.claims import Part
from analysis.decisions import ALPHA, interval, p_values
from analysis.stats import Estimate
from analysis.variance import Spread, in_general, over_seeds, prediction, split, unit_columns


@dataclass(frozen=True, kw_only=True)
class PartFinding:
    """The result for one part of a claim."""

    estimate: Estimate  # with an interval of level 1 - alpha
    sd: float | None  # between units
    df: float  # degrees of freedom of the interval
    supported_p: float  # one-sided, not adjusted
    contradicted_p: float
    not_supported_p: float
    verdict: str  # on this part alone, not adjusted
    doubts: tuple[str, ...]  # why the test of the mean is made stricter: TIES, SKEW
    configurations: int
    prediction: Estimate | None  # in general: the interval for one more scheme
    variance: Mapping[str, float]  # in general: the share of each source in the variance of runs
    decides: bool  # as in the rule of the part


def judge_part(rule: Part, runs: pl.DataFrame, general: bool, alpha: float = ALPHA) -> PartFinding:
    """Judge one part of a claim, without the correction for the number of claims.

    In general, the centre is always the mean over seeds and schemes.

    Args:
        rule: the rule of the part.
        runs: columns scheme, config, seed, data_seed, value. At least one row.
        general: whether schemes are units too.
        alpha: the error rate. Intervals have the level 1 - alpha.
    """
    return judge_units(rule, runs, general, alpha)[1]


def judge_units(
    rule: Part, runs: pl.DataFrame, general: bool, alpha: float
) -> tuple[Spread, PartFinding]:
    """Judge a part as judge_part does, and also return its units."""
    units = unit_columns(runs)
    if general:
        spread = in_general(runs, units)
        estimate = spread.interval(1 - alpha)
        found = p_values(rule, spread, "mean")
    else:
        spread = over_seeds(runs, units)
        estimate = interval(rule, spread, 1 - alpha)
        found = p_values(rule, spread)
    beyond = prediction(runs, units, 1 - alpha) if general else None
    has_sd = len(spread.units) > 1 and spread.error is not None
    return spread, PartFinding(
        estimate=estimate.within(rule.limits),
        sd=float(spread.units.std(ddof=1)) if has_sd else None,
        df=spread.df,
        supported_p=found.supported,
        contradicted_p=found.contradicted,
        not_supported_p=found.not_supported,
        verdict=found.verdict(1.0, alpha),
        doubts=spread.doubts if rule.centre == "mean" or general else (),
        configurations=runs["config"].n_unique(),
        prediction=beyond.within(rule.limits) if beyond else None,
        variance=split(runs, units) if general else {},
        decides=rule.decides,
    )
