"""Turn the numbers of runs into a verdict on each claim.

The independent units are seeds, and in general also schemes. The model is in analysis.variance.
Every claim is tested in both directions. The probability that any `supported` or `contradicted` of
a sweep is false is at most alpha, over all claims: Holm's procedure ensures this. At first, the
claims in power.HEADLINES have most of the error rate. The share of a decided claim goes to the
claims that are still undecided.

A run that diverged has no number. It may have diverged because its number was unusual. A verdict
therefore has to hold in two ways: without these runs, and with each of them counted against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import polars as pl

from analysis.claims import Claim, Part
from analysis.decisions import (
    ALPHA,
    CONTRADICTED,
    NOT_MEASURED,
    SUPPORTED,
    UNDERPOWERED,
    PValues,
    only_bound,
    p_values,
)
from analysis.measures import Values
from analysis.part_verdicts import PartFinding, judge_part, judge_units
from analysis.power import Forecast, forecast, shares_of_error
from analysis.stats import holm
from analysis.variance import (
    Spread,
    in_general,
    over_seeds,
    unit_columns,
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result for one claim. The fields are the keys of findings.json, in the same order."""

    verdict: str
    verdict_of_finished: str  # without the runs that are counted against it
    course: str | None  # transient or reversed; only for a claim about several steps of training
    p: float | None  # two-sided, not adjusted; None if the claim is not measured
    p_holm: float | None = None  # p, adjusted for the number of claims (Holm)
    runs: int
    counted_against: int  # diverged runs, and runs of configurations without a finished run
    seeds: int
    schemes: int
    configurations: int
    undefined_in: tuple[str, ...]  # configurations whose finished runs lack a number
    parts: Mapping[str, PartFinding]
    forecast: Forecast | None = None
    depends_on: Mapping[str, Mapping[str, Sequence[str]]] | None = None
    """If the verdict depends on a knob: by knob and verdict, the values of the knob."""

    @classmethod
    def without_numbers(cls, verdict: str) -> Finding:
        """Return the finding for a claim that was not judged."""
        return cls(
            verdict=verdict, verdict_of_finished=verdict, course=None, p=None, runs=0,
            counted_against=0, seeds=0, schemes=0, configurations=0, undefined_in=(), parts={},
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Unadjusted:
    """A finding before the correction for the number of claims."""

    finding: Finding
    tests: PValues | None  # None where the claim is not measured
    of_finished: PValues | None
    deciding: Sequence[tuple[Part, Spread]]  # the parts that decide, and their units


@dataclass(frozen=True, kw_only=True, eq=False)
class Trials:
    """The trials on which claims are judged."""

    units: pl.DataFrame  # trial_key, status, config, seed, init.scheme, scheme, data_seed
    against: pl.DataFrame
    """The rows of `units` that are counted against a verdict: the diverged runs, and all runs of a
    configuration without a finished run, about which nothing is known. Other missing runs are left
    out: the reason why they are missing is independent of their numbers."""
    finished: Sequence[str]  # the configurations that have a finished run

    @classmethod
    def of(cls, trials: pl.DataFrame) -> Trials:
        """Select the columns of `units`. A missing scheme or data seed gets a default."""
        columns: dict[str, pl.Expr] = {}
        if "init.scheme" not in trials.columns:
            columns["init.scheme"] = pl.col("config")
        if "corpus.data_seed" not in trials.columns:
            columns["corpus.data_seed"] = pl.lit(0)
        units = trials.with_columns(**columns).select(
            "trial_key", "status", "config", "seed", "init.scheme",
            scheme="init.scheme", data_seed="corpus.data_seed",
        )  # fmt: skip
        finished = (pl.col("status") == "finished").any().over("config")
        return cls(
            units=units,
            against=units.filter((pl.col("status") == "diverged") | ~finished),
            finished=units.filter(status="finished")["config"]
            .unique(maintain_order=True)
            .to_list(),
        )


def judge(
    claims: Mapping[str, Claim],
    values: Mapping[str, Values],
    trials: pl.DataFrame,
    general: bool = True,
    alpha: float = ALPHA,
    *,
    forecasts: bool = False,
) -> dict[str, Finding]:
    """Judge several claims that share one error rate.

    Args:
        claims: the claims, by name.
        values: the numbers of the measure of each claim, by the name of the claim. Numbers of
            trials that are not in `trials` are left out.
        trials: columns trial_key, status, config, seed. The columns init.scheme and
            corpus.data_seed are optional. Without init.scheme, each configuration is a scheme.
        general: whether schemes are units too. If not, the verdicts are about these configurations
            only.
        alpha: the error rate. Intervals have the level 1 - alpha. An adjusted p-value has to be
            below alpha.
        forecasts: whether to forecast how many seeds would decide each underpowered claim. This
            takes a third of the time.
    """
    judged = Trials.of(trials)
    unadjusted = {
        name: judge_one(claim, values[name], judged, general, alpha)
        for name, claim in claims.items()
    }
    return adjusted(unadjusted, shares_of_error(list(claims)), alpha, forecasts=forecasts)


Name = TypeVar("Name", str, tuple[str, str])
"""The name of a claim, or the value of a knob and the name of a claim."""


def adjusted(
    unadjusted: Mapping[Name, Unadjusted],
    shares: Mapping[Name, float],
    alpha: float,
    *,
    forecasts: bool = False,
) -> dict[Name, Finding]:
    """Adjust the p-values of findings for their number (Holm), and decide the verdicts.

    Args:
        unadjusted: the findings that share one error rate.
        shares: the share of the error rate that each finding has at first.
        alpha: the error rate.
        forecasts: as for judge.
    """
    strict = _verdicts({name: one.tests for name, one in unadjusted.items()}, shares, alpha)
    mild = _verdicts({name: one.of_finished for name, one in unadjusted.items()}, shares, alpha)
    findings = {}
    for name, one in unadjusted.items():
        found = one.finding
        if name in strict:
            found = replace(
                found,
                verdict=strict[name].verdict,
                verdict_of_finished=mild[name].verdict,
                p_holm=strict[name].p,
            )
            if forecasts and found.verdict == UNDERPOWERED and one.deciding:
                found = replace(found, forecast=forecast(one.deciding, strict[name].alpha))
        findings[name] = found
    return findings


@dataclass(frozen=True)
class _Decision:
    verdict: str
    p: float  # two-sided, adjusted
    alpha: float  # the error rate of this claim, for both directions together


def _verdicts(
    found: Mapping[Name, PValues | None], shares: Mapping[Name, float], alpha: float
) -> dict[Name, _Decision]:
    """Decide each claim that is measured."""
    known = {name: one for name, one in found.items() if one is not None}
    p_values, factors = holm(
        [one.two_sided for one in known.values()], [shares[name] for name in known]
    )
    # An undecided claim is judged at the error rate that remains after the decided claims.
    left = sum(shares[name] for name, p in zip(known, p_values, strict=True) if p >= alpha)
    verdicts = {}
    for (name, one), p, factor in zip(known.items(), p_values, factors, strict=True):
        decided = p < alpha
        factor = factor if decided else left / shares[name]
        verdict = one.verdict(factor, alpha, decided=decided)
        verdicts[name] = _Decision(verdict, p, alpha / factor)
    return verdicts


def judge_one(
    claim: Claim, values: Values, trials: Trials, general: bool, alpha: float
) -> Unadjusted:
    """Judge one claim, without the correction for the number of claims.

    A claim is supported if all its parts hold. Its p-value for support is therefore the largest of
    the parts. One part is enough to contradict a claim. The p-value for contradiction is therefore
    the smallest of the parts, times the number of parts.
    """
    # Sorted, so that rounding does not depend on the order of the runs.
    rows_of_trials = values.join(trials.units, on="trial_key").sort("part", "trial_key")
    against = trials.against
    parts: dict[str, PartFinding] = {}
    tested: list[tuple[PValues, PValues]] = []  # without and with the runs that count against it
    deciding_spreads: list[tuple[Part, Spread]] = []
    defined: set[str] = set()  # configurations with a number for some part that decides
    for (part,), rows in rows_of_trials.group_by("part", maintain_order=True):
        rule = claim.rule(str(part))
        spread, found = judge_units(rule, rows, general, alpha)
        parts[str(part)] = found
        if rule.decides:
            deciding_spreads.append((rule, spread))
            of_finished = _tests_of(found)
            tested.append((of_finished, _strict(rule, rows, against, general, of_finished)))
            defined |= set(rows["config"])
    missing = any(
        part != "*" and rule.decides and part not in parts for part, rule in claim.parts.items()
    )
    deciding = [part for part in parts.values() if part.decides]
    strict = _of_claim([one for _, one in tested], missing)
    rows = rows_of_trials
    return Unadjusted(
        finding=Finding(
            verdict=NOT_MEASURED,
            verdict_of_finished=NOT_MEASURED,
            course=course(claim, rows, general, alpha) if claim.course else None,
            p=strict.two_sided if strict else None,
            runs=rows["trial_key"].n_unique(),
            counted_against=len(against),
            seeds=max((part.estimate.seeds for part in deciding), default=0),
            schemes=rows["init.scheme"].n_unique(),
            configurations=max((part.configurations for part in deciding), default=0),
            undefined_in=tuple(one for one in trials.finished if one not in defined)
            if parts
            else (),
            parts=parts,
        ),
        tests=strict,
        of_finished=_of_claim([one for one, _ in tested], missing),
        # No forecast in general: more seeds do not add schemes, so they may not decide the claim.
        deciding=() if general else deciding_spreads,
    )


def _strict(
    rule: Part, rows: pl.DataFrame, against: pl.DataFrame, general: bool, of_finished: PValues
) -> PValues:
    """Return the larger p-values: without the runs of `against`, or with each counted against."""
    if against.is_empty():
        return of_finished
    worst = of_finished
    columns = ["scheme", "config", "seed", "data_seed", "value"]
    for holds in (False, True):
        counted = against.with_columns(value=pl.lit(extreme(rule, rows["value"], holds=holds)))
        runs = pl.concat([rows.select(columns), counted.select(columns)])
        units = unit_columns(runs)
        spread = in_general(runs, units) if general else over_seeds(runs, units)
        found = p_values(rule, spread, "mean" if general else None)
        if holds:
            found = replace(found, supported=of_finished.supported)
        else:
            found = replace(
                found,
                contradicted=of_finished.contradicted,
                not_supported=of_finished.not_supported,
            )
        worst = worst.worst(found)
    return worst


def _tests_of(part: PartFinding) -> PValues:
    return PValues(
        supported=part.supported_p,
        contradicted=part.contradicted_p,
        not_supported=part.not_supported_p,
    )


def _of_claim(parts: Sequence[PValues], missing: bool) -> PValues | None:
    """Combine the p-values of the parts that decide a claim.

    Returns:
        None if a part was not measured. For example, no byte of a text is rare.
    """
    if missing or not parts:
        return None
    return PValues(
        supported=max(part.supported for part in parts),
        contradicted=min(1.0, len(parts) * min(part.contradicted for part in parts)),
        not_supported=min(1.0, len(parts) * min(part.not_supported for part in parts)),
    )


def course(claim: Claim, rows: pl.DataFrame, general: bool, alpha: float) -> str | None:
    """Say whether an effect that was there at some step of training is gone or reversed at the end.

    The last step is compared with each earlier one, run by run. The error rate is divided by the
    number of earlier steps.

    Args:
        claim: a claim whose parts are one number at several steps.
        rows: columns part, scheme, config, seed, data_seed, value; sorted by part.
        general: whether schemes are units too.
        alpha: the error rate.

    Returns:
        `reversed` if an earlier step supports the claim and the last step contradicts it.
        `transient` if an earlier step supports the claim, the last step does not, and the number is
        shown to have become smaller in between. Otherwise None.
    """
    last = next((part for part in rows["part"].unique() if str(part).endswith("last step")), None)
    earlier = [part for part in rows["part"].unique().sort() if part != last]
    if last is None or not earlier:
        return None
    share = alpha / len(earlier)
    at_end = rows.filter(part=last)
    end = judge_part(claim.rule(last), at_end, general, alpha)
    if end.verdict == SUPPORTED:
        return None
    _, sign = only_bound(claim.rule(last))
    run = ["config", "seed", "data_seed"]
    for part in earlier:
        before = rows.filter(part=part)
        if judge_part(claim.rule(part), before, general, share).verdict != SUPPORTED:
            continue
        if end.verdict == CONTRADICTED:
            return "reversed"
        pairs = before.join(at_end.select(*run, end="value"), on=run)
        fall = pairs.with_columns(value=sign * (pl.col("value") - pl.col("end")))
        if fall.is_empty():
            continue
        falls = judge_part(Part(centre="mean", low=0.0), fall, general, share)
        if falls.verdict == SUPPORTED:
            return "transient"
    return None


def extreme(rule: Part, seen: pl.Series, *, holds: bool) -> float:
    """Return the number that is filled in for a run without a number.

    On one side of the bound, the number is at least as far away as any run is on the other side.

    Args:
        rule: the rule of the part.
        seen: the numbers of the other runs.
        holds: whether the number counts for the claim. If not, it counts against the claim.
    """
    if rule.centre == "share":
        return float(holds == (rule.low is not None))
    if rule.low is not None and rule.high is not None:
        return (rule.low + rule.high) / 2 if holds else 2 * rule.high - rule.low
    bound, sign = only_bound(rule)
    if holds and rule.against is not None:
        bound = rule.against
    distances = [sign * (float(value) - bound) for value in seen]
    if holds:
        return bound + sign * max(abs(min(distances)), max(distances))
    return bound + sign * min(-abs(max(distances)), min(distances))
