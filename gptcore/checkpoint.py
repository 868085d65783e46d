"""A trial's state in one file, so that it can end where it was cut off and differ in no bit.

The file holds the parameters, the optimiser's state and every row that the loop has made. There are
no generators to keep: batches and draws are functions of the config and the step.
"""

from __future__ import annotations

import contextlib
import pickle
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from gptcore.config import InputError, Scalar
from gptcore.model import GPT
from gptcore.records import SCHEMA_VERSION, TABLE_OF, TABLES, Row

SECONDS_BETWEEN = 10.0
SHARE_OF_TIME = 0.01
"""A trial saves at most this often, and spends at most this share of its time on it."""


def checkpoint_file(runs_dir: Path, key: str) -> Path:
    """Where the trial with this key leaves its state, in debug mode and in a sweep alike."""
    return runs_dir / "checkpoints" / f"{key}.pt"


@dataclass
class Progress:
    """How far a training loop is, beside the model and the optimiser."""

    step: int = 0  # the next to be looked at
    rows: list[list[Row]] = field(default_factory=list)  # of every step before it
    seconds: float = 0.0  # that those steps took


class Checkpoint:
    """The file of one trial, which stands for as long as the trial is unfinished."""

    def __init__(self, file: Path, identity: dict[str, Scalar]) -> None:
        """`identity` is what decides the trial's numbers, as TrialConfig.identity gives it."""
        self.file = file
        self.identity = {**identity, "schema_version": SCHEMA_VERSION}
        self.last, self.pause = time.perf_counter(), SECONDS_BETWEEN

    def due(self) -> bool:
        return time.perf_counter() - self.last >= self.pause

    def save(self, progress: Progress, model: GPT, optimizer: Optimizer) -> None:
        """Write everything to a file that then takes the old one's place.

        Raises InputError where it cannot be written; the old one is then left as it was.
        """
        start = time.perf_counter()
        state = {
            "identity": self.identity,
            "step": progress.step,
            "seconds": progress.seconds,
            "rows": [packed(rows) for rows in progress.rows],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        partial = self.file.with_suffix(".partial")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, partial)
            partial.replace(self.file)
        except (OSError, RuntimeError) as error:  # PyTorch's own for a full disk
            with contextlib.suppress(OSError):
                partial.unlink()
            why = str(error).strip().partition("\n")[0]
            raise InputError(f"the checkpoint {self.file} cannot be written: {why}") from error
        self.last = time.perf_counter()
        self.pause = max(SECONDS_BETWEEN, (self.last - start) / SHARE_OF_TIME)

    def load(self, model: GPT, optimizer: Optimizer) -> Progress:
        """Bring model and optimiser to where the file left them; the beginning where there is none.

        Raises InputError for a file that cannot be read or is of another trial.
        """
        if not self.file.exists():
            return Progress()
        try:
            # PyTorch writes checksums, but does not look at them.
            with zipfile.ZipFile(self.file) as archive:
                if spoiled := archive.testzip():
                    raise zipfile.BadZipFile(f"the checksum of {spoiled} is wrong")
            # weights_only: what the file holds is read as data, never run as code.
            state = torch.load(self.file, map_location=model.wte.weight.device, weights_only=True)
            differing = self._differences(state["identity"])
        except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, LookupError) as error:
            why = str(error).strip().partition("\n")[0]
            raise InputError(
                f"the checkpoint {self.file} is damaged ({type(error).__name__}: {why}): "
                "delete it to begin from step 0"
            ) from error
        if differing:
            raise InputError(
                f"the checkpoint {self.file} is of another trial ({differing}): "
                "delete it to begin from step 0"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rows = [unpacked(rows) for rows in state["rows"]]
        return Progress(state["step"], rows, state["seconds"])

    def _differences(self, identity: dict[str, Scalar]) -> str:
        """`init.seed is 0 there and 1 here`, for everything that differs."""
        return ", ".join(
            f"{name} is {identity.get(name)} there and {self.identity.get(name)} here"
            for name in {**self.identity, **identity}
            if identity.get(name) != self.identity.get(name)
        )

    def delete(self) -> None:
        self.file.unlink(missing_ok=True)


def packed(rows: Sequence[Row]) -> list[Any]:
    """Rows as the lists and numbers that a weights_only load takes: [table, values]."""
    return [
        [TABLE_OF[type(row)], [getattr(row, name) for name in _names(type(row))]] for row in rows
    ]


def unpacked(rows: Sequence[Any]) -> list[Row]:
    """What packed made a list of."""
    return [
        TABLES[table](**dict(zip(_names(TABLES[table]), values, strict=True)))
        for table, values in rows
    ]


def _names(row_type: type[Row]) -> list[str]:
    return [entry.name for entry in fields(row_type)]
