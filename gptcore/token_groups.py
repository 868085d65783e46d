"""Which tokens are common, rare or never used in the text that a trial trains on.

Counts are of what the trial trains on, never of the whole corpus: a token unused in one part may be
common in another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptcore.config import seed_of
from gptcore.records import GroupMembersRow
from gptcore.tokenizer import word_pieces

Counts = NDArray[np.int64]  # [n_vocab], occurrences of each id
Pieces = NDArray[np.bool_]  # [n_vocab], the ids that are text of their own
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TokenGroups:
    """The ids of every group, ascending, and how often each id occurs in the trial's text."""

    ids: Mapping[str, Ids]
    counts: Counts
    log_unigram: NDArray[np.float64]  # [n_vocab], as log_unigram gives it

    def rows(self) -> list[GroupMembersRow]:
        return [
            GroupMembersRow(group=group, tokens=ids.tolist(), counts=self.counts[ids].tolist())
            for group, ids in self.ids.items()
        ]


def token_groups(counts: Counts, seed: int, tokenizer: str) -> TokenGroups:
    """Form every group of TOKEN_GROUPS by these counts of the tokenizer's tokens.

    `seed` decides draws among tied tokens. A group may be empty: a text of bytes has few tokens
    that are rare.
    """
    pieces = word_pieces(tokenizer)
    ids = {
        name: np.sort(
            choose(counts, pieces, np.random.default_rng(seed_of("token_groups", name, seed)))
        )
        for name, choose in TOKEN_GROUPS.items()
    }
    return TokenGroups(ids, counts, log_unigram(counts))


def log_unigram(counts: Counts) -> NDArray[np.float64]:
    """Log-prob of every token under the unigram model of a text, smoothed for what it lacks.

    Good 1953, *The Population Frequencies of Species and the Estimation of Population Parameters*:
    what never occurred has the share of the text that singletons have, N_1 / N (here between 1 / N
    and 1 - 1 / N), evenly; all others share the rest by their counts.
    """
    unseen, singletons = (int(np.count_nonzero(counts == count)) for count in (0, 1))
    total = int(counts.sum())
    missing = min(max(singletons, 1), total - 1) / total if unseen else 0.0
    return np.log(np.where(counts > 0, (1 - missing) * counts / total, missing / max(unseen, 1)))


Choose = Callable[[Counts, Pieces, np.random.Generator], Ids]


def common_100(counts: Counts, pieces: Pieces, rng: np.random.Generator) -> Ids:
    """The 100 most frequent tokens (experiment B)."""
    return _drawn(np.flatnonzero(pieces & (counts > 0)), -counts, rng)[:100]


def rare_100(counts: Counts, pieces: Pieces, rng: np.random.Generator) -> Ids:
    """100 of the least frequent tokens that do occur (experiment B).

    Fewer where fewer are left beside the 100 most frequent, that is in a text of fewer than 200
    distinct pieces: a token is not both.
    """
    occurring_ids = np.flatnonzero(pieces & (counts > 0))
    left = max(0, len(occurring_ids) - 100)
    return _drawn(occurring_ids, counts, rng)[: min(100, left)]


def never_100(counts: Counts, pieces: Pieces, rng: np.random.Generator) -> Ids:
    """100 tokens that never occur (experiment B)."""
    return _drawn(np.flatnonzero(pieces & (counts == 0)), counts, rng)[:100]


def occurring(low: int, high: float) -> Choose:
    """The group of all tokens that occur at least `low` and fewer than `high` times."""
    return lambda counts, pieces, rng: np.flatnonzero((counts >= low) & (counts < high))


def _drawn(ids: Ids, order: Counts, rng: np.random.Generator) -> Ids:
    """The ids in ascending `order`, ties in an order that is drawn."""
    shuffled = rng.permutation(ids)
    return shuffled[np.argsort(order[shuffled], kind="stable")]


TOKEN_GROUPS: dict[str, Choose] = {
    "common_100": common_100,
    "rare_100": rare_100,
    "never_100": never_100,
    # Whole bins of frequency, each four times as wide as the one before.
    "never_used": occurring(0, 1),
    "singletons": occurring(1, 2),
    "count_2_3": occurring(2, 4),
    "count_4_15": occurring(4, 16),
    "count_16_63": occurring(16, 64),
    "count_64_255": occurring(64, 256),
    "count_256_up": occurring(256, np.inf),
}
