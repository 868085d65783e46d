"""Write files so that each appears complete or not at all, and say which can be trusted."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = Any
"""A value of a JSON file: None, a bool, a number, a text, a list, an object."""
JsonObject = dict[str, Json]
"""An object of a JSON file, as json.load gives it and json.dump takes it."""


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file by way of a temporary file, which is then renamed.

    Args:
        file: the file to write; its folder is created if need be.
        write: fills the temporary file whose path it is given.

    Raises:
        OSError: the file cannot be written; an older file of this name is left as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=_prefix(file)) as folder:
        write(Path(folder, file.name))
        Path(folder, file.name).replace(file)


def remove_leftovers(file: Path) -> None:
    """Remove temporary files of processes that were killed while they wrote the file."""
    for folder in file.parent.glob(f"{_prefix(file)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def is_trusted(place: Path) -> bool:
    """Return whether only this account and root own and can write a file or folder."""
    found = place.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def _prefix(file: Path) -> str:
    return f".{file.name}-"
