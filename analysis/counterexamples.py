"""Search for configurations that contradict a claim: distances, and verdicts on fresh seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from analysis.claims import CLAIMS, Claim, Part
from analysis.decisions import ALPHA, CONTRADICTED, combined, only_bound
from analysis.jsonable import to_json
from analysis.part_verdicts import PartFinding, judge_part
from analysis.sentences import format_estimate
from gptcore.config import Scalar, spelling
from gptcore.files import JsonObject
from gptcore.units import counted

REFUTABLE = [name for name, claim in CLAIMS.items() if not claim.over_subsets]
"""The claims for which a single trial has a number."""


@dataclass(frozen=True)
class Counterexample:
    """A configuration that contradicted a claim on one seed, and its verdict on fresh ones."""

    trial_key: str  # the trial that contradicted the claim
    knobs: Mapping[str, Scalar]  # the knobs that were suggested for it
    distance: float  # of its number, as `distance` gives it, below 0
    seeds: int  # fresh seeds
    verdict: str
    parts: Mapping[str, PartFinding]

    def to_json(self) -> JsonObject:
        """Return the entry of search.json. There, all parts decide, and do not say so."""
        entry: JsonObject = to_json(self)
        for part in entry["parts"].values():
            del part["decides"]
        return entry


def judge_on_fresh_seeds(
    claim: Claim, numbers: Iterable[tuple[int, str, float]], configurations: int
) -> tuple[str, int, dict[str, PartFinding]]:
    """Judge a claim on fresh seeds of one configuration.

    The configuration was chosen by its first seed, so that seed cannot confirm the contradiction.
    The error rate is divided by the number of configurations that are tested again (Bonferroni).

    Args:
        claim: the claim that may be contradicted.
        numbers: (seed, part, value) of the finished trials, for parts that decide.
        configurations: how many configurations are tested again.

    Returns:
        The verdict, the number of seeds, and the finding on each part.
    """
    rows = pl.DataFrame(
        list(numbers), schema={"seed": pl.Int64, "part": pl.String, "value": pl.Float64},
        orient="row",
    ).with_columns(config=pl.lit(""), scheme=pl.lit(""), data_seed="seed")  # fmt: skip
    parts = {
        str(part): judge_part(claim.rule(str(part)), runs, False, ALPHA / configurations)
        for (part,), runs in rows.group_by("part", maintain_order=True)
    }
    verdict = combined([part.verdict for part in parts.values()])
    return verdict, rows["seed"].n_unique(), parts


def distance(rule: Part, value: float) -> float:
    """Return how far a run's number is from contradicting a rule; below 0, it contradicts."""
    if rule.low is not None and rule.high is not None:
        return min(value - rule.low, rule.high - value)
    bound, sign = only_bound(rule)
    return sign * (value - (bound if rule.against is None else rule.against))


def seeds_to_contradict(claim: str, alpha: float) -> int:
    """Return the smallest number of seeds that can contradict a claim, at an error rate alpha.

    It is the number at which a claim is contradicted if all seeds agree.
    """

    def least_p(rule: Part, n: int) -> float:
        if rule.centre == "mean":
            return 0.0
        bound, sign = only_bound(rule)
        against = bound if rule.against is None else rule.against
        share = against if sign < 0 else 1 - against
        return float(0.5**n if rule.centre == "median" else share**n)

    rules = [rule for rule in CLAIMS[claim].parts.values() if rule.decides]
    return next(
        n for n in itertools.count(2) if all(2 * least_p(rule, n) < alpha for rule in rules)
    )


def sentences(claim: str, finds: Sequence[Counterexample], tried: int, measured: int) -> list[str]:
    """Say what a search for counterexamples has found, as lines for the console.

    Args:
        claim: its name.
        finds: the configurations that contradicted the claim on one seed.
        tried: how many trials were tried.
        measured: how many of them had a number for the claim.
    """
    if not measured:
        of = counted(tried, "trial")
        return [f"{claim}: not measured, because none of {of} has the number for it"]
    shown = [
        f"  {find.verdict} on {find.seeds} fresh seeds: "
        + spelled(find.knobs)
        + "".join(f"; {part} {format_estimate(one.estimate)}" for part, one in find.parts.items())
        for find in finds
    ]
    counterexamples = sum(find.verdict == CONTRADICTED for find in finds)
    if counterexamples:
        found = counted(counterexamples, "counterexample")
        return [f"{claim}: {found} found in {counted(tried, 'trial')}", *shown]
    on_one_seed = f"; {len(finds)} contradicted it on one seed alone" if finds else ""
    return [f"{claim}: no counterexample found in {counted(tried, 'trial')}{on_one_seed}", *shown]


def spelled(knobs: Mapping[str, Scalar]) -> str:
    """Spell knobs for the console: `init.scheme normal, init.std 0.02`."""
    return ", ".join(f"{knob} {spelling(value)}" for knob, value in knobs.items())
