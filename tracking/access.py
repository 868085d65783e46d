"""Who can use the files that commands write: this account alone or, with --share, its group too.

The runs folder itself keeps the choice: a folder that is open to its group, and gives its group to
what is made in it, is shared by every later command and by the workers of every machine.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptcore.config import InputError

ALONE, WITH_GROUP = 0o077, 0o007
"""What a umask takes away: all from everyone else, or all from everyone outside the group."""
SHARED = stat.S_ISGID | stat.S_IRWXG


@contextmanager
def private_files() -> Iterator[None]:
    """Inside a block or a function, make new files for this account alone, whatever its umask."""
    before = os.umask(ALONE)
    try:
        yield
    finally:
        os.umask(before)


def write_for(runs_dir: Path) -> None:
    """Make files from now on for those who share this runs folder, which need not exist."""
    os.umask(WITH_GROUP if is_shared(runs_dir) else ALONE)


def is_shared(folder: Path) -> bool:
    """Return whether a folder is shared with its group."""
    try:
        return folder.stat().st_mode & SHARED == SHARED
    except OSError:
        return False


def share(folder: Path) -> None:
    """Open a folder to its group, with all that is in it.

    Raises:
        InputError: the folder belongs to another account.
    """
    if is_shared(folder):
        return
    if folder.stat().st_uid != os.geteuid():
        raise InputError(f"--share: {folder} belongs to another account, which alone can share it")
    for place in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # another process removes its files
            found = place.lstat()
            more = SHARED if stat.S_ISDIR(found.st_mode) else stat.S_IRGRP | stat.S_IWGRP
            if not stat.S_ISLNK(found.st_mode) and found.st_uid == os.geteuid():
                place.chmod(stat.S_IMODE(found.st_mode) | more)


def share_database(file: Path) -> None:
    """Open a database to the group that shares its folder.

    SQLite makes files that only their owner can write, whatever the umask is.
    """
    if is_shared(file.parent):
        with contextlib.suppress(PermissionError):  # another account has made it, and opened it
            file.chmod(0o660)
