"""Intervals over runs. A run is the only independent unit: layers and tokens are never pooled.

scipy underneath. An interval that the number of runs cannot give is null, never a guess.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TypedDict

from scipy import stats

LEVEL = 0.95


class Estimate(TypedDict):
    """A number over runs with its 95% interval."""

    runs: int
    value: float | None
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean with Student's t interval; no interval below 2 runs."""
    low = high = None
    if len(values) >= 2:
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = error * float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
        low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
    value = statistics.fmean(values) if values else None
    return Estimate(runs=len(values), value=value, low=low, high=high)


def median_interval(values: Sequence[float]) -> Estimate:
    """Median with the interval between two order statistics; no interval below 6 runs.

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
    return Estimate(runs=len(ordered), value=value, low=low, high=high)


def share_interval(hits: Sequence[bool]) -> Estimate:
    """Share of runs in which something holds, with Wilson's interval (Wilson 1927)."""
    if not hits:
        return Estimate(runs=0, value=None, low=None, high=None)
    wilson = stats.binomtest(sum(hits), len(hits)).proportion_ci(LEVEL, method="wilson")
    return Estimate(
        runs=len(hits),
        value=sum(hits) / len(hits),
        low=float(wilson.low),
        high=float(wilson.high),
    )
