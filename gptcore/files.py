"""Files that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file that then takes the name `file`, and its folder if need be.

    Raises OSError where that cannot be done; what was there before is then left as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=_prefix(file)) as folder:
        write(Path(folder, file.name))
        Path(folder, file.name).replace(file)


def remove_leftovers(file: Path) -> None:
    """Remove what processes left that were killed as they wrote the file."""
    for folder in file.parent.glob(f"{_prefix(file)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(file: Path) -> str:
    return f".{file.name}-"
