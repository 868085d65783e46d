import numpy as np
import pytest

from gptcore.config import VOCAB_SIZES, CorpusConfig
from gptcore.corpus import load_corpus
from gptcore.token_groups import TOKEN_GROUPS, log_unigram, token_groups
from gptcore.token_probs import MIN_TOKENS
from gptcore.tokenizer import word_pieces


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(CorpusConfig(name="pydocs"), context=8)


@pytest.mark.parametrize("group", TOKEN_GROUPS)
def test_every_group_holds_distinct_ids_in_order_and_is_recorded(group, corpus):
    groups = token_groups(corpus.counts(), 0, corpus.tokenizer)
    ids = groups.ids[group]
    assert len(ids) > 0
    assert np.array_equal(ids, np.unique(ids))
    (recorded,) = (row for row in groups.rows() if row.group == group)
    assert recorded.tokens == ids.tolist()
    assert recorded.counts == corpus.counts()[ids].tolist()


def test_groups_are_what_their_names_say(corpus):
    groups = token_groups(corpus.counts(), 0, corpus.tokenizer)
    counts = groups.counts
    common, rare, never = (groups.ids[name] for name in ("common_100", "rare_100", "never_100"))
    assert len(common) == len(rare) == len(never) == 100
    pieces = word_pieces("gpt2").copy()
    assert pieces[[*common, *rare, *never]].all()
    pieces[common] = False
    assert counts[common].min() >= counts[pieces].max()
    assert set(counts[rare]) == {1}
    assert set(counts[never]) == {0}
    assert set(counts[groups.ids["singletons"]]) == {1}
    assert set(counts[groups.ids["never_used"]]) == {0}
    assert set(counts[groups.ids["count_2_3"]]) == {2, 3}
    assert counts[groups.ids["count_16_63"]].min() >= 16
    assert counts[groups.ids["count_16_63"]].max() <= 63


def test_the_bins_hold_every_token_once(corpus):
    groups = token_groups(corpus.counts(), 0, corpus.tokenizer)
    bins = [ids for name, ids in groups.ids.items() if not name.endswith("_100")]
    assert np.array_equal(np.sort(np.concatenate(bins)), np.arange(VOCAB_SIZES["gpt2"]))


def test_ties_are_broken_by_the_seed(corpus):
    first, again, other = (
        token_groups(corpus.counts(), seed, corpus.tokenizer) for seed in (0, 0, 1)
    )
    for group in ("rare_100", "never_100"):
        assert np.array_equal(first.ids[group], again.ids[group])
        assert not np.array_equal(first.ids[group], other.ids[group])


def test_the_unigram_is_a_distribution_that_keeps_the_counts_order(corpus):
    counts = corpus.counts()
    log_prob = log_unigram(counts)
    assert np.exp(log_prob).sum() == pytest.approx(1)
    by_count = [log_prob[counts == count] for count in range(4)]
    assert all(len(set(values)) == 1 for values in by_count)
    assert by_count[0][0] < by_count[1][0] < by_count[2][0] < by_count[3][0]
    singletons, total = (counts == 1).sum(), counts.sum()
    assert np.exp(by_count[0]).sum() == pytest.approx(singletons / total)
    assert np.exp(by_count[1][0]) == pytest.approx((1 - singletons / total) / total)


def test_the_unigram_is_defined_without_singletons_and_without_unused_tokens():
    assert np.exp(log_unigram(np.array([2, 2, 0]))) == pytest.approx([3 / 8, 3 / 8, 1 / 4])
    assert np.exp(log_unigram(np.array([1, 1, 0]))) == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    assert np.exp(log_unigram(np.array([3, 1]))) == pytest.approx([3 / 4, 1 / 4])


def test_of_bytes_too_few_are_rare_for_a_mean():
    corpus = load_corpus(CorpusConfig(name="pydocs", tokenizer="bytes"), context=8)
    counts = corpus.counts()
    assert len(counts) == 257
    occurring = np.flatnonzero(counts)
    groups = token_groups(counts, 0, "bytes")
    assert len(groups.ids["common_100"]) == 100
    assert len(groups.ids["rare_100"]) == len(occurring) - 100 < MIN_TOKENS
    assert len(groups.ids["never_100"]) == 100
    assert (counts[groups.ids["never_100"]] == 0).all()
    assert 256 not in groups.ids["never_100"]  # <|endoftext|> is no byte


def test_no_token_is_both_common_and_rare():
    rng = np.random.default_rng(0)
    counts = np.append(rng.permutation(np.arange(1, 257)) * (np.arange(256) < 150), 0)
    groups = token_groups(counts, 0, "bytes")
    common, rare = (groups.ids[name] for name in ("common_100", "rare_100"))
    assert (len(common), len(rare)) == (100, 50)
    assert counts[rare].max() < counts[common].min()
