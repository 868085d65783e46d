"""Decide one rule: the verdict that an interval gives it, and the p-value of its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

from analysis.claims import Part
from analysis.stats import (
    LEVEL,
    Estimate,
    mean_interval,
    median_interval,
    share_interval,
    sign_flip_p,
    t_p,
)

INTERVALS = {"mean": mean_interval, "median": median_interval, "share": share_interval}
ALPHA = round(1 - LEVEL, 12)

SUPPORTED, CONTRADICTED = "supported", "contradicted"
NOT_SUPPORTED, UNDERPOWERED, NOT_MEASURED = "not supported", "underpowered", "not measured"
VERDICTS = (SUPPORTED, CONTRADICTED, NOT_SUPPORTED, UNDERPOWERED, NOT_MEASURED)


def decide(rule: Part, estimate: Estimate) -> str:
    """Return the verdict that the rule gives an interval, by where its ends lie."""
    low, high = estimate.low, estimate.high
    if low is None or high is None:
        return UNDERPOWERED
    above = rule.low is None or low > rule.low
    below = rule.high is None or high < rule.high
    if above and below:
        return SUPPORTED
    if rule.low is not None and rule.high is not None:
        return CONTRADICTED if high < rule.low or low > rule.high else UNDERPOWERED
    bound, sign = only_bound(rule)
    nearest = max(sign * low, sign * high)  # the end of the interval on the claim's side
    if nearest < sign * (bound if rule.against is None else rule.against):
        return CONTRADICTED
    return NOT_SUPPORTED if nearest < sign * bound else UNDERPOWERED


def combined(verdicts: Sequence[str]) -> str:
    """Return the worst of the verdicts on the parts of a claim: all parts have to hold."""
    for verdict in (CONTRADICTED, NOT_SUPPORTED, NOT_MEASURED, UNDERPOWERED, SUPPORTED):
        if verdict in verdicts:
            return verdict
    return NOT_MEASURED


def p_value(rule: Part, units: Sequence[float]) -> float:
    """Return the one-sided p-value of the rule's null hypothesis.

    The test of a mean is Student's, like its interval. The test of a median flips signs. The test
    of a share is the exact binomial test. For a rule with two bounds the p-value is the larger of
    two tests (two one-sided tests, TOST).

    Args:
        rule: the rule of the part.
        units: one number for each independent unit.
    """
    p_values = []
    for null, sign in nulls(rule):
        if rule.centre == "share":
            successes = math.floor(sum(units) + 1e-9)
            test = stats.binomtest(successes, len(units), null, alternative="greater")
            p_values.append(float(test.pvalue))
        elif rule.centre == "mean":
            p_values.append(t_p([sign * (value - null) for value in units]))
        else:
            p_values.append(sign_flip_p([sign * (value - null) for value in units]))
    return max(p_values)


def nulls(rule: Part) -> list[tuple[float, int]]:
    """Return the null hypotheses of a rule.

    Each is the number that the centre is tested against, and the direction of the claim: 1 where
    the centre has to be larger, -1 where it has to be smaller.
    """
    bounds = ((rule.low, 1), (rule.high, -1))
    return [
        (bound if rule.null is None else rule.null, sign)
        for bound, sign in bounds
        if bound is not None
    ]


def only_bound(rule: Part) -> tuple[float, int]:
    """Return the bound of a rule that has one, and the direction of the claim as in `nulls`."""
    if rule.low is not None:
        return rule.low, 1
    assert rule.high is not None, "a rule has a bound"
    return rule.high, -1
