"""Where the files of runs may lie, whatever a store says of them, and the objects in them.

A store names a place for the files of each run. It may have been copied from somebody else, or many
people may write to it, so that word is not taken for everything: otherwise it would choose where
this machine writes, and which of its files are read.
"""

from __future__ import annotations

import functools
import json
import shutil
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from gptcore.config import InputError
from gptcore.files import JsonObject, write_atomically
from tracking.address import StoreAddress, bucket
from tracking.private_api import download_file
from tracking.untrusted import check_no_link, is_run_id

BUCKETS = ("s3", "gs", "abfss", "wasbs")
"""The schemes of addresses of buckets."""
LARGEST_JSON = 2**28
"""Bytes of a plan; one of 10,000 trials has 20 million."""


class Client(MlflowClient):
    """MLflow's client, whose files go where `place_of` says and not where the store says."""

    def __init__(self, uri: str, place_of: Callable[[str], Path | str]) -> None:
        """Connect to a store.

        Args:
            uri: its address.
            place_of: returns the place of a run's files, by its id: a folder of this machine, or an
                address.
        """
        super().__init__(uri)
        # A place is asked for once: a server might give another answer the next time.
        self._place_of = functools.cache(place_of)

    def _repository(self, run_id: str) -> ArtifactRepository:
        place = self._place_of(run_id)
        uri = place.as_uri() if isinstance(place, Path) else place
        return get_artifact_repository(uri, tracking_uri=self.tracking_uri)

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        """Copy a file to the files of a run."""
        place = self._place_of(run_id)
        if isinstance(place, Path):
            # Not as MLflow does, which writes into the file that a link points to.
            file = place / (artifact_path or "") / Path(local_path).name
            check_no_link(file.parent, place)
            write_atomically(file, lambda new: shutil.copyfile(local_path, new))
        else:
            self._repository(run_id).log_artifact(local_path, artifact_path)

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Copy the files in a folder to those of a run."""
        if isinstance(self._place_of(run_id), Path):
            for file in Path(local_dir).iterdir():
                self.log_artifact(run_id, str(file), artifact_path)
        else:
            self._repository(run_id).log_artifacts(local_dir, artifact_path)

    def list_artifacts(self, run_id: str, path: str | None = None) -> list[Any]:
        """List the files of a run."""
        return list(self._repository(run_id).list_artifacts(path))

    def download_artifacts(self, run_id: str, path: str, dst_path: str | None = None) -> str:
        """Copy a file of a run into a folder of this machine; all its files where path is empty."""
        repository = self._repository(run_id)
        if not path or dst_path is None:
            return str(repository.download_artifacts(path, dst_path))
        file = Path(dst_path, path)
        download_file(repository, path, file)
        return str(file)


def folder_of(run: Run, address: StoreAddress) -> Path:
    """Return the folder of a run's files, which is on this machine.

    Where the files are, they are found, even if the store says otherwise, because the folder was
    moved or copied.

    Raises:
        InputError: the store has them anywhere else, or by way of a link.
    """
    if not is_run_id(run.info.run_id):
        raise InputError(f"{run.info.run_id} is not the id of a run of MLflow")
    run_id: str = run.info.run_id
    places = {one / run_id / "artifacts": one for one in address.folders}
    found = [place for place in places if place.is_dir()] or [
        place for place in places if place.as_uri() == run.info.artifact_uri
    ]
    if not found:
        raise InputError(
            f"run {run.info.run_id} keeps its files at {run.info.artifact_uri}, and those of this "
            f"store are read and written below {' and '.join(map(str, address.folders))} alone: "
            "move them there, or name their folder by --runs-dir"
        )
    check_no_link(found[0], places[found[0]].parent)
    return found[0]


def check_place(location: str, address: StoreAddress, default: Callable[[], str | None]) -> None:
    """Check that files may go to where a server says.

    That is through the server itself, or into its bucket. Anywhere else the server, and everyone
    who can make an experiment there, would choose a file of this machine, or who is sent the
    password.

    Args:
        location: of an experiment or of a run.
        address: of the server.
        default: returns where the server keeps the files of an experiment that names no place.

    Raises:
        InputError: the place is neither.
    """
    place, server = _split(location), _split(address.uri)
    if place.scheme == "mlflow-artifacts":
        is_own = place.netloc in ("", server.netloc)
    elif place.scheme in BUCKETS:
        ours = [_split(one) for one in (bucket(), default()) if one]
        is_own = place[:2] in [one[:2] for one in ours]
    else:
        is_own = place[:2] == server[:2] and address.is_server
    if not is_own:
        raise InputError(
            f"{address.server} keeps files at {location}, where this machine writes and reads "
            "nothing: they have to go through the server (`mlflow server --artifacts-destination`) "
            "or into its bucket"
        )


def _split(location: str) -> urllib.parse.SplitResult:
    """Split an address; one that is none has no scheme."""
    try:
        return urllib.parse.urlsplit(location)
    except ValueError:
        return urllib.parse.SplitResult("", "", location, "", "")


def read_object(file: Path) -> JsonObject:
    """Read the object of a JSON file. Raises InputError where it holds something else."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        contents = json.loads(file.read_text())
        if not isinstance(contents, dict):
            raise TypeError("it holds no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged_file(file, error) from error
    return contents


def damaged_file(file: Path, why: Exception) -> InputError:
    """Return the error for a file of a sweep's own run that cannot be understood."""
    return InputError(
        f"{file} is damaged ({type(why).__name__}: {why}): run the sweep's command again with all "
        "its knobs, which writes the file anew"
    )
