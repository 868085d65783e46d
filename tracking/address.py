"""The address of a tracking store. Importing this module does not import MLflow."""

from __future__ import annotations

import os
import re
import shlex
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from gptcore.config import InputError

BUCKET = "GPT_SWEEPS_BUCKET"
"""The environment variable that names a folder in a bucket, for machines that share no folder."""
SQLITE = "sqlite:///"
"""How the address of an SQLite store begins."""
VIEW = "sweep"
"""Name of the view that a sweep's experiment opens with, in the address of its page."""


def mask_password(text: str) -> str:
    """Replace the password of every address in a text by ***."""
    return re.sub(r"(//[^/\s:@]*):[^/\s@]*@", r"\1:***@", text)


@dataclass(frozen=True)
class StoreAddress:
    """The address of a tracking store, as MLflow spells it."""

    uri: str

    @property
    def database(self) -> Path | None:
        """The file of an SQLite store; None for any other store."""
        if not self.uri.startswith(SQLITE):
            return None
        path, _, _options = self.uri.removeprefix(SQLITE).partition("?")
        return Path(urllib.parse.unquote(path))

    @property
    def is_server(self) -> bool:
        """Whether it is a tracking server, spoken to over http."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def exists(self) -> bool:
        """Whether the store has been made; a server always counts as made."""
        # os.path.exists is False, and not an error, for a name that no file can have.
        return self.database is None or os.path.exists(self.database)  # noqa: PTH110

    def is_of(self, runs_dir: Path) -> bool:
        """Whether this is the runs folder's own store, which no other folder's drivers use."""
        return self.database == runs_dir.resolve() / "mlflow.db"

    @property
    def masked(self) -> str:
        """The address for a reader, without its password."""
        return mask_password(self.uri)

    @property
    def server(self) -> str:
        """What to call a tracking server: `the tracking server at HOST:PORT`."""
        place = urllib.parse.urlsplit(self.uri).netloc.rpartition("@")[2]
        return f"the tracking server at {place}"

    def mlflow_command(self, runs_dir: Path, sweep: str) -> str:
        """Return what to type to see a sweep's pages, or the address of a server's pages."""
        if self.is_server:
            return self.masked
        folder = str(runs_dir.resolve())
        command = ["python", "-m", "tracking.pages", "--runs-dir", folder, "--name", sweep]
        if self.uri == default_address(runs_dir).uri:
            return shlex.join(command)
        return f"MLFLOW_TRACKING_URI={shlex.quote(self.masked)} {shlex.join(command)}"

    def chart_page(self, experiment_id: str) -> str:
        """Return the address of a tracking server's page of charts."""
        return f"{self.uri.rstrip('/')}/{chart_path(experiment_id)}"


def chart_path(experiment_id: str) -> str:
    """Return the path of an experiment's page of charts, in the view of tracking.view."""
    return f"#/experiments/{experiment_id}/runs?compareRunsMode=CHART&viewStateShareKey={VIEW}"


def sqlite_address(file: Path) -> str:
    """Return the address of an SQLite file, as SQLAlchemy reads it."""
    return SQLITE + str(file.resolve()).replace("%", "%25").replace("?", "%3F")


def default_address(runs_dir: Path) -> StoreAddress:
    """Return the address of the SQLite file in a runs folder."""
    return StoreAddress(sqlite_address(runs_dir.resolve() / "mlflow.db"))


def store_address(runs_dir: Path) -> StoreAddress:
    """Return MLFLOW_TRACKING_URI where it is set, else the SQLite file in the runs folder.

    Raises:
        InputError: the variable names no file where SQLite can keep anything.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        return default_address(runs_dir)
    if not given.startswith("sqlite"):
        return StoreAddress(given)
    path, _, options = given.removeprefix(SQLITE).partition("?")
    if not given.startswith(SQLITE) or not path or path.startswith((":memory:", "file:")):
        raise InputError(
            f"MLFLOW_TRACKING_URI {given} names no file: it takes sqlite:///FILE, or the address "
            "of another store"
        )
    # Workers run in another folder than the user's.
    whole = sqlite_address(Path(urllib.parse.unquote(path)))
    return StoreAddress(f"{whole}?{options}" if options else whole)


def bucket() -> str | None:
    """Return the bucket's folder that this process is to use, such as s3://lab/gpt-sweeps."""
    return (os.environ.get(BUCKET) or "").rstrip("/") or None
