"""Make the first screen of a report: the question, the answer, and the matrix of verdicts."""

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
"""The largest number of schemes that a sentence names. More schemes are only counted."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One verdict in the matrix of the first screen."""

    verdict: str
    symbol: str
    effect: str  # the value of the part that is furthest from support
    description: str  # verdict, number, bound and forecast
    remark: str  # how many seeds would decide the claim, or that the value is a mean; or empty


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """The verdicts on one claim: for all schemes together, and for each scheme."""

    name: str
    says: str
    must_be: str
    differs: str  # if the verdict depends on a knob other than the scheme: the values of the knob
    pooled: Cell  # for all schemes together
    depends_on: str  # the knobs on which the verdict depends, if any
    schemes: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The verdicts of a sweep: claims by schemes."""

    schemes: Sequence[str]  # the columns; empty if the sweep has one scheme
    left_out: int  # the number of schemes without a column; the files have all schemes
    rows: Sequence[MatrixRow]


def question(sweep: RunTables, findings: Findings) -> str:
    """Ask the question of a sweep: the claims, how the trials were trained, and what varied."""
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
    """Count schemes, and also name them if they are few."""
    if len(schemes) == 1:
        return f"{word} {schemes[0]}"
    names = f" ({', '.join(schemes)})" if len(schemes) <= MOST_NAMED else ""
    return f"{counted(len(schemes), word)}{names}"


def reading(sweep: RunTables, by_run: RunFrames) -> str:
    """Say how many trials there are, and how often each trial reads its text."""
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
    """Say the verdicts on the headline claims, and how many claims have each verdict."""
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
    """Say the verdicts on a claim by scheme: `... is supported under model5 (median tau 0.6).`"""
    statement = CLAIMS[name].says.rstrip(".")
    by = findings.claims.by.get("scheme", {})
    pooled = findings.claims.here[name]
    course = _course(name, findings)
    if not by and pooled.depends_on:
        return f"“{statement}” has no single verdict. {say_dependence(pooled)}{course}"
    if not by or agree(name, findings):
        over = f" under all {counted(len(by), 'scheme')}" if by else ""
        return f"“{statement}” is {_word(pooled)}{over} ({_number(name, pooled)}).{course}"
    groups: dict[str, list[str]] = {}
    for scheme, found in by.items():
        groups.setdefault(_word(found[name]), []).append(scheme)
    verdicts = [
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
    return f"“{statement}” is {'; '.join(verdicts)}.{depends}{course}"


def _word(found: Finding) -> str:
    return _word_of(found.verdict)


def _word_of(verdict: str) -> str:
    return "undecided" if verdict == UNDERPOWERED else verdict


def _course(name: str, findings: Findings) -> str:
    """Say under which schemes the gradient over depth disappears or reverses."""
    if name != "depth_gradient":
        return ""
    by = findings.claims.by.get("scheme") or {ALL: findings.claims.here}
    changes = {"transient": "is there at an early step and has become smaller by the last step",
               "reversed": "is there at an early step and reversed at the last step"}  # fmt: skip
    sentences = []
    for course, words in changes.items():
        some = [scheme for scheme, found in by.items()
                if found["depth_gradient_lasts"].course == course]  # fmt: skip
        if some:
            under = (
                "" if some == [ALL] else f" under {_named(some, 'scheme').removeprefix('scheme ')}"
            )
            sentences.append(f" The gradient over depth {words}{under}.")
    return "".join(sentences)


def _number(name: str, found: Finding) -> str:
    """Return the part that is furthest from support, with its interval."""
    part = weakest_part(found)
    return (
        f"{named(CLAIMS[name], part)} {format_estimate(found.parts[part].estimate)}"
        if part
        else "–"
    )


def matrix(findings: Findings, shown: Sequence[str], most: int) -> Matrix:
    """Make the matrix of verdicts.

    Args:
        findings: the findings of a sweep.
        shown: the names of the claims.
        most: the largest number of schemes with a column.
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
    """Say the rule of a part: `median tau > 0.3`."""
    if part is None:
        return ""
    claim = CLAIMS[name]
    rule = claim.rule(part)
    unit = "" if claim.unit == part else f", in {claim.unit}"
    return f"{named(claim, part)} {rule_in_words(rule)}{unit}"


def in_matrix(names: Sequence[str]) -> list[str]:
    """Put the headline claims first, as in the matrix."""
    return sorted(names, key=lambda name: name not in HEADLINES)


def _cell(name: str, found: Finding, part: str | None, *, mean: bool = False) -> Cell:
    """Make a cell of the matrix. All cells of a row show the same part.

    Args:
        name: the name of the claim.
        found: the finding for the claim.
        part: the part whose number is shown.
        mean: whether the number is a mean over schemes with different verdicts.
    """
    part = part if part in found.parts else None
    value = found.parts[part].estimate.value if part else None
    description = found.verdict
    if part:
        number = f"{named(CLAIMS[name], part)} {format_estimate(found.parts[part].estimate)}"
        description += f": {number}, has to be {rule_in_words(CLAIMS[name].rule(part))}"
    if found.forecast:
        description += f". {say_forecast(found.forecast)}"
    needed = found.forecast.half if found.forecast else None
    return Cell(
        verdict=found.verdict,
        symbol=SYMBOLS[found.verdict],
        effect="" if value is None else f"{value:.2g}" if abs(value) < 1e4 else f"{value:.0e}",
        description=description,
        remark="as a mean" * mean or (f"needs {needed} seeds" if needed else ""),
    )
