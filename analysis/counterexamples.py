"""Searching for a configuration in which a claim does not hold: distances, and what was found."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.claims import CLAIMS, Claim, Part
from analysis.findings import format_estimate
from analysis.verdicts import ALPHA, CONTRADICTED, INTERVALS, combined, decide, judge_part
from gptcore.config import Scalar, spelling

REFUTABLE = [name for name, claim in CLAIMS.items() if not claim.over_subsets]
"""The claims that one trial alone has a number for."""


@dataclass(frozen=True)
class Counterexample:
    """A configuration that contradicted a claim on one seed, and its verdict on fresh ones."""

    trial_key: str  # of the trial that contradicted the claim
    knobs: Mapping[str, Scalar]  # what was suggested for it
    distance: float  # of its number from contradicting the claim, below 0
    seeds: int  # fresh ones
    verdict: str
    parts: Mapping[str, Any]  # as judge_part gives them


def judge_on_fresh_seeds(
    claim: Claim, numbers: Iterable[tuple[int, str, float]], configurations: int
) -> tuple[str, int, dict[str, Any]]:
    """Judge a claim on fresh seeds of one configuration.

    On the seed for which it was chosen a configuration confirms nothing. The level is divided by
    the number of configurations that are tried again (Bonferroni).

    Args:
        claim: what is to be contradicted.
        numbers: (seed, part, value) of the finished trials.
        configurations: how many are tried again.

    Returns:
        The verdict, the number of seeds, and the finding on each part.
    """
    by_part = defaultdict(list)
    for seed, part, value in numbers:
        by_part[part].append((seed, "", value))
    parts = {
        part: judge_part(claim.rule(part), runs, False, ALPHA / configurations)
        for part, runs in by_part.items()
    }
    verdict = combined([part["verdict"] for part in parts.values() if part])
    return verdict, len({seed for runs in by_part.values() for seed, *_ in runs}), parts


def distance(rule: Part, value: float) -> float:
    """How far a run's number lies from where it would contradict the claim; beyond, below 0."""
    if rule.low is not None and rule.high is not None:
        return min(value - rule.low, rule.high - value)
    bound, sign = (rule.low, 1) if rule.low is not None else (rule.high, -1)
    assert bound is not None
    return sign * (value - (bound if rule.against is None else rule.against))


def seeds_to_contradict(claim: str, alpha: float) -> int:
    """The fewest seeds that can contradict a claim at the level alpha, where all agree on it."""

    def can(rule: Part, n: int) -> bool:
        found = INTERVALS[rule.centre]([0.0] * n, 1 - alpha)
        # Of a mean or median it does not matter what is known without doubt.
        known = found["low"] is not None
        return decide(rule, found) == CONTRADICTED if rule.centre == "share" else known

    rules = [rule for rule in CLAIMS[claim].parts.values() if rule.decides]
    return next(n for n in itertools.count(2) if all(can(rule, n) for rule in rules))


def sentences(claim: str, finds: Sequence[Counterexample], tried: int, measured: int) -> list[str]:
    """Say what a search for counterexamples came to; `measured` trials had the claim's number."""
    if not measured:
        return [f"{claim}: not measured, for none of {tried} trials has the number for it"]
    shown = [
        f"  {find.verdict} on {find.seeds} fresh seeds: "
        + spelled(find.knobs)
        + "".join(
            f"; {part} {format_estimate(one['estimate'])}"
            for part, one in find.parts.items()
            if one
        )
        for find in finds
    ]
    counterexamples = sum(find.verdict == CONTRADICTED for find in finds)
    if counterexamples:
        return [f"{claim}: {counterexamples} counterexamples found in {tried} trials", *shown]
    looked = f", {len(finds)} looked contrary on one seed" if finds else ""
    return [f"{claim}: no counterexample found in {tried} trials{looked}", *shown]


def spelled(knobs: Mapping[str, Scalar]) -> str:
    """Return `init.scheme normal, init.std 0.02`."""
    return ", ".join(f"{knob} {spelling(value)}" for knob, value in knobs.items())
