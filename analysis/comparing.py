"""Compare two sweeps: the verdicts of both, and the paired differences of their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from analysis.answers import in_matrix, must_be
from analysis.claim_table import COLUMNS, weakest_part
from analysis.claims import CLAIMS
from analysis.differences import Comparison, compare
from analysis.findings import Findings
from analysis.frames import trials_to_judge
from analysis.measures import Values
from analysis.runs import RunTables
from analysis.sentences import format_estimate
from analysis.stats import holm
from gptcore.config import KNOBS, spelling
from gptcore.units import counted


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One of two sweeps that are compared."""

    sweep: RunTables
    values: Mapping[str, Values]  # the numbers of every claim
    findings: Findings


@dataclass(frozen=True, kw_only=True)
class Row:
    """One claim in two sweeps."""

    claim: str
    part: str | None  # the number that is compared
    says: str
    must_be: str
    sides: Sequence[tuple[str, str]]  # the verdict and the number of each sweep
    difference: Comparison | None  # None if there are no pairs


def compare_sweeps(first: Side, second: Side) -> list[Row]:
    """Compare the verdicts and numbers of two sweeps, claim by claim.

    Two runs are a pair if scheme, seed, data seed and subset are the same. All other knobs may
    differ. The difference of a pair shows the effect of these knobs.
    """
    names = _names(first, second)
    trials = pl.concat(
        [_trials(side, name) for side, name in zip((first, second), names, strict=True)]
    )
    rows, differences = [], {}
    for name in in_matrix(list(CLAIMS)):
        here = [side.findings.claims.here[name] for side in (first, second)]
        part = weakest_part(here[0]) or weakest_part(here[1])
        numbers = [
            format_estimate(found.parts[part].estimate) if part and part in found.parts else "–"
            for found in here
        ]
        if part:
            values = pl.concat(
                [
                    side.values[name]
                    .filter(part=part)
                    .with_columns(trial_key=pl.format("{} {}", pl.lit(label), "trial_key"))
                    for side, label in zip((first, second), names, strict=True)
                ]
            )
            found = compare(CLAIMS[name], values, trials, names[0])
            if one := found.get(part, {}).get(names[1]):
                differences[name] = one
        rows.append(
            Row(
                claim=name,
                part=part,
                says=CLAIMS[name].says,
                must_be=must_be(name, part),
                sides=[(one.verdict, n) for one, n in zip(here, numbers, strict=True)],
                difference=None,
            )
        )
    adjusted = dict(zip(differences, holm([one.p for one in differences.values()])[0], strict=True))
    return [
        replace(row, difference=replace(differences[row.claim], p_holm=adjusted[row.claim]))
        if row.claim in differences
        else row
        for row in rows
    ]


def _names(first: Side, second: Side) -> tuple[str, str]:
    return first.sweep.name, second.sweep.name


def _trials(side: Side, name: str) -> pl.DataFrame:
    """Return the finished trials of a sweep for `compare`, with the sweep in place of the scheme.

    The column corpus.subset contains scheme and subset, so that both are the same in a pair.
    """
    finished = trials_to_judge(side.sweep).filter(status="finished")
    return finished.with_columns(
        pl.concat_str("init.scheme", "corpus.subset", separator=", ").alias("corpus.subset"),
        trial_key=pl.format("{} {}", pl.lit(name), "trial_key"),
        scheme=pl.lit(name),
    )


def say_difference(first: Side, second: Side) -> str:
    """Ask the question of a comparison, and name the knobs in which the sweeps differ."""
    names = _names(first, second)
    differ = []
    for knob in KNOBS:
        some, others = (
            sorted(side.sweep.trials[knob].unique().to_list()) for side in (first, second)
        )
        if some != others:
            here, there = (
                " and ".join(map(spelling, values)) if len(values) <= 6 else f"{len(values)} values"
                for values in (some, others)
            )
            differ.append(f"{knob} ({here}; {there})")
    if not differ:
        return f"{names[0]} and {names[1]} have the same knobs. Do they give the same verdicts?"
    which = f"Which verdicts of {names[0]} and {names[1]} differ?"
    return f"{which} The sweeps differ in {', '.join(differ)}."


def say_rows(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Say how many verdicts agree, and which numbers differ significantly."""
    same = sum(row.sides[0][0] == row.sides[1][0] for row in rows)
    paired = [row for row in rows if row.difference is not None]
    clear = [row for row in paired if row.difference and (row.difference.p_holm or 0) < 0.05]
    said = f"{same} of {counted(len(rows), 'claim')} have the same verdict in both sweeps."
    if not paired:
        return f"{said} There are no pairs of runs, so differences are not tested."
    which = ", ".join(row.claim for row in clear) or "none"
    return (
        f"{said} Of {counted(len(paired), 'paired number')}, these differ significantly between "
        f"{names[0]} and {names[1]}: {which}."
    )


def estimates_of(rows: Sequence[Row], first: Side, second: Side) -> pl.DataFrame:
    """Return the rows of fig_forest, with the sweeps in place of schemes."""
    found = []
    for row in rows:
        if row.part is None:
            continue
        rule = CLAIMS[row.claim].rule(row.part)
        for side in (first, second):
            finding = side.findings.claims.here[row.claim]
            if row.part in finding.parts:
                found.append(
                    {
                        "claim": row.claim, "part": row.part, "unit": CLAIMS[row.claim].unit,
                        "scheme": side.sweep.name, **vars(finding.parts[row.part].estimate),
                        "verdict": finding.verdict, "above": rule.low, "below": rule.high,
                        "against": rule.against,
                    }
                )  # fmt: skip
    left_out = ("decides", "claim_verdict")
    schema = {name: kind for name, kind in COLUMNS.items() if name not in left_out}
    return pl.DataFrame(found, schema=schema)
