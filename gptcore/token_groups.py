"""Groups of tokens that are common, rare or never used in the training text of a trial.

Counts are those of the training text, not of the complete corpus, because a token that one part
never uses may be common in another.
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
Pieces = NDArray[np.bool_]  # [n_vocab], whether each id is a word piece, as word_pieces says
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TokenGroups:
    """The ids of every group in ascending order, and the counts of all ids."""

    ids: Mapping[str, Ids]
    counts: Counts
    log_unigram: NDArray[np.float64]  # [n_vocab], as log_unigram gives it

    def rows(self) -> list[GroupMembersRow]:
        """Return one row for each group."""
        return [
            GroupMembersRow(group=group, tokens=ids.tolist(), counts=self.counts[ids].tolist())
            for group, ids in self.ids.items()
        ]


def token_groups(counts: Counts, seed: int, tokenizer: str) -> TokenGroups:
    """Form every group of TOKEN_GROUPS. A group may be empty: few bytes are rare in a text.

    Args:
        counts: occurrences of each token in the training text.
        seed: of the draws among tokens of equal count.
        tokenizer: its name in TOKENIZERS.
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
    """Return the log-prob of every token under the smoothed unigram model of a text, [n_vocab].

    Good 1953, *The Population Frequencies of Species and the Estimation of Population Parameters*:
    the tokens that never occur have the total probability N_1 / N, where N_1 tokens of the N in the
    text occur once (here it is kept between 1 / N and 1 - 1 / N). They share it equally. All other
    tokens share the rest in proportion to their counts.
    """
    unseen, singletons = (int(np.count_nonzero(counts == count)) for count in (0, 1))
    total = int(counts.sum())
    missing = min(max(singletons, 1), total - 1) / total if unseen else 0.0
    return np.log(np.where(counts > 0, (1 - missing) * counts / total, missing / max(unseen, 1)))


Choose = Callable[[Counts, Pieces, np.random.Generator], Ids]
"""A rule that chooses the tokens of a group."""


def common_100(counts: Counts, pieces: Pieces, rng: np.random.Generator) -> Ids:
    """Choose the 100 most frequent tokens (experiment B)."""
    return _sort_ties_at_random(np.flatnonzero(pieces & (counts > 0)), -counts, rng)[:100]


def rare_100(counts: Counts, pieces: Pieces, rng: np.random.Generator) -> Ids:
    """Choose 100 of the least frequent tokens that occur (experiment B).

    A text of fewer than 200 different word pieces gives fewer, because the 100 most frequent tokens
    are never chosen.
    """
    occurring_ids = np.flatnonzero(pieces & (counts > 0))
    left = max(0, len(occurring_ids) - 100)
    return _sort_ties_at_random(occurring_ids, counts, rng)[: min(100, left)]


def never_100(counts: Counts, pieces: Pieces, rng: np.random.Generator) -> Ids:
    """Choose 100 tokens that never occur (experiment B)."""
    return _sort_ties_at_random(np.flatnonzero(pieces & (counts == 0)), counts, rng)[:100]


def occurring(low: int, high: float) -> Choose:
    """Return the rule for all tokens that occur at least `low` and fewer than `high` times."""
    return lambda counts, pieces, rng: np.flatnonzero((counts >= low) & (counts < high))


def _sort_ties_at_random(ids: Ids, order: Counts, rng: np.random.Generator) -> Ids:
    """Sort ids by ascending `order`; ids of equal order come in random order."""
    shuffled = rng.permutation(ids)
    return shuffled[np.argsort(order[shuffled], kind="stable")]


TOKEN_GROUPS: dict[str, Choose] = {
    "common_100": common_100,
    "rare_100": rare_100,
    "never_100": never_100,
    # All tokens, in bins of frequency that are four times as wide from bin to bin.
    "never_used": occurring(0, 1),
    "singletons": occurring(1, 2),
    "count_2_3": occurring(2, 4),
    "count_4_15": occurring(4, 16),
    "count_16_63": occurring(16, 64),
    "count_64_255": occurring(64, 256),
    "count_256_up": occurring(256, np.inf),
}
