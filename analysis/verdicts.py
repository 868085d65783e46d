"""From the numbers of runs to a verdict on each claim.

The units are seeds. Runs of one seed start from the same weights, so their numbers are averaged
first. A verdict over seeds is about the configurations that were run.

Whether a claim holds in general also depends on which configurations were run. For that,
configurations are a second kind of unit: each is averaged over its seeds, and the variances of both
kinds are added. Seeds and configurations are crossed, so an interval over one kind alone is too
narrow. A bootstrap of the few configurations of a sweep is too narrow as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import TypeVar

import polars as pl
from scipy import stats

from analysis.claims import Claim, Part
from analysis.decisions import (
    ALPHA,
    CONTRADICTED,
    INTERVALS,
    NOT_MEASURED,
    SUPPORTED,
    UNDERPOWERED,
    combined,
    decide,
    only_bound,
    p_value,
)
from analysis.measures import Values
from analysis.power import seeds_needed
from analysis.stats import Estimate, SpreadEstimate, holm, mean_interval, sign_flip_p, t_p

Run = tuple[int, str, float]
"""The seed, the configuration and the number of one run."""
Unit = TypeVar("Unit", int, str)
"""The name of a unit: a seed, or a configuration."""


@dataclass(frozen=True, kw_only=True)
class PartFinding:
    """What runs say of one part of a claim."""

    over_configs: SpreadEstimate | None  # None where configurations are no unit
    configurations: int
    seeds_left_out: int  # seeds that not every configuration has
    over_seeds: SpreadEstimate
    estimate: Estimate  # over all units: this interval decides
    p: float
    verdict: str
    decides: bool  # as the part's rule says


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What runs say of one claim. Its fields are the keys of findings.json, in this order."""

    verdict: str
    verdict_with_diverged: str  # with diverged runs counted against the claim
    course: str | None  # transient or reversed, for a claim that follows a number through training
    p: float | None  # None where the claim is not measured
    p_with_diverged: float | None
    runs: int
    diverged: int
    seeds: int
    seeds_left_out: int
    configurations: int
    parts: Mapping[str, PartFinding]
    p_holm: float | None = None  # p, adjusted for the number of claims (Holm)
    p_holm_with_diverged: float | None = None
    seeds_needed: int | None = None  # how many seeds would decide an underpowered claim
    would_be: str | None = None  # the verdict that so many seeds would give


@dataclass(frozen=True, kw_only=True)
class Comparison(Estimate):
    """A mean difference between two schemes, with its two-sided p-value."""

    p: float
    p_holm: float | None = None  # p, adjusted for the number of differences (Holm)


def judge(
    claims: Mapping[str, Claim],
    values: Mapping[str, Values],
    trials: pl.DataFrame,
    general: bool = True,
    alpha: float = ALPHA,
) -> dict[str, Finding]:
    """Judge claims on some trials.

    A diverged trial has no number: each claim also gets a verdict that counts such trials against
    it. `supported` is corrected for the number of claims (Holm).

    Args:
        claims: the claims, by name.
        values: by claim, the numbers that its measure gives. The numbers of other trials than those
            of `trials` are left out.
        trials: columns trial_key, status, config, seed.
        general: whether configurations are units too. Without it, a verdict is about these
            configurations only.
        alpha: the error rate. Intervals are of 1 - alpha, and an adjusted p-value has to be below
            alpha.
    """
    judged = {
        name: _judge_one(claims[name], values[name], trials, general, alpha) for name in claims
    }
    adjusted = _adjusted({name: found.p for name, found in judged.items()})
    adjusted_worst = _adjusted({name: found.p_with_diverged for name, found in judged.items()})
    for name, found in judged.items():
        p_holm, p_worst = adjusted.get(name), adjusted_worst.get(name)
        found = replace(
            found,
            p_holm=p_holm,
            p_holm_with_diverged=p_worst,
            verdict=_corrected(found.verdict, p_holm, alpha),
            verdict_with_diverged=_corrected(found.verdict_with_diverged, p_worst, alpha),
        )
        if found.verdict == UNDERPOWERED and not general:
            deciding = {name: part.over_seeds for name, part in found.parts.items() if part.decides}
            needed, would_be = seeds_needed(claims[name], deciding, len(adjusted_worst), alpha)
            found = replace(found, seeds_needed=needed, would_be=would_be)
        judged[name] = found
    return judged


def _adjusted(p_values: Mapping[str, float | None]) -> dict[str, float]:
    """Adjust p-values for their number (Holm). Leave out those that are None."""
    known = {name: p for name, p in p_values.items() if p is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))


def _corrected(verdict: str, p_holm: float | None, alpha: float) -> str:
    """Turn `supported` into `underpowered` where the adjusted p-value is not below alpha."""
    if verdict != SUPPORTED:
        return verdict
    assert p_holm is not None
    return SUPPORTED if p_holm < alpha else UNDERPOWERED


def _judge_one(
    claim: Claim, values: Values, trials: pl.DataFrame, general: bool, alpha: float
) -> Finding:
    """Judge one claim, before the correction for the number of claims."""
    # Sorted, so that sums are added up in the same order whatever the order of runs.
    rows_of_trials = values.join(trials, on="trial_key").sort("part", "trial_key")
    diverged = trials.filter(status="diverged").select("seed", "config").rows()
    parts: dict[str, PartFinding] = {}
    worst: list[PartFinding] = []
    for (part,), rows in rows_of_trials.group_by("part", maintain_order=True):
        rule = claim.rule(str(part))
        runs: list[Run] = rows.select("seed", "config", "value").rows()
        found = judge_part(rule, runs, general, alpha)
        if found is None:
            continue
        parts[str(part)] = found
        if rule.decides:
            adverse = _adverse(rule, [value for *_, value in runs])
            against = [(seed, config, adverse) for seed, config in diverged]
            worst.append(judge_part(rule, runs + against, general, alpha) or found)
    deciding = [part for part in parts.values() if part.decides]
    # A claim with a part that was not measured is not decided by the other parts. Over bytes, for
    # example, no token is rare.
    missing = [
        NOT_MEASURED
        for part, rule in claim.parts.items()
        if part != "*" and rule.decides and part not in parts
    ]
    return Finding(
        verdict=combined([part.verdict for part in deciding] + missing),
        verdict_with_diverged=combined([part.verdict for part in worst] + missing),
        course=course(list(parts.values())) if claim.course else None,
        p=None if missing else max((part.p for part in deciding), default=None),
        p_with_diverged=None if missing else max((part.p for part in worst), default=None),
        runs=rows_of_trials["trial_key"].n_unique(),
        diverged=len(diverged),
        seeds=max((part.over_seeds.seeds for part in deciding), default=0),
        seeds_left_out=max((part.seeds_left_out for part in deciding), default=0),
        configurations=max((part.configurations for part in deciding), default=0),
        parts=parts,
    )


def judge_part(
    rule: Part, runs: Sequence[Run], general: bool, alpha: float = ALPHA
) -> PartFinding | None:
    """Judge one part of a claim, before the correction for the number of claims.

    A seed that not every configuration has is left out: its mean would be over other configurations
    than the means of the other seeds.

    Args:
        rule: the rule of the part.
        runs: the numbers of runs.
        general: whether configurations are units too, where there are several.
        alpha: the error rate. Intervals are of 1 - alpha.

    Returns:
        None where no seed remains.
    """
    configs_of: defaultdict[int, set[str]] = defaultdict(set)
    for seed, config, _ in runs:
        configs_of[seed].add(config)
    configs = set().union(*configs_of.values())
    complete = [run for run in runs if configs_of[run[0]] == configs]
    if not complete:
        return None
    seeds = _unit_means([(seed, value) for seed, _, value in complete])
    over_seeds, over_configs = _over_units(rule, seeds, alpha), None
    p = p_value(rule, seeds)
    if general and len(configs) >= 2:
        means = _unit_means([(config, value) for _, config, value in complete])
        over_configs = _over_units(rule, means, alpha)
        p = added_p([p, p_value(rule, means)])
    estimate = added([over_seeds, *([over_configs] if over_configs else [])], rule.centre)
    return PartFinding(
        over_configs=over_configs,
        configurations=len(configs),
        seeds_left_out=sum(some != configs for some in configs_of.values()),
        over_seeds=over_seeds,
        estimate=estimate,
        p=p,
        verdict=decide(rule, estimate),
        decides=rule.decides,
    )


def _unit_means(values: Sequence[tuple[Unit, float]]) -> list[float]:
    """Average (unit, value) pairs over each unit. Return the means in the order of units."""
    by_unit: defaultdict[Unit, list[float]] = defaultdict(list)
    for unit, value in values:
        by_unit[unit].append(value)
    return [fmean(by_unit[unit]) for unit in sorted(by_unit)]


def _over_units(rule: Part, means: Sequence[float], alpha: float) -> SpreadEstimate:
    """Estimate the centre of a rule over the means of units."""
    found = INTERVALS[rule.centre](means, 1 - alpha)
    return SpreadEstimate(**vars(found), sd=stdev(means) if len(means) > 1 else None)


def added(estimates: Sequence[Estimate], centre: str) -> Estimate:
    """Combine intervals over several kinds of crossed units into one.

    The squares of the distances from the value to the ends add up, separately for each side, as
    variances do (Zou & Donner 2008, *Construction of confidence limits about effect measures*).

    Args:
        estimates: one for each kind of unit. The result has the value of the first.
        centre: mean, median or share. The interval of a share stays between 0 and 1.
    """
    first = estimates[0]
    value = first.value
    if value is None or any(estimate.low is None for estimate in estimates):
        return Estimate(seeds=first.seeds, value=value, low=None, high=None)
    low = value - math.hypot(*(max(0.0, value - (one.low or 0.0)) for one in estimates))
    high = value + math.hypot(*(max(0.0, (one.high or 0.0) - value) for one in estimates))
    if centre == "share":
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(seeds=first.seeds, value=value, low=low, high=high)


def added_p(p_values: Sequence[float]) -> float:
    """Combine one-sided p-values over several kinds of crossed units into one.

    Each p-value is turned into a normal score, which is an effect over its standard error. The
    variances of the kinds of units add up.
    """
    scores = [float(stats.norm.isf(p)) for p in p_values]
    if min(scores) <= 0:
        return max(p_values)
    spread = math.sqrt(sum(score**-2 for score in scores))
    return float(stats.norm.sf(1 / spread)) if spread else 0.0


def course(parts: Sequence[PartFinding]) -> str | None:
    """Say what became of a number that was supported at some step of training.

    Args:
        parts: the number at several steps, in the order of steps.

    Returns:
        `reversed` where the interval has the other sign at the last step, `transient` where it
        contains 0 at the last step, else None.
    """
    if not parts:
        return None
    *earlier, last = parts
    if SUPPORTED not in [part.verdict for part in earlier] or last.verdict == SUPPORTED:
        return None
    if last.verdict == CONTRADICTED:
        return "reversed"
    return None if last.estimate.low is None else "transient"


def _adverse(rule: Part, values: Sequence[float]) -> float:
    """Return the number that a diverged run counts as.

    It is as far against the claim as any run is for it, or further.
    """
    if rule.centre == "share":
        return 0.0
    if rule.low is not None and rule.high is not None:
        return 2 * rule.high - rule.low
    bound, sign = only_bound(rule)
    seen = [sign * (value - bound) for value in values]
    return bound + sign * min(-abs(max(seen)), min(seen))


def compare(
    claim: Claim,
    values: Values,
    trials: pl.DataFrame,
    reference: str,
    alpha: float = ALPHA,
) -> dict[str, dict[str, Comparison]]:
    """Compare the numbers of a claim between schemes, in pairs of runs.

    The two runs of a pair have the same seed, subset and order of data. The p-value is Student's
    for a mean. Medians and shares come in steps, so theirs is that of the sign-flip test.

    Args:
        claim: the claim.
        values: the numbers that its measure gives.
        trials: columns trial_key, scheme, corpus.subset, corpus.data_seed, seed.
        reference: the scheme that the others are compared with.
        alpha: the error rate. Intervals are of 1 - alpha.

    Returns:
        By part and scheme, the mean over seeds of the scheme's number minus that of the reference.
        The p-values are not yet adjusted.
    """
    pair = ["part", "seed", "corpus.subset", "corpus.data_seed"]
    rows_of_trials = values.join(trials, on="trial_key").select("scheme", *pair, "value")
    base = rows_of_trials.filter(scheme=reference).select(*pair, base="value")
    seeds = (
        rows_of_trials.filter(pl.col("scheme") != reference)
        .join(base, on=pair)
        .group_by("part", "scheme", "seed")
        .agg(difference=(pl.col("value") - pl.col("base")).mean())
        .sort("part", "scheme", "seed")
    )
    found: dict[str, dict[str, Comparison]] = {}
    for (part, scheme), rows in seeds.group_by(["part", "scheme"], maintain_order=True):
        differences = rows["difference"].to_list()
        one_sided = t_p if claim.rule(str(part)).centre == "mean" else sign_flip_p
        p = 2 * min(one_sided(differences), one_sided([-value for value in differences]))
        estimate = mean_interval(differences, 1 - alpha)
        comparison = Comparison(**vars(estimate), p=min(1.0, p))
        found.setdefault(str(part), {})[str(scheme)] = comparison
    return found
