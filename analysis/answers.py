"""The first screen of a report: what was asked, what came out, and the matrix of verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import polars as pl

from analysis.claim_table import ALL, agree, weakest_part
from analysis.claims import CLAIMS
from analysis.decisions import (
    CONTRADICTED,
    DEPENDS,
    NOT_ASKED,
    NOT_MEASURED,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDERPOWERED,
    VERDICTS,
)
from analysis.findings import TEXT, Findings
from analysis.frames import RunFrames
from analysis.power import HEADLINES
from analysis.runs import RunTables
from analysis.sentences import (
    format_estimate,
    named,
    rule_in_words,
    say_dependence,
    say_forecast,
)
from analysis.verdicts import Finding
from gptcore.config import spelling
from gptcore.units import counted

SYMBOLS = {
    SUPPORTED: "✓", CONTRADICTED: "✗", DEPENDS: "≷", NOT_SUPPORTED: "−", UNDERPOWERED: "?",
    NOT_MEASURED: "·", NOT_ASKED: "",
}  # fmt: skip
MOST_NAMED = 8
"""No sentence names more schemes; more are counted."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One verdict in the matrix of the first screen."""

    verdict: str
    symbol: str
    effect: str  # the number of the part that is furthest from support
    told: str  # all that is known, in a sentence
    seeds: str  # the seeds that would decide it, that it is a mean of schemes, or nothing


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """The verdicts on one claim: of all schemes together, and of each scheme."""

    name: str
    says: str
    must_be: str
    differs: str  # where the verdict depends on a knob other than the scheme, both sides
    pooled: Cell  # of all schemes together
    depends_on: str  # the knobs on which the verdict depends, if any
    schemes: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The verdicts of a sweep: claims by schemes."""

    schemes: Sequence[str]  # the columns; none where the sweep has one scheme
    left_out: int  # schemes for which the page has no space; the files have them
    rows: Sequence[MatrixRow]


def question(sweep: RunTables, findings: Findings) -> str:
    """Say what a sweep asked: the claims, how its trials were trained, and what varied."""
    asked = findings.claims.asked
    few = len(asked) <= 3
    claims = (
        "Does this hold"
        if len(asked) == 1
        else "Do these hold"
        if few
        else f"Which of {len(asked)} claims about attention weights and token probabilities hold"
    )
    statements = " ".join(f"“{CLAIMS[name].says}”" for name in asked) if few else ""
    sizes = ", ".join(
        f"{name} {' and '.join(values)}" for name, values in findings.scope.items() if name != TEXT
    )
    trials = sweep.trials
    schemes = _named(trials["scheme"].unique(maintain_order=True).to_list(), "scheme")
    parts = [schemes, counted(trials["init.seed"].n_unique(), "seed")]
    subsets = [spelling(one) for one in trials["corpus.subset"].unique(maintain_order=True)]
    if len(subsets) > 1:
        parts.append(f"{len(subsets)} parts of the text ({', '.join(subsets)})")
    text = " and ".join(findings.scope[TEXT])
    return (
        f"{claims} when a GPT with {sizes} is trained on {text}, with "
        f"{', '.join(parts[:-1])} and {parts[-1]}? {statements}"
    ).strip()


def _named(schemes: Sequence[str], word: str) -> str:
    """Name schemes where they are few, else count them."""
    if len(schemes) == 1:
        return f"{word} {schemes[0]}"
    names = f" ({', '.join(schemes)})" if len(schemes) <= MOST_NAMED else ""
    return f"{counted(len(schemes), word)}{names}"


def reading(sweep: RunTables, by_run: RunFrames) -> str:
    """Say how many trials there are, and how often each reads its text."""
    trials = sweep.trials.with_columns(
        read=pl.col("train.steps") * pl.col("train.batch_size") * pl.col("model.context")
    )
    sizes = by_run.rare_by_size.select("trial_key", "n_tokens")
    passes = (
        trials.join(sizes, on="trial_key")
        .group_by("corpus.subset", maintain_order=True)
        .agg(passes=(pl.col("read") / pl.col("n_tokens")).mean())
        .rows()
    )
    least, most = int(trials["read"].min()), int(trials["read"].max())  # type: ignore[arg-type]
    reads = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    said = f"{counted(trials.height, 'trial')}. Each trains on {reads} tokens"
    some = ", ".join(f"{subset} {times:.2g} times" for subset, times in passes[:MOST_NAMED])
    return f"{said}, so it reads the text {some}." if some else f"{said}."


def answer(findings: Findings) -> list[str]:
    """Say what came out: how many claims have which verdict, then the headline claims."""
    here, asked = findings.claims.here, findings.claims.asked
    if not any(here[name].parts for name in asked):
        return ["No finished trial has numbers, so nothing is decided yet."]
    verdicts = Counter(here[name].verdict for name in asked)
    counts = ", ".join(
        f"{verdicts[one]} {'depending on a knob' if one == DEPENDS else _word_of(one)}"
        for one in VERDICTS
        if verdicts[one]
    )
    first = [name for name in HEADLINES if name in asked] or list(asked[:1])
    return [*(_say_claim(name, findings) for name in first),
            f"Over all schemes together, of {counted(len(asked), 'claim')}: {counts}."]  # fmt: skip


def _say_claim(name: str, findings: Findings) -> str:
    """Say where a claim holds: `Supported under model5 (tau 0.6), undecided under gpt2.`"""
    statement = CLAIMS[name].says.rstrip(".")
    by = findings.claims.by.get("scheme", {})
    pooled = findings.claims.here[name]
    course = _course(name, findings)
    if not by and pooled.depends_on:
        return f"“{statement}” has no verdict of its own. {say_dependence(pooled)}{course}"
    if not by or agree(name, findings):
        over = f" under all {counted(len(by), 'scheme')}" if by else ""
        return f"“{statement}” is {_word(pooled)}{over} ({_number(name, pooled)}).{course}"
    groups: dict[str, list[str]] = {}
    for scheme, found in by.items():
        groups.setdefault(_word(found[name]), []).append(scheme)
    told = [
        f"{word} under "
        + (
            ", ".join(f"{scheme} ({_number(name, by[scheme][name])})" for scheme in schemes)
            if len(schemes) <= MOST_NAMED
            else counted(len(schemes), "scheme")
        )
        for word, schemes in groups.items()
    ]
    other = {knob: sides for knob, sides in (pooled.depends_on or {}).items() if knob != "scheme"}
    depends = f" {say_dependence(replace(pooled, depends_on=other))}" if other else ""
    return f"“{statement}” is {'; '.join(told)}.{depends}{course}"


def _word(found: Finding) -> str:
    return _word_of(found.verdict)


def _word_of(verdict: str) -> str:
    return "undecided" if verdict == UNDERPOWERED else verdict


def _course(name: str, findings: Findings) -> str:
    """Say under which schemes the gradient over depth does not last."""
    if name != "depth_gradient":
        return ""
    by = findings.claims.by.get("scheme") or {ALL: findings.claims.here}
    said = {"transient": "is there early and gone at the last step",
            "reversed": "is there early and reversed at the last step"}  # fmt: skip
    sentences = []
    for course, words in said.items():
        some = [scheme for scheme, found in by.items()
                if found["depth_gradient_lasts"].course == course]  # fmt: skip
        if some:
            under = (
                "" if some == [ALL] else f" under {_named(some, 'scheme').removeprefix('scheme ')}"
            )
            sentences.append(f" The gradient over depth {words}{under}.")
    return "".join(sentences)


def _number(name: str, found: Finding) -> str:
    """Return the number that is furthest from support: `median tau 0.60 [0.33, 0.87]`."""
    part = weakest_part(found)
    return (
        f"{named(CLAIMS[name], part)} {format_estimate(found.parts[part].estimate)}"
        if part
        else "–"
    )


def matrix(findings: Findings, shown: Sequence[str], most: int) -> Matrix:
    """Make the matrix of verdicts.

    Args:
        findings: of a sweep.
        shown: the claims.
        most: the number of schemes that have a column.
    """
    by = findings.claims.by.get("scheme", {})
    schemes = list(by)[:most]
    rows = []
    for name in in_matrix(shown):
        pooled = findings.claims.here[name]
        part = weakest_part(pooled)
        rows.append(
            MatrixRow(
                name=name,
                says=CLAIMS[name].says,
                must_be=must_be(name, part),
                differs="; ".join(
                    f"{verdict} for {knob} {', '.join(values)}"
                    for knob, sides in (pooled.depends_on or {}).items()
                    for verdict, values in sides.items()
                    if knob != "scheme"
                ),
                pooled=_cell(name, pooled, part, mean=bool(by) and not agree(name, findings)),
                depends_on=" and ".join(pooled.depends_on or {}),
                schemes=[_cell(name, by[scheme][name], part) for scheme in schemes],
            )
        )
    return Matrix(schemes=schemes, left_out=len(by) - len(schemes), rows=rows)


def must_be(name: str, part: str | None) -> str:
    """Say what a number of a claim has to be: `median tau > 0.3`."""
    if part is None:
        return ""
    claim = CLAIMS[name]
    rule = claim.rule(part)
    unit = "" if claim.unit == part else f", in {claim.unit}"
    return f"{named(claim, part)} {rule_in_words(rule)}{unit}"


def in_matrix(names: Sequence[str]) -> list[str]:
    """Order claims as a matrix has them: the headline claims first."""
    return sorted(names, key=lambda name: name not in HEADLINES)


def _cell(name: str, found: Finding, part: str | None, *, mean: bool = False) -> Cell:
    """Make a cell with the number of one part, which is the same in a row of the matrix.

    Args:
        name: of the claim.
        found: the finding on it.
        part: the part.
        mean: whether it is the mean of schemes with other verdicts.
    """
    part = part if part in found.parts else None
    value = found.parts[part].estimate.value if part else None
    told = found.verdict
    if part:
        number = f"{named(CLAIMS[name], part)} {format_estimate(found.parts[part].estimate)}"
        told += f": {number}, has to be {rule_in_words(CLAIMS[name].rule(part))}"
    if found.forecast:
        told += f". {say_forecast(found.forecast)}"
    needed = found.forecast.half if found.forecast else None
    return Cell(
        verdict=found.verdict,
        symbol=SYMBOLS[found.verdict],
        effect="" if value is None else f"{value:.2g}" if abs(value) < 1e4 else f"{value:.0e}",
        told=told,
        seeds="as a mean" * mean or (f"needs {needed} seeds" if needed else ""),
    )
