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
DATABASES = ("postgresql", "mysql", "mssql")
"""How the addresses of other databases begin."""
VIEW = "sweep"
"""Name of the view that a sweep's experiment opens with, in the address of its page."""


USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
"""MLflow's own environment variables for what a server asks for. No address holds either."""


ENCODED = r"([A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*"
"""A user or a password as an address spells it (RFC 3986)."""


def credentials() -> dict[str, str]:
    """Return the variables of this process that hold what the store asks for."""
    return {name: os.environ[name] for name in (USER, PASSWORD) if os.environ.get(name)}


def mask_password(text: str) -> str:
    """Replace the password of this process, and that of every address in a text, by ***."""
    if len(password := os.environ.get(PASSWORD, "")) > 3:  # a shorter one is in many a word
        for spelled in (password, urllib.parse.quote(password, safe="")):
            text = text.replace(spelled, "***")
    return re.sub(r"(//[^/\s:@]*):[^/\s@]*@", r"\1:***@", text)


@dataclass(frozen=True)
class StoreAddress:
    """The address of a tracking store, as MLflow spells it, without user and password.

    These are in the environment (`credentials`), because an address is printed, pickled and kept.
    """

    uri: str
    runs_dir: Path | None = None  # whose folder `artifacts` holds the files of new runs

    def __repr__(self) -> str:
        return f"StoreAddress({self.masked!r})"

    @property
    def connection(self) -> str:
        """The address to connect with: that of a database has its user and password again."""
        known = credentials()
        if not known or not self.uri.startswith(DATABASES):
            return self.uri
        scheme, _, rest = self.uri.partition("://")
        words = [urllib.parse.quote(known.get(name, ""), safe="") for name in (USER, PASSWORD)]
        return f"{scheme}://{words[0]}{':' * bool(words[1])}{words[1]}@{rest}"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders below which the files of runs may lie; none for a server."""
        if self.is_remote:
            return ()
        folders = [self.database.parent if self.database else None, self.runs_dir]
        return tuple(dict.fromkeys(folder / "artifacts" for folder in folders if folder))

    @property
    def is_remote(self) -> bool:
        """Whether files go to where the store says; else they lie in folders of ours."""
        return "://" in self.uri and not self.uri.startswith((SQLITE, "file:", *DATABASES))

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
    """Return the path of the page of charts of an experiment, in the view of tracking.view.

    MLflow 3.17.2 ignores the kind of the experiment. Without `workflowType` in the address, it
    shows every experiment as a language-model application.
    """
    return (
        f"#/experiments/{experiment_id}/runs?compareRunsMode=CHART&viewStateShareKey={VIEW}"
        "&workflowType=machine_learning"
    )


def sqlite_address(file: Path) -> str:
    """Return the address of an SQLite file, as SQLAlchemy reads it."""
    return SQLITE + str(file.resolve()).replace("%", "%25").replace("?", "%3F")


def default_address(runs_dir: Path) -> StoreAddress:
    """Return the address of the SQLite file in a runs folder."""
    runs_dir = runs_dir.resolve()
    return StoreAddress(sqlite_address(runs_dir / "mlflow.db"), runs_dir)


def store_address(runs_dir: Path) -> StoreAddress:
    """Return MLFLOW_TRACKING_URI where it is set, else the SQLite file in the runs folder.

    A user and a password in the variable go to variables of their own, for this process and all
    that it starts.

    Raises:
        InputError: the variable names no file where SQLite can keep anything.
    """
    runs_dir = runs_dir.resolve()
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        return default_address(runs_dir)
    if not given.startswith("sqlite"):
        address, found = without_credentials(given)
        if found:
            for name in (USER, PASSWORD):
                os.environ.pop(name, None)
            os.environ.update(found, MLFLOW_TRACKING_URI=address)
        return StoreAddress(address, runs_dir)
    path, _, options = given.removeprefix(SQLITE).partition("?")
    if not given.startswith(SQLITE) or not path or path.startswith((":memory:", "file:")):
        raise InputError(
            f"MLFLOW_TRACKING_URI {given} names no file: it takes sqlite:///FILE, or the address "
            "of another store"
        )
    # Workers run in another folder than the user's.
    whole = sqlite_address(Path(urllib.parse.unquote(path)))
    return StoreAddress(f"{whole}?{options}" if options else whole, runs_dir)


def without_credentials(uri: str) -> tuple[str, dict[str, str]]:
    """Split user and password off an address.

    A password may be percent-encoded or not: one with a character that has to be encoded is taken
    as it is. It may so contain any character, also @, / and #.

    Returns:
        The address without them, and MLflow's variables for them; none where it has none.
    """
    scheme, separator, rest = uri.partition("://")
    given, at, place = rest.rpartition("@")
    if not separator or not at:
        return uri, {}
    user, _, password = given.partition(":")
    words = {
        name: urllib.parse.unquote(word) if re.fullmatch(ENCODED, word) else word
        for name, word in ((USER, user), (PASSWORD, password))
        if word
    }
    return f"{scheme}://{place}", words


def bucket() -> str | None:
    """Return the bucket's folder that this process is to use, such as s3://lab/gpt-sweeps."""
    return (os.environ.get(BUCKET) or "").rstrip("/") or None
