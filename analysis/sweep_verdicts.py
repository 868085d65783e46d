"""Judge the claims of a sweep: for its configurations, in general, and by the values of a knob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from analysis.claims import CLAIMS, Claim, digest
from analysis.decisions import ALPHA, CONTRADICTED, DEPENDS, NOT_ASKED, SUPPORTED
from analysis.frames import trials_to_judge
from analysis.interim import InterimPlan
from analysis.measures import Values
from analysis.power import shares_of_error
from analysis.runs import RunTables
from analysis.verdicts import Finding, Trials, adjusted, judge, judge_one

MOST_FORECAST = 24
"""With more schemes than this, verdicts by scheme have no forecast, because forecasts are slow."""


@dataclass(frozen=True, kw_only=True)
class ClaimFindings:
    """The verdicts on all claims: for a sweep, in general, and for each value of some knobs."""

    digest: str
    standing: str  # confirmatory, exploratory, or confirmatory for some trials
    exploratory_trials: Sequence[str]  # keys of trials that were planned after a result was seen
    alpha: float
    asked: Sequence[str]  # the names of the claims that the sweep asks
    here: Mapping[str, Finding]  # over seeds
    in_general: Mapping[str, Finding] | None  # over seeds and schemes; None if there is one scheme
    by: Mapping[str, Mapping[str, Mapping[str, Finding]]]  # knob, its value, claim


def measured(sweep: RunTables) -> dict[str, Values]:
    """Measure the numbers of every claim."""
    return {name: claim.measure(sweep) for name, claim in CLAIMS.items()}


def judge_sweep(sweep: RunTables, alpha: float) -> dict[str, Finding]:
    """Judge the claims that a sweep asks, for its own configurations, at the error rate alpha."""
    claims = {name: CLAIMS[name] for name in asked_of(sweep)}
    values = {name: claim.measure(sweep) for name, claim in claims.items()}
    trials = trials_to_judge(sweep)
    return judge(claims, values, trials, general=False, alpha=alpha, forecasts=True)


def asked_of(sweep: RunTables) -> list[str]:
    """Return the claims that a sweep asks, in the order of CLAIMS."""
    return [name for name in CLAIMS if not sweep.asked or name in sweep.asked]


def claim_findings(
    sweep: RunTables,
    values: Mapping[str, Values],
    plan: InterimPlan | None = None,
    alpha: float = ALPHA,
) -> ClaimFindings:
    """Judge every claim for the configurations of a sweep, in general, and by knob.

    The knobs are scheme, subset and optimiser, as far as they vary. For one value of a knob, a
    claim is tested only if these trials have all the numbers that the sweep has. The verdicts by
    one knob share an error rate alpha, and so do the verdicts in general.

    Args:
        sweep: the runs.
        values: the numbers of every claim, by the name of the claim.
        plan: the interim analyses of the sweep, if any. Their findings then count for the
            configurations of the sweep, and no new ones are made.
        alpha: the error rate of all other verdicts.
    """
    trials, asked = trials_to_judge(sweep), asked_of(sweep)
    claims = {name: CLAIMS[name] for name in asked}
    by = {
        knob: judge_by(knob, claims, values, trials, alpha)
        for knob in ("scheme", "corpus.subset", "optim.name")
        if trials[knob].n_unique() > 1
    }
    current: Mapping[str, Finding] = plan.current_findings() if plan else {}
    here = current or judge(claims, values, trials, general=False, alpha=alpha, forecasts=True)
    general = (
        judge(claims, values, trials, alpha=alpha) if trials["init.scheme"].n_unique() > 1 else None
    )
    ended = trials.filter(status="finished")["trial_key"]
    current_digest = digest(sweep.asked)
    seen = [key for key in ended if sweep.stamps.get(key) != current_digest]
    return ClaimFindings(
        digest=current_digest,
        standing="confirmatory"
        if not seen
        else "exploratory"
        if len(seen) == len(ended)
        else f"confirmatory for {len(ended) - len(seen)} of {len(ended)} trials",
        exploratory_trials=seen,
        alpha=alpha,
        asked=asked,
        here=with_not_asked({name: _pooled(found, name, by) for name, found in here.items()}),
        in_general=with_not_asked(general) if general else None,
        by={
            knob: {label: with_not_asked(found) for label, found in labels.items()}
            for knob, labels in by.items()
        },
    )


def judge_by(
    knob: str,
    claims: Mapping[str, Claim],
    values: Mapping[str, Values],
    trials: pl.DataFrame,
    alpha: float,
) -> dict[str, dict[str, Finding]]:
    """Judge claims for each value of a knob. All of these verdicts share one error rate.

    Returns:
        The findings, by the value of the knob and the name of the claim.
    """
    labels = [str(label) for label in trials[knob].unique(maintain_order=True)]
    unadjusted = {}
    for label in labels:
        some = trials.filter(pl.col(knob).cast(pl.String) == label)
        judged = Trials.of(some)
        for name, claim in claims.items():
            numbers = values[name]
            if _parts_of(numbers.join(some, on="trial_key")) != _parts_of(numbers):
                numbers = numbers.head(0)
            unadjusted[label, name] = judge_one(claim, numbers, judged, False, alpha)
    shares = shares_of_error(list(claims))
    found = adjusted(
        unadjusted,
        {(label, name): shares[name] / len(labels) for label, name in unadjusted},
        alpha,
        forecasts=len(labels) <= MOST_FORECAST,
    )
    return {label: {name: found[label, name] for name in claims} for label in labels}


def _parts_of(values: Values) -> set[str]:
    return set(values["part"])


def _pooled(
    found: Finding, claim: str, by: Mapping[str, Mapping[str, Mapping[str, Finding]]]
) -> Finding:
    """Return the finding for all trials together, or the verdict DEPENDS.

    A verdict depends on a knob if one value supports the claim and another value contradicts it.
    """
    for knob, labels in by.items():
        sides = {
            verdict: [label for label, some in labels.items() if some[claim].verdict == verdict]
            for verdict in (SUPPORTED, CONTRADICTED)
        }
        if all(sides.values()):
            return replace(found, verdict=DEPENDS, depends_on={knob: sides}, forecast=None)
    return found


def with_not_asked(found: Mapping[str, Finding]) -> dict[str, Finding]:
    """Add a finding for each claim that was not asked."""
    return {name: found.get(name) or Finding.without_numbers(NOT_ASKED) for name in CLAIMS}
