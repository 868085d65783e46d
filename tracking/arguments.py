"""What the commands of every floor share: how bad arguments are reported, and --runs-dir."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import NoReturn

from gptcore.config import InputError
from tracking.access import share, write_for
from tracking.untrusted import printable


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's message."""
        raise InputError(message)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse arguments; `-1e-3` is a number and not an option, and `--` is never a value."""
        given = [_as_decimal(text) for text in (sys.argv[1:] if args is None else args)]
        for text in given:
            if text.startswith("--") and text.endswith("=--"):
                self.error(f"argument {text[:-3]}: it takes a value, not --")
        return super().parse_known_args(given, namespace)

    def add_runs_dir(self) -> None:
        """Add --runs-dir, whose default is the environment's GPT_SWEEPS_RUNS_DIR, else `runs`."""
        default = os.environ.get("GPT_SWEEPS_RUNS_DIR") or "runs"
        self.add_argument(
            "--runs-dir",
            type=runs_folder,
            default=default,  # argparse parses a default that is a text like a given one
            help=f"folder for runs, checkpoints and reports ({default})".replace("%", "%%"),
        )


def _as_decimal(text: str) -> str:
    """Write `-1e-3` as `-0.001`, because argparse takes the former for an option."""
    if not re.fullmatch(r"-([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]{1,3}", text):
        return text
    return format(Decimal(text), "f")


LONGEST_FOLDER = 400
"""Bytes in the path of a runs folder: SQLite takes 512 for the path of a database and its journal.
"""


def runs_folder(text: str) -> Path:
    """Parse --runs-dir: a folder of this machine, which need not exist yet.

    Raises:
        argparse.ArgumentTypeError: nothing can ever be kept in such a folder.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("it takes a folder, not an empty name")
    try:
        folder = Path(text).expanduser()
        whole = str(folder.resolve())
        whole.encode()
        above = next(place for place in (folder, *folder.parents) if place.exists())
    except (OSError, RuntimeError, ValueError) as error:  # also a loop of links, an unknown user
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {error}") from error
    why = ""
    if "://" in text:
        why = (
            "it takes a folder of this machine; GPT_SWEEPS_BUCKET takes a bucket, and "
            "MLFLOW_TRACKING_URI a tracking server"
        )
    elif "%" in whole or "?" in whole:
        # They have a meaning in the address of a database, and MLflow would make another folder.
        why = "MLflow cannot keep a database below a folder with % or ? in its name"
    elif (bytes_of_path := len(whole.encode())) > LONGEST_FOLDER:
        why = f"its path has {bytes_of_path} bytes, of at most {LONGEST_FOLDER}"
    elif not above.is_dir():
        why = f"{above} is a file, not a folder"
    elif links := _links_in(folder):
        why = (
            f"{links[0]} is a link, by which a copied runs folder could have files written "
            "elsewhere: put what it points to in its place"
        )
    if why:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {why}")
    return folder


def _links_in(folder: Path) -> list[str]:
    """List what a runs folder has in place of its files and folders: links to elsewhere."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if entry.is_symlink())
    except OSError:  # it is yet to be made, or cannot be read, which is found out later
        return []


def check_writable(folder: Path, shared: bool = False) -> None:
    """Make the runs folder, for this account alone or shared; one that exists stays as it is.

    Args:
        folder: the runs folder.
        shared: whether it is opened to its group, also if it exists.

    Raises:
        InputError: nothing can be written into it.
    """
    try:
        # The mode, because the umask may still be the account's own.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shared:
            share(folder)
        write_for(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--runs-dir {folder} cannot be written: {error.strerror}") from error


def prepare_output() -> None:
    """Have a console that knows only some characters show the others as question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_error(error: BaseException) -> None:
    """Print an error to standard error in one line, whatever a store or a user wrote into it."""
    text = printable(str(error)).replace("\n", "\\n")
    print(f"error: {text}", file=sys.stderr)


def give_up_output() -> None:
    """Drop what standard output does not take: Python would end with an error of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
