"""Compute how many seeds a claim needs, before a sweep and after it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from analysis.claims import Claim, Part
from analysis.decisions import ALPHA, CONTRADICTED, NOT_SUPPORTED, SUPPORTED, only_bound
from analysis.skew import ASSUMED, SEEN, guarded
from analysis.stats import holm
from analysis.variance import SKEW, TIES, Spread

MAX_SEEDS = 1000
"""The largest number of seeds that is recommended."""
POWER = 0.8
"""The probability with which a recommended number of seeds decides a claim."""
FUTURES = 400
"""The number of simulated continuations of a sweep in a forecast."""

HEADLINES = {"depth_gradient": 0.64, "never_suppressed": 0.26}
"""The claims that matter most, and their shares of the error rate. The other claims share the rest
evenly. With the share 0.64, six seeds that agree are enough to support depth_gradient."""

Draws = NDArray[np.float64]


def shares_of_error(claims: Sequence[str]) -> dict[str, float]:
    """Return the share of the error rate that each claim has at first."""
    others = [name for name in claims if name not in HEADLINES]
    left = 1 - sum(share for name, share in HEADLINES.items() if name in claims)
    return {name: HEADLINES.get(name, left / max(1, len(others))) for name in claims}


def say_power(seeds: int, claims: Mapping[str, Claim], alpha: float = ALPHA) -> list[str]:
    """Say what a number of seeds can decide, as lines for the console.

    Args:
        seeds: the number of seeds of each configuration.
        claims: the claims that are asked, by name.
        alpha: the error rate at which claims will be judged.
    """
    by_least: dict[int, list[str]] = {}
    for name, least in least_seeds(claims, alpha).items():
        by_least.setdefault(least, []).append(name)
    shares = shares_of_error(list(claims))
    lines = [f"{seeds} seeds in every configuration, {len(claims)} claims:"]
    if seeds >= 2:
        last = detectable(seeds, min(shares.values()) * alpha)
        alone = detectable(seeds, alpha)
        lines.append(
            f"  a claim about a mean is decided in {POWER:.0%} of sweeps if the mean lies beyond "
            f"the bound by {alone:.2g} standard deviations (between seeds) and all other claims "
            f"are decided; by {last:.2g} if no other claim is decided"
        )
    for least, names in sorted(by_least.items()):
        if seeds >= least:
            lines.append(f"  can support, if every seed agrees: {', '.join(names)}")
        else:
            needed = f"{least} seeds" if least <= MAX_SEEDS else "no number of seeds"
            lines.append(f"  cannot support {', '.join(names)}: {needed} can, if every seed agrees")
    return lines


def least_seeds(claims: Mapping[str, Claim], alpha: float = ALPHA) -> dict[str, int]:
    """Return the smallest number of seeds that can support each claim.

    With this number, the claim is supported if every seed agrees with every claim. The p-value of a
    median or a share then has the smallest possible value. The p-value of a mean can be as small as
    you like.

    Args:
        claims: all claims that are judged together, by name.
        alpha: the error rate.

    Returns:
        The number of seeds by the name of the claim. MAX_SEEDS + 1 means that no number suffices.
    """
    shares = list(shares_of_error(list(claims)).values())
    rules = [[rule for rule in one.parts.values() if rule.decides] for one in claims.values()]
    found = dict.fromkeys(claims, MAX_SEEDS + 1)
    for n in range(MAX_SEEDS, 1, -1):
        p_values = [2 * max(_least_p(rule, n) for rule in some) for some in rules]
        adjusted, _ = holm(p_values, shares)
        supported = [name for name, p in zip(claims, adjusted, strict=True) if p < alpha]
        if not supported:
            break
        found.update(dict.fromkeys(supported, n))
    return found


def _least_p(rule: Part, n: int) -> float:
    """Return the smallest one-sided p-value that n units can give."""
    if rule.centre == "mean":
        return 0.0
    if rule.centre == "median":
        return 2.0**-n
    bound, sign = only_bound(rule)
    return float((bound if sign > 0 else 1 - bound) ** n)


def detectable(n_seeds: int, alpha: float = ALPHA) -> float:
    """Return the effect that a guarded t-test decides with probability POWER.

    Args:
        n_seeds: at least 2.
        alpha: the error rate of both directions together.

    Returns:
        The distance of a mean from its bound, in standard deviations between seeds.
    """
    t, df = critical_t(n_seeds - 1.0, alpha), n_seeds - 1
    # scipy's noncentral t has no numbers for the large t of few seeds. The sd that is estimated, in
    # units of the true one, takes each of these values equally often.
    sds = np.sqrt(stats.chi2.ppf((np.arange(1000) + 0.5) / 1000, df) / df)

    def excess_misses(effect: float) -> float:
        misses = stats.norm.cdf(t * sds - effect * math.sqrt(n_seeds)).mean()
        return float(misses) - (1 - POWER)

    return float(optimize.brentq(excess_misses, 0.0, 10 + 10 * t))


@functools.lru_cache(maxsize=4096)
def critical_t(df: float, alpha: float, guard: float = ASSUMED) -> float:
    """Return the smallest t at which a guarded two-sided test rejects at the error rate alpha."""

    def excess(log_p: float) -> float:
        return guarded(math.exp(log_p), df, guard) - alpha / 2

    if alpha >= 1:
        return 0.0
    return float(stats.t.isf(math.exp(optimize.brentq(excess, -600.0, math.log(0.5))), df))


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The numbers of seeds that would decide a claim, if new seeds resemble the seeds so far."""

    half: int | None  # decide the claim with probability 0.5; None for more than MAX_SEEDS
    most: int | None  # decide the claim with probability POWER; None for more than MAX_SEEDS
    would_be: str  # the most likely verdict


def forecast(rules: Sequence[tuple[Part, Spread]], alpha: float) -> Forecast | None:
    """Forecast how many seeds would decide an undecided claim.

    The true centre and spread are only known roughly. FUTURES possible pairs are drawn. For each
    pair, further seeds are simulated, and tested as in analysis.decisions.

    Args:
        rules: the parts that decide the claim, and their units.
        alpha: the error rate of the claim, for both directions together.

    Returns:
        None if there is only one seed.
    """
    n = min(len(spread.units) for _, spread in rules)
    if n < 2 or any(spread.error is None for _, spread in rules):
        return None
    rng = np.random.default_rng(0)
    drawn = [_Part(rule, spread, rng) for rule, spread in rules]
    half = None
    likely = SUPPORTED
    for seeds in _sizes(n):
        shown = [one.shown(seeds, alpha, len(rules)) for one in drawn]
        supported = np.logical_and.reduce([one[SUPPORTED] for one in shown])
        contradicted = np.logical_or.reduce([one[CONTRADICTED] for one in shown])
        missed = np.logical_or.reduce([one[NOT_SUPPORTED] for one in shown])
        decided = float((supported | contradicted | missed).mean())
        by_verdict = {
            SUPPORTED: supported.sum(),
            CONTRADICTED: contradicted.sum(),
            NOT_SUPPORTED: (missed & ~contradicted).sum(),
        }
        likely = max(by_verdict, key=lambda verdict: int(by_verdict[verdict]))
        half = seeds if half is None and decided >= 0.5 else half
        if decided >= POWER:
            return Forecast(half=half, most=seeds, would_be=likely)
    return Forecast(half=half, most=None, would_be=likely)


def _sizes(n: int) -> list[int]:
    """Return the numbers of seeds to try: from n + 1 up to MAX_SEEDS, in growing steps."""
    sizes = [n + 1]
    while sizes[-1] < MAX_SEEDS:
        sizes.append(max(sizes[-1] + 1, math.ceil(sizes[-1] * 1.15)))
    return sizes[:-1]


class _Part:
    """Simulated continuations of the numbers of one part."""

    def __init__(self, rule: Part, spread: Spread, rng: np.random.Generator) -> None:
        self.rule, self.rng, self.units = rule, rng, spread.units
        self.n = len(spread.units)
        self.sd = float(spread.units.std(ddof=1))
        self.mean = float(spread.units.mean())
        self.sigma = self.sd * np.sqrt((self.n - 1) / rng.chisquare(self.n - 1, FUTURES))
        self.centre = self.mean + self.sigma / math.sqrt(self.n) * rng.standard_normal(FUTURES)
        self.doubts = spread.doubts
        self.guard = SEEN if SKEW in spread.doubts else ASSUMED
        self.at: dict[tuple[float, int], Draws] = {}  # shares beyond a bound, by bound and sign

    def shown(self, seeds: int, alpha: float, parts: int) -> dict[str, NDArray[np.bool_]]:
        """Return in which futures each statement about the rule is shown.

        Args:
            seeds: the number of seeds, larger than the number so far.
            alpha: the error rate of both directions together.
            parts: the number of parts that decide the claim.

        Returns:
            One boolean for each future, by verdict.
        """
        rule = self.rule
        means = self._means(seeds) if rule.centre == "mean" else None

        def shows(bound: float, sign: int, level: float) -> NDArray[np.bool_]:
            if means is not None:
                t = sign * (means[0] - bound) / np.maximum(means[1], 1e-300)
                passed = np.asarray(t > critical_t(seeds - 1.0, level, self.guard))
                ties = TIES in self.doubts
                return passed & self._counts(bound, sign, seeds, level) if ties else passed
            return self._counts(bound, sign, seeds, level)

        each = alpha / parts
        if rule.low is not None and rule.high is not None:
            inside = shows(rule.low, 1, alpha) & shows(rule.high, -1, alpha)
            outside = shows(rule.low, -1, each / 2) | shows(rule.high, 1, each / 2)
            return {SUPPORTED: inside, CONTRADICTED: outside, NOT_SUPPORTED: outside}
        bound, sign = only_bound(rule)
        against = bound if rule.against is None else rule.against
        return {
            SUPPORTED: shows(bound, sign, alpha),
            CONTRADICTED: shows(against, -sign, each),
            NOT_SUPPORTED: shows(bound, -sign, each),
        }

    def _means(self, seeds: int) -> tuple[Draws, Draws]:
        """Return the mean of each future, and its standard error."""
        more = seeds - self.n
        new = self.centre + self.sigma / math.sqrt(more) * self.rng.standard_normal(FUTURES)
        squares = self.sd**2 * (self.n - 1) + more * self.n / seeds * (new - self.mean) ** 2
        if more > 1:
            squares = squares + self.sigma**2 * self.rng.chisquare(more - 1, FUTURES)
        mean = (self.n * self.mean + more * new) / seeds
        return mean, np.sqrt(squares / (seeds - 1) / seeds)

    def _counts(self, bound: float, sign: int, seeds: int, level: float) -> NDArray[np.bool_]:
        """Return in which futures a median or a share is shown to lie beyond a bound."""
        is_share = self.rule.centre == "share"
        one = sign * (self.units - (0.5 if is_share else bound)) > 0
        held, null = int(one.sum()), (bound if sign > 0 else 1 - bound) if is_share else 0.5
        if (bound, sign) not in self.at:
            self.at[bound, sign] = self.rng.beta(held + 0.5, self.n - held + 0.5, FUTURES)
        counts = held + self.rng.binomial(seeds - self.n, self.at[bound, sign])
        return np.asarray(counts >= critical_count(seeds, null, level))


@functools.lru_cache(maxsize=4096)
def critical_count(n: int, null: float, alpha: float) -> int:
    """Return the smallest number of successes at which an exact binomial test rejects.

    Args:
        n: the number of seeds.
        null: the share under the null hypothesis.
        alpha: the error rate of both directions together.

    Returns:
        n + 1 if not even n successes are enough.
    """
    p_values = stats.binom.sf(np.arange(n + 1) - 1, n, null)  # of 0 to n successes
    return int((2 * p_values >= alpha).sum())
