import os
import tempfile

import pytest

from gptcore.config import VOCAB_SIZES
from gptcore.tokenizer import (
    TOKENIZERS,
    bytes_encoding,
    encode,
    gpt2_encoding,
    token_bytes,
    word_pieces,
)

ODD_TEXT = "Brobdingnag’s\n\n  naïve 🐎 <|endoftext|>\t"


def test_ids_are_gpt2s():
    # From GPT-2's published vocabulary.
    assert encode("gpt2", "Hello world").tolist() == [15496, 995]
    assert encode("gpt2", " the").tolist() == [262]
    assert gpt2_encoding().eot_token == 50256


def test_ids_are_bytes():
    assert encode("bytes", ODD_TEXT).tolist() == list(ODD_TEXT.encode())
    assert bytes_encoding().eot_token == 256
    assert token_bytes("bytes")[:256] == tuple(bytes([byte]) for byte in range(256))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_any_text_comes_back(tokenizer):
    assert TOKENIZERS[tokenizer].encoding().decode(encode(tokenizer, ODD_TEXT).tolist()) == ODD_TEXT


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_sizes_are_those_that_a_config_goes_by(tokenizer):
    assert TOKENIZERS.keys() == VOCAB_SIZES.keys()
    encoding = TOKENIZERS[tokenizer].encoding()
    assert encoding.n_vocab == VOCAB_SIZES[tokenizer] == len(token_bytes(tokenizer))
    assert encoding.eot_token == encoding.n_vocab - 1


def test_word_pieces_are_text_of_more_than_one_byte():
    pieces = word_pieces("gpt2")
    assert pieces[995]
    assert not pieces[gpt2_encoding().eot_token]
    assert not pieces[:256].any()
    undecodable = next(i for i, piece in enumerate(token_bytes("gpt2")) if piece == b"\xe2\x80")
    assert not pieces[undecodable]


def test_of_bytes_every_one_is_a_piece():
    assert word_pieces("bytes").tolist() == [True] * 256 + [False]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("blank", [" ", "\n", " \t\r\n", "\u3000", "\x85", "\xa0"])
@pytest.mark.parametrize("after", ["", "word", ".", "\x1cword", "'s"])
def test_long_runs_of_blanks_have_the_tokens_of_tiktoken(tokenizer, blank, after):
    """They are cut out of the text, and none is so long that tiktoken could not read it whole."""
    text = f"before{blank * 15000}{after} and{blank * 12000}"
    whole = TOKENIZERS[tokenizer].encoding().encode_ordinary(text)
    assert encode(tokenizer, text).tolist() == whole


@pytest.mark.parametrize("blank", [" ", "\n", " \n", "a", "."])
def test_a_million_characters_in_a_row_are_no_reason_to_stop(blank):
    text = blank * 10**6 + "end"
    pieces = token_bytes("gpt2")
    assert b"".join(pieces[token] for token in encode("gpt2", text)).decode() == text


def test_no_copy_of_the_vocabulary_is_left_or_used_where_all_accounts_write(tmp_path, monkeypatch):
    """An unreadable copy of another account would end the command."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert gpt2_encoding.__wrapped__().n_vocab == 50257  # not what the process has loaded before
    assert list(tmp_path.iterdir()) == []
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
