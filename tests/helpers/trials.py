"""Small trials, what they leave behind undisturbed, and trials that are cut off."""

import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from gptcore.config import TrialConfig, spelling
from gptcore.files import write_atomically
from gptcore.records import MemoryRecorder, Row, TrainingRow
from tracking.tables import write_tables

TINY = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.d_model": 16,
    "model.context": 16,
    "corpus.name": "pydocs",
    "corpus.tokenizer": "bytes",  # a vocabulary of 257: V seldom matters to what is asserted
    "train.steps": 5,
    "train.batch_size": 4,
    "train.device": "cpu",
    "probes.every": 2,
    "probes.histogram_every": 4,
}

WORDS = {**TINY, "corpus.tokenizer": "gpt2"}
"""The same over GPT-2's tokens, for what is said of rare tokens: few bytes are rare."""

KILLED = {**TINY, "train.steps": 1500, "train.checkpoint_seconds": 0.2, "probes.every": 50}
"""A trial of some seconds, long enough to be killed in the middle."""


def three_of(config: TrialConfig) -> list[TrialConfig]:
    """Three trials of an array that differ in all they may: start, data and text."""
    return [
        with_knobs(config, init__scheme="model5"),
        with_knobs(config, init__scheme="gpt2", init__seed=1, corpus__data_seed=3),
        with_knobs(config, init__scheme="normal", init__std=0.1, corpus__subset="0-0.5"),
    ]


class Cut(Exception):
    """Stands for whatever ends a process in the middle of a trial."""


class CutAt(MemoryRecorder):
    """Raises Cut once it has been told of a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def log(self, rows: Sequence[Row]) -> None:
        super().log(rows)
        if any(isinstance(row, TrainingRow) and row.step == self.step for row in rows):
            raise Cut


def flags(config: TrialConfig) -> list[str]:
    """The command line that asks for this one trial."""
    flat = config.to_flat()
    return [word for key, value in flat.items() for word in (f"--{key}", spelling(value))]


def with_knobs(config: TrialConfig, **knobs: object) -> TrialConfig:
    """Change some knobs of a trial: `optim__lr=1` stands for optim.lr."""
    return TrialConfig.from_flat(
        {**config.to_flat(), **{key.replace("__", "."): value for key, value in knobs.items()}}
    )


def key_of(config: TrialConfig) -> str:
    """Return the key under which a sweep would run the trial."""
    from gptcore.experiment import check_trial  # which imports torch; see conftest.py

    return config.key(check_trial(config).digest)


def undisturbed(config: TrialConfig) -> MemoryRecorder:
    """Return what a trial leaves that runs by itself, with nothing happening to it.

    That is a function of its config, so it is computed once for all tests of a session, and kept
    in a folder that the session's processes share.
    """
    file = Path(
        os.environ["GPT_SWEEPS_TEST_SHARED"], f"{key_of(config)}-{config.train.device}.pickle"
    )
    if not file.exists():
        from gptcore.experiment import run_trial

        recorder = MemoryRecorder()
        run_trial(config, recorder)
        write_atomically(file, lambda temporary: temporary.write_bytes(pickle.dumps(recorder)))
    found: MemoryRecorder = pickle.loads(file.read_bytes())
    return found


def undisturbed_tables(config: TrialConfig) -> dict[str, pl.DataFrame]:
    """Return the Parquet tables of an undisturbed trial, by name."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_tables(undisturbed(config).rows, Path(folder))
        return {file.stem: pl.read_parquet(file) for file in files}
