"""Write the sentences and numbers of the report and the summary."""

from __future__ import annotations

from collections import Counter

from analysis.claims import CLAIMS, Claim, Part
from analysis.decisions import ALPHA, NOT_ASKED, NOT_MEASURED, SUPPORTED, only_bound
from analysis.findings import TEXT, Findings, InterimSummary
from analysis.interim import InterimFinding
from analysis.measures import TAU_MOVED, TAUS
from analysis.power import MAX_SEEDS, POWER, Forecast
from analysis.stats import Estimate
from analysis.sweep_verdicts import ClaimFindings
from analysis.variance import LEAST_SCHEMES, LEAST_SEEDS, SKEW, TIES
from analysis.verdicts import Finding
from gptcore.units import counted

CLEAR_TAU = 0.2
"""Two taus of opposite signs contradict each other if both are larger than this, without sign."""

MOST_CONFIGURATIONS = 3
"""The largest number of configurations that a sentence names."""


def say_outcome(name: str, findings: Findings) -> str:
    """Say the verdict on a claim, with its scope, its numbers, by scheme and in general."""
    claims = findings.claims
    claim, finding = CLAIMS[name], claims.here[name]
    if finding.verdict == NOT_ASKED:
        return "Not asked: the sweep was started with --claims, and this claim was not among them."
    sentences = [_verdict_and_numbers(claim, finding, scope_of(findings))]
    if finding.depends_on:
        sentences.append(say_dependence(finding))
    if held := say_where_it_holds(name, claims):
        sentences.append(held)
    if finding.forecast:
        sentences.append(say_forecast(finding.forecast))
    if finding.verdict_of_finished != finding.verdict and not finding.depends_on:
        sentences.append(
            f"The finished runs alone give: {finding.verdict_of_finished}. The verdict counts "
            f"{counted(finding.counted_against, 'run')} without a number against the claim: runs "
            "that diverged, or runs of a configuration without a finished run."
        )
    if finding.undefined_in:
        configurations = "; ".join(finding.undefined_in[:MOST_CONFIGURATIONS])
        if (more := len(finding.undefined_in) - MOST_CONFIGURATIONS) > 0:
            configurations += f"; and {counted(more, 'further configuration')}"
        sentences.append(
            f"The number is not defined for {configurations}. Possible reasons: a weight starts at "
            "0, or a token group has too few tokens."
        )
    sentences += _doubts(finding)
    schemes = {scheme: found[name] for scheme, found in claims.by.get("scheme", {}).items()}
    for scheme, found in (schemes or {"": finding}).items():
        if contrast := _contrast(found):
            sentences.append(f"Under {scheme}: {contrast}" if scheme else contrast)
    if claims.in_general:
        sentences.append(say_in_general(claims.in_general[name]))
    return " ".join(sentences)


def _verdict_and_numbers(claim: Claim, finding: Finding, scope: str) -> str:
    if finding.verdict == NOT_MEASURED:
        return "Not measured: " + (
            "the finished runs have only some of the numbers that the claim needs."
            if finding.parts
            else "no finished run has the numbers that the claim needs."
        )
    numbers = "; ".join(
        f"{named(claim, part)} {format_estimate(found.estimate)}"
        for part, found in finding.parts.items()
        if found.decides
    )
    over = counted(finding.seeds, "seed")
    if finding.configurations > 1:
        over += f", mean of {finding.configurations} configurations"
    if isinstance(finding, InterimFinding):
        over += f", interim analysis {finding.analysis} at alpha = {finding.alpha:.2g}"
    p = "" if finding.p_holm is None else f", adjusted p = {finding.p_holm:.2g}"
    verdict = finding.verdict.capitalize()
    verdict += f", {finding.course}" if finding.course else ""
    return f"{verdict} {scope}: {numbers} ({claim.unit}; {over}{p})."


def named(claim: Claim, part: str) -> str:
    """Name the centre of a part: `median tau`, or `q` for a mean."""
    return f"median {part}" if claim.rule(part).centre == "median" else part


def say_dependence(finding: Finding) -> str:
    """Say on which knob a verdict depends, and which values give which verdict."""
    sentences = []
    for knob, sides in (finding.depends_on or {}).items():
        both = "; ".join(f"{verdict} for {', '.join(some)}" for verdict, some in sides.items())
        sentences.append(f"The verdict depends on {knob}: {both}.")
    return " ".join(sentences)


def holds_in(name: str, claims: ClaimFindings) -> str:
    """Return in how many schemes a claim holds: `2 of 4 schemes`."""
    verdicts = [found[name].verdict for found in claims.by.get("scheme", {}).values()]
    return f"{verdicts.count(SUPPORTED)} of {counted(len(verdicts), 'scheme')}"


def say_where_it_holds(name: str, claims: ClaimFindings) -> str:
    """Say in how many schemes a claim holds. Return an empty text if there is one scheme."""
    schemes = claims.by.get("scheme", {})
    verdicts = Counter(found[name].verdict for found in schemes.values())
    if not schemes:
        return ""
    others = ", ".join(
        f"{verdict} in {n}" for verdict, n in verdicts.items() if verdict != SUPPORTED
    )
    held = f"Holds in {holds_in(name, claims)}"
    return f"{held}{f' ({others})' if others else ''}."


def say_forecast(forecast: Forecast) -> str:
    """Say how many seeds would probably decide a claim."""
    half = (
        f"{forecast.half or f'over {MAX_SEEDS}'} seeds would decide the claim in half of all cases"
    )
    most = f"{forecast.most or f'over {MAX_SEEDS}'} seeds in {POWER:.0%} of all cases"
    return (
        f"If more seeds are like these, {half}, and {most}. The most likely verdict is "
        f"{forecast.would_be}."
    )


def _doubts(finding: Finding) -> list[str]:
    """Say for which reasons a stricter test was used."""
    doubts = {doubt for part in finding.parts.values() if part.decides for doubt in part.doubts}
    sentences = {
        TIES: "Some numbers are equal, so the exact sign test had to agree with the t-test.",
        SKEW: "The numbers are skewed, so a stricter t-test was used.",
    }
    return [says for doubt, says in sentences.items() if doubt in doubts]


def _contrast(finding: Finding) -> str:
    """Say if tau of growth has another sign than tau of displacement, or than tau of Q, K or V."""

    def tau(part: str) -> float:
        return (finding.parts[part].estimate.value if part in finding.parts else None) or 0.0

    def contrary(part: str) -> bool:
        return tau("tau") * tau(part) < 0 and min(abs(tau("tau")), abs(tau(part))) >= CLEAR_TAU

    said = []
    if contrary(TAU_MOVED):
        said.append(
            f"For RMS displacement, however, tau is {tau(TAU_MOVED):.2g}. Growth d(log std) is "
            "larger if a layer starts with a smaller std, so growth and displacement differ here."
        )
    if other := [f"{tau(part):.2g} for {kind.upper()}" for kind, part in TAUS.items()
                 if contrary(part)]:  # fmt: skip
        said.append(f"For single weights, however, tau is {' and '.join(other)}.")
    return " ".join(said)


def say_in_general(finding: Finding) -> str:
    """Say the verdict for other schemes of this kind."""
    parts = [part for part in finding.parts.values() if part.decides]
    if not parts:
        return "In general: not measured."
    if all(part.estimate.low is None for part in parts):
        return (
            f"In general: too few schemes or seeds ({counted(finding.schemes, 'scheme')}; "
            f"at least {LEAST_SCHEMES} schemes and {LEAST_SEEDS} seeds are needed)."
        )
    p = "" if finding.p_holm is None else f" (means; adjusted p = {finding.p_holm:.2g})"
    numbers = "; ".join(
        f"{name} {format_estimate(part.estimate)}"
        + (f", one more scheme {format_range(part.prediction)}" if part.prediction else "")
        for name, part in finding.parts.items()
        if part.decides
    )
    return (
        "In general, for other schemes of this kind on this text, the claim is "
        f"{finding.verdict}: {numbers}{p} ({finding.schemes} schemes). Intervals are not corrected "
        "for the number of claims."
    )


def say_whether_confirmatory(claims: ClaimFindings) -> str:
    """Say for which trials the claims and rules were fixed before the results."""
    if claims.standing == "confirmatory":
        return "Confirmatory: the claims and rules were fixed before these trials had results."
    why = (
        "were planned after a result was seen, were selected after a result was seen, or were "
        "planned with other claims or rules"
    )
    if claims.standing == "exploratory":
        return f"Exploratory: these trials {why}."
    some = ", ".join(claims.exploratory_trials[:5])
    some += ", ..." if len(claims.exploratory_trials) > 5 else ""
    return f"{claims.standing.capitalize()}; the others {why}: {some}."


def scope_of(findings: Findings) -> str:
    """Say what verdicts are about: `at d_model 64, n_layer 6, lr 0.001, steps 200, on gulliver`."""
    sizes = [
        f"{name} {' and '.join(values)}" for name, values in findings.scope.items() if name != TEXT
    ]
    return f"at {', '.join(sizes)}, on {' and '.join(findings.scope[TEXT])}"


def say_interim(interim: InterimSummary) -> str:
    """Say how many interim analyses were made, and how many claims they decided."""
    sizes = ", ".join(str(one.seeds) for one in interim.schedule)
    decided = sum(len(one.decided) for one in interim.made)
    return (
        f"Seeds were added until claims were decided. {len(interim.made)} of at most "
        f"{len(interim.schedule)} interim analyses (at {sizes} seeds) were made. {decided} claims "
        f"are decided and {len(interim.undecided)} are undecided. Each analysis spends a part of "
        f"the error rate {ALPHA:.2g} (Lan & DeMets 1983)."
    )


def rule_in_words(rule: Part) -> str:
    """Say where the centre has to lie: `> 0.3 (contradicted below 0)`."""
    if rule.low is not None and rule.high is not None:
        return f"between {short(rule.low)} and {short(rule.high)}"
    bound, sign = only_bound(rule)
    says = f"{'>' if sign > 0 else '<'} {short(bound)}"
    if rule.against in (None, bound):
        return says
    return f"{says} (contradicted {'below' if sign > 0 else 'above'} {short(rule.against)})"


def format_estimate(estimate: Estimate) -> str:
    """Return `-3.12 [-3.40, -2.84]`, or `-3.12 [too few]` if there are too few units."""
    if estimate.value is None:
        return "–"
    if estimate.low is None:
        return f"{short(estimate.value)} [too few]"
    return f"{short(estimate.value)} {format_range(estimate)}"


def format_range(estimate: Estimate) -> str:
    """Return the interval: `[-3.40, -2.84]`."""
    if estimate.low is None or estimate.high is None:
        return "[too few]"
    return f"[{short(estimate.low)}, {short(estimate.high)}]"


def short(value: float) -> str:
    """Format a number with three digits. A number that rounds to 0 has no sign."""
    text = f"{value:.3g}"
    return "0" if float(text) == 0 else text
