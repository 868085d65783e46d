"""Looking at a sweep again and again while it grows, at an error rate that holds over all looks.

A sweep that gets seeds until its claims are decided is judged several times, and may err each time.
What every look may spend of the error is fixed beforehand: what a spending function of the share of
seeds that are there grows by since the look before (Lan & DeMets 1983, *Discrete sequential
boundaries for clinical trials*). The function is theirs after Pocock (1977, *Group sequential
methods in the design and analysis of clinical trials*), who found that five looks give most of what
looking can save. A look is judged at the level of what it spends: then the chance that any errs is
at most the sum, for every kind of test, and for Holm's correction over claims too. That is
conservative: looks at the same growing seeds often err together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.claims import CLAIMS, digest
from analysis.runs import RunTables
from analysis.verdicts import ALPHA, NOT_MEASURED, UNDERPOWERED, least_seeds

MOST_LOOKS = 5

Record = Mapping[str, Any]
"""What a sweep keeps of its looks, as JSON: `seeds` in the order in which they are added, the keys
of all `trials` that these may lead to, `claims_digest`, the claims that it `waits_for`, the
`schedule`, and of each of the `looks` taken its seeds, its level alpha, the claims `decided` there,
and the `findings` (as verdicts.judge) on every claim that was open until then."""


def spent(share: float) -> float:
    """How much of ALPHA is spent where this share of all seeds is there: Lan & DeMets' alpha_3*."""
    return ALPHA * math.log1p((math.e - 1) * share)


def supportable(seeds: int, alpha: float) -> set[str]:
    """The claims that so many seeds can support at this level."""
    return {name for name, least in least_seeds(CLAIMS, alpha).items() if least <= seeds}


def schedule(given: int, most: int) -> list[dict[str, Any]]:
    """Of each look the number of seeds and its level alpha; the last has `most` seeds.

    The first has the fewest, but no fewer than `given` (from 1 to `most`), that can support every
    claim that `most` seeds can: one before it could end no sweep in which the claims hold, and
    would only spend error. Up to three more lie evenly between, as many as can each support all of
    these.
    """
    wanted = supportable(most, ALPHA)
    first = next(n for n in range(given, most + 1) if wanted <= supportable(n, spent(n / most)))
    return next(
        looks
        for looks in (_evenly(first, most, n_looks) for n_looks in range(MOST_LOOKS, 1, -1))
        if all(wanted <= supportable(look["seeds"], look["alpha"]) for look in looks[:-1])
    )


def _evenly(first: int, most: int, n_looks: int) -> list[dict[str, Any]]:
    steps = range(n_looks)
    sizes = sorted({round(first + (most - first) * step / (n_looks - 1)) for step in steps})
    before = [0, *sizes]
    return [
        {"seeds": n, "alpha": spent(n / most) - spent(previous / most)}
        for previous, n in zip(before, sizes, strict=False)
    ]


def plan_looks(seeds: Sequence[int], given: int, trials: Sequence[str]) -> dict[str, Any]:
    """The Record of a sweep before its first trial; `given` of the seeds were asked for by name."""
    return {
        "seeds": list(seeds),
        "trials": sorted(trials),
        "claims_digest": digest(),
        "waits_for": sorted(supportable(len(seeds), ALPHA)),
        "schedule": schedule(given, len(seeds)),
        "looks": [],
    }


def take(record: Record, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The record with its next look, which found this (as verdicts.judge) at its level.

    A claim that was decided before keeps its verdict: its error is spent.
    """
    before = {name for look in record["looks"] for name in look["decided"]}
    findings = {name: one for name, one in found.items() if name not in before}
    look = {
        **record["schedule"][len(record["looks"])],
        "decided": [
            name
            for name, one in findings.items()
            if one["verdict"] not in (UNDERPOWERED, NOT_MEASURED)
        ],
        "findings": findings,
    }
    return {**record, "looks": [*record["looks"], look]}


def standing(record: Record) -> dict[str, dict[str, Any]]:
    """The finding that stands on each claim, with the number and level of its look: that of the
    look which decided it, of an open claim the last one. Empty before the first look."""
    return {
        name: {**found, "look": number, "alpha": look["alpha"]}
        for number, look in enumerate(record["looks"], 1)
        for name, found in look["findings"].items()
    }


def waiting(record: Record) -> list[str]:
    """The claims that keep the sweep going: all it waits for that are underpowered so far."""
    stands = standing(record)
    return [
        name
        for name in record["waits_for"]
        if not stands or stands[name]["verdict"] == UNDERPOWERED
    ]


def is_over(record: Record) -> bool:
    """Whether no look is to come: nothing is waited for, or all were taken."""
    return not waiting(record) or len(record["looks"]) == len(record["schedule"])


def level(records: Sequence[Record]) -> float:
    """The level at which anything else may be judged on the runs of sweeps with looks: what the
    last look of each has spent, the shares of several multiplied; ALPHA where there are none.

    The sum over all looks at which the sweeps might have ended is then at most ALPHA.
    """
    alphas = [record["schedule"][max(0, len(record["looks"]) - 1)]["alpha"] for record in records]
    if not alphas:
        return ALPHA
    first, *others = alphas
    return float(first * math.prod(alpha / ALPHA for alpha in others))


def own_record(sweep: RunTables) -> Record | None:
    """The record whose verdicts are this sweep's: where it is one sweep with looks, whole and not
    shuffled, and its claims are as they were before its first trial."""
    is_one = len(sweep.commands) == len(sweep.looks) == 1
    return sweep.looks[0] if is_one and sweep.claims_digest == digest() else None
