"""Intervals over seeds. Layers and tokens are never pooled as if they were independent, and neither
are runs of one seed, which start from the same weights: their values are averaged first.

scipy underneath. An interval that the number of seeds cannot give is null, never a guess.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TypedDict

from scipy import stats

LEVEL = 0.95


class Estimate(TypedDict):
    """A number over seeds with its 95% interval."""

    seeds: int
    value: float | None
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean with Student's t interval; no interval below 2 seeds."""
    low = high = None
    if len(values) >= 2:
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = error * float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
        low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
    value = statistics.fmean(values) if values else None
    return Estimate(seeds=len(values), value=value, low=low, high=high)


def median_interval(values: Sequence[float]) -> Estimate:
    """Median with the interval between two order statistics; no interval below 6 seeds.

    Distribution-free and conservative: with k from the binomial(n, 1/2), at least 95% of samples
    have the median between their k-th smallest and k-th largest value (Conover 1999, section 3.2).
    """
    ordered, low, high = sorted(values), None, None
    if ordered:
        outside = int(stats.binom.ppf((1 - LEVEL) / 2, len(ordered), 0.5))
        if stats.binom.cdf(outside, len(ordered), 0.5) > (1 - LEVEL) / 2:
            outside -= 1
        if outside >= 0:
            low, high = ordered[outside], ordered[-1 - outside]
    value = statistics.median(ordered) if ordered else None
    return Estimate(seeds=len(ordered), value=value, low=low, high=high)


def share_interval(shares: Sequence[float]) -> Estimate:
    """Mean of shares, each of an independent unit and between 0 and 1, with Wilson's interval.

    Where every share is 0 or 1 it is the interval of Wilson (1927) for a proportion.
    """
    if not shares:
        return Estimate(seeds=0, value=None, low=None, high=None)
    n, p, z = len(shares), statistics.fmean(shares), float(stats.norm.ppf((1 + LEVEL) / 2))
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Estimate(seeds=n, value=p, low=max(0.0, middle - half), high=min(1.0, middle + half))
