"""The numbers of every claim as one table: run by run, and by scheme with interval and bounds.

The figures of claims and the files verdicts.csv and verdicts.tex are made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from analysis.claims import CLAIMS
from analysis.decisions import NOT_ASKED, NOT_MEASURED
from analysis.findings import Findings
from analysis.frames import with_trial
from analysis.jsonable import to_json
from analysis.measures import Values
from analysis.runs import RunTables
from analysis.verdicts import Finding

ALL = "all schemes"

COLUMNS: dict[str, type[pl.DataType]] = {
    "claim": pl.String, "part": pl.String, "decides": pl.Boolean, "unit": pl.String,
    "scheme": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    "seeds": pl.Int64, "verdict": pl.String, "claim_verdict": pl.String, "above": pl.Float64,
    "below": pl.Float64, "against": pl.Float64,
}  # fmt: skip


def estimates(findings: Findings) -> pl.DataFrame:
    """Tell the centre of each part of each claim over seeds, for each scheme.

    Returns:
        One row for each claim, part and scheme, with the columns of COLUMNS. `value` is the centre,
        and `low` and `high` are its interval, null where there are too few seeds. `verdict` is on
        this number alone, `claim_verdict` on the whole claim. The centre has to lie above `above`
        and below `below`, and refutes the claim beyond `against`. The rows of ALL schemes are there
        where all schemes have the same verdict.
    """
    rows = [
        row
        for name in CLAIMS
        for scheme, finding in _by_scheme(name, findings).items()
        for row in _rows(name, scheme, finding)
    ]
    return pl.DataFrame(rows, schema=COLUMNS)


def _by_scheme(name: str, findings: Findings) -> dict[str, Finding]:
    """Return the findings on a claim by scheme, first those of all schemes where these agree."""
    pooled, by = findings.claims.here[name], findings.claims.by.get("scheme", {})
    if pooled.verdict in (NOT_ASKED, NOT_MEASURED) and not pooled.parts:
        return {}
    if not by:
        return {next(iter(findings.depth_gradient), ALL): pooled}
    found = {scheme: some[name] for scheme, some in by.items()}
    return {ALL: pooled, **found} if agree(name, findings) else found


def agree(name: str, findings: Findings) -> bool:
    """Return whether all schemes have the verdict that they have together."""
    others = {some[name].verdict for some in findings.claims.by.get("scheme", {}).values()}
    return others <= {findings.claims.here[name].verdict}


def _rows(name: str, scheme: str, finding: Finding) -> Iterator[dict[str, Any]]:
    claim = CLAIMS[name]
    for part, found in finding.parts.items():
        rule = claim.rule(part)
        yield {
            "claim": name, "part": part, "decides": rule.decides, "unit": claim.unit,
            "scheme": scheme, **vars(found.estimate), "verdict": found.verdict,
            "claim_verdict": finding.verdict, "above": rule.low, "below": rule.high,
            "against": rule.against,
        }  # fmt: skip


def of_claims(
    sweep: RunTables, values: Mapping[str, Values], by_scheme: pl.DataFrame
) -> pl.DataFrame:
    """Put the numbers of runs below the rows of estimates.

    Args:
        sweep: the runs.
        values: the numbers of every claim, run by run.
        by_scheme: the rows of estimates.

    Returns:
        The rows of estimates. Then one row for each claim, part and run that has a number: claim,
        part, decides, scheme, subset, seed, trial_key, value.
    """
    known = by_scheme.select("claim", "part", "decides").unique()
    runs = [
        numbers.select("trial_key", "part", "value", claim=pl.lit(name))
        for name, numbers in values.items()
    ]
    rows = with_trial(pl.concat(runs), sweep).join(known, on=["claim", "part"])
    return pl.concat([by_scheme, rows], how="diagonal")


def weakest(by_scheme: pl.DataFrame, findings: Findings, claims: Sequence[str]) -> pl.DataFrame:
    """Keep, of each of some claims, the part that decides it and is furthest from support."""
    here = findings.claims.here
    part_of = {name: weakest_part(here[name]) for name in claims if here[name].parts}
    chosen = pl.DataFrame(
        list(part_of.items()), schema={"claim": pl.String, "part": pl.String}, orient="row"
    )
    return by_scheme.join(chosen, on=["claim", "part"], maintain_order="left").with_columns(
        verdict="claim_verdict"
    )


def weakest_part(finding: Finding) -> str | None:
    """Return the part that decides a claim and is furthest from support."""
    deciding = {part: found for part, found in finding.parts.items() if found.decides}
    return max(deciding, key=lambda part: deciding[part].supported_p, default=None)


def specified(findings: Findings) -> dict[str, pl.DataFrame]:
    """Return the specifications of each claim that has them, as a frame for its figure."""
    return {
        f"specifications_{claim}": pl.DataFrame(to_json(found.all), infer_schema_length=None)
        for claim, found in findings.specifications.items()
    }


def variance(findings: Findings) -> pl.DataFrame:
    """Return how the variance of each number that decides a claim splits, where schemes vary.

    Returns:
        Columns number (`claim: part`), source, share.
    """
    general = findings.claims.in_general or {}
    rows = [
        (f"{claim}: {part}", source, share)
        for claim, found in general.items()
        for part, numbers in found.parts.items()
        if numbers.decides
        for source, share in numbers.variance.items()
    ]
    return pl.DataFrame(rows, schema=["number", "source", "share"], orient="row")
