"""Where trials are recorded: one Store object, made once by a command and passed down.

A sweep is one MLflow experiment. Its own run (tag kind=sweep) holds plan.json with the keys of its
trials. Each trial is a run (kind=trial) of the sweep that asked for it first, and belongs to every
sweep that asks for the same key. Of several runs of one key a finished one counts, else the newest.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# How long driver and workers wait for a tracking server that does not answer: MLflow tries every
# request ten times more, after 0, 4, 8, 16, 32, 64 and then each 120 seconds, ten minutes in all.
# MLflow takes no higher number; set the variable to wait less.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "10")

from mlflow import MlflowClient
from mlflow.entities import Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from gptcore.config import InputError
from gptcore.files import JsonObject
from tracking.address import StoreAddress, mask_password
from tracking.health import check_server
from tracking.private_api import create_engine, runs_in_database

TrialStatus = Literal["finished", "diverged", "failed", "pruned", "stopped", "running", "missing"]
"""What became of a trial: the tag of its run, or `missing` where there is no run."""
DONE: tuple[TrialStatus, ...] = ("finished", "diverged")
"""The values of a trial's status that are results: a diverged trial has one too."""
MAX_TAG_LENGTH = 5000
"""Characters of a tag's value that MLflow takes."""

logging.getLogger("alembic").setLevel(logging.WARNING)
# MLflow also raises what it logs here.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


class Store:
    """A tracking store, connected to when it is first used."""

    def __init__(self, address: StoreAddress) -> None:
        self.address = address
        self._is_checked = False

    @functools.cached_property
    def client(self) -> MlflowClient:
        """MLflow's client, which waits for a server that does not answer."""
        return MlflowClient(self.address.uri)

    def open(self) -> None:
        """Check once that the store answers; make the SQLite file where there is none.

        Raises:
            InputError: the store does not answer.
        """
        if self._is_checked:
            return
        address, file = self.address, self.address.database
        try:
            if file and not address.exists:
                _make_database(file)
            elif file and not file.stat().st_size:
                raise ValueError("the file is empty")  # MLflow would make a store of it
            # MLflow's client would go on trying for minutes.
            if address.is_server:
                check_server(address.uri)
            elif address.uri.startswith(("postgresql", "mysql", "mssql")):
                engine = create_engine(address.uri)
                engine.connect().close()
                engine.dispose()
            self.client.search_experiments(max_results=1)
        except (OSError, ValueError, ImportError, MlflowException, SQLAlchemyError) as error:
            why = mask_password(str(error).strip().splitlines()[0])
            raise InputError(
                f"the tracking store {address.masked} does not answer: {why}"
            ) from error
        self._is_checked = True

    def experiment_ids(self) -> list[str]:
        """List every experiment that is not deleted."""
        found = self.client.search_experiments(view_type=ViewType.ACTIVE_ONLY)
        return [experiment.experiment_id for experiment in found]

    def open_experiment(
        self, name: str, runs_dir: Path, tags: Mapping[str, str] | None = None
    ) -> str:
        """Return the id of a sweep's experiment, made if it is new.

        Args:
            name: of the sweep.
            runs_dir: a new experiment of an SQLite store keeps its files in there; a server keeps
                them in its own folder.
            tags: set on the experiment; its other tags stay.

        Raises:
            InputError: the experiment was deleted.
        """
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            local = self.address.database is not None
            location = (runs_dir.resolve() / "artifacts").as_uri() if local else None
            experiment_id = self.client.create_experiment(name, artifact_location=location)
        elif experiment.lifecycle_stage != "active":
            raise InputError(
                f"sweep {name} was deleted in MLflow: restore it there or take another --name"
            )
        else:
            experiment_id = experiment.experiment_id
        for tag, value in (tags or {}).items():
            self.client.set_experiment_tag(experiment_id, tag, value)
        return experiment_id

    def runs(self, kind: str) -> list[Run]:
        """List all runs of a kind (trial, sweep) with their tags, newest first.

        Params and metrics are left out where the store is an SQLite file.
        """
        if self.address.database:
            return runs_in_database(self.address.uri, self.experiment_ids(), kind)
        return self.search(f"tags.kind = '{kind}'")

    def search(self, condition: str, experiment_id: str | None = None) -> list[Run]:
        """List all runs that are not deleted and for which a condition holds, newest first.

        Args:
            condition: in MLflow's search syntax.
            experiment_id: look into this experiment alone.
        """
        return list(self._pages(condition, experiment_id, page_size=1000))

    def _pages(self, condition: str, experiment_id: str | None, page_size: int) -> Iterator[Run]:
        """Yield the runs of `search`, and ask for a page only when it is needed."""
        experiments = [experiment_id] if experiment_id else self.experiment_ids()
        page = None
        while True:
            found = self.client.search_runs(
                experiments,
                condition,
                ViewType.ACTIVE_ONLY,
                max_results=page_size,
                order_by=["attributes.start_time DESC"],
                page_token=page,
            )
            yield from found
            if not (page := found.token):
                return

    def find_run(self, kind: str, experiment_id: str | None = None, **tags: str) -> Run | None:
        """Return the newest run of a kind (trial, sweep) with the given tags, with all it holds."""
        clauses = [f"tags.{name} = '{value}'" for name, value in {"kind": kind, **tags}.items()]
        return next(self._pages(" and ".join(clauses), experiment_id, page_size=1), None)

    def trial_runs(self) -> dict[str, Run]:
        """Return by trial key the run that counts, of whichever sweep."""
        by_key: dict[str, Run] = {}
        for run in sorted(self.runs("trial"), key=lambda run: run.info.status != "FINISHED"):
            by_key.setdefault(run.data.tags["trial_key"], run)
        return by_key

    def sweep_runs(self) -> dict[str, Run]:
        """Return the sweeps' own runs by the sweep's name, the one launched last at the end."""
        found = self.runs("sweep")
        launched = sorted(found, key=lambda run: float(run.data.tags["launched"]))
        return {run.data.tags["sweep"]: run for run in launched}

    def read_json(self, run: Run, name: str) -> JsonObject:
        """Read the object of a JSON file that a sweep's own run holds.

        Raises:
            InputError: the file is not there, or the store stops answering.
        """
        with tempfile.TemporaryDirectory() as folder:
            if not self.fetch(run.info.run_id, name, Path(folder)):
                raise InputError(
                    f"{name} of sweep {run.data.tags['sweep']} is not at "
                    f"{run.info.artifact_uri}: was the runs folder moved?"
                )
            contents: JsonObject = json.loads(Path(folder, name).read_text())
            return contents

    def fetch(self, run_id: str, name: str, folder: Path) -> bool:
        """Copy one file of a run into a folder. Return False where the run lacks the file.

        Raises:
            InputError: the store stops answering.
        """
        try:
            self.client.download_artifacts(run_id, name, str(folder))
            return True
        except (OSError, MlflowException) as error:  # OSError: also what requests raises
            # Only MLflow's message tells a missing file from a server that is away: list the files.
            with contextlib.suppress(OSError, MlflowException):
                if name not in [file.path for file in self.client.list_artifacts(run_id)]:
                    return False
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            why = mask_password(" ".join(str(error).split()))
            raise InputError(
                f"the runs cannot be read from {self.address.masked}: {why}"
            ) from error

    def set_tags(self, run_id: str, **tags: str) -> None:
        """Set tags of a run in one call, cut to the length that MLflow takes."""
        cut = [RunTag(name, value) for name, value in cut_tags(tags).items()]
        self.client.log_batch(run_id, tags=cut)

    def delete_tags(self, run_id: str, prefix: str) -> None:
        """Delete the tags of a run whose names begin with a prefix."""
        for name in self.client.get_run(run_id).data.tags:
            if name.startswith(prefix):
                self.client.delete_tag(run_id, name)


def _make_database(file: Path) -> None:
    """Make MLflow's tables in a file that takes its name when they are all there.

    Processes that find a half-made file would each try to make its tables, and fail.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        new = Path(folder, file.name)
        MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
        try:
            file.hardlink_to(new)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # a file system without hard links
            new.replace(file)


def cut_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Cut the values of tags to the length that MLflow takes."""
    return {name: value[:MAX_TAG_LENGTH] for name, value in tags.items()}


def trial_status(run: Run | None) -> TrialStatus:
    """Return what became of the trial whose run this is."""
    return "missing" if run is None else cast(TrialStatus, run.data.tags["trial_status"])


def artifact_folder(run: Run) -> Path | None:
    """Return the folder of a run's files where this machine has it; None for one on a server."""
    place = urllib.parse.urlsplit(run.info.artifact_uri)
    return Path(urllib.parse.unquote(place.path)) if place.scheme == "file" else None


def stop_waiting() -> None:
    """From here on in this process, do not wait for a tracking server that does not answer."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"


def named_runs(store: Store, names: Sequence[str]) -> list[Run]:
    """Return the own runs of the named sweeps, or of the sweep launched last where none is named.

    Raises:
        InputError: there is no such sweep.
    """
    sweeps = store.sweep_runs()
    if not sweeps:
        raise InputError(f"there is no sweep yet in {store.address.masked}")
    for name in names:
        if name not in sweeps:
            raise InputError(
                f"there is no sweep {name}: the sweeps of this store are {', '.join(sweeps)}"
            )
    return [sweeps[name] for name in dict.fromkeys(names or list(sweeps)[-1:])]
