"""The cache: texts and tokens that this account keeps between runs.

A text is tokenised once per machine into `<cache>/<digest>.npy` (uint16), or
`<digest>-bytes.npy` for the tokenizer `bytes`, and all trials memory-map this file. The cache is
~/.cache/gpt-sweeps, or `$GPTCORE_CACHE`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptcore.config import InputError
from gptcore.files import is_trusted, write_atomically


def cache_dir() -> Path:
    """Return the folder of the cache, which need not exist yet.

    Raises:
        InputError: another account can write into it, and so choose what trials read.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("GPTCORE_CACHE") or Path(base) / "gpt-sweeps").expanduser()
    if folder.is_dir() and not is_trusted(folder):
        raise InputError(
            f"other accounts can write into the corpus cache {folder}: set GPTCORE_CACHE to a "
            "folder of your own, or close this one by chmod go-w"
        )
    return folder


def write_to_cache(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file in the cache, for this account alone.

    Args:
        file: the file to write.
        write: fills the temporary file whose path it is given.

    Raises:
        InputError: it cannot be written.
    """

    def write_private(temporary: Path) -> None:
        write(temporary)
        temporary.chmod(0o600)

    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(file, write_private)
    except OSError as error:
        raise InputError(
            f"the corpus cache {file.parent} cannot be written ({error}): "
            "set GPTCORE_CACHE to a folder that can be written"
        ) from error


def cached_tokens(
    digest: str, tokenizer: str, encode: Callable[[], NDArray[np.uint16]]
) -> NDArray[np.uint16]:
    """Return the tokens of a text, memory-mapped from the cache; tokenise it if need be.

    A file that is damaged, or that another account may have written, is made anew.

    Args:
        digest: of the text.
        tokenizer: its name.
        encode: tokenises the text.

    Raises:
        InputError: the cache cannot be trusted or written.
    """
    # The tokens of GPT-2 have no suffix, because existing caches have them under this name.
    file = cache_dir() / (f"{digest}.npy" if tokenizer == "gpt2" else f"{digest}-{tokenizer}.npy")
    cached = _read_tokens(file, digest, tokenizer)
    if cached is not None:
        return cached
    tokens = encode()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as opened:
            np.save(opened, tokens)
            opened.write(_digest_of(tokens, digest, tokenizer))

    write_to_cache(file, write)
    written: NDArray[np.uint16] = np.load(file, mmap_mode="r", allow_pickle=False)
    return written


def _read_tokens(file: Path, text_digest: str, tokenizer: str) -> NDArray[np.uint16] | None:
    """Read a file of tokens. Return None where it does not hold the tokens of this text."""
    try:
        if not is_trusted(file):
            return None
        tokens: NDArray[np.uint16] = np.load(file, mmap_mode="r", allow_pickle=False)
        with file.open("rb") as opened:
            opened.seek(-hashlib.sha256().digest_size, os.SEEK_END)
            kept = opened.read()
    except (OSError, ValueError, EOFError):  # it is missing, cut short, or no array
        return None
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        return None
    return tokens if kept == _digest_of(tokens, text_digest, tokenizer) else None


def _digest_of(tokens: NDArray[np.uint16], text_digest: str, tokenizer: str) -> bytes:
    """Return the digest that follows the tokens in their file."""
    digest = hashlib.sha256(f"{tokenizer} tokens of {text_digest}".encode())
    digest.update(np.ascontiguousarray(tokens).data)
    return digest.digest()
