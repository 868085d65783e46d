"""Corpora: find or download a text, tokenise it once, take a subset, and draw batches.

`$GPTCORE_CORPORA` names a folder that is searched for texts before the cache is.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import pydoc_data.topics
import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from gptcore.cache import cache_dir, cached_tokens, write_to_cache
from gptcore.config import VOCAB_SIZES, CorpusConfig, InputError, seed_of
from gptcore.files import is_trusted
from gptcore.records import FixedTextRow
from gptcore.tokenizer import encode, token_bytes

GULLIVER_URL = "https://www.gutenberg.org/cache/epub/829/pg829.txt"
GULLIVER_FILES = ("gulliver.txt", "pg829.txt", "829-0.txt")
GET_GULLIVER = (
    f"save Project Gutenberg's text 829 as {GULLIVER_FILES[0]} in a folder, and name that folder "
    "in GPTCORE_CORPORA"
)
DOWNLOAD_TRIES, DOWNLOAD_SECONDS = 2, 5.0


class CorpusUnavailable(InputError):
    """This machine does not have a corpus of CORPORA, and cannot download it."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The subset of a text that a trial uses for training and for measuring.

    Two fixed texts consist of `windows` windows each, which alternate at equal distances over the
    subset. Training uses the windows of `probe` too, and never those of `held_out`. The windows
    depend on the subset, `context` and `windows` only, so that all schemes and seeds are measured
    on the same texts.
    """

    name: str
    tokenizer: str
    subset: str
    digest: str  # SHA-256 of the complete text in UTF-8
    origin: str  # the file or address of the text
    tokens: NDArray[np.uint16]  # [n_tokens] of the subset, memory-mapped
    context: int
    windows: int

    def batch(self, step: int, *, batch_size: int, seed: int) -> NDArray[np.int64]:
        """Draw the sequences of one step, [batch_size, context + 1].

        The inputs of a model are all tokens but the last, and the targets all but the first.

        A sequence can start wherever it does not overlap a held-out window. Sequences are drawn
        with replacement. A batch depends on the step and the seed only, so that a trial can
        continue at any step.
        """
        rng = np.random.default_rng(seed_of("batch", seed, step))
        held_out = self.fixed_starts()["held_out"]
        gap_starts = np.array([0, *(held_out + self.context + 1)])
        starts_in_gap = np.array([*held_out, len(self.tokens)]) - gap_starts - self.context
        ends = np.maximum(starts_in_gap, 0).cumsum()
        draws = rng.integers(0, ends[-1], size=batch_size)
        gaps = ends.searchsorted(draws, side="right")
        return self._windows(gap_starts[gaps] + draws - np.array([0, *ends])[gaps])

    def fixed_starts(self) -> dict[str, NDArray[np.int64]]:
        """Return the first positions of the windows of each fixed text, [windows] each."""
        room = len(self.tokens) - (self.context + 1)
        starts = np.arange(2 * self.windows) * room // (2 * self.windows - 1)
        return {"probe": starts[0::2], "held_out": starts[1::2]}

    def fixed_texts(self) -> dict[str, NDArray[np.int64]]:
        """Return the windows of each fixed text, [windows, context + 1] each."""
        return {text: self._windows(starts) for text, starts in self.fixed_starts().items()}

    def fixed_text_rows(self) -> list[FixedTextRow]:
        """Return one row for each fixed text."""
        return [
            FixedTextRow(
                text=text,
                digest=hashlib.sha256(windows.astype("<u2").tobytes()).hexdigest(),
                starts=self.fixed_starts()[text].tolist(),
                tokens=windows.flatten().tolist(),
            )
            for text, windows in self.fixed_texts().items()
        ]

    def counts(self) -> NDArray[np.int64]:
        """Count each token of the tokenizer in the training text, [n_vocab]."""
        n_vocab = VOCAB_SIZES[self.tokenizer]
        total = np.bincount(self.tokens, minlength=n_vocab)
        held_out = self.fixed_texts()["held_out"].flatten()
        return total - np.bincount(held_out, minlength=n_vocab)

    def _windows(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        places = starts[:, None] + np.arange(self.context + 1)
        windows: NDArray[np.int64] = self.tokens[places].astype(np.int64)
        return windows


@dataclass(frozen=True)
class Source:
    """How to get a text, and the sections of it that corpus.subset can name."""

    read: Callable[[], tuple[str, str]]
    """Return the text and its origin."""
    sections: Callable[[str], dict[str, tuple[int, int]]]
    """Find the sections of a text by name: index of the first character, and after the last one."""


Texts = Mapping[str, tuple[str, str]]
"""Texts and their origins by corpus.name."""
NO_TEXTS: Texts = MappingProxyType({})


def load_corpus(config: CorpusConfig, context: int, preloaded_texts: Texts = NO_TEXTS) -> Corpus:
    """Load the corpus and the subset that a config names.

    Args:
        config: the section `corpus` of a trial.
        context: tokens per sequence.
        preloaded_texts: texts that are not read from this machine, by corpus.name.

    Raises:
        InputError: the text does not exist, is not UTF-8 or is too short, or the subset is unknown.
        CorpusUnavailable: a corpus of CORPORA is not on this machine and cannot be downloaded.
    """
    text, origin = preloaded_texts.get(config.name) or read_text(config.name)
    digest = hashlib.sha256(text.encode()).hexdigest()
    tokens = cached_tokens(digest, config.tokenizer, lambda: encode(config.tokenizer, text))
    start, stop = _subset_bounds(config, text, tokens)
    # This length keeps the fixed windows separate, with training text between held-out windows.
    if stop - start < (minimum := 2 * config.windows * (context + 1)):
        raise InputError(
            f"corpus.subset {config.subset} of corpus {config.name} has {stop - start} tokens: a "
            f"context of {context} with {config.windows} corpus.windows needs at least {minimum}"
        )
    return Corpus(
        name=config.name,
        tokenizer=config.tokenizer,
        subset=config.subset,
        digest=digest,
        origin=origin,
        tokens=tokens[start:stop],
        context=context,
        windows=config.windows,
    )


def read_text(name: str) -> tuple[str, str]:
    """Return the text and the origin of a corpus. Raises what load_corpus raises."""
    return CORPORA[name].read() if name in CORPORA else _read_file(name)


def _subset_bounds(config: CorpusConfig, text: str, tokens: NDArray[np.uint16]) -> tuple[int, int]:
    """Return the indices of the first token of a subset, and after its last one."""
    if config.subset == "all":
        return 0, len(tokens)
    sections = CORPORA[config.name].sections(text) if config.name in CORPORA else {}
    if config.subset in sections:
        # Find the token that contains a character, by the number of bytes up to each token's end.
        ends = np.cumsum(np.array([len(piece) for piece in token_bytes(config.tokenizer)])[tokens])
        offsets = [len(text[:char].encode()) for char in sections[config.subset]]
        start, stop = np.searchsorted(ends, offsets, side="right")
        return int(start), int(stop)
    if fractions := _fractions(config.subset):
        low, high = fractions
        return round(low * len(tokens)), round(high * len(tokens))
    named = "".join(f"{section}, " for section in sections)
    raise InputError(
        f"corpus.subset {config.subset!r} is unknown: corpus {config.name} has all, {named}"
        "and fractions from 0 to 1 such as 0-0.25"
    )


def canonical_subset(subset: str) -> str:
    """Write a subset in one way only, so that 0-.5 and 0.0-0.50 are one trial, and 0-1 is all."""
    fractions = _fractions(subset)
    if fractions == (0.0, 1.0):
        return "all"
    return f"{fractions[0]:.12g}-{fractions[1]:.12g}" if fractions else subset


def _fractions(subset: str) -> tuple[float, float] | None:
    """Parse `0-0.25` to (0.0, 0.25). Returns None for anything but two fractions in order."""
    number = r"([0-9]+\.?[0-9]*|\.[0-9]+)"
    if match := re.fullmatch(f"{number}-{number}", subset):
        low, high = float(match[1]), float(match[2])
        if 0 <= low < high <= 1:
            return low, high
    return None


def _read_file(path: str) -> tuple[str, str]:
    """Read a UTF-8 text file, with \\n at the end of lines. Returns the text and the path."""
    try:
        file = Path(path).expanduser()
        found = file.is_file()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ):  # a name that is too long, a folder without permission, an unknown user
        found = False
    if not found:
        raise InputError(
            f"corpus.name {path!r} is neither a corpus ({', '.join(CORPORA)}) nor a text file"
        )
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"corpus.name {path!r} cannot be read as UTF-8 text: {error}") from error
    if "\0" in text:
        raise InputError(f"corpus.name {path!r} is not a text: it contains NUL bytes")
    if not text.strip():
        raise InputError(f"corpus.name {path!r} is empty")
    return text, str(file.resolve())


def _read_gulliver() -> tuple[str, str]:
    """Find or download Swift, *Gulliver's Travels* (1726), Project Gutenberg's text 829.

    The licence and other words of Project Gutenberg are removed.
    """
    cache = cache_dir()
    folders = [cache]
    if folder := os.environ.get("GPTCORE_CORPORA"):
        if not Path(folder).is_dir():
            raise InputError(
                f"GPTCORE_CORPORA is {folder!r}, which is not a folder: set it to a folder of texts"
            )
        folders.insert(0, Path(folder))
    for file in (folder / name for folder in folders for name in GULLIVER_FILES):
        if file.is_file():
            is_cached = file.parent == cache
            if is_cached and not is_trusted(file):
                continue
            try:
                text, origin = _read_file(str(file))
            except InputError:
                if is_cached:
                    continue  # a damaged file of the cache is downloaded again
                raise
            text = strip_gutenberg(text)
            if is_cached and len(_gulliver_parts(text)) != 4:
                continue
            return text, origin
    text = strip_gutenberg(_download(GULLIVER_URL))
    if len(_gulliver_parts(text)) != 4:
        raise CorpusUnavailable(f"{GULLIVER_URL} does not send Gulliver's Travels: {GET_GULLIVER}")
    write_to_cache(
        cache / GULLIVER_FILES[0],
        lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"),
    )
    return text, GULLIVER_URL


def _download(url: str) -> str:
    """Download a text, in a few tries of a few seconds. Bytes that are not UTF-8 are replaced."""
    for attempt in range(DOWNLOAD_TRIES):
        time.sleep(attempt)
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:
                raw = bytearray()
                deadline = time.monotonic() + DOWNLOAD_SECONDS
                while piece := response.read1(1 << 16):
                    raw += piece
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{len(raw)} bytes in {DOWNLOAD_SECONDS:.0f} s")
                return raw.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
        except (OSError, http.client.HTTPException) as error:
            why = error
    raise CorpusUnavailable(f"corpus gulliver cannot be downloaded ({url}: {why}): {GET_GULLIVER}")


def strip_gutenberg(text: str) -> str:
    """Return the text between Project Gutenberg's start and end lines, if it has them."""
    start = re.search(r"^\*\*\* ?START OF TH.*\*\*\*\n", text, re.MULTILINE)
    end = re.search(r"^\*\*\* ?END OF TH.*\*\*\*$", text, re.MULTILINE)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip("\n") + "\n"


def _gulliver_parts(text: str) -> dict[str, tuple[int, int]]:
    """Find part-1 to part-4, each from its heading to the next heading or the end of the text."""
    # The table of contents has these headings too, either indented or earlier in the text.
    starts = [
        [match.start() for match in re.finditer(rf"^PART {roman}\. ", text, re.MULTILINE)]
        for roman in ("I", "II", "III", "IV")
    ]
    if not all(starts):
        return {}
    bounds = [found[-1] for found in starts] + [len(text)]
    return {f"part-{i + 1}": (bounds[i], bounds[i + 1]) for i in range(4)}


def _read_pydocs() -> tuple[str, str]:
    """Join the topics of Python's own manual: real English that every Python installation has."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics)), "pydoc_data.topics"


def _no_sections(text: str) -> dict[str, tuple[int, int]]:
    """Return no sections."""
    return {}


CORPORA: dict[str, Source] = {
    "gulliver": Source(_read_gulliver, _gulliver_parts),
    "pydocs": Source(_read_pydocs, _no_sections),
}
