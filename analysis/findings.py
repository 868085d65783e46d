"""From runs to findings: all numbers and verdicts of a report.

The dataclasses here are the contents of findings.json: their fields are its keys, in their order.
This is one file so that findings.json is described in one place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import polars as pl

from analysis.claims import CLAIMS, Claim, digest
from analysis.decisions import ALPHA, CONTRADICTED, DEPENDS, NOT_ASKED, SUPPORTED
from analysis.depth_gradient import last_steps
from analysis.frames import RunFrames, trials_to_judge
from analysis.interim import (
    InterimPlan,
    PlannedAnalysis,
    interim_plans,
    own_plan,
    remaining_alpha,
)
from analysis.jsonable import FLAT, KEY
from analysis.measures import Values
from analysis.power import shares_of_error
from analysis.rare_tokens import ORDERS
from analysis.runs import RunTables
from analysis.specifications import Curve, Specification, specifications
from analysis.stats import Estimate, holm, mean_interval, median_interval, share_interval
from analysis.variance import over_units
from analysis.verdicts import Comparison, Finding, Trials, adjusted, compare, judge, judge_one
from gptcore.config import Scalar, spelling, varying_knobs
from gptcore.records import PRIMARY
from gptcore.units import counted

UNPLANNED = (
    "These trials were judged while seeds were added, and this report is none of the planned "
    "interim analyses: every verdict is at the error rate {:.2g} that those leave for it."
)
PROVISIONAL = (
    "No interim analysis has been made yet: these verdicts are provisional, at the error rate of "
    "the first one."
)


@dataclass(frozen=True, kw_only=True)
class MadeAnalysis(PlannedAnalysis):
    """An interim analysis, and the verdicts on the claims that it decided."""

    decided: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class InterimSummary:
    """The interim analyses of a sweep, without their findings, which are among the claims'."""

    schedule: Sequence[PlannedAnalysis]
    made: Sequence[MadeAnalysis] = field(metadata={KEY: "taken"})
    undecided: Sequence[str] = field(metadata={KEY: "open"})
    not_waited_for: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class ClaimFindings:
    """The verdicts on all claims, for a sweep, in general, and for the parts of the sweep."""

    digest: str
    standing: str  # confirmatory, exploratory, or confirmatory for some of the trials
    exploratory_trials: Sequence[str]  # keys of trials that were planned in view of results
    alpha: float
    asked: Sequence[str]  # claims
    here: Mapping[str, Finding]  # over seeds
    in_general: Mapping[str, Finding] | None  # over seeds and schemes
    by: Mapping[str, Mapping[str, Mapping[str, Finding]]]  # knob, its value, claim


@dataclass(frozen=True, kw_only=True)
class DepthFinding:
    """The gradient over depth in the runs of one scheme."""

    runs: int
    tau: Estimate
    tau_of_runs: Mapping[str, float | None]  # by trial key
    first_layer_widest: Estimate
    widest_layer_of_runs: Mapping[str, int]  # layer: number of runs
    median_growth_by_layer: Sequence[float]
    median_growth: Estimate


@dataclass(frozen=True, kw_only=True)
class TokenFinding:
    """The changes of token groups in the runs of one scheme."""

    runs: int
    measured_on: Mapping[str, str]
    groups: Mapping[str, Mapping[str, Estimate]]  # group, column of group_changes
    change_by_subset: Mapping[str, Mapping[str, Estimate]]  # subset, group
    orders: Mapping[str, Estimate] = field(metadata=FLAT)  # by name in ORDERS, a share of runs


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """The differences of all schemes from the first one."""

    reference: str
    claims: Mapping[str, Mapping[str, Mapping[str, Comparison]]]  # claim, part, scheme


@dataclass(frozen=True, kw_only=True)
class CountedSpecifications:
    """The specifications of one claim, and how many have which verdict."""

    verdicts: Mapping[str, int]
    by_choice: Mapping[str, Mapping[str, Mapping[str, int]]]  # choice, option, verdict
    joint_p: float | None  # how often they would agree so well by chance, all together
    all: Sequence[Specification]


RunRow = Mapping[str, Scalar | None]
"""One trial: trial_key, the knobs that vary, status, reason, and its main numbers."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The contents of findings.json."""

    sweep: str
    notes: Sequence[str]
    trials: Mapping[str, int]  # by status
    scope: Mapping[str, Sequence[str]]  # what the verdicts are about: by knob, its values
    interim: InterimSummary | None = field(metadata={KEY: "looks"})
    claims: ClaimFindings
    depth_gradient: Mapping[str, DepthFinding]  # by scheme
    rare_tokens: Mapping[str, TokenFinding]  # by scheme
    comparisons: Comparisons | None
    specifications: Mapping[str, CountedSpecifications]  # by claim
    runs: Sequence[RunRow]


def find(sweep: RunTables, by_run: RunFrames, values: Mapping[str, Values]) -> Findings:
    """Compute the findings of a sweep.

    Args:
        sweep: the runs; its trials have the column of with_scheme.
        by_run: their statistics.
        values: the numbers of every claim.
    """
    counts = Counter(sweep.trials["status"])
    ended = {status: counts[status] for status in ("finished", "diverged", "failed", "unreadable")}
    schemes = sweep.trials["scheme"].unique(maintain_order=True)
    plans = interim_plans(sweep)
    own, alpha = own_plan(sweep, plans), remaining_alpha(plans)
    notes = list(sweep.notes)
    if plans and own is None:
        notes.append(UNPLANNED.format(alpha))
    if own and not own.made:
        notes.append(PROVISIONAL)
    return Findings(
        sweep=sweep.name,
        notes=[*notes, *_hardly_trained(sweep), *_left_out(sweep, by_run.left_out)],
        trials={**ended, "unfinished": len(sweep.trials) - sum(ended.values())},
        scope=scope(sweep),
        interim=_summary(own) if own else None,
        claims=claim_findings(sweep, values, own, alpha),
        depth_gradient={scheme: _depth_finding(by_run, scheme) for scheme in schemes},
        rare_tokens={scheme: _token_finding(by_run, scheme) for scheme in schemes},
        comparisons=comparisons(sweep, values, alpha),
        specifications={
            claim: _counted(curve)
            for claim, curve in specifications(sweep, trials_to_judge(sweep), alpha).items()
        },
        runs=runs(sweep, by_run),
    )


HARDLY = 0.15
"""A trial has hardly trained if its loss has fallen by less than this share of the first loss."""


def _hardly_trained(sweep: RunTables) -> list[str]:
    """Say which trials have hardly trained: what they show is about the start of training."""
    losses = (
        sweep.tables["training"]
        .sort("step", maintain_order=True)
        .group_by("trial_key", maintain_order=True)
        .agg(first=pl.col("loss").first(), last=pl.col("loss").last())
        .filter(pl.col("last") > (1 - HARDLY) * pl.col("first"))
        .sort("trial_key")
    )
    if losses.is_empty():
        return []
    some = ", ".join(losses["trial_key"].head(5)) + (", ..." if losses.height > 5 else "")
    return [
        f"{counted(losses.height, 'trial')} hardly trained: the last loss is above "
        f"{1 - HARDLY:.0%} of the first one ({some}). They show the start of training."
    ]


def _left_out(sweep: RunTables, of_figures: pl.DataFrame) -> list[str]:
    """Say which trials are left out of the report or of a figure, and why."""
    unreadable = sweep.trials.filter(status="unreadable").select("trial_key", "reason").rows()
    return [
        *(f"Trial {key} is left out: {why}." for key, why in unreadable),
        *(
            f"Trial {key} is left out of a figure: {why}."
            for key, why in of_figures.select("trial_key", "why").rows()
        ),
    ]


MOST_FORECAST = 24
"""With more schemes, the verdicts of each have no forecast: forecasts take most of the time."""
TEXT = "text"
SCOPE = {
    "corpus.name": TEXT,
    "model.d_model": "d_model",
    "model.n_layer": "n_layer",
    "optim.lr": "lr",
    "train.steps": "steps",
}
"""The knobs that say what any verdict is about, and what each is called."""


def scope(sweep: RunTables) -> dict[str, list[str]]:
    """Return what the verdicts of a sweep are about: sizes, learning rates, steps and text."""
    names = {name: sorted(sweep.trials[knob].unique()) for knob, name in SCOPE.items()}
    return {name: [spelling(value) for value in values] for name, values in names.items()}


def measured(sweep: RunTables) -> dict[str, Values]:
    """Measure the numbers of every claim."""
    return {name: claim.measure(sweep) for name, claim in CLAIMS.items()}


def judge_sweep(sweep: RunTables, alpha: float) -> dict[str, Finding]:
    """Judge the claims that a sweep asks for its configurations, at an error rate alpha."""
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
    """Judge every claim for a sweep, in general, and for the parts of the sweep.

    The parts are the values of scheme, subset and optimiser, where they vary. In a part a claim is
    tested only if the part has all the numbers that the sweep has. Each of these tables has an
    error rate of its own, alpha over all its verdicts.

    Args:
        sweep: the runs.
        values: the numbers of every claim.
        plan: the interim analyses of the sweep, if any. What they have found takes the place of new
            findings for these configurations.
        alpha: the error rate of everything else.
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
    """Judge claims for each value of a knob. All these verdicts share one error rate.

    Returns:
        By value of the knob and by claim.
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
    """Return a finding on a whole sweep, or that the verdict depends on a knob.

    It does where the claim is supported for one value of the knob and contradicted for another.
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
    """Add a finding on each claim that was not asked."""
    return {name: found.get(name) or Finding.without_numbers(NOT_ASKED) for name in CLAIMS}


def _summary(plan: InterimPlan) -> InterimSummary:
    return InterimSummary(
        schedule=plan.schedule,
        made=[
            MadeAnalysis(
                seeds=one.seeds,
                alpha=one.alpha,
                decided={name: one.findings[name].verdict for name in one.decided},
            )
            for one in plan.made
        ],
        undecided=plan.undecided(),
        not_waited_for=[name for name in CLAIMS if name not in plan.waits_for],
    )


def comparisons(
    sweep: RunTables, values: Mapping[str, Values], alpha: float = ALPHA
) -> Comparisons | None:
    """Compare every claim's numbers under each scheme with those under the first scheme.

    The p-values are adjusted for the number of all differences (Holm).

    Returns:
        None where there is one scheme.
    """
    trials = trials_to_judge(sweep).filter(status="finished")
    reference = str(trials["scheme"].first())
    if trials["scheme"].n_unique() < 2:
        return None
    found = {
        name: compare(CLAIMS[name], numbers, trials, reference, alpha)
        for name, numbers in values.items()
    }
    p_values = [
        one.p for parts in found.values() for schemes in parts.values() for one in schemes.values()
    ]
    p_holm = iter(holm(p_values)[0])
    return Comparisons(
        reference=reference,
        claims={
            name: {
                part: {scheme: replace(one, p_holm=next(p_holm)) for scheme, one in some.items()}
                for part, some in parts.items()
            }
            for name, parts in found.items()
            if parts
        },
    )


def _counted(curve: Curve) -> CountedSpecifications:
    """Count the verdicts of specifications: of all, and of each option of each choice."""
    every = curve.all
    choices = list(every[0].choices) if every else []
    options = {choice: dict.fromkeys(one.choices[choice] for one in every) for choice in choices}
    return CountedSpecifications(
        verdicts=Counter(one.verdict for one in every),
        by_choice={
            choice: {
                option: Counter(one.verdict for one in every if one.choices[choice] == option)
                for option in options[choice]
            }
            for choice in choices
        },
        joint_p=curve.joint_p,
        all=every,
    )


def runs(sweep: RunTables, by_run: RunFrames) -> list[RunRow]:
    """List every trial of the plan: its knobs that vary, how it ended, and its main numbers."""
    losses = (
        sweep.tables["training"]
        .group_by("trial_key")
        .agg(last_loss=pl.col("loss").sort_by("step").last())
    )
    tau = by_run.depth_gradient.select("trial_key", "tau", "widest_layer")
    knobs = varying_knobs(sweep.trials.to_dicts())
    rows: list[RunRow] = []
    rows += (
        sweep.trials.select("trial_key", *knobs, "status", "reason")
        .join(losses, on="trial_key", how="left", maintain_order="left")
        .join(tau, on="trial_key", how="left", maintain_order="left")
        .to_dicts()
    )
    return rows


def _depth_finding(by_run: RunFrames, scheme: str) -> DepthFinding:
    runs = by_run.depth_gradient.filter(pl.col("scheme") == scheme)
    growth = last_steps(by_run.layer_growth.filter(pl.col("scheme") == scheme))
    by_layer = growth.group_by("layer").agg(pl.col("growth").median()).sort("layer")
    widest = Counter(runs["widest_layer"])
    return DepthFinding(
        runs=runs.height,
        tau=median_interval(of_seeds(runs, "tau")),
        tau_of_runs=dict(zip(runs["trial_key"], runs["tau"], strict=True)),
        first_layer_widest=share_interval(
            of_seeds(runs.with_columns(first=pl.col("widest_layer") == 0), "first")
        ),
        widest_layer_of_runs={str(layer): widest[layer] for layer in sorted(widest)},
        median_growth_by_layer=by_layer["growth"].to_list(),
        median_growth=median_interval(of_seeds(runs, "median_growth")),
    )


def _token_finding(by_run: RunFrames, scheme: str) -> TokenFinding:
    changes = by_run.group_changes.filter(pl.col("scheme") == scheme)
    orders = by_run.group_orders.filter(pl.col("scheme") == scheme)
    groups = by_run.group_changes["group"].unique(maintain_order=True)
    columns = ("start", "end", "change", "logit_change", "log_z_change", "excess")

    def mean_of(rows: pl.DataFrame, group: str, column: str) -> Estimate:
        return mean_interval(of_seeds(rows.filter(pl.col("group") == group), column))

    return TokenFinding(
        runs=orders.height,
        measured_on=PRIMARY,
        groups={
            group: {column: mean_of(changes, group, column) for column in columns}
            for group in groups
        },
        change_by_subset={
            str(subset): {group: mean_of(rows, group, "change") for group in groups}
            for (subset,), rows in changes.group_by("subset", maintain_order=True)
        },
        orders={name: share_interval(of_seeds(orders, name)) for name in ORDERS},
    )


def of_seeds(runs: pl.DataFrame, column: str) -> list[float]:
    """Return one number for each seed, because the runs of a seed are not independent.

    Args:
        runs: columns seed, subset and the column that is averaged. Nulls are left out.
        column: the name of that column.
    """
    known = runs.drop_nulls(column).select(
        "seed", config="subset", value=pl.col(column).cast(pl.Float64)
    )
    if known.is_empty():
        return []
    spread = over_units(known)
    units: list[float] = spread.units.tolist()
    return units if spread.error is not None else [spread.mean]
