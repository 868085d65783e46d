"""Decide one rule: compute its p-values and its verdict.

There are three statements about a rule, and each one has a p-value of its own:

- supported: the centre lies where the rule says;
- not supported: the centre does not lie there;
- contradicted: the centre lies beyond the bound against the claim.
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
    """The one-sided p-values of the three statements about a rule."""

    supported: float
    not_supported: float
    contradicted: float

    def worst(self, other: PValues) -> PValues:
        """Return the larger of two p-values for each statement."""
        return PValues(
            supported=max(self.supported, other.supported),
            not_supported=max(self.not_supported, other.not_supported),
            contradicted=max(self.contradicted, other.contradicted),
        )

    @property
    def two_sided(self) -> float:
        """The p-value of a claim for both directions together."""
        return min(1.0, 2 * min(self.supported, self.contradicted))

    def verdict(self, factor: float, alpha: float, *, decided: bool = True) -> str:
        """Return the verdict at an error rate alpha.

        Args:
            factor: the factor by which p-values are multiplied, because of the number of claims.
            alpha: the error rate of both directions together.
            decided: whether the adjusted two-sided p-value is below alpha.
        """

        def is_shown(p: float) -> bool:
            return 2 * p * factor < alpha

        if decided and is_shown(self.supported):
            return SUPPORTED
        if decided and is_shown(self.contradicted):
            return CONTRADICTED
        return NOT_SUPPORTED if is_shown(self.not_supported) else UNDERPOWERED


def p_values(rule: Part, spread: Spread, centre: str | None = None) -> PValues:
    """Return the p-values of the three statements about a rule.

    A rule with two bounds is supported if both one-sided tests reject (TOST). The centre can lie
    outside on either side, so the smaller of these two p-values counts twice.

    Args:
        rule: the rule of a part.
        spread: the numbers of the units.
        centre: mean, median or share, if it is not the centre of the rule.
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
    """Return the one-sided p-value for a centre beyond a bound.

    A mean has Student's t-test, guarded against skewed numbers. If some units are equal, the larger
    p-value of the t-test and the sign test counts. If the units are visibly skewed, the guard is
    stronger. The sign test cannot help there, because it is about the median. A median has the sign
    test, and a share has the binomial test. Both tests are exact.

    Args:
        centre: mean, median or share.
        spread: the numbers of the units.
        bound: the centre under the null hypothesis.
        sign: 1 if the centre has to be larger, -1 if it has to be smaller.
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
    """Return the bound of a rule with one bound, and the direction of the claim.

    The direction is 1 if the centre has to be larger, -1 if it has to be smaller.
    """
    if rule.low is not None:
        return rule.low, 1
    assert rule.high is not None, "every rule has a bound"
    return rule.high, -1
