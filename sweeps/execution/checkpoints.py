"""A bucket for machines that share no folder: checkpoints are kept there as they are written.

Each machine then has a runs folder of its own; what the bucket has of a checkpoint counts.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, FileType

from gptcore.checkpoint import checkpoint_file
from gptcore.config import InputError
from gptcore.files import remove_leftovers, write_atomically
from tracking.store import BUCKET, bucket


def check_bucket() -> None:
    """Raises InputError for a bucket that cannot be written."""
    if not (address := bucket()):
        return
    try:
        files, folder = FileSystem.from_uri(address)
        files.create_dir(f"{folder}/checkpoints")
        with files.open_output_stream(f"{folder}/checked") as stream:
            stream.write(b"")
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(
            f"{BUCKET}={address} cannot be written ({why}): it takes s3://BUCKET/FOLDER"
        ) from error


def with_checkpoint(runs_dir: Path) -> set[str]:
    """The keys of the trials that have a checkpoint to go on from."""
    if not (address := bucket()):
        return {file.stem for file in checkpoint_file(runs_dir, "").parent.glob("*.pt")}
    files, folder = FileSystem.from_uri(f"{address}/checkpoints")
    found = files.get_file_info(FileSelector(folder, allow_not_found=True))
    return {Path(info.path).stem for info in found}


def fetch(file: Path) -> None:
    """Make a checkpoint here what the bucket has: that of the machine which had the trial last."""
    if not bucket():
        return
    files, remote = _remote(file)
    if files.get_file_info(remote).type == FileType.NotFound:
        file.unlink(missing_ok=True)
        return
    with files.open_input_file(remote) as stream:
        write_atomically(file, lambda new: new.write_bytes(stream.read()))


def keep(file: Path) -> None:
    """Have a checkpoint that was written here in the bucket; in S3 it appears whole or not at all.

    Where that fails the one before stands: a trial need not end for it.
    """
    if not bucket():
        return
    try:
        files, remote = _remote(file)
        with file.open("rb") as source, files.open_output_stream(remote) as stream:
            shutil.copyfileobj(source, stream)
    except OSError as error:
        print(f"{file} is not kept in {bucket()} this time: {error}", file=sys.stderr)


def forget(file: Path) -> None:
    """Delete a checkpoint, here and in the bucket, if it is there, and what is half written."""
    file.unlink(missing_ok=True)
    remove_leftovers(file)
    if bucket():
        files, remote = _remote(file)
        if files.get_file_info(remote).type == FileType.File:
            files.delete_file(remote)


def _remote(file: Path) -> tuple[FileSystem, str]:
    """Where the bucket has a checkpoint."""
    files, name = FileSystem.from_uri(f"{bucket()}/checkpoints/{file.name}")
    return files, name
