"""The address of a tracking store. Importing this module does not import MLflow."""

from __future__ import annotations

import os
import re
import shlex
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

BUCKET = "GPT_SWEEPS_BUCKET"
"""The environment variable that names a folder in a bucket, for machines that share no folder."""
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
        prefix = "sqlite:///"
        return Path(self.uri.removeprefix(prefix)) if self.uri.startswith(prefix) else None

    @property
    def is_server(self) -> bool:
        """Whether it is a tracking server, spoken to over http."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def exists(self) -> bool:
        """Whether the store has been made; a server always counts as made."""
        # os.path.exists is False, and not an error, for a name that no file can have.
        return self.database is None or os.path.exists(self.database)  # noqa: PTH110

    @property
    def masked(self) -> str:
        """The address for a reader, without its password."""
        return mask_password(self.uri)

    @property
    def server(self) -> str:
        """What to call a tracking server: `the tracking server at HOST:PORT`."""
        place = urllib.parse.urlsplit(self.uri).netloc.rpartition("@")[2]
        return f"the tracking server at {place}"

    def mlflow_command(self) -> str:
        """Return what to type to see the store's pages, or the address of a server's pages."""
        if self.is_server:
            return self.masked
        return shlex.join(["mlflow", "ui", "--backend-store-uri", self.uri])

    def chart_page(self, experiment_id: str) -> str:
        """Return the address of MLflow's chart page, in the view of tracking.view."""
        server = self.uri.rstrip("/") if self.is_server else "http://127.0.0.1:5000"
        query = f"compareRunsMode=CHART&viewStateShareKey={VIEW}"
        return f"{server}/#/experiments/{experiment_id}/runs?{query}"


def store_address(runs_dir: Path) -> StoreAddress:
    """Return MLFLOW_TRACKING_URI where it is set, else the SQLite file in the runs folder."""
    default = f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"
    return StoreAddress(os.environ.get("MLFLOW_TRACKING_URI") or default)


def bucket() -> str | None:
    """Return the bucket's folder that this process is to use, such as s3://lab/gpt-sweeps."""
    return (os.environ.get(BUCKET) or "").rstrip("/") or None
