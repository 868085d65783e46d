"""What the commands of every floor share: how bad arguments are reported, and --runs-dir."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import NoReturn

from gptcore.config import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's message."""
        raise InputError(message)

    def add_runs_dir(self) -> None:
        """Add --runs-dir, whose default is the environment's GPT_SWEEPS_RUNS_DIR, else `runs`."""
        default = Path(os.environ.get("GPT_SWEEPS_RUNS_DIR") or "runs")
        self.add_argument(
            "--runs-dir",
            type=Path,
            default=default,
            help=f"folder for runs, checkpoints and reports ({default})",
        )


def check_writable(folder: Path) -> None:
    """Make a folder. Raise InputError where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--runs-dir {folder} cannot be written: {error.strerror}") from error
