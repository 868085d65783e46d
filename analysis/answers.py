"""The first screen of a report: what was asked, what came out, and what to do next."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
    short,
)
from analysis.verdicts import Finding
from gptcore.config import KNOBS, spelling
from gptcore.units import counted

SYMBOLS = {
    SUPPORTED: "✓", CONTRADICTED: "✗", DEPENDS: "≷", NOT_SUPPORTED: "−", UNDERPOWERED: "?",
    NOT_MEASURED: "·", NOT_ASKED: "",
}  # fmt: skip
MOST_SEEDS = 32
"""No command for more seeds is proposed: another size or rate then says more."""
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


@dataclass(frozen=True, kw_only=True)
class Replicated:
    """A number of the source, beside those of a sweep."""

    what: str
    source: str
    here: str  # what the source's formula gives at the size of the sweep, where it has one
    found: Mapping[str, tuple[str, bool]]  # by scheme: number, and whether it agrees


@dataclass(frozen=True, kw_only=True)
class Next:
    """What to do next: a sentence and the command."""

    says: str
    command: str


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


def replication(sweep: RunTables, findings: Findings, by_run: RunFrames) -> list[Replicated]:
    """Put the numbers that the source reports beside those of a sweep, by scheme.

    The source's are those of one model with d_model 768 and context 256. Where a formula gives its
    number, the formula decides at the size of the sweep.
    """
    knobs = sweep.trials.row(0, named=True)
    wpe = (2 / (knobs["model.context"] + knobs["model.d_model"])) ** 0.5
    schemes = list(findings.depth_gradient)

    def of_init(kind: str) -> dict[str, float]:
        rows = by_run.init_errors.filter(kind=kind).group_by("scheme").agg(pl.col("found").mean())
        return dict(rows.iter_rows())

    def near(target: float, found: Mapping[str, float]) -> dict[str, tuple[str, bool]]:
        return {
            scheme: (short(value), abs(value / target - 1) < 0.03)
            for scheme, value in found.items()
        }

    start = by_run.group_changes.filter(
        pl.col("group").is_in(["common_100", "rare_100", "never_100"])
    )
    levels = {
        str(scheme): (float(rows["start"].min()), float(rows["start"].max()))  # type: ignore[arg-type]
        for (scheme,), rows in start.drop_nulls("start").group_by("scheme")
    }
    widest = {
        scheme: max(found.widest_layer_of_runs, key=lambda layer: found.widest_layer_of_runs[layer])
        for scheme, found in findings.depth_gradient.items()
        if found.widest_layer_of_runs
    }
    taus = {scheme: found.tau.value for scheme, found in findings.depth_gradient.items()}
    orders = {
        scheme: found.orders["never_below_rare_below_common"].value
        for scheme, found in findings.rare_tokens.items()
    }
    of_groups = {
        group: {scheme: found.groups[group]["change"].value
                for scheme, found in findings.rare_tokens.items() if group in found.groups}
        for group in ("common_100", "rare_100", "never_100")
    }  # fmt: skip

    def change(group: str, *, falls: bool) -> dict[str, tuple[str, bool]]:
        return {
            scheme: (f"{value:+.2f} nats", (value < 0) == falls)
            for scheme, value in of_groups[group].items()
            if value is not None
        }

    rows = [
        Replicated(what="std of linear weights (MLP) at the start", source="0.02", here="",
                   found=near(0.02, of_init("fc"))),
        Replicated(what="std of position embeddings at the start", source="0.044",
                   here=f"sqrt(2 / (context + d_model)) = {short(wpe)}",
                   found=near(wpe, of_init("wpe"))),
        Replicated(what="std of token embeddings at the start", source="0.02", here="",
                   found=near(0.02, of_init("wte"))),
        Replicated(what="mean log-prob of all three groups at the start", source="-10.8 to -11",
                   here="", found={
                       scheme: (f"{low:.2f} to {high:.2f}" if high - low >= 0.005 else f"{low:.2f}",
                                low >= -11.05 and high <= -10.75)
                       for scheme, (low, high) in levels.items()}),
        Replicated(what="layer whose QKV weights widen most", source="0", here="",
                   found={scheme: (layer, layer == "0") for scheme, layer in widest.items()}),
        Replicated(what="earlier layers widen more: tau over depth", source="> 0", here="",
                   found={scheme: (short(tau), tau > 0) for scheme, tau in taus.items()
                          if tau is not None}),
        Replicated(what="never used < rare < common at the end", source="yes", here="",
                   found={scheme: (f"{share:.0%} of seeds", share > 0.5)
                          for scheme, share in orders.items() if share is not None}),
        Replicated(what="100 most common tokens, change", source="not below the start", here="",
                   found=change("common_100", falls=False)),
        Replicated(what="100 rare tokens, change", source="falls", here="",
                   found=change("rare_100", falls=True)),
        Replicated(what="100 unused tokens, change", source="falls", here="",
                   found=change("never_100", falls=True)),
    ]  # fmt: skip
    return [row for row in rows if any(scheme in row.found for scheme in schemes)]


def next_steps(sweep: RunTables, findings: Findings) -> list[Next]:
    """Say what would decide more: more seeds, fresh seeds at a held error rate, another rate."""
    # What is selected, shuffled, joined or searched has no stamps, and no command of its own.
    if len(sweep.commands) != 1 or not sweep.stamps or findings.interim:
        return []
    try:
        words = shlex.split(sweep.commands[0])
    except ValueError:
        return []
    if words[:1] != ["python"] or Path("".join(words[1:2])).name != "init_sweep.py":
        return []
    command, name = without_flags(shlex.join(words), ONCE_ONLY), sweep.name
    given = {word[2:].partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
    # A command that only continued a sweep does not name its trials.
    if not (given & {"preset", *KNOBS} or name == "quick"):
        return []
    seeds = sorted(sweep.trials["init.seed"].unique().to_list())
    rates = sorted(sweep.trials["optim.lr"].unique().to_list())
    steps = []
    by = findings.claims.by.get("scheme") or {ALL: findings.claims.here}
    forecasts = {
        (claim, scheme): found.forecast.half or 0
        for scheme, some in by.items()
        for claim, found in some.items()
        if found.forecast
    }
    open_claims = {one: n for one, n in forecasts.items() if len(seeds) < n <= MOST_SEEDS}
    first = min(
        open_claims, key=lambda one: (one[0] not in HEADLINES, open_claims[one]), default=None
    )
    if first:
        needed = open_claims[first]
        under = "" if first[1] == ALL else f" under {first[1]}"
        fresh = [str(seeds[-1] + 1 + seed) for seed in range(min(8, len(seeds)))]
        steps.append(
            Next(
                says="Fresh seeds, added until every claim is decided, with one error rate over "
                "all interim analyses:",
                command=with_flags(
                    command, name=f"{name}-fresh", **{"until-decided": str(max(needed, 24)),
                                                      "init.seed": fresh},
                ),
            )
        )  # fmt: skip
        new = range(seeds[-1] + 1, seeds[-1] + 1 + needed - len(seeds))
        more = with_flags(command, name=name, **{"init.seed": [*map(str, [*seeds, *new])]})
        steps.append(
            Next(
                says=f"With {needed} seeds, {first[0]}{under} would be decided in half of all "
                "cases. Finished trials are not run again. The new ones are exploratory, because "
                "this report was seen:",
                command=more,
            )
        )
    if len(rates) == 1:
        others = [spelling(float(f"{rates[0] * factor:.1g}")) for factor in (0.3, 3)]
        steps.append(
            Next(
                says="The learning rate can decide a verdict. The same at other rates:",
                command=with_flags(command, name=f"{name}-rates", **{"optim.lr": others}),
            )
        )
    return steps


ONCE_ONLY = ("redo", "watch", "wait", "dry-run")
"""Flags that are about one run of a command."""


def without_flags(command: str, flags: Collection[str]) -> str:
    """Leave flags and their values out of a command."""
    kept, dropping = list[str](), False
    for word in shlex.split(command):
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return shlex.join(kept)


def with_flags(command: str, **flags: str | Sequence[str]) -> str:
    """Give flags to a command, in place of those of the same names."""
    words = shlex.split(without_flags(command, flags))
    for flag, value in flags.items():
        words += [f"--{flag}", *([value] if isinstance(value, str) else value)]
    return shlex.join(words)
