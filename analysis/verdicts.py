"""From the numbers of runs to a verdict on each claim.

The units are seeds, and in general schemes as well: analysis.variance is the model. A claim is
judged both ways at once, for and against, and the chance that any verdict of a sweep is false is at
most alpha: over all claims, and over `supported` and `contradicted` together. Holm's procedure does
that. Most of the error rate goes first to the claims in power.HEADLINES. What a decided claim had
goes on to the others.

A run that diverged has no number, and may have diverged because its number was unusual. A verdict
therefore has to hold with and without these runs, each counted against it.
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
    """What runs say of one claim. Its fields are the keys of findings.json, in this order."""

    verdict: str
    verdict_of_finished: str  # without the runs that are counted against it
    course: str | None  # transient or reversed, for a claim that follows a number through training
    p: float | None  # two-sided: of the claim, or of its contrary; None if it is not measured
    p_holm: float | None = None  # p, adjusted for the number of claims (Holm)
    runs: int
    counted_against: int  # runs without a number: diverged, or of a configuration without results
    seeds: int
    schemes: int
    configurations: int
    undefined_in: tuple[str, ...]  # configurations whose finished runs lack a number
    parts: Mapping[str, PartFinding]
    forecast: Forecast | None = None
    depends_on: Mapping[str, Mapping[str, Sequence[str]]] | None = None
    """Where the verdict depends on a knob: by knob and verdict, the values of the knob."""

    @classmethod
    def without_numbers(cls, verdict: str) -> Finding:
        """Return the finding on a claim that was not judged."""
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
    """The rows of units that are counted against a verdict: the diverged runs, and all of a
    configuration that has no finished run, because nothing is known of it. Other runs are missing
    for reasons that have nothing to do with their numbers."""
    finished: Sequence[str]  # the configurations that have a finished run

    @classmethod
    def of(cls, trials: pl.DataFrame) -> Trials:
        """Add the columns of units that are not known to the trials that `judge` takes."""
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
    """Judge claims on some trials. They share one error rate.

    Args:
        claims: the claims, by name.
        values: by claim, the numbers that its measure gives. The numbers of other trials than those
            of `trials` are left out.
        trials: columns trial_key, status, config, seed. And, where they are known, init.scheme
            (without it each configuration is a scheme) and corpus.data_seed.
        general: whether schemes are units too. Without it, a verdict is about these configurations
            only.
        alpha: the error rate. Intervals are of 1 - alpha, and an adjusted p-value has to be below
            alpha.
        forecasts: whether to forecast the seeds that would decide each underpowered claim, which
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
    """Correct findings for their number (Holm) and give them their verdicts.

    Args:
        unadjusted: the findings that share one error rate.
        shares: the share of the error rate that each has at first.
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
    alpha: float  # what the claim has of the error rate, for both directions


def _verdicts(
    found: Mapping[Name, PValues | None], shares: Mapping[Name, float], alpha: float
) -> dict[Name, _Decision]:
    """Decide each claim that is measured."""
    known = {name: one for name, one in found.items() if one is not None}
    p_values, factors = holm(
        [one.two_sided for one in known.values()], [shares[name] for name in known]
    )
    # A claim that stays undecided is judged with the error rate that the decided ones have left.
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
    """Judge one claim, before the correction for the number of claims.

    All parts have to hold, so support has the largest of their p-values. One part is enough to
    contradict, so contradiction has the smallest, times the number of parts.
    """
    # Sorted, so that sums are added up in the same order whatever the order of runs.
    rows_of_trials = values.join(trials.units, on="trial_key").sort("part", "trial_key")
    against = trials.against
    parts: dict[str, PartFinding] = {}
    tested: list[tuple[PValues, PValues]] = []  # without and with the runs counted against it
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
        # Schemes are units of another kind: more seeds may not decide a claim in general.
        deciding=() if general else deciding_spreads,
    )


def _strict(
    rule: Part, rows: pl.DataFrame, against: pl.DataFrame, general: bool, of_finished: PValues
) -> PValues:
    """Return the p-values that also hold with runs counted against each sentence."""
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
    """Return the p-values of a claim from those of the parts that decide it.

    Returns:
        None where a part was not measured. Over bytes, for example, no token is rare.
    """
    if missing or not parts:
        return None
    return PValues(
        supported=max(part.supported for part in parts),
        contradicted=min(1.0, len(parts) * min(part.contradicted for part in parts)),
        not_supported=min(1.0, len(parts) * min(part.not_supported for part in parts)),
    )


def course(claim: Claim, rows: pl.DataFrame, general: bool, alpha: float) -> str | None:
    """Say what became of a number that was supported at some step of training.

    Each earlier step is compared with the last one, run by run. The error rate is divided by the
    number of earlier steps.

    Args:
        claim: its parts are the number at several steps.
        rows: columns part, scheme, config, seed, data_seed, value; parts in the order of names.
        general: whether schemes are units too.
        alpha: the error rate.

    Returns:
        `reversed` where the number is shown at an earlier step and its contrary at the last one,
        `transient` where it is shown at an earlier step and shown to be smaller at the last one,
        which does not show it. Else None.
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
    """Return the number that a run without one counts as.

    It is as far from the bound as any run is on the other side, or further.

    Args:
        rule: the rule of the part.
        seen: the numbers of runs.
        holds: whether it counts for the claim, or against it.
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
