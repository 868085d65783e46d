"""The model of variance in a sweep: how the number of a run comes about.

The number of a run is a sum:

    number = configuration + seed + interactions + the run itself

A configuration is a scheme with the values of the other knobs. A seed is everything that a run
draws: the initial weights, the order of the data, and the draws among tokens. Runs of one seed have
the same draws in every configuration, so seeds are crossed with configurations. The same formulas
hold if each configuration has seeds of its own.

Three questions need three kinds of interval.

- `over_units`, *here*: what would these configurations give with other seeds? The seeds are a
  sample, and the configurations are fixed. The estimate is the mean over configurations of their
  means over seeds. The variance is cluster-robust, with seeds as clusters. The correction for small
  samples is CR2 (Bell & McCaffrey 2002), which is exact for complete designs. The degrees of
  freedom are Satterthwaite's.
- `in_general`: what would other schemes of this kind give? The schemes are a sample too. One scheme
  is one unit, however many configurations it has. The variances over schemes and over seeds add up,
  minus the part that is in both.
- `prediction`: where would one more scheme lie?
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import special, stats

from analysis.stats import LEVEL, Estimate

LEAST_SCHEMES, LEAST_SEEDS = 3, 3
"""The smallest numbers of schemes and seeds for an interval in general."""
DRAWS = 1024
"""The number of draws of the variances in a prediction interval."""
TIES, SKEW = "equal numbers", "skewed numbers"
"""Reasons to doubt the assumptions of a t-test. If numbers are equal, the sign test has to agree.
If numbers are skewed, the test is stricter."""
TIE = 1e-9
"""Two units are equal if they differ by less than this share of the largest deviation."""
LEAST_FOR_SKEW = 8
SKEW_ALPHA = 0.01
"""From LEAST_FOR_SKEW units on, D'Agostino's test (1970) looks for skewness, at this error rate."""

Numbers = NDArray[np.float64]
Codes = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """The mean of runs, and how it varies over units of one kind."""

    mean: float
    error: float | None  # the standard error of the mean; None where it cannot be estimated
    df: float  # its degrees of freedom
    units: Numbers
    """One number for each unit. Their mean is `mean`, and their spread gives `error`. In a sweep
    without missing runs, the number of a seed is the mean over configurations."""

    @functools.cached_property
    def doubts(self) -> tuple[str, ...]:
        """The reasons to doubt a t-test of these units: TIES, SKEW."""
        ordered = np.sort(self.units)
        scale = max(abs(ordered[0] - self.mean), abs(ordered[-1] - self.mean))
        found = [TIES] if (np.diff(ordered) <= TIE * scale).any() else []
        if len(ordered) >= LEAST_FOR_SKEW and ordered[0] < ordered[-1]:
            found += [SKEW] if stats.skewtest(ordered).pvalue < SKEW_ALPHA else []
        return tuple(found)

    def interval(self, level: float = LEVEL) -> Estimate:
        """Return the mean with Student's interval."""
        if self.error is None:
            return Estimate(seeds=len(self.units), value=self.mean, low=None, high=None)
        half = self.error * float(special.stdtrit(self.df, (1 + level) / 2))
        return Estimate(
            seeds=len(self.units), value=self.mean, low=self.mean - half, high=self.mean + half
        )


def unit_columns(runs: pl.DataFrame) -> list[str]:
    """Return the columns that name the units over which a mean varies.

    A data seed that follows the seed, or is the same for all runs, is not a unit of its own. If the
    two seeds were varied separately, there are two kinds of units.

    Args:
        runs: columns seed and data_seed.
    """
    seeds, orders = runs["seed"].n_unique(), runs["data_seed"].n_unique()
    pairs = runs.select("seed", "data_seed").unique().height
    if pairs == seeds:
        return ["seed"]
    return ["data_seed"] if pairs == orders else ["seed", "data_seed"]


def over_units(runs: pl.DataFrame, unit: str = "seed") -> Spread:
    """Return the mean over configurations, and how it varies over units.

    A configuration with a single unit says nothing about the variance. It is left out if another
    configuration has several units.

    Args:
        runs: columns config, `unit`, value. At least one row.
        unit: the column that names the units.
    """
    configs, units, values = _table(_codes(runs["config"]), _codes(runs[unit]), runs["value"])
    several = np.bincount(configs)[configs] > 1
    if several.any() and not several.all():
        configs, units, values = _table(configs[several], units[several], values[several])
    sizes = np.bincount(configs)
    means = np.bincount(configs, values) / sizes
    mean, n = float(means.mean()), int(units.max()) + 1
    if sizes.min() < 2:
        return Spread(mean=mean, error=None, df=0.0, units=np.full(n, mean))
    weight = np.sqrt(sizes / (sizes - 1)) / (len(sizes) * sizes)  # of a run's deviation
    terms = np.bincount(units, weight[configs] * (values - means[configs]))
    weights = np.zeros((n, len(sizes)))
    weights[units, configs] = weight[configs]
    gram = np.diag((weights**2).sum(1)) - (weights / sizes) @ weights.T
    return Spread(
        mean=mean,
        error=math.sqrt(float((terms**2).sum())),
        df=float(np.trace(gram) ** 2 / (gram**2).sum()),
        units=np.asarray(mean + math.sqrt(n * (n - 1)) * terms, dtype=np.float64),
    )


def over_seeds(runs: pl.DataFrame, units: list[str]) -> Spread:
    """Return the mean over configurations, and how it varies over seeds of all kinds.

    If weights and data have separate seeds, the two variances add up. The units of the result are
    then the seeds of the kind with fewer seeds.

    Args:
        runs: columns config, value and those of `units`. At least one row.
        units: the columns that name seeds.
    """
    spreads = [over_units(runs, unit) for unit in units]
    fewest = min(spreads, key=lambda spread: len(spread.units))
    if len(spreads) == 1 or any(spread.error is None for spread in spreads):
        return fewest
    variances = [float(spread.error or 0.0) ** 2 for spread in spreads]
    spread_of_sum = sum(one**2 / spread.df for one, spread in zip(variances, spreads, strict=True))
    return Spread(
        mean=fewest.mean,
        error=math.sqrt(sum(variances)),
        df=sum(variances) ** 2 / spread_of_sum if spread_of_sum else fewest.df,
        units=fewest.units,
    )


def _table(
    configs: Codes, units: Codes, values: pl.Series | Numbers
) -> tuple[Codes, Codes, Numbers]:
    """Average the runs with the same configuration and unit. Return new codes from 0, and means."""
    width = int(units.max()) + 1
    cells, of_cell = np.unique(configs * width + units, return_inverse=True)
    means = np.bincount(of_cell, np.asarray(values)) / np.bincount(of_cell)
    configs, units = (
        np.unique(codes, return_inverse=True)[1] for codes in (cells // width, cells % width)
    )
    return configs, units, means


def in_general(runs: pl.DataFrame, units: list[str]) -> Spread:
    """Return the mean over schemes, and how it varies over schemes and seeds.

    Args:
        runs: columns scheme, config, value and those of `units`. At least one row.
        units: the columns that name seeds.
    """
    found = _parts_of_variance(runs, units)
    schemes, n_schemes = found.schemes, len(found.schemes)
    mean = float(schemes.mean())
    if n_schemes < LEAST_SCHEMES or found.seeds < LEAST_SEEDS or math.isnan(found.over_seeds):
        return Spread(mean=mean, error=None, df=0.0, units=schemes)
    of_schemes = float(schemes.var(ddof=1)) / n_schemes
    # The variance of single runs is in the variance over schemes, and again in that over seeds.
    more = found.over_seeds - found.in_both
    terms = [(of_schemes, n_schemes - 1.0)]
    if more > 0:
        terms += [(found.over_seeds, found.seeds_df), (found.in_both, found.both_df)]
    variance = of_schemes + max(0.0, more)
    spread = sum(term**2 / df for term, df in terms if df > 0)
    df = variance**2 / spread if spread else n_schemes - 1.0
    least = min(n_schemes - 1.0, found.seeds_df)
    return Spread(mean=mean, error=math.sqrt(variance), df=max(df, least), units=schemes)


def prediction(runs: pl.DataFrame, units: list[str], level: float = LEVEL) -> Estimate:
    """Return an interval for the mean that one more scheme would have, over all its seeds.

    Few schemes say little about the variance of a scheme and of the mean. Therefore each variance
    is drawn from the values that agree with the sweep (a generalised interval, Weerahandi 1993).

    Args:
        runs, units: as for in_general.
        level: the confidence level.
    """
    found = _parts_of_variance(runs, units)
    n_schemes = len(found.schemes)
    mean = float(found.schemes.mean())
    if n_schemes < LEAST_SCHEMES or found.seeds < LEAST_SEEDS or math.isnan(found.over_seeds):
        return Estimate(seeds=found.seeds, value=mean, low=None, high=None)
    of_schemes = float(found.schemes.var(ddof=1)) / _chi_squared(n_schemes - 1.0, 0)
    over_seeds = found.over_seeds / _chi_squared(found.seeds_df, 1)
    in_both = found.in_both / _chi_squared(found.both_df, 2) if found.both_df > 0 else 0.0
    of_mean = of_schemes / n_schemes + np.maximum(0.0, over_seeds - in_both)
    of_one = np.maximum(0.0, of_schemes - n_schemes * in_both)
    distances = np.sqrt(of_mean + of_one) * _normal(3)
    half = float(np.quantile(np.abs(distances), level))
    return Estimate(seeds=found.seeds, value=mean, low=mean - half, high=mean + half)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Parts:
    """The parts of the variance of the mean over schemes."""

    schemes: Numbers  # the mean of each scheme
    seeds: int
    over_seeds: float  # NaN where it cannot be estimated
    seeds_df: float
    in_both: float  # the part of over_seeds that is also in the variance of `schemes`
    both_df: float


def _parts_of_variance(runs: pl.DataFrame, units: list[str]) -> _Parts:
    means = runs.group_by("scheme", "config").agg(pl.col("value").mean())
    schemes = means.group_by("scheme").agg(pl.col("value").mean()).sort("scheme")
    over = over_seeds(runs, units)
    in_both, both_df = _in_both(runs, units[0]) if over.error is not None else (0.0, 0.0)
    return _Parts(
        schemes=schemes["value"].to_numpy(),
        seeds=len(over.units),
        over_seeds=math.nan if over.error is None else over.error**2,
        seeds_df=over.df,
        # With two kinds of units the part is in the variance of each of them.
        in_both=in_both * len(units),
        both_df=both_df,
    )


def _in_both(runs: pl.DataFrame, unit: str) -> tuple[float, float]:
    """Return the variance of the mean over schemes that single runs cause, and its df.

    It is computed from the residuals of a table of schemes by seeds, after the effects of both.
    """
    deviation = pl.col("value") - pl.col("value").mean().over("config")
    table = (
        runs.with_columns(value=deviation)
        .group_by("scheme", unit)
        .agg(pl.col("value").mean())
        .sort("scheme", unit)
    )
    schemes, seeds = _codes(table["scheme"]), _codes(table[unit])
    sizes = np.bincount(schemes)
    n_seeds = int(seeds.max()) + 1
    values = table["value"].to_numpy()
    if len(table) == n_seeds:  # each scheme has its own seeds: all that varies over them is in both
        residuals, df = values, float(len(table) - len(sizes))
    else:
        residuals = values - (np.bincount(seeds, values) / np.bincount(seeds))[seeds]
        residuals = residuals - (np.bincount(schemes, residuals) / sizes)[schemes]
        df = float(len(table) - len(sizes) - n_seeds + 1)
    if df <= 0:
        return 0.0, 0.0
    of_run = float((residuals**2).sum()) / df
    return of_run * float((1 / sizes).sum()) / len(sizes) ** 2, df


@functools.lru_cache(maxsize=256)
def _chi_squared(df: float, column: int) -> Numbers:
    """Return DRAWS quantiles of chi-squared with df degrees of freedom, divided by df."""
    found: Numbers = stats.chi2.ppf(_uniform()[:, column], df) / df
    return found


@functools.lru_cache(maxsize=8)
def _normal(column: int) -> Numbers:
    found: Numbers = stats.norm.ppf(_uniform()[:, column])
    return found


@functools.lru_cache(maxsize=1)
def _uniform() -> Numbers:
    """Return DRAWS points that fill the unit cube in four dimensions evenly, always the same."""
    found: Numbers = stats.qmc.Sobol(4, scramble=True, rng=0).random(DRAWS)
    return found


def split(runs: pl.DataFrame, units: list[str]) -> dict[str, float]:
    """Split the variance of single runs into shares of its sources, which add up to 1.

    The variance components are estimated by Rao's MINQUE(0). In a complete design, these are the
    usual estimates. Other designs need no iteration. A negative component counts as 0.

    Args:
        runs: columns scheme, config, value and those of `units`. At least one row.
        units: the columns that name seeds.
    """
    names = {"scheme": ["scheme"], "configuration of a scheme": ["config"]}
    names |= {unit.replace("_", " "): [unit] for unit in units}
    names |= {f"{unit.replace('_', ' ')} within a scheme": ["scheme", unit] for unit in units}
    factors: dict[str, Codes] = {}
    for name, columns in names.items():
        codes = _codes(runs.select(pl.struct(columns)).to_series())
        # A factor has no share if it is constant, or equal to another factor or to the run.
        alike = [*factors.values(), np.arange(len(runs))]
        if codes.max() > 0 and not any(_same(codes, other) for other in alike):
            factors[name] = codes
    factors["run"] = np.arange(len(runs))
    values = runs["value"].to_numpy() - float(runs["value"].to_numpy().mean())
    squares = np.array([float((np.bincount(one, values) ** 2).sum()) for one in factors.values()])
    codes_of = list(factors.values())
    expected = np.array([[_trace(one, other) for other in codes_of] for one in codes_of])
    components = np.maximum(0.0, np.linalg.lstsq(expected, squares, rcond=None)[0])
    total = float(components.sum())
    shares = components / total if total else np.zeros(len(components))
    return dict(zip(factors, shares.tolist(), strict=True))


def _trace(one: Codes, other: Codes) -> float:
    """Return tr(M A A' M B B') for two factors with indicator matrices A and B, M = I - 11'/n."""
    n = len(one)
    width = int(other.max()) + 1
    pairs, counts = np.unique(one * width + other, return_counts=True)
    of_one, of_other = np.bincount(one), np.bincount(other)
    crossed = float((counts * of_one[pairs // width] * of_other[pairs % width]).sum())
    both = float((of_one.astype(float) ** 2).sum()) * float((of_other.astype(float) ** 2).sum())
    return float((counts.astype(float) ** 2).sum()) - 2 * crossed / n + both / n**2


def _same(one: Codes, other: Codes) -> bool:
    """Return whether two factors divide the runs into the same groups."""
    groups = len(np.unique(np.stack([one, other]), axis=1).T)
    return bool(groups == one.max() + 1 == other.max() + 1)


def _codes(labels: pl.Series) -> Codes:
    """Return the number of each label, from 0, in the order of labels."""
    if labels.dtype.is_integer():
        found: Codes = np.unique(labels.to_numpy(), return_inverse=True)[1]
        return found
    return labels.rank("dense").to_numpy().astype(np.int64) - 1


def shares_of(variances: Mapping[str, float]) -> str:
    """Say how the variance splits: `scheme 80%, seed 15%, run 5%`."""
    return ", ".join(f"{name} {share:.0%}" for name, share in variances.items())
