"""How many seeds a claim needs: what a number of seeds can support, and how many would decide."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping

from scipy import optimize, stats

from analysis.claims import CLAIMS, Claim, Part
from analysis.decisions import (
    ALPHA,
    INTERVALS,
    SUPPORTED,
    UNDERPOWERED,
    combined,
    decide,
    nulls,
)
from analysis.stats import Estimate, SpreadEstimate, least_sign_flip_p, share_interval, t_quantile
from gptcore.config import TrialConfig

MAX_SEEDS = 1000
"""No larger number of seeds is recommended."""
POWER = 0.8
"""The probability of finding an effect for which `detectable` gives its size."""


def power(trials: Iterable[TrialConfig], alpha: float = ALPHA) -> list[str]:
    """Say which claims a plan has enough seeds to support.

    A claim that the plan cannot support stays undecided even if every seed agrees with it.

    Args:
        trials: all trials of the plan.
        alpha: the error rate at which claims will be judged.

    Returns:
        Lines for the console.
    """
    configs_of: dict[int, set[str]] = {}
    for config in trials:
        flat = config.to_flat()
        seed = flat.pop("init.seed")
        configs_of.setdefault(int(seed), set()).add(str(flat))
    configs = set().union(*configs_of.values())
    seeds = sum(some == configs for some in configs_of.values())
    claims_by_least: dict[int, list[str]] = {}
    for name, least in least_seeds(CLAIMS, alpha).items():
        claims_by_least.setdefault(least, []).append(name)
    lines = [f"{seeds} seeds in every configuration, {len(CLAIMS)} claims:"]
    if seeds >= 2:
        effect = detectable(seeds, len(CLAIMS), alpha)
        lines.append(
            f"  80% power for a claim about a mean that is {effect:.2g} standard deviations "
            "(between seeds) beyond the bound"
        )
    for least, names in sorted(claims_by_least.items()):
        if seeds >= least:
            lines.append(f"  can support {', '.join(names)}")
        else:
            needed = f"{least} seeds" if least <= MAX_SEEDS else "no number of seeds"
            lines.append(f"  cannot support {', '.join(names)}: {needed} can")
    return lines


def least_seeds(claims: Mapping[str, Claim], alpha: float = ALPHA) -> dict[str, int]:
    """Return the smallest number of seeds that can support each claim.

    It is the number at which a claim is supported if every seed agrees with every claim. The
    p-value of a median or a share is then as small as it can be, and Holm's correction multiplies
    it by the number of claims about medians and shares. The p-value of a mean can always be
    smaller.

    Args:
        claims: all claims that are judged together, by name.
        alpha: the error rate.

    Returns:
        By name of the claim the number of seeds, and MAX_SEEDS + 1 where no number can.
    """
    exact = [
        name
        for name, claim in claims.items()
        if any(rule.decides and rule.centre != "mean" for rule in claim.parts.values())
    ]

    def can_support(rule: Part, n: int) -> bool:
        if rule.centre == "mean":
            return True
        # Every seed agrees: a share is 1, and all medians are equal and above 0.
        estimate = INTERVALS[rule.centre]([1.0] * n, 1 - alpha)
        bounded = rule if rule.centre == "share" else Part(centre="median", low=0.0)
        return decide(bounded, estimate) == SUPPORTED and _least_p(rule, n) * len(exact) < alpha

    return {
        name: next(
            (
                n
                for n in range(2, MAX_SEEDS + 1)
                if all(can_support(rule, n) for rule in claim.parts.values() if rule.decides)
            ),
            MAX_SEEDS + 1,
        )
        for name, claim in claims.items()
    }


def detectable(n_seeds: int, n_claims: int, alpha: float = ALPHA) -> float:
    """Return the effect that a t-test finds with probability POWER.

    The effect is the distance of a mean from its bound, in standard deviations between seeds. The
    test is one-sided, and alpha is divided by the number of claims (Bonferroni).
    """
    t = float(stats.t.isf(alpha / n_claims, n_seeds - 1))

    def excess_misses(effect: float) -> float:
        misses = float(stats.nct.cdf(t, n_seeds - 1, effect * math.sqrt(n_seeds)))
        return misses - (1 - POWER)

    return float(optimize.brentq(excess_misses, 0.0, 1000.0))


def seeds_needed(
    claim: Claim, estimates: Mapping[str, SpreadEstimate], n_claims: int, alpha: float
) -> tuple[int, str] | tuple[None, None]:
    """Return how many seeds would decide a claim, and the verdict that they would give.

    It assumes that more seeds have the same centre and standard deviation.

    Args:
        claim: the claim, which the seeds so far have not decided.
        estimates: by part that decides the claim, the estimate over the seeds so far.
        n_claims: how many claims are tested together.
        alpha: the error rate.

    Returns:
        (None, None) where there is only one seed, or where MAX_SEEDS would not decide the claim.
    """
    if any(estimate.sd is None for estimate in estimates.values()):
        return None, None
    counts = [
        _seeds_for_part(claim.rule(part), estimate, n_claims, alpha)
        for part, estimate in estimates.items()
    ]
    needed = max(counts)
    if needed > MAX_SEEDS:
        return None, None
    verdicts = [
        decide(claim.rule(part), _expected(claim.rule(part), estimate, needed, alpha))
        for part, estimate in estimates.items()
    ]
    return needed, combined(verdicts)


def _seeds_for_part(rule: Part, estimate: SpreadEstimate, n_claims: int, alpha: float) -> int:
    """Return how many seeds would decide a part; MAX_SEEDS + 1 where MAX_SEEDS would not."""

    def is_decided(n: int) -> bool:
        verdict = decide(rule, _expected(rule, estimate, n, alpha))
        if verdict != SUPPORTED:
            return verdict != UNDERPOWERED
        return _expected_p(rule, estimate, n) * n_claims < alpha

    # A part that is decided stays decided with more seeds, so bisection finds the first number.
    counts = range(max(2, estimate.seeds + 1), MAX_SEEDS + 1)
    return counts.start + bisect.bisect_left(counts, True, key=is_decided)


def _least_p(rule: Part, n: int) -> float:
    """Return the p-value of a median or a share for n units that all agree."""
    return least_sign_flip_p(n) if rule.centre == "median" else 2.0**-n


def _expected_p(rule: Part, estimate: SpreadEstimate, n: int) -> float:
    """Return the p-value that n units would give; for a median or a share, the smallest one."""
    if rule.centre != "mean":
        return _least_p(rule, n)
    assert estimate.value is not None
    error = (estimate.sd or 1e-300) / math.sqrt(n)
    return max(
        float(stats.t.sf(sign * (estimate.value - null) / error, n - 1))
        for null, sign in nulls(rule)
    )


def _expected(rule: Part, estimate: SpreadEstimate, n: int, alpha: float) -> Estimate:
    """Return the interval that n units with the same centre and spread would give."""
    value, sd = estimate.value, estimate.sd
    assert value is not None
    assert sd is not None
    if rule.centre == "share":
        return share_interval([value] * n, 1 - alpha)
    half = t_quantile(n, 1 - alpha) * sd / math.sqrt(n)
    return Estimate(seeds=n, value=value, low=value - half, high=value + half)
