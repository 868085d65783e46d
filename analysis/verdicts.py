"""From the numbers of runs to a verdict on each claim.

Units are seeds: runs of one seed start from the same weights and are averaged first. That says what
holds for the configurations that were run. Where there are several, whether a claim holds in
general depends on which were run as well: configurations are a second kind of unit, each averaged
over its seeds, and the variances of both are added. Seeds and configurations are crossed: either
alone makes intervals too narrow, and so does a bootstrap of the few configurations of a sweep.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import polars as pl
from scipy import optimize, stats

from analysis.claims import Claim, Part, Values
from analysis.stats import (
    LEVEL,
    Estimate,
    holm,
    least_sign_flip_p,
    mean_interval,
    median_interval,
    share_interval,
    sign_flip_p,
    t_p,
    t_quantile,
)

INTERVALS = {"mean": mean_interval, "median": median_interval, "share": share_interval}
ALPHA = 1 - LEVEL
MOST_SEEDS = 1000
"""More than this are not recommended to anyone."""

SUPPORTED, CONTRADICTED = "supported", "contradicted"
NOT_SUPPORTED, UNDERPOWERED, NOT_MEASURED = "not supported", "underpowered", "not measured"


def judge(
    claims: Mapping[str, Claim],
    values: Mapping[str, Values],
    trials: pl.DataFrame,
    general: bool = True,
    alpha: float = ALPHA,
) -> dict[str, dict[str, Any]]:
    """A finding for each claim on these trials; `supported` is corrected for their number (Holm).

    All at the level `alpha`: intervals are of 1 - alpha, and an adjusted p has to be below it.

    `values`: what each claim's measure gave. `trials`: columns trial_key, status, config, seed; the
    numbers of other trials are left out. A diverged trial has no number: the verdict is also given
    with it counted against the claim. Where not in `general`, what is found is of these
    configurations, and says nothing of others.
    """
    judged = {
        name: _judge_one(claims[name], values[name], trials, general, alpha) for name in claims
    }
    for suffix in ("", "_with_diverged"):
        p_values = {
            name: found[f"p{suffix}"]
            for name, found in judged.items()
            if found[f"p{suffix}"] is not None
        }
        adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
        for name, found in judged.items():
            found[f"p_holm{suffix}"] = adjusted.get(name)
            if found[f"verdict{suffix}"] == SUPPORTED and adjusted[name] >= alpha:
                found[f"verdict{suffix}"] = UNDERPOWERED
    for name, found in judged.items():
        found["seeds_needed"] = found["would_be"] = None
        if found["verdict"] == UNDERPOWERED and not general:
            needed = _seeds_needed(claims[name], found["parts"], len(p_values), alpha)
            found["seeds_needed"], found["would_be"] = needed
    return judged


def _judge_one(
    claim: Claim, values: Values, trials: pl.DataFrame, general: bool, alpha: float
) -> dict[str, Any]:
    """The finding on one claim, before the correction for their number."""
    # Sorted, so that sums are added up in the same order whatever the order of runs.
    placed = values.join(trials, on="trial_key").sort("part", "trial_key")
    diverged = trials.filter(status="diverged").select("seed", "config").rows()
    parts: dict[str, dict[str, Any]] = {}
    worst = []
    for (part,), rows in placed.group_by("part", maintain_order=True):
        rule = claim.rule(str(part))
        runs = rows.select("seed", "config", "value").rows()
        found = judge_part(rule, runs, general, alpha)
        if found is None:
            continue
        parts[str(part)] = {**found, "decides": rule.decides}
        if rule.decides:
            adverse = _adverse(rule, [value for *_, value in runs])
            against = [(seed, config, adverse) for seed, config in diverged]
            worst.append(judge_part(rule, runs + against, general, alpha) or found)
    deciding = [part for part in parts.values() if part["decides"]]
    # A claim is not decided by some of its parts: over bytes, for one, no token is rare.
    missing = [
        NOT_MEASURED
        for part, rule in claim.parts.items()
        if part != "*" and rule.decides and part not in parts
    ]
    return {
        "verdict": combined([part["verdict"] for part in deciding] + missing),
        "verdict_with_diverged": combined([part["verdict"] for part in worst] + missing),
        "course": course(list(parts.values())) if claim.course else None,
        "p": None if missing else max((part["p"] for part in deciding), default=None),
        "p_with_diverged": None if missing else max((part["p"] for part in worst), default=None),
        "runs": placed["trial_key"].n_unique(),
        "diverged": len(diverged),
        "seeds": max((part["over_seeds"]["seeds"] for part in deciding), default=0),
        "seeds_left_out": max((part["seeds_left_out"] for part in deciding), default=0),
        "configurations": max((part["configurations"] for part in deciding), default=0),
        "parts": parts,
    }


def judge_part(
    rule: Part, runs: Sequence[tuple[int, str, float]], general: bool, alpha: float = ALPHA
) -> dict[str, Any] | None:
    """Estimate, p and verdict of one part from (seed, config, value) of its runs, uncorrected, by
    intervals of 1 - alpha.

    Over seeds and, in `general`, over configurations where there are several. A seed that not every
    configuration has is left out: its mean would be of other configurations than the next one's.
    None where no seed remains.
    """
    configs_of: defaultdict[int, set[str]] = defaultdict(set)
    for seed, config, _ in runs:
        configs_of[seed].add(config)
    configs = set().union(*configs_of.values())
    complete = [run for run in runs if configs_of[run[0]] == configs]
    if not complete:
        return None
    found: dict[str, Any] = {
        "over_configs": None,
        "configurations": len(configs),
        "seeds_left_out": sum(some != configs for some in configs_of.values()),
    }
    estimates, p_values = [], []
    for unit, index in (("seed", 0), ("config", 1)):
        if unit == "config" and (not general or len(configs) < 2):
            continue
        by_unit: defaultdict[Any, list[float]] = defaultdict(list)
        for run in complete:
            by_unit[run[index]].append(run[2])
        units = [fmean(by_unit[name]) for name in sorted(by_unit)]
        estimate = INTERVALS[rule.centre](units, 1 - alpha)
        found[f"over_{unit}s"] = {**estimate, "sd": stdev(units) if len(units) > 1 else None}
        estimates.append(estimate)
        p_values.append(p_value(rule, units))
    found["estimate"] = added(estimates, rule.centre)
    return {**found, "p": p_added(p_values), "verdict": decide(rule, found["estimate"])}


def added(estimates: Sequence[Estimate], centre: str) -> Estimate:
    """One interval from intervals over several kinds of crossed unit, around the first one's value.

    The squares of the distances to their ends add, each side for itself, as variances do (Zou &
    Donner 2008, *Construction of confidence limits about effect measures*). A share stays between
    0 and 1.
    """
    first = estimates[0]
    value = first["value"]
    if value is None or any(estimate["low"] is None for estimate in estimates):
        return Estimate(seeds=first["seeds"], value=value, low=None, high=None)
    low = value - math.hypot(*(max(0.0, value - (one["low"] or 0.0)) for one in estimates))
    high = value + math.hypot(*(max(0.0, (one["high"] or 0.0) - value) for one in estimates))
    if centre == "share":
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(seeds=first["seeds"], value=value, low=low, high=high)


def p_added(p_values: Sequence[float]) -> float:
    """One-sided p of a number whose variance is the sum of those that the p-values stand on."""
    scores = [float(stats.norm.isf(p)) for p in p_values]
    if len(scores) == 1 or min(scores) <= 0:
        return max(p_values)
    spread = math.sqrt(sum(score**-2 for score in scores))
    return float(stats.norm.sf(1 / spread)) if spread else 0.0


def decide(rule: Part, estimate: Estimate) -> str:
    """Where the interval lies, seen from the rule's bounds."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return UNDERPOWERED
    above = rule.low is None or low > rule.low
    below = rule.high is None or high < rule.high
    if above and below:
        return SUPPORTED
    if rule.low is not None and rule.high is not None:
        return CONTRADICTED if high < rule.low or low > rule.high else UNDERPOWERED
    bound, sign = (rule.low, 1) if rule.low is not None else (rule.high, -1)
    assert bound is not None
    nearest = max(sign * low, sign * high)  # the end of the interval on the claim's side
    if nearest < sign * (bound if rule.against is None else rule.against):
        return CONTRADICTED
    return NOT_SUPPORTED if nearest < sign * bound else UNDERPOWERED


def combined(verdicts: Sequence[str]) -> str:
    """Of verdicts on the parts of a claim, which all have to hold: the worst."""
    for verdict in (CONTRADICTED, NOT_SUPPORTED, NOT_MEASURED, UNDERPOWERED, SUPPORTED):
        if verdict in verdicts:
            return verdict
    return NOT_MEASURED


def course(parts: Sequence[Mapping[str, Any]]) -> str | None:
    """Of a number that was there at some step: reversed where its interval has the other sign at
    the last one, transient where its interval then holds 0."""
    *earlier, last = parts or [{"verdict": None, "estimate": None}]
    if SUPPORTED not in [part["verdict"] for part in earlier] or last["verdict"] == SUPPORTED:
        return None
    if last["verdict"] == CONTRADICTED:
        return "reversed"
    return None if last["estimate"]["low"] is None else "transient"


def p_value(rule: Part, units: Sequence[float]) -> float:
    """One-sided p against the rule's null; for a region with two bounds the larger of both (TOST).

    For means Student's, as their interval is; for medians by flipping signs, exact up to 14 units;
    for shares exact binomial.
    """
    p_values = []
    for null, sign in _nulls(rule):
        if rule.centre == "share":
            whole = math.floor(sum(units) + 1e-9)
            p_values.append(
                float(stats.binomtest(whole, len(units), null, alternative="greater").pvalue)
            )
        elif rule.centre == "mean":
            p_values.append(t_p([sign * (value - null) for value in units]))
        else:
            p_values.append(sign_flip_p([sign * (value - null) for value in units]))
    return max(p_values)


def _nulls(rule: Part) -> list[tuple[float, int]]:
    """What the rule's number is tested against, and 1 if it has to be larger, -1 if smaller."""
    bounds = ((rule.low, 1), (rule.high, -1))
    return [
        (bound if rule.null is None else rule.null, sign)
        for bound, sign in bounds
        if bound is not None
    ]


def _adverse(rule: Part, values: Sequence[float]) -> float:
    """What a diverged run counts as: as far against the claim as any run is for it, or further."""
    if rule.centre == "share":
        return 0.0
    if rule.low is not None and rule.high is not None:
        return 2 * rule.high - rule.low
    bound, sign = (rule.low, 1) if rule.low is not None else (rule.high, -1)
    assert bound is not None
    seen = [sign * (value - bound) for value in values]
    return bound + sign * min(-abs(max(seen)), min(seen))


def _seeds_needed(
    claim: Claim, parts: Mapping[str, Any], n_claims: int, alpha: float
) -> tuple[int, str] | tuple[None, None]:
    """How many seeds would decide the claim if their values go on as they are, and to what.

    None where one seed says nothing of how they vary, or no number up to MOST_SEEDS would.
    """
    needed = 0
    for part, found in parts.items():
        if not found["decides"]:
            continue
        rule, estimate = claim.rule(part), found["over_seeds"]
        if estimate["sd"] is None:
            return None, None

        def decided(n: int, rule: Part = rule, estimate: Any = estimate) -> bool:
            verdict = decide(rule, _expected(rule, estimate, n, alpha))
            if verdict != SUPPORTED:
                return verdict != UNDERPOWERED
            return _expected_p(rule, estimate, n) * n_claims < alpha

        # More than there are, which have not decided it. Once decided, more seeds leave it so.
        counts = range(max(2, estimate["seeds"] + 1), MOST_SEEDS + 1)
        n = counts.start + bisect.bisect_left(counts, True, key=decided)
        if n > MOST_SEEDS:
            return None, None
        needed = max(needed, n)
    then = [
        decide(claim.rule(part), _expected(claim.rule(part), found["over_seeds"], needed, alpha))
        for part, found in parts.items()
        if found["decides"]
    ]
    return needed, combined(then)


def least_seeds(claims: Mapping[str, Claim], alpha: float = ALPHA) -> dict[str, int]:
    """The fewest seeds that can support each claim at the level `alpha`, where every seed agrees on
    all of them; more than MOST_SEEDS where none can.

    The p of a median or a share is then the least it can be, which Holm's correction multiplies by
    the number of claims on those: a mean's can be smaller than any of them.
    """
    exact = [
        name
        for name, claim in claims.items()
        if any(rule.decides and rule.centre != "mean" for rule in claim.parts.values())
    ]

    def can(rule: Part, n: int) -> bool:
        if rule.centre == "mean":
            return True
        # A share of 1, or medians that are known.
        found = INTERVALS[rule.centre]([1.0] * n, 1 - alpha)
        bounded = rule if rule.centre == "share" else Part(centre="median", low=0.0)
        return decide(bounded, found) == SUPPORTED and _least_p(rule, n) * len(exact) < alpha

    return {
        name: next(
            (
                n
                for n in range(2, MOST_SEEDS + 1)
                if all(can(rule, n) for rule in claim.parts.values() if rule.decides)
            ),
            MOST_SEEDS + 1,
        )
        for name, claim in claims.items()
    }


def detectable(n_seeds: int, n_claims: int, alpha: float = ALPHA) -> float:
    """How far a mean has to lie beyond its bound, in standard deviations of seeds, for a t-test
    among so many claims to find it with 80% power."""
    t = float(stats.t.isf(alpha / n_claims, n_seeds - 1))

    def misses(effect: float) -> float:
        return float(stats.nct.cdf(t, n_seeds - 1, effect * math.sqrt(n_seeds))) - 0.2

    return float(optimize.brentq(misses, 0.0, 1000.0))


def _least_p(rule: Part, n: int) -> float:
    """The p of n units that all agree, of a median or a share."""
    return least_sign_flip_p(n) if rule.centre == "median" else 2.0**-n


def _expected_p(rule: Part, estimate: Mapping[str, Any], n: int) -> float:
    """The p-value of n units as those seen: with medians and shares the least that n can have."""
    if rule.centre != "mean":
        return _least_p(rule, n)
    error = (estimate["sd"] or 1e-300) / math.sqrt(n)
    return max(
        float(stats.t.sf(sign * (estimate["value"] - null) / error, n - 1))
        for null, sign in _nulls(rule)
    )


def _expected(rule: Part, estimate: Mapping[str, Any], n: int, alpha: float) -> Estimate:
    """The interval that n units would give if their centre and spread were those seen."""
    value, sd = estimate["value"], estimate["sd"]
    if rule.centre == "share":
        return share_interval([value] * n, 1 - alpha)
    half = t_quantile(n, 1 - alpha) * sd / math.sqrt(n)
    return Estimate(seeds=n, value=value, low=value - half, high=value + half)


def compare(
    claim: Claim,
    values: Values,
    trials: pl.DataFrame,
    reference: str,
    alpha: float = ALPHA,
) -> dict[str, dict[str, dict[str, Any]]]:
    """By part and scheme: how far its runs lie above those of `reference`, paired, mean over seeds.

    `values` as the claim's measure gives them; `trials`: columns trial_key, scheme, corpus.subset,
    corpus.data_seed, seed. A pair has all of these in common but the scheme. Intervals are of
    1 - alpha. `p` is two-sided and uncorrected: Student's for means, by flipping signs for medians
    and shares, which come in steps.
    """
    pair = ["part", "seed", "corpus.subset", "corpus.data_seed"]
    placed = values.join(trials, on="trial_key").select("scheme", *pair, "value")
    base = placed.filter(scheme=reference).select(*pair, base="value")
    seeds = (
        placed.filter(pl.col("scheme") != reference)
        .join(base, on=pair)
        .group_by("part", "scheme", "seed")
        .agg(difference=(pl.col("value") - pl.col("base")).mean())
        .sort("part", "scheme", "seed")
    )
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (part, scheme), rows in seeds.group_by(["part", "scheme"], maintain_order=True):
        differences = rows["difference"].to_list()
        one_sided = t_p if claim.rule(str(part)).centre == "mean" else sign_flip_p
        p = 2 * min(one_sided(differences), one_sided([-value for value in differences]))
        estimate = {**mean_interval(differences, 1 - alpha), "p": min(1.0, p)}
        found.setdefault(str(part), {})[str(scheme)] = estimate
    return found
