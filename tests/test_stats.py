"""Intervals cover the true value at the rate that they promise."""

import numpy as np
import pytest
from scipy import stats

from analysis.stats import Estimate, mean_interval, median_interval, share_interval, share_p

SAMPLES = 2000
# Four standard errors of a coverage of 95% over this many samples.
SLACK = 4 * (0.95 * 0.05 / SAMPLES) ** 0.5


def coverage(estimate, draw, truth, size):
    rng = np.random.default_rng(0)
    found = [estimate(draw(rng, size).tolist()) for _ in range(SAMPLES)]
    return np.mean([one.low <= truth <= one.high for one in found])


@pytest.mark.parametrize("size", [3, 8, 30])
def test_the_interval_of_a_mean_covers_it(size):
    covered = coverage(mean_interval, lambda rng, n: rng.normal(2, 3, n), 2, size)
    assert covered == pytest.approx(0.95, abs=SLACK)


@pytest.mark.parametrize("size", [6, 9, 25])
def test_the_interval_of_a_median_covers_at_least_as_often_as_it_says(size):
    covered = coverage(median_interval, lambda rng, n: rng.exponential(1, n), np.log(2), size)
    assert covered >= 0.95 - SLACK


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_interval_of_a_share_covers_at_least_as_often_as_it_says(share):
    covered = coverage(
        share_interval, lambda rng, n: (rng.random(n) < share).astype(float), share, 30
    )
    assert covered >= 0.95 - SLACK


def test_there_is_no_interval_with_too_few_seeds():
    assert mean_interval([1.0]) == Estimate(seeds=1, value=1.0, low=None, high=None)
    assert median_interval([1.0] * 5).low is None
    assert median_interval([1.0, 2, 3, 4, 5, 9]) == Estimate(seeds=6, value=3.5, low=1.0, high=9)
    for estimate in (mean_interval, median_interval, share_interval):
        assert estimate([]) == Estimate(seeds=0, value=None, low=None, high=None)


def test_the_order_of_runs_does_not_matter():
    values = [3.0, 1, 2, 8, 5, 4, 7]
    for estimate in (mean_interval, median_interval):
        assert estimate(values) == estimate(values[::-1])


@pytest.mark.parametrize("held", [0, 3, 8])
def test_the_interval_and_the_test_of_a_share_are_the_exact_ones(held):
    shares = [1.0] * held + [0.0] * (8 - held)
    exact = stats.binomtest(held, 8).proportion_ci(0.95, method="exact")
    found = share_interval(shares)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert found.low <= found.value <= found.high
    for sign, side in ((1, "greater"), (-1, "less")):
        p = stats.binomtest(held, 8, 0.4, alternative=side).pvalue
        assert share_p(shares, 0.4, sign) == pytest.approx(p)
