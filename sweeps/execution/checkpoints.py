"""Checkpoints in a bucket, for machines that share no folder.

Each machine then has its own runs folder. Where a checkpoint in the folder and the one in the
bucket differ, the one in the bucket counts. Without a bucket, these functions use the runs folder.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, FileType

from gptcore.checkpoint import checkpoint_file
from gptcore.config import InputError
from gptcore.files import remove_leftovers, write_atomically
from tracking.address import BUCKET, bucket
from tracking.bucket import CHECKPOINTS


def check_bucket() -> None:
    """Raise InputError for a bucket that cannot be written."""
    if not (address := bucket()):
        return
    try:
        files, folder = FileSystem.from_uri(address)
        files.create_dir(f"{folder}/{CHECKPOINTS}")
        with files.open_output_stream(f"{folder}/checked") as stream:
            stream.write(b"")
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(
            f"{BUCKET}={address} cannot be written ({why}): it takes s3://BUCKET/FOLDER"
        ) from error


def with_checkpoint(runs_dir: Path) -> set[str]:
    """Return the keys of the trials that have a checkpoint."""
    if not (address := bucket()):
        return {file.stem for file in checkpoint_file(runs_dir, "").parent.glob("*.pt")}
    files, folder = FileSystem.from_uri(f"{address}/{CHECKPOINTS}")
    found = files.get_file_info(FileSelector(folder, allow_not_found=True))
    return {Path(info.path).stem for info in found}


def fetch_checkpoint(file: Path) -> None:
    """Make the file here equal to the one in the bucket, or delete it where the bucket has none.

    The bucket has the checkpoint of the machine that ran the trial last.
    """
    if not bucket():
        return
    files, remote = _remote(file)
    if files.get_file_info(remote).type == FileType.NotFound:
        file.unlink(missing_ok=True)
        return
    with files.open_input_file(remote) as stream:
        write_atomically(file, lambda new: new.write_bytes(stream.read()))


def save_checkpoint(file: Path) -> None:
    """Copy a checkpoint to the bucket; in S3 a file appears complete or not at all.

    If that fails, say so and keep the checkpoint that the bucket has: the trial goes on.
    """
    if not bucket():
        return
    try:
        files, remote = _remote(file)
        with file.open("rb") as source, files.open_output_stream(remote) as stream:
            shutil.copyfileobj(source, stream)
    except OSError as error:
        print(f"{file} could not be copied to {bucket()}: {error}", file=sys.stderr)


def delete_checkpoint(file: Path) -> None:
    """Delete a checkpoint, here and in the bucket, and files that were only half written."""
    file.unlink(missing_ok=True)
    remove_leftovers(file)
    if bucket():
        files, remote = _remote(file)
        if files.get_file_info(remote).type == FileType.File:
            files.delete_file(remote)


def _remote(file: Path) -> tuple[FileSystem, str]:
    """Return the file system and the path of a checkpoint in the bucket."""
    files, name = FileSystem.from_uri(f"{bucket()}/{CHECKPOINTS}/{file.name}")
    return files, name
