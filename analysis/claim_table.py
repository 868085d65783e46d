"""Make tables of the numbers of claims: by run, by scheme with intervals, and by specification.

The figures of claims, and the files effects.csv and effects.tex, are made from these tables.
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
    """Return the centre over seeds of each part of each claim, for each scheme.

    Returns:
        One row for each claim, part and scheme, with the columns of COLUMNS. `value` is the centre.
        `low` and `high` are the ends of the interval, and null with too few seeds. `verdict` is
        about this part alone, and `claim_verdict` about the claim. The centre has to lie above
        `above` and below `below`. Beyond `against` it contradicts the claim. There are rows of ALL
        schemes if all schemes have the same verdict.
    """
    rows = [
        row
        for name in CLAIMS
        for scheme, finding in _by_scheme(name, findings).items()
        for row in _rows(name, scheme, finding)
    ]
    return pl.DataFrame(rows, schema=COLUMNS)


def _by_scheme(name: str, findings: Findings) -> dict[str, Finding]:
    """Return the findings for a claim by scheme. If all schemes agree, ALL is the first entry."""
    pooled, by = findings.claims.here[name], findings.claims.by.get("scheme", {})
    if pooled.verdict in (NOT_ASKED, NOT_MEASURED) and not pooled.parts:
        return {}
    if not by:
        return {next(iter(findings.depth_gradient), ALL): pooled}
    found = {scheme: some[name] for scheme, some in by.items()}
    return {ALL: pooled, **found} if agree(name, findings) else found


def agree(name: str, findings: Findings) -> bool:
    """Return whether the verdict for each scheme equals the verdict for all schemes together."""
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
    """Append the numbers of runs to the rows of estimates.

    Args:
        sweep: the runs.
        values: the numbers of every claim, run by run.
        by_scheme: the result of estimates.

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
    """Select one part of each claim: the deciding part that is furthest from support."""
    here = findings.claims.here
    part_of = {name: weakest_part(here[name]) for name in claims if here[name].parts}
    chosen = pl.DataFrame(
        list(part_of.items()), schema={"claim": pl.String, "part": pl.String}, orient="row"
    )
    return by_scheme.join(chosen, on=["claim", "part"], maintain_order="left").with_columns(
        verdict="claim_verdict"
    )


def weakest_part(finding: Finding) -> str | None:
    """Return the deciding part that is furthest from support."""
    deciding = {part: found for part, found in finding.parts.items() if found.decides}
    return max(deciding, key=lambda part: deciding[part].supported_p, default=None)


def specified(findings: Findings) -> dict[str, pl.DataFrame]:
    """Return the specifications of claims as frames, by the name of the frame."""
    return {
        f"specifications_{claim}": pl.DataFrame(to_json(found.all), infer_schema_length=None)
        for claim, found in findings.specifications.items()
    }


def variance(findings: Findings) -> pl.DataFrame:
    """Return the shares of each source in the variance of each deciding part, if schemes vary.

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
