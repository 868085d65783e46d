"""Interim analyses: judge a growing sweep several times, with one error rate over all analyses.

A sweep with --until-decided gets seeds until its claims are decided. It is judged several times,
and each time can give a false verdict. The error rate of each analysis is fixed before the first
trial, by a spending function of the share of finished seeds. An analysis spends the increase of the
function since the previous analysis (Lan & DeMets 1983, *Discrete sequential boundaries for
clinical trials*). The function approximates the boundaries of Pocock (1977, *Group sequential
methods in the design and analysis of clinical trials*). Pocock found that more than five analyses
hardly save more trials.

The alpha of an analysis is what it spends. The probability of any false verdict is then at most the
sum of all alphas. This holds for every test, and for Holm's correction over claims. It is
conservative, because the analyses of one sweep share their seeds, and often err together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlflow.entities import Run

from analysis.claims import CLAIMS, digest
from analysis.decisions import ALPHA, NOT_MEASURED, UNDERPOWERED, VERDICTS
from analysis.jsonable import KEY, from_json, to_json
from analysis.power import least_seeds
from analysis.runs import RunTables
from analysis.verdicts import Finding
from gptcore.files import JsonObject
from tracking.places import damaged_file
from tracking.store import Store
from tracking.untrusted import is_plain, one_line

INTERIM_FILE = "looks.json"
MAX_ANALYSES = 5


@dataclass(frozen=True, kw_only=True)
class PlannedAnalysis:
    """One interim analysis of a schedule."""

    seeds: int  # of each configuration
    alpha: float  # the error rate that it spends


@dataclass(frozen=True, kw_only=True)
class InterimAnalysis(PlannedAnalysis):
    """An interim analysis that was made."""

    decided: tuple[str, ...]  # claims
    findings: Mapping[str, Finding]  # for every claim that was undecided before


@dataclass(frozen=True, kw_only=True)
class InterimFinding(Finding):
    """A finding, and the interim analysis that made it."""

    analysis: int = field(metadata={KEY: "look"})  # the number of the analysis, from 1
    alpha: float


@dataclass(frozen=True, kw_only=True)
class InterimPlan:
    """The past and the future interim analyses of a sweep. It is stored as looks.json."""

    seeds: tuple[int, ...]  # in the order in which they are added
    trials: tuple[str, ...]  # keys of all trials that the sweep may get
    claims_digest: str
    asked: tuple[str, ...]  # claims; if empty, all claims
    waits_for: tuple[str, ...]  # the claims that have to be decided
    schedule: tuple[PlannedAnalysis, ...]
    made: tuple[InterimAnalysis, ...] = field(default=(), metadata={KEY: "looks"})

    @classmethod
    def from_json(cls, stored: JsonObject) -> InterimPlan:
        """Read a plan that was written by to_json.

        Raises:
            ValueError: this is not a plan, or the plan contradicts itself.
        """
        plan = from_json(cls, stored)
        is_ours, before = plan.claims_digest == digest(plan.asked), set[str]()
        if not plan.schedule or len(plan.made) > len(plan.schedule):
            raise ValueError("there are more analyses than planned, or none is planned")
        for planned in (*plan.schedule, *plan.made):
            if not (0 < planned.alpha <= ALPHA and 0 < planned.seeds <= len(plan.seeds)):
                raise ValueError("an analysis has an impossible alpha or number of seeds")
        for one in plan.made:
            # Claims of another version are not looked up.
            is_whole = not is_ours or one.findings.keys() == set(plan.asked or CLAIMS) - before
            if not is_whole or not set(one.decided) <= one.findings.keys():
                raise ValueError("an analysis lacks the finding for an undecided claim")
            before |= set(one.decided)
            for name, found in one.findings.items():
                said = {found.verdict, found.verdict_of_finished}
                said |= {found.forecast.would_be} if found.forecast else set()
                said |= {part.verdict for part in found.parts.values()}
                has_rules = not is_ours or all(map(CLAIMS[name].has_part, found.parts))
                labels = [*found.undefined_in, *(why for one in found.parts.values() for why in
                          [*one.doubts, *one.variance])]  # fmt: skip
                is_shown = all(map(is_plain, [name, found.course or "", *found.parts, *labels]))
                if not (said <= set(VERDICTS) and has_rules and is_shown):
                    raise ValueError(f"the finding for {one_line(name)} is impossible")
        if is_ours and not set(plan.waits_for) <= CLAIMS.keys():
            raise ValueError("it waits for claims that do not exist")
        return plan

    def to_json(self) -> JsonObject:
        """Return the contents of looks.json."""
        stored: JsonObject = to_json(self)
        return stored

    @property
    def is_over(self) -> bool:
        """Whether the analyses are over: no claim is undecided, or no analysis is left."""
        return not self.undecided() or len(self.made) == len(self.schedule)

    def with_findings(self, found: Mapping[str, Finding]) -> InterimPlan:
        """Return a plan in which the next analysis has been made.

        A claim that was decided before keeps its verdict, because its error rate is spent.

        Args:
            found: the findings of verdicts.judge at the alpha of the next analysis, by claim.
        """
        before = {name for analysis in self.made for name in analysis.decided}
        findings = {name: one for name, one in found.items() if name not in before}
        planned = self.schedule[len(self.made)]
        made = InterimAnalysis(
            seeds=planned.seeds,
            alpha=planned.alpha,
            decided=tuple(
                name
                for name, one in findings.items()
                if one.verdict not in (UNDERPOWERED, NOT_MEASURED)
            ),
            findings=findings,
        )
        return replace(self, made=(*self.made, made))

    def current_findings(self) -> dict[str, InterimFinding]:
        """Return the finding for each claim: the deciding one, or else the latest one.

        The result is empty before the first analysis.
        """
        return {
            name: InterimFinding(**vars(found), analysis=number, alpha=analysis.alpha)
            for number, analysis in enumerate(self.made, 1)
            for name, found in analysis.findings.items()
        }

    def undecided(self) -> list[str]:
        """Return the claims of `waits_for` that are still underpowered."""
        current = self.current_findings()
        return [
            name for name in self.waits_for if not current or current[name].verdict == UNDERPOWERED
        ]


def plan_interim(
    seeds: Sequence[int], first_seeds: int, trials: Sequence[str], asked: Sequence[str] = ()
) -> InterimPlan:
    """Plan the interim analyses of a sweep before its first trial.

    Args:
        seeds: all seeds that a configuration may get, in the order in which they are added.
        first_seeds: the number of seeds before --until-decided adds more.
        trials: the keys of all trials that the sweep may get.
        asked: the names of the claims. Without names, all claims.
    """
    return InterimPlan(
        seeds=tuple(seeds),
        trials=tuple(sorted(trials)),
        claims_digest=digest(asked),
        asked=tuple(asked),
        waits_for=tuple(sorted(supportable(len(seeds), ALPHA, asked))),
        schedule=schedule(first_seeds, len(seeds), asked),
    )


def spent(share: float) -> float:
    """Return the part of ALPHA that is spent when this share of all seeds is finished.

    The spending function is alpha_3* of Lan & DeMets (1983).
    """
    return ALPHA * math.log1p((math.e - 1) * share)


def supportable(seeds: int, alpha: float, asked: Sequence[str] = ()) -> set[str]:
    """Return the asked claims that this number of seeds can support at the error rate alpha."""
    claims = {name: CLAIMS[name] for name in CLAIMS if not asked or name in asked}
    return {name for name, least in least_seeds(claims, alpha).items() if least <= seeds}


def schedule(
    first_seeds: int, max_seeds: int, asked: Sequence[str] = ()
) -> tuple[PlannedAnalysis, ...]:
    """Choose the number of seeds and the alpha of each interim analysis.

    The first analysis has at least `first_seeds`. It has the smallest number of seeds that can
    support every claim that `max_seeds` can support. An earlier analysis would spend a part of the
    error rate, but could not end the sweep. The last analysis has `max_seeds`. Up to three more are
    evenly spaced in between, if each of them can support all of these claims.
    """
    wanted = supportable(max_seeds, ALPHA, asked)
    first = next(
        n
        for n in range(first_seeds, max_seeds + 1)
        if wanted <= supportable(n, spent(n / max_seeds), asked)
    )
    schedules = (_evenly_spaced(first, max_seeds, n) for n in range(MAX_ANALYSES, 1, -1))
    return next(
        planned
        for planned in schedules
        if all(wanted <= supportable(one.seeds, one.alpha, asked) for one in planned[:-1])
    )


def _evenly_spaced(first: int, last: int, n_analyses: int) -> tuple[PlannedAnalysis, ...]:
    """Plan analyses at evenly spaced numbers of seeds. Equal numbers are planned once."""
    steps = range(n_analyses)
    sizes = sorted({round(first + (last - first) * step / (n_analyses - 1)) for step in steps})
    return tuple(
        PlannedAnalysis(seeds=n, alpha=spent(n / last) - spent(previous / last))
        for previous, n in zip([0, *sizes], sizes, strict=False)
    )


def remaining_alpha(plans: Sequence[InterimPlan]) -> float:
    """Return the alpha for all other verdicts on the runs of some sweeps.

    For one sweep it is the alpha of the last analysis. For several sweeps, the shares of ALPHA are
    multiplied. The sum over all analyses at which the sweeps could have ended is then at most
    ALPHA. Without interim analyses, the result is ALPHA.
    """
    alphas = [plan.schedule[max(0, len(plan.made) - 1)].alpha for plan in plans]
    if not alphas:
        return ALPHA
    first, *others = alphas
    return first * math.prod(alpha / ALPHA for alpha in others)


def find_sweep(store: Store, name: str) -> Run | None:
    """Return the run that records a sweep. None if there is no such sweep."""
    if not store.address.exists:
        return None
    store.open()
    return store.sweep_runs().get(name)


def read_interim_plan(store: Store, sweep_run: Run) -> InterimPlan | None:
    """Read the interim analyses of a sweep. None if the sweep has none."""
    if "until_decided" not in sweep_run.data.tags:
        return None
    stored = store.read_json(sweep_run, INTERIM_FILE)
    try:
        if isinstance(stored, dict) and stored.get("claims_digest") != digest(
            stored.get("asked", ())
        ):
            stored = _without_findings(stored)
        return InterimPlan.from_json(stored)
    except ValueError as error:
        raise damaged_file(Path(INTERIM_FILE), error) from error


def interim_plans(sweep: RunTables) -> list[InterimPlan]:
    """Read the interim analyses of all sweeps in a report."""
    plans = (read_interim_plan(sweep.store, run) for run in sweep.sweep_runs)
    return [plan for plan in plans if plan]


def own_plan(sweep: RunTables, plans: Sequence[InterimPlan]) -> InterimPlan | None:
    """Return the interim plan whose findings hold for these runs.

    There is one only for a single sweep with interim analyses, with all trials, without shuffled
    labels, and with the claims that were fixed before the first trial. Otherwise None.
    """
    is_one = len(sweep.sweep_runs) == len(plans) == 1
    is_whole = bool(sweep.stamps)
    return (
        plans[0] if is_one and is_whole and plans[0].claims_digest == digest(sweep.asked) else None
    )


def _without_findings(stored: JsonObject) -> JsonObject:
    """Remove the findings of an older version, in which findings had other fields.

    The seeds and the alphas of the analyses stay.
    """
    looks = [{**look, "decided": [], "findings": {}} for look in stored.get("looks", [])]
    return {"asked": [], **stored, "looks": looks, "waits_for": []}
