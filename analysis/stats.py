"""Intervals and p-values over independent units.

The units are seeds, or configurations. Layers, tokens and runs of one seed are not independent:
their values are averaged before they come here. Where there are too few units for an interval, its
ends are None.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
"""The confidence level of an interval, unless a caller gives another."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number over seeds, with its interval."""

    seeds: int
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class SpreadEstimate(Estimate):
    """An estimate over units, with the standard deviation between them."""

    sd: float | None  # None for one unit


@functools.cache
def t_quantile(n: int, level: float = LEVEL) -> float:
    """Return the quantile of Student's t for an interval of `level` over n values.

    The distribution has n - 1 degrees of freedom.
    """
    return float(stats.t.ppf((1 + level) / 2, n - 1))


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Estimate a mean with Student's t interval, which takes at least 2 values."""
    low = high = None
    if len(values) >= 2:
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = error * t_quantile(len(values), level)
        low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
    value = statistics.fmean(values) if values else None
    return Estimate(seeds=len(values), value=value, low=low, high=high)


def t_p(values: Sequence[float]) -> float:
    """Return the one-sided p-value of Student's test that the mean is above 0.

    It is 1 for fewer than 2 values. Equal values have no variance to estimate: for them it is the
    p-value of the sign-flip test.
    """
    if len(values) < 2:
        return 1.0
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    if error == 0:
        return sign_flip_p(values)
    return float(stats.t.sf(mean / error, len(values) - 1))


def median_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Estimate a median with the interval between two order statistics.

    The interval needs no distribution and is conservative: with k from the binomial(n, 1/2), at
    least `level` of samples have the median between their k-th smallest and k-th largest value
    (Conover 1999, section 3.2). At 95% it takes at least 6 values.
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
    """Estimate a mean of shares with Wilson's interval.

    Args:
        shares: one number between 0 and 1 for each independent unit. Where all are 0 or 1, the
            interval is that of Wilson (1927) for a proportion.
        level: the confidence level.
    """
    if not shares:
        return Estimate(seeds=0, value=None, low=None, high=None)
    n, p, z = len(shares), statistics.fmean(shares), float(stats.norm.ppf((1 + level) / 2))
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Estimate(seeds=n, value=p, low=max(0.0, middle - half), high=min(1.0, middle + half))


EXACT_FLIPS = 14
"""Up to this many values, the sign-flip test takes all ways to flip signs."""
FLIPS = 4001
"""For more values, the sign-flip test takes this many ways, drawn at random."""


def sign_flip_p(values: Sequence[float]) -> float:
    """Return the one-sided p-value of the sign-flip test that the centre is above 0.

    Under the null hypothesis the distribution is symmetric about 0. The p-value is the share of
    ways to flip the signs of the values that give a mean at least as large (Fisher 1935,
    section 21). The unflipped values count as one of the ways.
    """
    found = np.asarray(values, dtype=np.float64)
    sums = _signs(len(found)) @ found
    # Sums that are equal in exact arithmetic must count as equal.
    slack = 1e-12 * np.abs(found).sum()
    return float((sums >= found.sum() - slack).mean())


def least_sign_flip_p(n: int) -> float:
    """Return the smallest p-value that sign_flip_p can give for n values: all are positive."""
    return 2.0**-n if n <= EXACT_FLIPS else 1 / FLIPS


@functools.lru_cache(maxsize=4)
def _signs(n: int) -> NDArray[np.float64]:
    """Return ways to give signs to n values, one row for each, the unflipped one first."""
    if n <= EXACT_FLIPS:
        return np.array(1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1), dtype=np.float64)
    draws = np.random.default_rng(n).integers(0, 2, size=(FLIPS, n))
    draws[0] = 0
    return np.array(1 - 2 * draws, dtype=np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979). Return them in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
