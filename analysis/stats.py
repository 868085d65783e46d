"""Intervals and p-values over independent units.

The units are seeds or schemes. Layers, tokens and runs of one seed are not independent, so their
values are averaged first. If there are too few units for an interval, both ends are None.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy import stats

LEVEL = 0.95
"""The default confidence level of an interval."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number over seeds, with an interval."""

    seeds: int
    value: float | None
    low: float | None
    high: float | None

    def within(self, limits: tuple[float, float]) -> Estimate:
        """Return the estimate with the interval cut at some limits."""
        low, high = limits
        return replace(
            self,
            low=None if self.low is None else min(max(self.low, low), high),
            high=None if self.high is None else max(min(self.high, high), low),
        )


@functools.cache
def t_quantile(n: int, level: float = LEVEL) -> float:
    """Return the quantile of Student's t for an interval of `level` over n values.

    The distribution has n - 1 degrees of freedom.
    """
    return float(stats.t.ppf((1 + level) / 2, n - 1))


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Estimate a mean with Student's t interval, which needs at least 2 values."""
    low = high = None
    if len(values) >= 2:
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = error * t_quantile(len(values), level)
        low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
    value = statistics.fmean(values) if values else None
    return Estimate(seeds=len(values), value=value, low=low, high=high)


def median_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Estimate a median with the interval between two order statistics.

    The interval assumes no distribution and is conservative: with k from the binomial(n, 1/2), at
    least `level` of samples have the median between their k-th smallest and k-th largest value
    (Conover 1999, section 3.2). At 95% it needs at least 6 values.
    """
    ordered, low, high = sorted(values), None, None
    if ordered:
        outside = int(stats.binom.ppf((1 - level) / 2, len(ordered), 0.5))
        if stats.binom.cdf(outside, len(ordered), 0.5) > (1 - level) / 2:
            outside -= 1
        if outside >= 0:
            low, high = ordered[outside], ordered[-1 - outside]
    value = statistics.median(ordered) if ordered else None
    return Estimate(seeds=len(ordered), value=value, low=low, high=high)


def share_interval(shares: Sequence[float], level: float = LEVEL) -> Estimate:
    """Estimate a mean of shares with the exact interval of Clopper & Pearson (1934).

    Args:
        shares: one number from 0 to 1 for each independent unit. Numbers strictly between 0 and 1
            vary less than zeros and ones, so the interval is then longer than necessary.
        level: the confidence level.
    """
    if not shares:
        return Estimate(seeds=0, value=None, low=None, high=None)
    n, outside = len(shares), (1 - level) / 2
    held = min(float(n), max(0.0, math.fsum(shares)))
    low = float(stats.beta.ppf(outside, held, n - held + 1)) if held > 0 else 0.0
    high = float(stats.beta.isf(outside, held + 1, n - held)) if held < n else 1.0
    return Estimate(seeds=n, value=statistics.fmean(shares), low=low, high=high)


def share_p(shares: Sequence[float], bound: float, sign: int) -> float:
    """Return the exact one-sided p-value for a share above a bound, or below it.

    Args:
        shares: as for share_interval.
        bound: the share under the null hypothesis.
        sign: 1 for above, -1 for below.
    """
    n, held = len(shares), math.fsum(shares)
    if sign < 0:
        n, held, bound = n, n - held, 1 - bound
    return binomial_p(math.floor(held + 1e-9), n, bound)


def sign_p(values: Sequence[float]) -> float:
    """Return the one-sided p-value of the sign test for a median above 0.

    It is exact for every distribution (Conover 1999, section 3.4). A value of 0 counts as below 0.
    """
    return binomial_p(sum(value > 0 for value in values), len(values), 0.5)


@functools.lru_cache(maxsize=4096)
def binomial_p(successes: int, n: int, share: float) -> float:
    """Return the probability of at least so many successes of n, each with probability `share`."""
    return float(stats.binom.sf(successes - 1, n, share))


def holm(
    p_values: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """Adjust p-values for their number (Holm 1979, with weights as in section 4 of that paper).

    The share of a rejected hypothesis is divided among the remaining hypotheses, in proportion to
    their weights.

    Args:
        p_values: the p-value of each hypothesis.
        weights: the share of the error rate that each hypothesis has at first. By default, all
            shares are equal.

    Returns:
        The adjusted p-values, and the factor by which each p-value was multiplied. Both are in the
        order of the arguments.
    """
    weights = weights or [1.0] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i] / weights[i])
    adjusted, factors = [0.0] * len(p_values), [0.0] * len(p_values)
    left, largest = sum(weights), 0.0
    for i in order:
        factors[i] = left / weights[i]
        largest = max(largest, min(1.0, factors[i] * p_values[i]))
        adjusted[i] = largest
        left -= weights[i]
    return adjusted, factors
