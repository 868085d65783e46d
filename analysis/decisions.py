"""Decide one rule: the p-values of its numbers, and the verdict that they give.

Three sentences can be said of a rule, and each has a p-value of its own, which tests that sentence:
the centre is where the rule wants it (supported), it is not there (not supported), it lies beyond
the bound of contradiction (contradicted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

from analysis.claims import Part
from analysis.skew import SEEN, guarded
from analysis.stats import LEVEL, Estimate, median_interval, share_interval, share_p, sign_p
from analysis.variance import SKEW, TIES, Spread

ALPHA = round(1 - LEVEL, 12)

SUPPORTED, CONTRADICTED, DEPENDS = "supported", "contradicted", "depends"
NOT_SUPPORTED, UNDERPOWERED, NOT_MEASURED = "not supported", "underpowered", "not measured"
NOT_ASKED = "not asked"
VERDICTS = (
    SUPPORTED, CONTRADICTED, DEPENDS, NOT_SUPPORTED, UNDERPOWERED, NOT_MEASURED, NOT_ASKED
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PValues:
    """The one-sided p-values of the three sentences about a rule."""

    supported: float
    not_supported: float
    contradicted: float

    def worst(self, other: PValues) -> PValues:
        """Return the larger p-value of each sentence."""
        return PValues(
            supported=max(self.supported, other.supported),
            not_supported=max(self.not_supported, other.not_supported),
            contradicted=max(self.contradicted, other.contradicted),
        )

    @property
    def two_sided(self) -> float:
        """The p-value of a claim, whichever way it is decided."""
        return min(1.0, 2 * min(self.supported, self.contradicted))

    def verdict(self, factor: float, alpha: float, *, decided: bool = True) -> str:
        """Return the verdict at an error rate alpha.

        Args:
            factor: by what the p-values are multiplied, for the number of claims.
            alpha: the error rate of both directions together.
            decided: whether the adjusted two-sided p-value is small enough.
        """

        def is_shown(p: float) -> bool:
            return 2 * p * factor < alpha

        if decided and is_shown(self.supported):
            return SUPPORTED
        if decided and is_shown(self.contradicted):
            return CONTRADICTED
        return NOT_SUPPORTED if is_shown(self.not_supported) else UNDERPOWERED


def p_values(rule: Part, spread: Spread, centre: str | None = None) -> PValues:
    """Return the p-values of the three sentences about a rule.

    Args:
        rule: the rule of a part.
        spread: the units.
        centre: mean, median or share, where it is not that of the rule.

    For a rule with two bounds, support needs both of two one-sided tests (TOST). Outside is either
    side, so the smaller of two p-values counts twice.
    """

    def p(bound: float, sign: int) -> float:
        return p_beyond(centre or rule.centre, spread, bound, sign)

    if rule.low is not None and rule.high is not None:
        outside = min(1.0, 2 * min(p(rule.low, -1), p(rule.high, 1)))
        return PValues(
            supported=max(p(rule.low, 1), p(rule.high, -1)),
            not_supported=outside,
            contradicted=outside,
        )
    bound, sign = only_bound(rule)
    against = bound if rule.against is None else rule.against
    return PValues(
        supported=p(bound, sign), not_supported=p(bound, -sign), contradicted=p(against, -sign)
    )


def p_beyond(centre: str, spread: Spread, bound: float, sign: int) -> float:
    """Return the one-sided p-value that a centre lies beyond a bound.

    The test of a mean is Student's, guarded against skewness. Where units are equal, the sign test
    has to agree: the larger of both p-values counts. Where their skewness is seen, the guard is
    stronger. The sign test would not do there, because it is about the median. The test of a median
    is the sign test, and that of a share is binomial. Both are exact.

    Args:
        centre: mean, median or share.
        spread: the units.
        bound: the centre under the null hypothesis.
        sign: 1 where the centre has to be larger, -1 where it has to be smaller.
    """
    if spread.error is None:
        return 1.0
    distances: list[float] = (sign * (spread.units - bound)).tolist()
    if centre == "share":
        return share_p(spread.units.tolist(), bound, sign)
    if centre == "median":
        return sign_p(distances)
    if spread.error == 0:
        return sign_p(distances)
    t = sign * (spread.mean - bound) / spread.error
    students = float(special.stdtr(spread.df, -t))
    p = guarded(students, spread.df)
    if SKEW in spread.doubts:
        p = max(p, guarded(students, spread.df, SEEN))
    return max(p, sign_p(distances)) if TIES in spread.doubts else p


def interval(rule: Part, spread: Spread, level: float) -> Estimate:
    """Estimate the centre of a rule, with its interval."""
    if rule.centre == "mean" or spread.error is None:
        return spread.interval(level)
    of = median_interval if rule.centre == "median" else share_interval
    return of(spread.units.tolist(), level)


def combined(verdicts: Sequence[str]) -> str:
    """Return the worst of the verdicts on the parts of a claim: all parts have to hold."""
    for verdict in (CONTRADICTED, NOT_SUPPORTED, NOT_MEASURED, UNDERPOWERED, SUPPORTED):
        if verdict in verdicts:
            return verdict
    return NOT_MEASURED


def only_bound(rule: Part) -> tuple[float, int]:
    """Return the bound of a rule that has one, and the direction of the claim.

    The direction is 1 where the centre has to be larger, -1 where it has to be smaller.
    """
    if rule.low is not None:
        return rule.low, 1
    assert rule.high is not None, "a rule has a bound"
    return rule.high, -1
