"""A trial's state in one file, so that it can end where it was cut off and differ in no bit.

The file holds the parameters, the optimiser's state and every row that the loop has made. There are
no generators to keep: batches and draws are functions of the config and the step.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gptcore.array import State
from gptcore.config import InputError, Scalar
from gptcore.files import remove_leftovers, write_atomically
from gptcore.records import SCHEMA_VERSION, TABLES, Row

SHARE_OF_TIME = 0.01
"""A trial spends at most this share of its time on saving."""


def checkpoint_file(runs_dir: Path, key: str) -> Path:
    """Where the trial with this key leaves its state, in debug mode and in a sweep alike."""
    return runs_dir / "checkpoints" / f"{key}.pt"


@dataclass(frozen=True)
class Progress:
    """How far a training loop is, beside the model and the optimiser."""

    step: int  # the next to be looked at
    rows: list[list[Row]]  # of every step before it
    seconds: float  # that those steps took


class Checkpoint:
    """The file of one trial, which stands for as long as the trial is unfinished."""

    def __init__(
        self,
        file: Path,
        identity: dict[str, Scalar],
        pause: float,
        keep: Callable[[Path], object] | None = None,
    ) -> None:
        """`identity`, as TrialConfig.identity gives it, is what decides the trial's numbers.

        `pause` is the least number of seconds between two savings. `keep` is called with the file
        each time it was written.
        """
        self.keep = keep
        self.file, self.least_pause = file, pause
        self.identity = {**identity, "schema_version": SCHEMA_VERSION}
        self.next = time.perf_counter() + pause

    def due(self) -> bool:
        return time.perf_counter() >= self.next

    def save(self, progress: Progress, state: State, begun: float | None = None) -> None:
        """Write everything to a file that then takes the old one's place.

        `begun`: when the saving began, by time.perf_counter, if others of an array were saved
        before. Raises InputError where it cannot be written; the old one is then left as it was.
        """
        start = begun or time.perf_counter()
        # To memory first: from writing to a disk, PyTorch raises what it also raises for faults.
        written = io.BytesIO()
        torch.save(
            {
                "identity": self.identity,
                "step": progress.step,
                "rows": progress.rows,
                "seconds": progress.seconds,
                **state,
            },
            written,
        )
        try:
            write_atomically(self.file, lambda file: file.write_bytes(written.getbuffer()))
        except OSError as error:
            raise InputError(f"the checkpoint {self.file} cannot be written: {error}") from error
        if self.keep:
            self.keep(self.file)
        end = time.perf_counter()
        self.next = end + max(self.least_pause, (end - start) / SHARE_OF_TIME)

    def load(self, device: torch.device) -> tuple[Progress, State | None]:
        """How far the file is, and the state it holds; the beginning where there is none.

        Raises InputError for a file that cannot be read or is of another trial.
        """
        if not self.file.exists():
            return Progress(0, [], 0.0), None
        try:
            # PyTorch writes checksums, but does not look at them.
            with zipfile.ZipFile(self.file) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile
            # weights_only: of what the file holds, nothing but tensors and rows is ever made.
            with torch.serialization.safe_globals([*TABLES.values()]):
                held = torch.load(self.file, map_location=device, weights_only=True)
            if differing := self._differences(held["identity"]):
                raise InputError(
                    f"the checkpoint {self.file} is of another trial ({differing}): "
                    "delete it to begin from step 0"
                )
            optimizer = {**held["optimizer"], "state": dict(held["optimizer"]["state"])}
            state = {"model": dict(held["model"]), "optimizer": optimizer}
            return Progress(held["step"], held["rows"], held["seconds"]), state
        except InputError:
            raise
        except Exception as error:  # a damaged file is as free in this as in what it holds
            raise InputError(
                f"the checkpoint {self.file} is damaged ({type(error).__name__}): "
                "delete it to begin from step 0"
            ) from error

    def _differences(self, identity: dict[str, Scalar]) -> str:
        """`init.seed is 0 there and 1 here`, for everything that differs."""
        return ", ".join(
            f"{name} is {identity.get(name)} there and {self.identity.get(name)} here"
            for name in {**self.identity, **identity}
            if identity.get(name) != self.identity.get(name)
        )

    def delete(self) -> None:
        self.file.unlink(missing_ok=True)
        remove_leftovers(self.file)
