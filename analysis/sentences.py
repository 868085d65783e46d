"""Say what was found: the sentences and numbers of the report and the summary."""

from __future__ import annotations

from analysis.claims import CLAIMS
from analysis.decisions import ALPHA, NOT_MEASURED
from analysis.findings import ClaimFindings, InterimSummary
from analysis.interim import InterimFinding
from analysis.stats import Estimate


def say_outcome(name: str, claims: ClaimFindings) -> str:
    """Say the verdict on a claim as a paper would: with its numbers, and in general."""
    claim, finding = CLAIMS[name], claims.here[name]
    if finding.verdict == NOT_MEASURED:
        return (
            "Not measured: no seed has all the numbers for it in every configuration of this sweep."
        )
    numbers = "; ".join(
        f"{part} {format_estimate(found.estimate)}" for part, found in finding.parts.items()
    )
    text = finding.verdict.capitalize()
    text += f", {finding.course}" if finding.course else ""
    seeds = f"{finding.seeds} seed{'s' * (finding.seeds != 1)}"
    if isinstance(finding, InterimFinding):
        seeds += f" at interim analysis {finding.analysis}, alpha = {finding.alpha:.2g}"
    # There is no p-value where a part was not measured, and another part decides the claim.
    p = "" if finding.p_holm is None else f", Holm-adjusted p = {finding.p_holm:.2g}"
    text += f": {numbers} ({claim.unit}; {seeds}{p})."
    if finding.seeds_needed:
        text += f" By these numbers {finding.seeds_needed} seeds would decide it: "
        text += f"{finding.would_be}."
    if finding.seeds_left_out:
        text += f" {finding.seeds_left_out} seeds that not every configuration has are left out."
    if finding.verdict_with_diverged != finding.verdict:
        text += f" With {finding.diverged} diverged runs counted against it: "
        text += f"{finding.verdict_with_diverged}."
    if claims.in_general:
        general = claims.in_general[name]
        text += f" In general, from {general.configurations} configurations: {general.verdict}."
    return text


def say_interim(interim: InterimSummary) -> str:
    """Say how often a growing sweep was judged, and what that decided."""
    sizes = ", ".join(str(one.seeds) for one in interim.schedule)
    decided = sum(len(one.decided) for one in interim.made)
    return (
        f"Seeds were added until claims were decided. {len(interim.made)} of at most "
        f"{len(interim.schedule)} interim analyses (at {sizes} seeds) were made: {decided} claims "
        f"are decided and {len(interim.undecided)} are undecided. Each analysis spends a part of "
        f"the error rate {ALPHA:.2g} (Lan & DeMets 1983)."
    )


def format_estimate(estimate: Estimate) -> str:
    """Return `-3.12 [-3.40, -2.84]`, or the value alone where there are too few seeds."""
    if estimate.value is None:
        return "–"
    if estimate.low is None:
        return f"{estimate.value:.3g} [too few seeds]"
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
