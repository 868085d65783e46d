"""Intervals over seeds. Layers and tokens are never pooled as if they were independent, and neither
are runs of one seed, which start from the same weights: their values are averaged first.

scipy underneath. An interval that the number of seeds cannot give is null, never a guess.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95


class Estimate(TypedDict):
    """A number over seeds with its interval."""

    seeds: int
    value: float | None
    low: float | None
    high: float | None


@functools.cache
def t_quantile(n: int, level: float = LEVEL) -> float:
    """Of Student's t with n - 1 degrees of freedom, for an interval of `level`."""
    return float(stats.t.ppf((1 + level) / 2, n - 1))


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean with Student's t interval; no interval below 2 seeds."""
    low = high = None
    if len(values) >= 2:
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = error * t_quantile(len(values), level)
        low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
    value = statistics.fmean(values) if values else None
    return Estimate(seeds=len(values), value=value, low=low, high=high)


def t_p(values: Sequence[float]) -> float:
    """One-sided p of Student's test that the mean is above 0; 1 below 2 values.

    Values that are all alike say nothing of how they vary: then the p of their signs.
    """
    if len(values) < 2:
        return 1.0
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    if error == 0:
        return sign_flip_p(values)
    return float(stats.t.sf(mean / error, len(values) - 1))


def median_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Median with the interval between two order statistics; at 95% none below 6 seeds.

    Distribution-free and conservative: with k from the binomial(n, 1/2), at least `level` of
    samples have the median between their k-th smallest and k-th largest value (Conover 1999,
    section 3.2).
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
    """Mean of shares, each of an independent unit and between 0 and 1, with Wilson's interval.

    Where every share is 0 or 1 it is the interval of Wilson (1927) for a proportion.
    """
    if not shares:
        return Estimate(seeds=0, value=None, low=None, high=None)
    n, p, z = len(shares), statistics.fmean(shares), float(stats.norm.ppf((1 + level) / 2))
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Estimate(seeds=n, value=p, low=max(0.0, middle - half), high=min(1.0, middle + half))


EXACT_FLIPS, FLIPS = 14, 4001


def sign_flip_p(values: Sequence[float]) -> float:
    """One-sided p of values whose distribution is symmetric about 0 if the null holds.

    The share of all ways to flip their signs that give a mean at least as large (Fisher 1935,
    section 21): exact up to EXACT_FLIPS values, then from FLIPS, the values themselves among them.
    """
    found = np.asarray(values, dtype=np.float64)
    sums = _signs(len(found)) @ found
    # Sums that are equal in exact arithmetic must count as equal.
    slack = 1e-12 * np.abs(found).sum()
    return float((sums >= found.sum() - slack).mean())


def least_sign_flip_p(n: int) -> float:
    """What sign_flip_p gives where all of n values have the sign that it looks for."""
    return 2.0**-n if n <= EXACT_FLIPS else 1 / FLIPS


@functools.lru_cache(maxsize=4)
def _signs(n: int) -> NDArray[np.float64]:
    """Ways to give n values a sign, a row each: all of them, or the first and draws."""
    if n <= EXACT_FLIPS:
        return np.array(1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1), dtype=np.float64)
    draws = np.random.default_rng(n).integers(0, 2, size=(FLIPS, n))
    draws[0] = 0
    return np.array(1 - 2 * draws, dtype=np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the order given. Holm 1979."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
