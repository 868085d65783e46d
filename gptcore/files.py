"""Files that appear whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file that then takes the name `file`, and its folder if need be.

    Raises OSError where that cannot be done; what was there before is then left as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        write(Path(folder, file.name))
        Path(folder, file.name).replace(file)
