import numpy as np
import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus import load_corpus
from gptcore.token_groups import TOKEN_GROUPS, token_groups
from gptcore.tokenizer import is_word_piece


@pytest.fixture(scope="module")
def tokens():
    return load_corpus(CorpusConfig(name="pydocs"), 8).tokens


@pytest.mark.parametrize("group", TOKEN_GROUPS)
def test_every_group_holds_distinct_ids_in_order_and_is_recorded(group, tokens):
    groups = token_groups(tokens, seed=0)
    ids = groups.ids[group]
    assert len(ids) > 0
    assert np.array_equal(ids, np.unique(ids))
    (recorded,) = (row for row in groups.rows() if row.group == group)
    assert recorded.tokens == ids.tolist()
    assert sum(recorded.counts) == np.isin(tokens, ids).sum()


def test_groups_are_what_their_names_say(tokens):
    groups = token_groups(tokens, seed=0)
    counts = groups.counts
    common, rare, never = (groups.ids[name] for name in ("common_100", "rare_100", "never_100"))
    assert len(common) == len(rare) == len(never) == 100
    pieces = np.array([is_word_piece(token) for token in range(len(counts))])
    pieces[common] = False
    assert counts[common].min() >= counts[pieces].max()
    assert set(counts[rare]) == {1}
    assert set(counts[never]) == {0}
    assert all(is_word_piece(int(token)) for token in [*common, *rare, *never])
    assert np.array_equal(groups.ids["singletons"], np.flatnonzero(counts == 1))
    assert np.array_equal(groups.ids["never_used"], np.flatnonzero(counts == 0))


def test_ties_are_broken_by_the_seed(tokens):
    first, again, other = (token_groups(tokens, seed) for seed in (0, 0, 1))
    for group in ("rare_100", "never_100"):
        assert np.array_equal(first.ids[group], again.ids[group])
        assert not np.array_equal(first.ids[group], other.ids[group])


def test_counts_are_of_the_subset():
    part = load_corpus(CorpusConfig(name="pydocs", subset="0-0.1"), 8).tokens
    assert token_groups(part, 0).counts.sum() == len(part)
