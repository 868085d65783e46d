"""Which tokens are common, rare or never used in the text that a trial trains on.

Counts are of the subset that the trial reads, never of the whole corpus: a token unused in one part
may be common in another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptcore.config import seed_of
from gptcore.records import GroupMembersRow
from gptcore.tokenizer import VOCAB_SIZE, is_word_piece

Counts = NDArray[np.int64]  # [VOCAB_SIZE], occurrences of each id
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TokenGroups:
    """The ids of every group, ascending, and how often each id occurs in the trial's text."""

    ids: Mapping[str, Ids]
    counts: Counts

    def rows(self) -> list[GroupMembersRow]:
        return [
            GroupMembersRow(group=group, tokens=ids.tolist(), counts=self.counts[ids].tolist())
            for group, ids in self.ids.items()
        ]


def token_groups(tokens: NDArray[np.uint16], seed: int) -> TokenGroups:
    """Every group of TOKEN_GROUPS for a text; `seed` decides draws among tied tokens."""
    counts = np.bincount(tokens, minlength=VOCAB_SIZE)
    ids = {
        name: np.sort(choose(counts, np.random.default_rng(seed_of("token_groups", name, seed))))
        for name, choose in TOKEN_GROUPS.items()
    }
    return TokenGroups(ids, counts)


def common_100(counts: Counts, rng: np.random.Generator) -> Ids:
    """The 100 most frequent tokens (experiment B)."""
    return _first_100(np.flatnonzero(counts), -counts, rng)


def rare_100(counts: Counts, rng: np.random.Generator) -> Ids:
    """100 of the least frequent tokens that do occur (experiment B)."""
    return _first_100(np.flatnonzero(counts), counts, rng)


def never_100(counts: Counts, rng: np.random.Generator) -> Ids:
    """100 tokens that never occur (experiment B)."""
    return _first_100(np.flatnonzero(counts == 0), counts, rng)


def singletons(counts: Counts, rng: np.random.Generator) -> Ids:
    """All tokens that occur exactly once."""
    return np.flatnonzero(counts == 1)


def never_used(counts: Counts, rng: np.random.Generator) -> Ids:
    """All tokens that never occur."""
    return np.flatnonzero(counts == 0)


def _first_100(ids: Ids, order: Counts, rng: np.random.Generator) -> Ids:
    """The 100 ids that come first in `order`, byte and undecodable ids left out, ties drawn."""
    pieces = np.array([token for token in ids if is_word_piece(token)], dtype=np.int64)
    shuffled = rng.permutation(pieces)
    return shuffled[np.argsort(order[shuffled], kind="stable")][:100]


TOKEN_GROUPS: dict[str, Callable[[Counts, np.random.Generator], Ids]] = {
    "common_100": common_100,
    "rare_100": rare_100,
    "never_100": never_100,
    "singletons": singletons,
    "never_used": never_used,
}
