"""Say what was found: the sentences and numbers of the report and the summary."""

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
"""Two taus of opposite signs contradict each other where both are larger than this."""

NAMED = 3
"""A sentence names no more configurations one by one."""


def say_outcome(name: str, findings: Findings) -> str:
    """Say the verdict on a claim as a paper would: with its scope, by scheme, and in general."""
    claims = findings.claims
    claim, finding = CLAIMS[name], claims.here[name]
    if finding.verdict == NOT_ASKED:
        return "Not asked: the sweep was started with --claims, without this one."
    sentences = [_verdict_and_numbers(claim, finding, scope_of(findings))]
    if finding.depends_on:
        sentences.append(say_dependence(finding))
    if held := say_where_it_holds(name, claims):
        sentences.append(held)
    if finding.forecast:
        sentences.append(say_forecast(finding.forecast))
    if finding.verdict_of_finished != finding.verdict and not finding.depends_on:
        sentences.append(
            f"The finished runs alone: {finding.verdict_of_finished}. The verdict counts "
            f"{counted(finding.counted_against, 'run')} without a result against it, because they "
            "diverged or nothing of their configuration finished."
        )
    if finding.undefined_in:
        configurations = "; ".join(finding.undefined_in[:NAMED])
        if (more := len(finding.undefined_in) - NAMED) > 0:
            configurations += f"; and {counted(more, 'further configuration')}"
        sentences.append(
            f"Not defined for {configurations}: for example because a weight starts at 0 there, or "
            "a group has too few tokens."
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
            "these runs have only some of the numbers that it needs."
            if finding.parts
            else "no finished run has the numbers for it."
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
    """Name a number as a verdict is about it: `median tau`, and `q` for a mean."""
    return f"median {part}" if claim.rule(part).centre == "median" else part


def say_dependence(finding: Finding) -> str:
    """Say on which knob a verdict depends, with both sides."""
    sentences = []
    for knob, sides in (finding.depends_on or {}).items():
        both = "; ".join(f"{verdict} for {', '.join(some)}" for verdict, some in sides.items())
        sentences.append(f"It depends on {knob}: {both}.")
    return " ".join(sentences)


def holds_in(name: str, claims: ClaimFindings) -> str:
    """Return in how many schemes a claim holds: `2 of 4 schemes`."""
    verdicts = [found[name].verdict for found in claims.by.get("scheme", {}).values()]
    return f"{verdicts.count(SUPPORTED)} of {counted(len(verdicts), 'scheme')}"


def say_where_it_holds(name: str, claims: ClaimFindings) -> str:
    """Say in how many schemes a claim holds; nothing where there is one scheme."""
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
    """Say how many seeds would decide a claim, and how often that comes true."""
    half = f"{forecast.half or f'over {MAX_SEEDS}'} seeds would decide it in half of all cases"
    most = f"{forecast.most or f'over {MAX_SEEDS}'} in {POWER:.0%} of them"
    return f"If more seeds are like these, {half} and {most}, most likely as {forecast.would_be}."


def _doubts(finding: Finding) -> list[str]:
    """Say where another test had to agree."""
    doubts = {doubt for part in finding.parts.values() if part.decides for doubt in part.doubts}
    sentences = {
        TIES: "Because of equal numbers, the exact sign test had to agree with the t-test.",
        SKEW: "Because the numbers are skewed, a stricter t-test was used.",
    }
    return [says for doubt, says in sentences.items() if doubt in doubts]


def _contrast(finding: Finding) -> str:
    """Say where growth over depth has another sign than displacement, or than Q, K or V alone."""

    def tau(part: str) -> float:
        return (finding.parts[part].estimate.value if part in finding.parts else None) or 0.0

    def contrary(part: str) -> bool:
        return tau("tau") * tau(part) < 0 and min(abs(tau("tau")), abs(tau(part))) >= CLEAR_TAU

    said = []
    if contrary(TAU_MOVED):
        said.append(
            f"By RMS displacement, however, tau is {tau(TAU_MOVED):.2g}: d(log std) is larger "
            "where a layer starts with a smaller std, so growth and displacement differ here."
        )
    if other := [f"{tau(part):.2g} for {kind.upper()}" for kind, part in TAUS.items()
                 if contrary(part)]:  # fmt: skip
        said.append(f"Taken alone, however, tau is {' and '.join(other)}.")
    return " ".join(said)


def say_in_general(finding: Finding) -> str:
    """Say the verdict for other schemes of this kind."""
    parts = [part for part in finding.parts.values() if part.decides]
    if not parts:
        return "In general: not measured."
    if all(part.estimate.low is None for part in parts):
        return (
            f"In general: too few schemes or seeds to say ({counted(finding.schemes, 'scheme')}; "
            f"it takes {LEAST_SCHEMES} schemes and {LEAST_SEEDS} seeds)."
        )
    p = "" if finding.p_holm is None else f" (means; adjusted p = {finding.p_holm:.2g})"
    numbers = "; ".join(
        f"{name} {format_estimate(part.estimate)}"
        + (f", another scheme {format_range(part.prediction)}" if part.prediction else "")
        for name, part in finding.parts.items()
        if part.decides
    )
    return (
        f"In general, for other schemes of this kind on this text ({finding.schemes} schemes): "
        f"{finding.verdict}: {numbers}{p}. Intervals are not corrected for the number of claims."
    )


def say_standing(claims: ClaimFindings) -> str:
    """Say whether claims and rules were fixed before the results, for which trials."""
    if claims.standing == "confirmatory":
        return (
            "Confirmatory: the claims, their bounds and the rules were fixed before these trials "
            "had results."
        )
    why = (
        "were planned after a result was seen, were chosen in view of results, or are judged by "
        "other claims or rules than those that they were planned with"
    )
    if claims.standing == "exploratory":
        return f"Exploratory: these trials {why}."
    some = ", ".join(claims.exploratory_trials[:5])
    some += ", ..." if len(claims.exploratory_trials) > 5 else ""
    return f"{claims.standing.capitalize()}; the others {why}: {some}."


def scope_of(findings: Findings) -> str:
    """Say what a verdict is about: `at d_model 64, n_layer 6, lr 0.001, steps 200, on gulliver`."""
    sizes = [
        f"{name} {' and '.join(values)}" for name, values in findings.scope.items() if name != TEXT
    ]
    return f"at {', '.join(sizes)}, on {' and '.join(findings.scope[TEXT])}"


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


def rule_in_words(rule: Part) -> str:
    """Say where a number has to lie: `> 0.3 (contradicted below 0)`."""
    if rule.low is not None and rule.high is not None:
        return f"between {short(rule.low)} and {short(rule.high)}"
    bound, sign = only_bound(rule)
    says = f"{'>' if sign > 0 else '<'} {short(bound)}"
    if rule.against in (None, bound):
        return says
    return f"{says} (contradicted {'below' if sign > 0 else 'above'} {short(rule.against)})"


def format_estimate(estimate: Estimate) -> str:
    """Return `-3.12 [-3.40, -2.84]`, or the value alone where there are too few units."""
    if estimate.value is None:
        return "–"
    if estimate.low is None:
        return f"{short(estimate.value)} [too few]"
    return f"{short(estimate.value)} {format_range(estimate)}"


def format_range(estimate: Estimate) -> str:
    """Return the interval alone: `[-3.40, -2.84]`."""
    if estimate.low is None or estimate.high is None:
        return "[too few]"
    return f"[{short(estimate.low)}, {short(estimate.high)}]"


def short(value: float) -> str:
    """Spell a number with three digits. A number that rounds to 0 has no sign."""
    text = f"{value:.3g}"
    return "0" if float(text) == 0 else text
