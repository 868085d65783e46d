"""The differences between schemes, in pairs of runs of the same seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import polars as pl

from analysis.claims import CLAIMS, Claim, Part
from analysis.decisions import ALPHA, p_values
from analysis.frames import trials_to_judge
from analysis.measures import Values
from analysis.runs import RunTables
from analysis.stats import Estimate, holm
from analysis.variance import over_seeds, unit_columns


@dataclass(frozen=True, kw_only=True)
class Comparison(Estimate):
    """A mean difference between two schemes, with its two-sided p-value."""

    p: float
    p_holm: float | None = None  # p, adjusted for the number of differences (Holm)


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """The differences between the first scheme and every other scheme."""

    reference: str
    claims: Mapping[str, Mapping[str, Mapping[str, Comparison]]]  # claim, part, scheme


def comparisons(
    sweep: RunTables, values: Mapping[str, Values], alpha: float = ALPHA
) -> Comparisons | None:
    """Compare every claim's numbers under each scheme with those under the first scheme.

    The p-values are adjusted for the number of all differences (Holm).

    Returns:
        None if there is only one scheme.
    """
    trials = trials_to_judge(sweep).filter(status="finished")
    reference = str(trials["scheme"].first())
    if trials["scheme"].n_unique() < 2:
        return None
    found = {
        name: compare(CLAIMS[name], numbers, trials, reference, alpha)
        for name, numbers in values.items()
    }
    unadjusted = [
        one.p for parts in found.values() for schemes in parts.values() for one in schemes.values()
    ]
    p_holm = iter(holm(unadjusted)[0])
    return Comparisons(
        reference=reference,
        claims={
            name: {
                part: {scheme: replace(one, p_holm=next(p_holm)) for scheme, one in some.items()}
                for part, some in parts.items()
            }
            for name, parts in found.items()
            if parts
        },
    )


def compare(
    claim: Claim,
    values: Values,
    trials: pl.DataFrame,
    reference: str,
    alpha: float = ALPHA,
) -> dict[str, dict[str, Comparison]]:
    """Compare the numbers of a claim between schemes, in pairs of runs.

    The two runs of a pair have the same seed, subset and order of data. The p-value tests
    the mean difference, whatever the centre of the claim.

    Args:
        claim: the claim.
        values: the numbers of its measure, run by run.
        trials: columns trial_key, scheme, corpus.subset, corpus.data_seed, seed.
        reference: the scheme that the others are compared with.
        alpha: the error rate. Intervals have the level 1 - alpha.

    Returns:
        By part and scheme: the number of the scheme minus the number of the reference, as a mean
        over seeds. The p-values are not adjusted.
    """
    pair = ["part", "seed", "corpus.subset", "corpus.data_seed"]
    rows_of_trials = values.join(trials, on="trial_key").select("scheme", *pair, "value")
    base = rows_of_trials.filter(scheme=reference).select(*pair, base="value")
    pairs = (
        rows_of_trials.filter(pl.col("scheme") != reference)
        .join(base, on=pair)
        .with_columns(value=pl.col("value") - pl.col("base"), config="corpus.subset")
        .sort("part", "scheme", "seed", "corpus.subset", "corpus.data_seed")
    )
    rule = Part(centre="mean", low=0.0)
    found: dict[str, dict[str, Comparison]] = {}
    for (part, scheme), rows in pairs.group_by(["part", "scheme"], maintain_order=True):
        rows = rows.with_columns(data_seed="corpus.data_seed")
        spread = over_seeds(rows, unit_columns(rows))
        estimate, two_sided = spread.interval(1 - alpha), p_values(rule, spread).two_sided
        comparison = Comparison(**vars(estimate), p=two_sided)
        found.setdefault(str(part), {})[str(scheme)] = comparison
    return found
