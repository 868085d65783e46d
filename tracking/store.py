"""Where trials are recorded: one Store object, made once by a command and passed down.

A sweep is one MLflow experiment. Its own run (tag kind=sweep) holds plan.json with the keys of its
trials. Each trial is a run (kind=trial) of the sweep that asked for it first, and belongs to every
sweep that asks for the same key. Of several runs of one key a finished one counts, else the newest.

A store may also hold experiments and runs of other people, and thousands of them. The files of runs
lie below the folder of an SQLite store, wherever that folder is moved or copied to.

This is one file because only this object holds the connection.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

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
from mlflow.store.entities import PagedList
from sqlalchemy.exc import SQLAlchemyError

from gptcore.config import InputError, did_you_mean
from gptcore.files import JsonObject
from tracking.access import share_database
from tracking.address import DATABASES, StoreAddress, mask_password, sqlite_address
from tracking.health import DAMAGE, causes, check_server, damaged, sqlite_code
from tracking.places import Client, check_place, folder_of, read_object
from tracking.private_api import (
    KIND_OF_TRAINING,
    create_engine,
    move_artifacts,
    runs_in_database,
)
from tracking.tags import NEEDED, TrialStatus, known_runs, lacking_tags, say_incomplete
from tracking.untrusted import one_line

Item = TypeVar("Item")

DONE: tuple[TrialStatus, ...] = ("finished", "diverged")
"""The values of a trial's status that are results: a diverged trial has one too."""
MAX_TAG_LENGTH = 5000
"""Characters of a tag's value that MLflow takes."""
PAGE = 1000
"""Runs or experiments that one request asks for."""
MOST_PAGES = 10_000
"""Pages of one answer: a server that names a next page for ever is not followed."""
EXPERIMENTS_A_REQUEST = 500
"""Experiments that one request looks into."""
MADE_BY = {"made_by": "gpt-sweeps"}
"""The tag by which runs of this project are known among those of other people."""
logging.getLogger("alembic").setLevel(logging.WARNING)
# MLflow also raises what it logs here.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def understood(ask: Callable[..., Item]) -> Callable[..., Item]:
    """Wrap a method of a store: raise InputError where the store's answer is none of MLflow's."""

    @functools.wraps(ask)
    def asking(store: Store, *arguments: Any, **named: Any) -> Item:
        try:
            return ask(store, *arguments, **named)
        except (InputError, MlflowException, OSError, SQLAlchemyError):
            raise
        except Exception as error:  # MLflow makes objects of whatever it is sent
            why = one_line(str(error))[:200]
            raise InputError(
                f"{store.address.masked} gives an answer that is none of MLflow's "
                f"({type(error).__name__}: {why})"
            ) from error

    return asking


class Store:
    """A tracking store, connected to when it is first used."""

    def __init__(self, address: StoreAddress) -> None:
        self.address = address
        self.incomplete: dict[str, Run] = {}
        """By run id, the runs of this project that were left out because they lack a tag."""
        self._is_checked = False

    @functools.cached_property
    def client(self) -> MlflowClient:
        """MLflow's client, which waits for a server that does not answer."""
        return Client(self.address.connection, self._place_of)

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
            elif file and not file.stat().st_size:  # MLflow would make a store of it
                raise InputError(damaged(file, "it is empty"))
            # MLflow's client would go on trying for minutes.
            if address.is_server:
                check_server(address.uri)
            elif address.uri.startswith(DATABASES):
                engine = create_engine(address.connection)
                engine.connect().close()
                engine.dispose()
            self.client.search_experiments(max_results=1)
        except InputError:
            raise
        except Exception as error:  # what answers may be anything
            if file and any(sqlite_code(cause) in DAMAGE for cause in causes(error)):
                raise InputError(damaged(file, str(list(causes(error))[-1]))) from error
            why = mask_password(one_line(str(error).strip().partition("\n")[0]))
            raise InputError(
                f"the tracking store {address.masked} does not answer: {why}"
            ) from error
        self._is_checked = True

    @understood
    def experiment_ids(self) -> list[str]:
        """List every experiment that is not deleted."""
        return [
            experiment.experiment_id
            for experiment in _every_page(
                lambda page: self.client.search_experiments(
                    ViewType.ACTIVE_ONLY, max_results=PAGE, page_token=page
                )
            )
            if experiment.experiment_id.isdecimal()
        ]

    def open_experiment(
        self, name: str, runs_dir: Path, tags: Mapping[str, str] | None = None
    ) -> str:
        """Return the id of a sweep's experiment, made if it is new.

        Args:
            name: of the sweep. Its experiment may have been renamed in MLflow.
            runs_dir: a new experiment of a database keeps its files in there; a server keeps them
                in its own folder.
            tags: set on the experiment. Other tags stay. An experiment without a kind gets the kind
                of model training.

        Raises:
            InputError: the experiment was deleted, or its files cannot be reached from here.
        """
        own = None if self.address.is_remote else runs_dir.resolve() / "artifacts"
        if own and self.address.database == own.parent / "mlflow.db":
            move_artifacts(self.address.uri, own)
        sweep_run = self.sweep_runs().get(name)
        experiment = (
            self.client.get_experiment(sweep_run.info.experiment_id)
            if sweep_run
            else self.client.get_experiment_by_name(name)
        )
        if experiment is None:
            try:
                experiment_id = self.client.create_experiment(
                    name, artifact_location=own.as_uri() if own else None
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self.open_experiment(name, runs_dir, tags)  # another driver was faster
        elif experiment.lifecycle_stage != "active":
            raise InputError(
                f"sweep {name} was deleted in MLflow: restore it there or take another --name"
            )
        else:
            experiment_id = experiment.experiment_id
        experiment = experiment or self.client.get_experiment(experiment_id)
        location = experiment.artifact_location
        if own is None:
            check_place(location, self.address, lambda: self._default_location)
        elif location != own.as_uri():
            raise InputError(
                f"the experiment {name} of the tracking store keeps its files at {location}, not "
                f"at {own}: take another --name"
            )
        # An existing kind may be the choice of the user.
        kind = {} if KIND_OF_TRAINING.keys() & experiment.tags.keys() else KIND_OF_TRAINING
        for tag, value in {**kind, **(tags or {})}.items():
            self.client.set_experiment_tag(experiment_id, tag, value)
        return experiment_id

    @understood
    def runs(self, kind: str) -> list[Run]:
        """List all runs of a kind (trial, sweep) with their tags, newest first.

        Params and metrics are left out where the store is an SQLite file.
        """
        if self.address.database:
            return known_runs(runs_in_database(self.address.uri, self.experiment_ids(), kind))
        return self.search(f"tags.kind = '{kind}'")

    @understood
    def search(
        self, condition: str, experiment_id: str | None = None, *, known: Sequence[str] = ()
    ) -> list[Run]:
        """List all runs that are not deleted and for which a condition holds, newest first.

        Args:
            condition: in MLflow's search syntax.
            experiment_id: look into this experiment alone.
            known: else look into these experiments alone; without any, into all that there are now.
        """
        experiments = [experiment_id] if experiment_id else known or self.experiment_ids()
        found: list[Run] = []
        for start in range(0, len(experiments), EXPERIMENTS_A_REQUEST):
            some = experiments[start : start + EXPERIMENTS_A_REQUEST]
            found += _every_page(
                lambda page, some=some: self.client.search_runs(  # type: ignore[misc]
                    some,
                    condition,
                    ViewType.ACTIVE_ONLY,
                    max_results=PAGE,
                    order_by=["attributes.start_time DESC"],
                    page_token=page,
                )
            )
        return sorted(known_runs(found), key=lambda run: -run.info.start_time)

    def find_run(
        self,
        kind: str,
        experiment_id: str | None = None,
        *,
        known: Sequence[str] = (),
        **tags: str,
    ) -> Run | None:
        """Return the run that counts of a kind (trial, sweep) with the given tags.

        It has its params and metrics too. `known` is as for search.
        """
        return next(iter(self.find_runs(kind, experiment_id, known=known, **tags)), None)

    def find_runs(
        self,
        kind: str,
        experiment_id: str | None = None,
        *,
        known: Sequence[str] = (),
        **tags: str,
    ) -> list[Run]:
        """Return all runs of a kind with the given tags, with params, the one that counts first.

        `known` is as for search.
        """
        wanted = {"kind": kind, **tags}
        if not all(re.fullmatch(r"[\w. -]+", value) for value in wanted.values()):
            raise InputError(f"no {kind} has the tags {tags}")  # they would be read as a condition
        clauses = [f"tags.{name} = '{value}'" for name, value in wanted.items()]
        found = self._complete(kind, self.search(" and ".join(clauses), experiment_id, known=known))
        return _what_counts_first(found)

    def trial_runs(self) -> dict[str, Run]:
        """Return by trial key the run that counts, of whichever sweep."""
        by_key: dict[str, Run] = {}
        for run in _what_counts_first(self._complete("trial", self.runs("trial"))):
            by_key.setdefault(run.data.tags["trial_key"], run)
        return by_key

    def sweep_runs(self) -> dict[str, Run]:
        """Return the sweeps' own runs by the sweep's name, the one launched last at the end."""
        found = self._complete("sweep", self.runs("sweep"))
        launched = sorted(found, key=lambda run: float(run.data.tags["launched"]))
        return {run.data.tags["sweep"]: run for run in launched}

    def has_trials_of(self, sweep: str) -> bool:
        """Return whether a trial was run by the sweep of this name."""
        return any(run.data.tags.get("sweep") == sweep for run in self.trial_runs().values())

    def _complete(self, kind: str, runs: Sequence[Run]) -> list[Run]:
        """Leave out runs of other people, and runs that lack a tag, which `incomplete` then names.

        A run from before MADE_BY is known by a tag that this project alone gives.
        """
        complete = []
        for run in runs:
            self.incomplete.pop(run.info.run_id, None)  # its tag may be back
            lacking = lacking_tags(run, kind)
            if not lacking:
                complete.append(run)
            elif MADE_BY.items() <= run.data.tags.items() or len(lacking) < len(NEEDED[kind]):
                self.incomplete[run.info.run_id] = run
        return complete

    def folder_of(self, run: Run) -> Path | None:
        """Return the folder of a run's files on this machine; None for those of a server.

        Raises:
            InputError: the store has them where nothing is read or written.
        """
        if not self.address.is_remote:
            return folder_of(run, self.address)
        check_place(run.info.artifact_uri, self.address, lambda: self._default_location)
        return None

    @understood
    def _place_of(self, run_id: str) -> Path | str:
        """Return the place of a run's files. Raises InputError where it is not to be used."""
        run = self.client.get_run(run_id)
        return self.folder_of(run) or str(run.info.artifact_uri)

    @functools.cached_property
    def _default_location(self) -> str | None:
        """Where a server keeps files unless an experiment says otherwise."""
        try:
            location: str = self.client.get_experiment("0").artifact_location
        except MlflowException:
            return None
        return location

    def read_json(self, run: Run, name: str) -> JsonObject:
        """Read the object of a JSON file that a sweep's own run holds.

        Raises:
            InputError: the file is not there or damaged, or the store stops answering.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.folder_of(run)
            if folder is None and self.fetch(run.info.run_id, name, Path(scratch)):
                folder = Path(scratch)
            if folder is None or not (folder / name).is_file():
                raise InputError(
                    f"{name} of sweep {run.data.tags['sweep']} is not at "
                    f"{folder or run.info.artifact_uri}: put it there, or take another --name"
                )
            return read_object(folder / name)

    @understood
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
        MlflowClient(sqlite_address(new)).search_experiments(max_results=1)
        try:
            file.hardlink_to(new)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # a file system without hard links
            new.replace(file)
    share_database(file)


def _every_page(ask: Callable[[str | None], PagedList[Item]]) -> Iterator[Item]:
    """Yield what all pages of an answer hold. `ask` takes the token that the page before gave."""
    page = None
    for _ in range(MOST_PAGES):
        found = ask(page)
        yield from found
        if not (page := found.token):
            return
    raise InputError(f"the tracking store has more than {MOST_PAGES:,} pages of runs")


def _what_counts_first(runs: Iterable[Run]) -> list[Run]:
    """Put finished runs before others, and keep the order of each."""
    return sorted(runs, key=lambda run: run.info.status != "FINISHED")


def cut_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Cut the values of tags to the length that MLflow takes."""
    return {name: value[:MAX_TAG_LENGTH] for name, value in tags.items()}


def delete_twins(store: Store, run: Run, found: Sequence[Run]) -> list[Run]:
    """Delete, of some runs, those that the same request has made as `run`. Return the others.

    A server that dies after it has made a run, and before its answer, is asked again by MLflow and
    then makes another one. Both have the tag of this attempt, which no other run has.
    """
    attempt = run.data.tags.get("attempt")
    twins = {
        one.info.run_id for one in found if attempt and one.data.tags.get("attempt") == attempt
    } - {run.info.run_id}
    for twin in twins:
        store.client.delete_run(twin)
    return [one for one in found if one.info.run_id not in twins]


def set_aside(store: Store, run: Run) -> None:
    """Mark a trial's run as replaced, so that the trial counts as not run (--redo)."""
    store.set_tags(run.info.run_id, kind="replaced", replaced_at=time.strftime("%Y-%m-%d %H:%M:%S"))
    if run.info.status == "RUNNING":
        store.client.set_terminated(run.info.run_id, "KILLED")


def trial_status(run: Run | None) -> TrialStatus:
    """Return what became of the trial whose run this is."""
    return "missing" if run is None else cast(TrialStatus, run.data.tags["trial_status"])


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
        left_out = "".join(f"; {say_incomplete(run)}" for run in store.incomplete.values())
        raise InputError(f"there is no sweep yet in {store.address.masked}{left_out}")
    for name in names:
        if name not in sweeps:
            raise InputError(
                f"there is no sweep {name}: {did_you_mean(name, sweeps)}the sweeps of this store "
                f"are {', '.join(sweeps)}"
            )
    return [sweeps[name] for name in dict.fromkeys(names or list(sweeps)[-1:])]
