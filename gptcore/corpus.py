"""Texts to train on: find or fetch one, tokenise it once, cut a subset, draw batches.

A corpus is tokenised once per machine into `<cache>/<digest>.npy` (uint16; by bytes into
`<digest>-bytes.npy`), which every trial memory-maps. `$GPTCORE_CACHE` moves the cache from
~/.cache/gpt-sweeps; `$GPTCORE_CORPORA` names a folder of texts to look in first.
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

from gptcore.config import VOCAB_SIZES, CorpusConfig, InputError, seed_of
from gptcore.files import write_atomically
from gptcore.records import FixedTextRow
from gptcore.tokenizer import encode, token_bytes

GULLIVER_URL = "https://www.gutenberg.org/cache/epub/829/pg829.txt"
GULLIVER_FILES = ("gulliver.txt", "pg829.txt", "829-0.txt")
GET_GULLIVER = (
    f"put Project Gutenberg's text 829 as {GULLIVER_FILES[0]} into a folder and name that folder "
    "in GPTCORE_CORPORA"
)
DOWNLOAD_TRIES, DOWNLOAD_SECONDS = 2, 5.0


class CorpusUnavailable(InputError):
    """A corpus of CORPORA that this machine neither has nor can fetch."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The part of a text that a trial reads: all of it but the held-out windows is trained on.

    Two fixed texts of so many windows each lie evenly over it, by turns: `probe` is read in
    training too, `held_out` never. They depend on nothing but the subset, `context` and `windows`,
    so every scheme and seed is measured on the same ones.
    """

    name: str
    tokenizer: str
    subset: str
    digest: str  # SHA-256 of the whole text, UTF-8
    origin: str  # where the text came from
    tokens: NDArray[np.uint16]  # [n_tokens] of the subset, memory-mapped
    context: int
    windows: int

    def batch(
        self, step: int, *, batch_size: int, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and next-token targets of one step, [batch_size, context] each.

        Sequences start wherever they meet no held-out window, drawn with replacement. A batch is a
        function of the step and the seed alone, so a trial can begin again at any step.
        """
        rng = np.random.default_rng(seed_of("batch", seed, step))
        held_out = self.fixed_starts()["held_out"]
        gap_starts = np.array([0, *(held_out + self.context + 1)])
        starts_in_gap = np.array([*held_out, len(self.tokens)]) - gap_starts - self.context
        ends = np.maximum(starts_in_gap, 0).cumsum()
        draws = rng.integers(0, ends[-1], size=batch_size)
        gaps = ends.searchsorted(draws, side="right")
        windows = self._windows(gap_starts[gaps] + draws - np.array([0, *ends])[gaps])
        return windows[:, :-1], windows[:, 1:]

    def fixed_starts(self) -> dict[str, NDArray[np.int64]]:
        """Where the windows of each fixed text begin, [windows] each."""
        room = len(self.tokens) - (self.context + 1)
        starts = np.arange(2 * self.windows) * room // (2 * self.windows - 1)
        return {"probe": starts[0::2], "held_out": starts[1::2]}

    def fixed_texts(self) -> dict[str, NDArray[np.int64]]:
        """The windows of each fixed text, [windows, context + 1] each."""
        return {text: self._windows(starts) for text, starts in self.fixed_starts().items()}

    def fixed_text_rows(self) -> list[FixedTextRow]:
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
        """How often each token of the tokenizer occurs in what is trained on, [n_vocab]."""
        n_vocab = VOCAB_SIZES[self.tokenizer]
        everywhere = np.bincount(self.tokens, minlength=n_vocab)
        held_out = self.fixed_texts()["held_out"].flatten()
        return everywhere - np.bincount(held_out, minlength=n_vocab)

    def _windows(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)


@dataclass(frozen=True)
class Source:
    """How to come by a text, and the named sections one can cut from it."""

    # -> (text, origin)
    read: Callable[[], tuple[str, str]]
    # text -> first and past-last character of each section, by its name
    sections: Callable[[str], dict[str, tuple[int, int]]]


Texts = Mapping[str, tuple[str, str]]
"""By corpus.name a text and its origin."""
NO_TEXTS: Texts = MappingProxyType({})


def load_corpus(config: CorpusConfig, context: int, preloaded_texts: Texts = NO_TEXTS) -> Corpus:
    """The corpus and subset that a config names, with room for its fixed texts and for training.

    Raises InputError for a text that is not there, is no UTF-8 text or is too short, and for an
    unknown subset; CorpusUnavailable where a corpus of CORPORA cannot be had.
    """
    text, origin = preloaded_texts.get(config.name) or read_text(config.name)
    digest = hashlib.sha256(text.encode()).hexdigest()
    tokens = _tokenised(text, digest, config.tokenizer)
    start, stop = _subset_bounds(config, text, tokens)
    # The fixed windows do not touch then, and between two held-out ones is room to train on.
    if stop - start < (least := 2 * config.windows * (context + 1)):
        raise InputError(
            f"corpus.subset {config.subset} of corpus {config.name} has {stop - start} tokens: a "
            f"context of {context} with {config.windows} corpus.windows needs at least {least}"
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
    """(text, origin) of a corpus; raises as load_corpus does."""
    return CORPORA[name].read() if name in CORPORA else _read_file(name)


def _subset_bounds(config: CorpusConfig, text: str, tokens: NDArray[np.uint16]) -> tuple[int, int]:
    """First and past-last token of a subset."""
    if config.subset == "all":
        return 0, len(tokens)
    sections = CORPORA[config.name].sections(text) if config.name in CORPORA else {}
    if config.subset in sections:
        # The token in which a character of the text lies, by the bytes before each token's end.
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
    """The one spelling of a subset, so that 0-.5 and 0.0-0.50 are one trial, and 0-1 is all."""
    fractions = _fractions(subset)
    if fractions == (0.0, 1.0):
        return "all"
    return f"{fractions[0]:.12g}-{fractions[1]:.12g}" if fractions else subset


def _fractions(subset: str) -> tuple[float, float] | None:
    """(0.0, 0.25) of `0-0.25`; None for what does not name a part of a text by fractions."""
    number = r"([0-9]+\.?[0-9]*|\.[0-9]+)"
    if match := re.fullmatch(f"{number}-{number}", subset):
        low, high = float(match[1]), float(match[2])
        if 0 <= low < high <= 1:
            return low, high
    return None


def _read_file(path: str) -> tuple[str, str]:
    """A UTF-8 text file, line ends made \\n."""
    try:
        file = Path(path).expanduser()
        found = file.is_file()
    except (OSError, RuntimeError, ValueError):  # too long, not to be searched, no such user
        found = False
    if not found:
        raise InputError(
            f"corpus.name {path!r} is neither a corpus ({', '.join(CORPORA)}) nor a text file"
        )
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"corpus.name {path!r} cannot be read as a UTF-8 text: {error}") from error
    if "\0" in text:
        raise InputError(f"corpus.name {path!r} is no text: it holds NUL bytes")
    if not text.strip():
        raise InputError(f"corpus.name {path!r} is empty")
    return text, str(file.resolve())


def _tokenised(text: str, digest: str, tokenizer: str) -> NDArray[np.uint16]:
    """The text's tokens, memory-mapped from the cache, where the first caller puts them."""
    # GPT-2's came first, and keep the name that they have in everybody's cache.
    file = cache_dir() / (f"{digest}.npy" if tokenizer == "gpt2" else f"{digest}-{tokenizer}.npy")
    if not file.exists():
        tokens = encode(tokenizer, text)
        _keep(file, lambda temporary: np.save(temporary, tokens))
    return np.load(file, mmap_mode="r")


def cache_dir() -> Path:
    """Where texts and tokens are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GPTCORE_CACHE") or Path(base) / "gpt-sweeps").expanduser()


def _keep(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file of the cache. Raises InputError where it cannot be written."""
    try:
        write_atomically(file, write)
    except OSError as error:
        raise InputError(
            f"the corpus cache {file.parent} cannot be written ({error}): "
            "set GPTCORE_CACHE to a folder that can"
        ) from error


def _read_gulliver() -> tuple[str, str]:
    """Swift, *Gulliver's Travels* (1726), Project Gutenberg 829, without Gutenberg's own words."""
    folders = [cache_dir()]
    if folder := os.environ.get("GPTCORE_CORPORA"):
        if not Path(folder).is_dir():
            raise InputError(f"GPTCORE_CORPORA is {folder!r}, which is no folder")
        folders.insert(0, Path(folder))
    for file in (folder / name for folder in folders for name in GULLIVER_FILES):
        if file.is_file():
            text, origin = _read_file(str(file))
            return strip_gutenberg(text), origin
    text = strip_gutenberg(_download(GULLIVER_URL))
    if len(_gulliver_parts(text)) != 4:
        raise CorpusUnavailable(f"{GULLIVER_URL} does not send Gulliver's Travels: {GET_GULLIVER}")
    _keep(
        cache_dir() / GULLIVER_FILES[0],
        lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"),
    )
    return text, GULLIVER_URL


def _download(url: str) -> str:
    """A text, in a few tries of a few seconds each. What is no UTF-8 in it is replaced."""
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
    raise CorpusUnavailable(f"corpus gulliver could not be had ({url}: {why}): {GET_GULLIVER}")


def strip_gutenberg(text: str) -> str:
    """The book between Project Gutenberg's start and end lines, where it has them."""
    start = re.search(r"^\*\*\* ?START OF TH.*\*\*\*\n", text, re.MULTILINE)
    end = re.search(r"^\*\*\* ?END OF TH.*\*\*\*$", text, re.MULTILINE)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip("\n") + "\n"


def _gulliver_parts(text: str) -> dict[str, tuple[int, int]]:
    """part-1 .. part-4: each from its heading to the next, the last to the end of the text."""
    # The table of contents names each part too, on an indented or an earlier line.
    starts = [
        [match.start() for match in re.finditer(rf"^PART {roman}\. ", text, re.MULTILINE)]
        for roman in ("I", "II", "III", "IV")
    ]
    if not all(starts):
        return {}
    bounds = [found[-1] for found in starts] + [len(text)]
    return {f"part-{i + 1}": (bounds[i], bounds[i + 1]) for i in range(4)}


def _read_pydocs() -> tuple[str, str]:
    """The topics of Python's own manual: real English that every Python carries."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics)), "pydoc_data.topics"


def _no_sections(text: str) -> dict[str, tuple[int, int]]:
    return {}


CORPORA: dict[str, Source] = {
    "gulliver": Source(_read_gulliver, _gulliver_parts),
    "pydocs": Source(_read_pydocs, _no_sections),
}
