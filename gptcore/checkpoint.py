"""Save the state of a trial in one file, so that an interrupted trial continues with the same bits.

The file holds the parameters, the state of the optimiser, and every row of the training loop. It
holds no random generators: batches and draws are functions of the config and the step.
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
"""A trial spends at most this fraction of its time on saving."""


def checkpoint_file(runs_dir: Path, key: str) -> Path:
    """Return the checkpoint file of the trial with this key, in a sweep and in debug mode."""
    return runs_dir / "checkpoints" / f"{key}.pt"


@dataclass(frozen=True)
class Progress:
    """How far a training loop has come. The state of model and optimiser is stored separately."""

    step: int  # the next step to compute
    rows: list[list[Row]]  # the rows of every earlier step
    seconds: float  # the time of the earlier steps


class Checkpoint:
    """The checkpoint file of one trial, which exists until the trial has finished."""

    def __init__(
        self,
        file: Path,
        identity: dict[str, Scalar],
        pause: float,
        after_save: Callable[[Path], object] | None = None,
    ) -> None:
        """Open the checkpoint of a trial; no file is read or written yet.

        Args:
            file: where the checkpoint is.
            identity: all that decides the numbers of the trial, from TrialConfig.identity.
            pause: the shortest time between two saves, in seconds.
            after_save: called with the file each time it was written.
        """
        self.after_save = after_save
        self.file, self.min_pause = file, pause
        self.identity = {**identity, "schema_version": SCHEMA_VERSION}
        self.next_save = time.perf_counter() + pause

    def due(self) -> bool:
        """Return whether it is time to save."""
        return time.perf_counter() >= self.next_save

    def save(self, progress: Progress, state: State, start: float | None = None) -> None:
        """Write the checkpoint, which replaces the older one.

        Args:
            start: when the saving began, by time.perf_counter(); give it when other trials of an
                array were saved just before, so that their time counts too.

        Raises:
            InputError: the file cannot be written; the older one is left as it was.
        """
        start = start or time.perf_counter()
        # To memory first: when PyTorch writes to a disk that fails, it raises a RuntimeError, as it
        # does for a bug.
        buffer = io.BytesIO()
        torch.save(
            {
                "identity": self.identity,
                "step": progress.step,
                "rows": progress.rows,
                "seconds": progress.seconds,
                **state,
            },
            buffer,
        )
        try:
            write_atomically(self.file, lambda file: file.write_bytes(buffer.getbuffer()))
        except OSError as error:
            raise InputError(f"the checkpoint {self.file} cannot be written: {error}") from error
        if self.after_save:
            self.after_save(self.file)
        end = time.perf_counter()
        self.next_save = end + max(self.min_pause, (end - start) / SHARE_OF_TIME)

    def load(self, device: torch.device) -> tuple[Progress, State | None]:
        """Read the checkpoint, onto this device.

        Returns:
            The progress of the trial and its state; step 0 and None where there is no file.

        Raises:
            InputError: the file is damaged or belongs to another trial.
        """
        if not self.file.exists():
            return Progress(0, [], 0.0), None
        try:
            # PyTorch writes checksums, but does not compare them when it loads.
            with zipfile.ZipFile(self.file) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile
            # weights_only: no object is created but tensors, rows and plain Python values.
            with torch.serialization.safe_globals([*TABLES.values()]):
                stored = torch.load(self.file, map_location=device, weights_only=True)
            if differing := self._differences(stored["identity"]):
                raise InputError(
                    f"the checkpoint {self.file} belongs to another trial ({differing}): "
                    "delete it to begin from step 0"
                )
            optimizer = {**stored["optimizer"], "state": dict(stored["optimizer"]["state"])}
            state = {"model": dict(stored["model"]), "optimizer": optimizer}
            return Progress(stored["step"], stored["rows"], stored["seconds"]), state
        except InputError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise InputError(
                f"the checkpoint {self.file} is damaged ({type(error).__name__}): "
                "delete it to begin from step 0"
            ) from error

    def _differences(self, stored: dict[str, Scalar]) -> str:
        """List what differs: `init.seed is 0 in the file and 1 in this trial`."""
        return ", ".join(
            f"{name} is {stored.get(name)} in the file and {self.identity.get(name)} in this trial"
            for name in {**self.identity, **stored}
            if stored.get(name) != self.identity.get(name)
        )

    def delete(self) -> None:
        """Delete the file, and temporary files that a killed process left."""
        self.file.unlink(missing_ok=True)
        remove_leftovers(self.file)
