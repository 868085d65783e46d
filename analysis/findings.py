"""Compute the findings of a sweep: all numbers and verdicts of a report.

The dataclasses here are the contents of findings.json. The fields of a dataclass are the keys of a
JSON object, in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from analysis.claims import CLAIMS
from analysis.depth_gradient import last_steps
from analysis.differences import Comparisons, comparisons
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
from analysis.rare_tokens import ORDERS
from analysis.runs import RunTables
from analysis.specifications import Curve, Specification, specifications
from analysis.stats import Estimate, mean_interval, median_interval, share_interval
from analysis.sweep_verdicts import ClaimFindings, claim_findings
from analysis.variance import over_units
from gptcore.config import Scalar, spelling, varying_knobs
from gptcore.records import PRIMARY
from gptcore.units import counted

UNPLANNED = (
    "These trials were judged while seeds were added. This report is not one of the planned "
    "interim analyses, so its verdicts use the error rate {:.2g} that the interim analyses leave."
)
PROVISIONAL = (
    "No interim analysis has been made yet. These verdicts are provisional. They use the error "
    "rate of the first interim analysis."
)


@dataclass(frozen=True, kw_only=True)
class MadeAnalysis(PlannedAnalysis):
    """An interim analysis, and the verdicts on the claims that it decided."""

    decided: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class InterimSummary:
    """The interim analyses of a sweep. Their findings are in ClaimFindings."""

    schedule: Sequence[PlannedAnalysis]
    made: Sequence[MadeAnalysis] = field(metadata={KEY: "taken"})
    undecided: Sequence[str] = field(metadata={KEY: "open"})
    not_waited_for: Sequence[str]


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
class CountedSpecifications:
    """The specifications of one claim, and the number of specifications with each verdict."""

    verdicts: Mapping[str, int]
    by_choice: Mapping[str, Mapping[str, Mapping[str, int]]]  # choice, option, verdict
    joint_p: float | None  # of one test of all specifications together
    all: Sequence[Specification]


RunRow = Mapping[str, Scalar | None]
"""One trial: trial_key, the knobs that vary, status, reason, and its main numbers."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The contents of findings.json."""

    sweep: str
    notes: Sequence[str]
    trials: Mapping[str, int]  # by status
    scope: Mapping[str, Sequence[str]]  # the values of the knobs that the verdicts are about
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
        sweep: the runs. The trials need the column of with_scheme.
        by_run: the statistics of the runs.
        values: the numbers of every claim, by the name of the claim.
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


LEAST_FALL = 0.15
"""A trial has hardly trained if its loss fell by less than this share of the first loss."""


def _hardly_trained(sweep: RunTables) -> list[str]:
    """Say which trials have hardly trained."""
    losses = (
        sweep.tables["training"]
        .sort("step", maintain_order=True)
        .group_by("trial_key", maintain_order=True)
        .agg(first=pl.col("loss").first(), last=pl.col("loss").last())
        .filter(pl.col("last") > (1 - LEAST_FALL) * pl.col("first"))
        .sort("trial_key")
    )
    if losses.is_empty():
        return []
    some = ", ".join(losses["trial_key"].head(5)) + (", ..." if losses.height > 5 else "")
    return [
        f"{counted(losses.height, 'trial')} hardly trained: the last loss is above "
        f"{1 - LEAST_FALL:.0%} of the first loss ({some}). Verdicts on such trials are about the "
        "start of training."
    ]


def _left_out(sweep: RunTables, of_figures: pl.DataFrame) -> list[str]:
    """Say which trials are missing from the report or from a figure, and why."""
    unreadable = sweep.trials.filter(status="unreadable").select("trial_key", "reason").rows()
    return [
        *(f"Trial {key} is left out: {why}." for key, why in unreadable),
        *(
            f"Trial {key} is left out of a figure: {why}."
            for key, why in of_figures.select("trial_key", "why").rows()
        ),
    ]


TEXT = "text"
SCOPE = {
    "corpus.name": TEXT,
    "model.d_model": "d_model",
    "model.n_layer": "n_layer",
    "optim.lr": "lr",
    "train.steps": "steps",
}
"""The knobs that say what the verdicts are about, and their names in the report."""


def scope(sweep: RunTables) -> dict[str, list[str]]:
    """Return the scope of the verdicts: text, sizes, learning rates and steps."""
    names = {name: sorted(sweep.trials[knob].unique()) for knob, name in SCOPE.items()}
    return {name: [spelling(value) for value in values] for name, values in names.items()}


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


def _counted(curve: Curve) -> CountedSpecifications:
    """Count the verdicts of all specifications, and for each option of each choice."""
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
    """List every trial of the plan with the knobs that vary, the status and the main numbers."""
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
    """Average a column over the runs of each seed, because these runs are not independent.

    Args:
        runs: columns seed, subset and `column`. Nulls are left out.
        column: the name of the column to average.

    Returns:
        One number for each seed.
    """
    known = runs.drop_nulls(column).select(
        "seed", config="subset", value=pl.col(column).cast(pl.Float64)
    )
    if known.is_empty():
        return []
    spread = over_units(known)
    units: list[float] = spread.units.tolist()
    return units if spread.error is not None else [spread.mean]
