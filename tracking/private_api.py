"""The parts of MLflow 3.17.2 that its documentation does not promise, all in one module.

Each has its reason. tests/test_private_api.py fails, with a sentence, when another version
of MLflow changes one of them.
"""

from __future__ import annotations

import base64
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy
from mlflow.entities import Run, RunData, RunInfo

from gptcore.files import JsonObject

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from starlette.types import ASGIApp


def create_engine(uri: str) -> sqlalchemy.Engine:
    """Connect to a database with the certificates and options that MLflow itself uses.

    Reason: a database that does not answer is then found out at once, and in the same way as
    MLflow would, instead of after minutes of retries.
    """
    from mlflow.store.db.utils import create_sqlalchemy_engine

    engine: sqlalchemy.Engine = create_sqlalchemy_engine(uri)
    return engine


def server_app() -> ASGIApp:
    """Return MLflow's own ASGI application.

    Reason: a tracking server that asks for a password puts its check in front of this application.
    """
    with warnings.catch_warnings(action="ignore"):  # it uses a part of Starlette that will go
        from mlflow.server.fastapi_app import app

    application: ASGIApp = app
    return application


def pages_app(uri: str, files: Path) -> ASGIApp:
    """Return MLflow's own ASGI application over a database. It is the only one of this process.

    Reason: MLflow takes the files of a run from wherever the database says, and that can be any
    file of the user. Here they are those of the run's folder, also where the runs were moved.

    Args:
        uri: of the database.
        files: the folder of the runs' files, a folder for each run.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.server import handlers
    from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def files_of(run: Run) -> LocalArtifactRepository:
        # It lets nobody out of its folder, neither by a path nor by a link.
        folder = files / run.info.run_id / "artifacts"
        if not folder.resolve().is_relative_to(files.resolve()):
            raise MlflowException(f"the files of run {run.info.run_id} are not in {files}")
        return LocalArtifactRepository(folder.as_uri())

    os.environ |= {BACKEND_STORE_URI_ENV_VAR: uri, ARTIFACT_ROOT_ENV_VAR: files.as_uri()}
    handlers._get_artifact_repo = files_of
    return server_app()


RUNS_WITH_TAGS = (
    "select r.run_uuid, r.experiment_id, r.user_id, r.status, r.start_time, r.end_time, "
    "r.artifact_uri, t.key, t.value from runs r join tags t on t.run_uuid = r.run_uuid "
    "join tags k on k.run_uuid = r.run_uuid and k.key = 'kind' and k.value = :kind "
    "where r.lifecycle_stage = 'active' order by r.start_time desc, r.run_uuid"
)


def runs_in_database(uri: str, experiments: Sequence[str], kind: str) -> list[Run]:
    """Read all runs of a kind from the tables of an SQLite store, newest first.

    Reason: MLflow's own search makes a quarter of a million objects of 2,000 runs, most of them
    metrics that nobody reads here. These runs have their tags, and neither params nor metrics.
    """
    wanted = set(map(int, experiments))
    found: dict[str, Run] = {}
    engine = sqlalchemy.create_engine(uri)
    with engine.connect() as store:
        for run_id, experiment_id, user, status, start, end, artifacts, key, value in store.execute(
            sqlalchemy.text(RUNS_WITH_TAGS), {"kind": kind}
        ):
            if experiment_id not in wanted or not isinstance(start, int):
                continue  # SQLite keeps a text in a column of numbers too
            if run_id not in found:
                info = RunInfo(
                    str(run_id), str(experiment_id), user, status, start, end, "active", artifacts
                )
                found[run_id] = Run(info, RunData())
            found[run_id].data.tags[str(key)] = str(value)
    engine.dispose()
    return list(found.values())


def move_artifacts(uri: str, folder: Path) -> None:
    """Have an SQLite store say that its runs keep their files in a folder, if they do.

    Reason: MLflow stores absolute paths and cannot change them. Files would be written into the
    folder that was moved here or copied, and not into this one.

    Args:
        uri: of the store.
        folder: where the files of its runs are now, a folder for each run.
    """
    here = folder.as_uri()
    engine = sqlalchemy.create_engine(uri)
    with engine.begin() as store:
        elsewhere = store.execute(
            sqlalchemy.text(
                "select experiment_id, artifact_location from experiments "
                "where artifact_location != :here and artifact_location like 'file:%/artifacts'"
            ),
            {"here": here},
        ).all()
        for experiment_id, location in elsewhere:
            of = {"experiment": experiment_id, "here": here, "there": f"{location}/"}
            runs = store.execute(
                sqlalchemy.text("select run_uuid from runs where experiment_id = :experiment"), of
            ).scalars()
            if not any((folder / run).is_dir() for run in runs):
                continue
            store.execute(
                sqlalchemy.text(
                    "update runs set artifact_uri = :here || substr(artifact_uri, length(:there)) "
                    "where experiment_id = :experiment "
                    "and substr(artifact_uri, 1, length(:there)) = :there"
                ),
                of,
            )
            store.execute(
                sqlalchemy.text(
                    "update experiments set artifact_location = :here "
                    "where experiment_id = :experiment"
                ),
                of,
            )
    engine.dispose()


def download_file(repository: ArtifactRepository, name: str, file: Path) -> None:
    """Copy one file of a run.

    Reason: MLflow's own call asks the server whether the file is a folder, and then follows what
    the server lists in it, to any depth and without an end.
    """
    repository._download_file(name, str(file))


KIND_OF_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""The tag of an experiment whose runs train models.

Reason: MLflow has no call that sets the kind of an experiment. Servers of other versions read this
tag. The page of version 3.17.2 reads the address instead (chart_path).
"""


RUN_COLOUR_TAG = "mlflow.runColor"
"""The tag of a run with the colour of the run on MLflow's pages.

Reason: a scheme has the same colour in the report and on these pages. The colours of groups of runs
cannot be set: MLflow chooses them.
"""


def shared_view_tag(name: str) -> str:
    """Name the experiment tag in which MLflow's page keeps a shared view.

    Reason: a sweep's page is to open on its trials and charts, and MLflow has no call for that.
    """
    return f"mlflow.sharedViewState.{name}"


def shared_view(name: str, state: JsonObject) -> str:
    """Pack the state of MLflow's page of runs as the value of a shared view's tag."""
    text = json.dumps(state, separators=(",", ":"))
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})
