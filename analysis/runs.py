"""The only reader of MLflow: from the names of sweeps to their trials and tables.

A sweep is one experiment. Its own run (kind=sweep) holds plan.json, the keys of its trials; each
trial is a run (kind=trial) whose Parquet artifacts are what the analysis reads. Of several runs of
one key, in one sweep or in several, a finished one counts, else the newest. Only finished trials
have rows; the others are in `trials` with their status.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shlex
import tempfile
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import polars as pl
import requests
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Run, RunData, RunInfo, ViewType
from mlflow.exceptions import MlflowException
from rich.console import Console
from rich.progress import Progress
from sqlalchemy.exc import SQLAlchemyError

from analysis.depth_gradient import STEPS
from gptcore.config import KNOBS, InputError, TrialConfig
from gptcore.records import PRIMARY, SCHEMA_VERSION

SERVER_SECONDS = 5.0
DOWNLOADS = 16
"""Tables fetched at a time from a server."""
VIEW = "sweep"
"""Name of the view that a sweep's experiment opens with, in the address of its page."""

UNREADABLE = (OSError, pl.exceptions.PolarsError)
"""What reading a table that is damaged or not there raises."""

logging.getLogger("alembic").setLevel(logging.WARNING)
# What goes wrong it raises as well.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunTables:
    """One sweep, or several as one, as frames."""

    name: str  # of several sweeps: joined by " + "
    notes: tuple[str, ...]
    commands: tuple[str, ...]  # by which the sweeps were made
    pages: tuple[str, ...]  # addresses of MLflow's charts of them
    claims_digest: str | None  # of the claims as they stood before the first trials, if one
    trials: pl.DataFrame
    """One row a trial of the plans: trial_key, run_id, status, reason, then every knob."""
    tables: Mapping[str, pl.DataFrame]
    """The rows of finished trials by table, as gptcore.records says, behind a column trial_key."""
    folders: Mapping[str, Path]
    """By trial key where its tables lie: where the run left them, or fetched to the cache."""
    uri: str  # of the store
    cache: Path
    looks: tuple[Mapping[str, Any], ...] = ()  # analysis.looks' Record of each sweep that has one


def tracking_uri(runs_dir: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else the SQLite file in the runs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"


def has_started(uri: str) -> bool:
    """Whether the store exists; a server always counts as one."""
    # os.path.exists is False, and not an error, for a name that no file can have.
    return not uri.startswith("sqlite:///") or os.path.exists(uri.removeprefix("sqlite:///"))  # noqa: PTH110


def connect(uri: str) -> MlflowClient:
    """A client of a store that answers; a SQLite file that is not there is made.

    Raises InputError where the store does not answer.
    """
    try:
        if not has_started(uri):
            _make_store(Path(uri.removeprefix("sqlite:///")))
        elif (
            uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).stat().st_size
        ):
            raise ValueError("the file is empty")  # of which MLflow would make a store
        # MLflow's client would go on trying for minutes.
        if uri.startswith(("http://", "https://")):
            requests.get(f"{uri.rstrip('/')}/health", timeout=SERVER_SECONDS).raise_for_status()
        elif uri.startswith(("postgresql", "mysql", "mssql")):
            # With the certificates and options that MLflow itself connects with.
            from mlflow.store.db.utils import create_sqlalchemy_engine

            engine = create_sqlalchemy_engine(uri)
            engine.connect().close()
            engine.dispose()
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (OSError, ValueError, ImportError, MlflowException, SQLAlchemyError) as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(
            f"the tracking store {shown(uri)} does not answer: {shown(why)}"
        ) from error
    return client


def shown(text: str) -> str:
    """A text with the password of every address in it masked."""
    return re.sub(r"(//[^/\s:@]*):[^/\s@]*@", r"\1:***@", text)


def _make_store(file: Path) -> None:
    """Make MLflow's tables in a file that takes its name when they are all there.

    Processes that find a half-made file each try to make its tables, and fail.
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


def mlflow_command(uri: str) -> str:
    """What to type to see the store's pages; the address where a server shows them already."""
    if uri.startswith("http"):
        return uri
    return shlex.join(["mlflow", "ui", "--backend-store-uri", uri])


def chart_page(uri: str, experiment_id: str) -> str:
    """The address of MLflow's chart page, in the view of sweeps.mlflow_view."""
    server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    query = f"compareRunsMode=CHART&viewStateShareKey={VIEW}"
    return f"{server}/#/experiments/{experiment_id}/runs?{query}"


def search_runs(client: MlflowClient, experiments: list[str], kind: str) -> list[Run]:
    """All runs of a kind (trial, sweep) in the experiments, newest first, without what is measured.

    A store on this machine is asked directly: of 2,000 runs MLflow's own search makes a quarter of
    a million objects, most of them metrics that nobody reads.
    """
    if client.tracking_uri.startswith("sqlite:"):
        return _runs_in_file(client.tracking_uri, experiments, kind)
    runs: list[Run] = []
    page = None
    while True:
        found = client.search_runs(
            experiments,
            f"tags.kind = '{kind}'",
            ViewType.ACTIVE_ONLY,
            max_results=1000,
            order_by=["attributes.start_time DESC"],
            page_token=page,
        )
        runs += found
        if not (page := found.token):
            return runs


def _runs_in_file(uri: str, experiments: list[str], kind: str) -> list[Run]:
    """search_runs of a SQLite store."""
    asked = sqlalchemy.text(
        "select r.run_uuid, r.experiment_id, r.user_id, r.status, r.start_time, r.end_time, "
        "r.artifact_uri, t.key, t.value from runs r join tags t on t.run_uuid = r.run_uuid "
        "join tags k on k.run_uuid = r.run_uuid and k.key = 'kind' and k.value = :kind "
        "where r.lifecycle_stage = 'active' order by r.start_time desc, r.run_uuid"
    )
    wanted = set(map(int, experiments))
    found: dict[str, Run] = {}
    engine = sqlalchemy.create_engine(uri)
    with engine.connect() as store:
        for run_id, experiment_id, user, status, start, end, artifacts, key, value in store.execute(
            asked, {"kind": kind}
        ):
            if experiment_id not in wanted:
                continue
            if run_id not in found:
                info = RunInfo(
                    run_id, str(experiment_id), user, status, start, end, "active", artifacts
                )
                found[run_id] = Run(info, RunData())
            found[run_id].data.tags[key] = value
    engine.dispose()
    return list(found.values())


def experiment_ids(client: MlflowClient) -> list[str]:
    """Every experiment of the store that is not deleted."""
    found = client.search_experiments(view_type=ViewType.ACTIVE_ONLY)
    return [experiment.experiment_id for experiment in found]


def trial_runs(client: MlflowClient) -> dict[str, Run]:
    """By trial key the run that counts, of whichever sweep: a trial belongs to all that want it."""
    by_key: dict[str, Run] = {}
    runs = search_runs(client, experiment_ids(client), "trial")
    for run in sorted(runs, key=lambda run: run.info.status != "FINISHED"):
        by_key.setdefault(run.data.tags["trial_key"], run)
    return by_key


def trial_status(run: Run | None) -> str:
    """finished, diverged, failed, pruned, stopped, running; missing where there is no run."""
    return "missing" if run is None else run.data.tags["trial_status"]


def _all(rows: pl.LazyFrame) -> pl.LazyFrame:
    return rows


Rows = Callable[[pl.LazyFrame], pl.LazyFrame]
"""What of a table is read: from all its rows, with a column `file`, to some that keep it."""

READ: dict[str, Rows] = {
    "init": _all,
    "training": _all,
    "weights": lambda rows: rows.filter(
        pl.col("kind").is_in(["q", "k", "v", "qkv"]) | (pl.col("step") == 0)
    ).drop("size", "mean", "frobenius", "cosine", "grad_rms"),
    "text_losses": _all,
    "token_groups": lambda rows: rows.filter(
        text=PRIMARY["text"], positions=PRIMARY["positions"]
    ).filter(
        (pl.col("mask") == PRIMARY["mask"])
        | pl.col("step").is_in([0, *STEPS])
        | (pl.col("step") == pl.col("step").max().over("file"))
    ).drop("text", "positions", "n_tokens", "log_mean_prob"),
    "group_weights": _all,
    # In place of fifty thousand ids a trial.
    "group_members": lambda rows: rows.select(
        "file", "group", n_tokens=pl.col("counts").list.len(),
        n_occurrences=pl.col("counts").list.sum(),
    ),
}  # fmt: skip
"""The tables that a report rests on, and what of them; all else stays where it is."""


def read_sweeps(
    uri: str,
    names: Sequence[str],
    where: str | None,
    cache: Path,
    keys: Collection[str] | None = None,
) -> RunTables:
    """The named sweeps as one, or the one launched last; of them the trials that `where` takes, and
    only those of some `keys` where they are given.

    `where` is an SQL expression over the knobs. Finished trials whose tables cannot be read have
    the status unreadable. `cache` keeps what is fetched from a server, by run. Raises InputError
    where there is nothing to read, and for tables of another schema.
    """
    if not has_started(uri):
        raise InputError(f"there is no sweep yet: {uri.removeprefix('sqlite:///')} does not exist")
    client = connect(uri)
    sweeps = _sweeps_named(client, names)
    name = " + ".join(run.data.tags["sweep"] for run in sweeps)
    plans = [_kept(client, run, "plan.json") for run in sweeps]
    runs = trial_runs(client)
    trials = _trials(plans, runs)
    if where is not None:
        trials = selected(trials, where)
    if keys is not None:
        trials = trials.filter(pl.col("trial_key").is_in(list(keys)))
    finished = trials.filter(pl.col("status") == "finished")["trial_key"].to_list()
    if not finished:
        condition = f" for which {where}" if where else ""
        raise InputError(f"sweep {name} has no finished trials yet{condition}")
    folders = {key: _folder(runs[key], cache) for key in finished}
    _fetch_all(uri, cache, READ, folders)
    tables, unreadable = read_tables(READ, folders)
    if not tables:
        key, why = next(iter(unreadable.items()))
        raise InputError(f"no trial can be read: of {key} the {why}")
    digests = {run.data.tags.get("claims_digest") for run in sweeps}
    notes = dict.fromkeys(note for plan in plans for note in plan["notes"])
    return RunTables(
        name=name,
        notes=(*notes, *([f"Only the trials for which {where}."] if where else [])),
        commands=tuple(plan["command"] for plan in plans),
        pages=tuple(chart_page(uri, run.info.experiment_id) for run in sweeps),
        # What is chosen after the runs confirms nothing.
        claims_digest=digests.pop() if len(digests) == 1 and not where else None,
        trials=trials.with_columns(
            status=pl.when(pl.col("trial_key").is_in(list(unreadable)))
            .then(pl.lit("unreadable"))
            .otherwise("status"),
            reason=pl.col("trial_key").replace_strict(unreadable, default=pl.col("reason")),
        ),
        tables=tables,
        folders={key: folder for key, folder in folders.items() if key not in unreadable},
        uri=uri,
        cache=cache,
        looks=tuple(filter(None, (_looks(client, run) for run in sweeps))),
    )


def _sweeps_named(client: MlflowClient, names: Sequence[str]) -> list[Run]:
    """The sweeps' own runs, or that of the sweep launched last. Raises InputError."""
    found = search_runs(client, experiment_ids(client), "sweep")
    sweeps = {
        run.data.tags["sweep"]: run
        for run in sorted(found, key=lambda run: float(run.data.tags["launched"]))
    }
    if not sweeps:
        raise InputError(f"there is no sweep yet in {shown(client.tracking_uri)}")
    for name in names:
        if name not in sweeps:
            raise InputError(
                f"there is no sweep {name}: the sweeps of this store are {', '.join(sweeps)}"
            )
    return [sweeps[name] for name in dict.fromkeys(names or list(sweeps)[-1:])]


def read_looks(uri: str, sweep: str) -> dict[str, Any] | None:
    """What a sweep keeps of its looks, analysis.looks' Record: empty where it was run without, None
    where there is no such sweep."""
    if not has_started(uri):
        return None
    client = connect(uri)
    found = search_runs(client, experiment_ids(client), "sweep")
    run = next((run for run in found if run.data.tags["sweep"] == sweep), None)
    return _looks(client, run) if run else None


def _looks(client: MlflowClient, sweep: Run) -> dict[str, Any]:
    return _kept(client, sweep, "looks.json") if "until_decided" in sweep.data.tags else {}


def _kept(client: MlflowClient, sweep: Run, name: str) -> dict[str, Any]:
    """A JSON file that the sweep's run holds."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = client.download_artifacts(sweep.info.run_id, name, folder)
        except (OSError, MlflowException) as error:
            raise InputError(
                f"{name} of sweep {sweep.data.tags['sweep']} is not at "
                f"{sweep.info.artifact_uri}: was the runs folder moved?"
            ) from error
        kept: dict[str, Any] = json.loads(Path(file).read_text())
        return kept


def _trials(plans: Sequence[Mapping[str, Any]], runs: Mapping[str, Run]) -> pl.DataFrame:
    """RunTables.trials of all trials of the plans. `runs`: as trial_runs."""
    defaults = TrialConfig().to_flat()
    params = {key: trial["params"] for plan in plans for key, trial in plan["trials"].items()}
    return pl.DataFrame(
        [
            {
                "trial_key": key,
                "run_id": runs[key].info.run_id if key in runs else None,
                "status": trial_status(runs.get(key)),
                "reason": runs[key].data.tags.get("reason", "") if key in runs else "",
                # A plan made before a knob was added does not have it.
                **{**defaults, **flat},
            }
            for key, flat in params.items()
        ],
        infer_schema_length=None,
    )


def _folder(run: Run, cache: Path) -> Path:
    """Where a run's tables are read: in place for a local store, else in `cache`, by run."""
    place = urllib.parse.urlsplit(run.info.artifact_uri)
    if place.scheme == "file":
        return Path(urllib.parse.unquote(place.path))
    return cache / run.info.run_id


def _fetch_all(uri: str, cache: Path, tables: Iterable[str], folders: Mapping[str, Path]) -> None:
    """Fetch what the folders of `cache` lack of the tables from a server, several at a time.

    Raises InputError where the server stops answering.
    """
    missing = [
        (folder, table)
        for folder, table in itertools.product(folders.values(), tables)
        if folder.parent == cache and not (folder / f"{table}.parquet").exists()
    ]
    if not missing:
        return
    client = connect(uri)
    bar = Progress(console=Console(stderr=True), transient=True)
    try:
        with ThreadPoolExecutor(max_workers=DOWNLOADS) as pool, bar:
            fetched = pool.map(lambda one: _fetch(client, *one), missing)
            for _ in bar.track(fetched, total=len(missing), description="fetching tables"):
                pass
    except (requests.RequestException, MlflowException) as error:
        why = " ".join(str(error).split())
        raise InputError(f"the runs cannot be read from {shown(uri)}: {shown(why)}") from error


def _fetch(client: MlflowClient, folder: Path, table: str) -> None:
    """Put one table of a finished run, which never changes, into its folder: all of it or none.

    None where the run lacks it or has no Parquet file there: whoever reads it says so.
    """
    run_id, name = folder.name, f"{table}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            client.download_artifacts(run_id, name, scratch)
            pl.read_parquet_metadata(Path(scratch, name))
        except MlflowException:
            # MLflow tells a file that is not there from a server that is not there in words alone.
            if name in [file.path for file in client.list_artifacts(run_id)]:
                raise
        except pl.exceptions.PolarsError:
            pass
        else:
            Path(scratch, name).replace(folder / name)


def selected(trials: pl.DataFrame, where: str) -> pl.DataFrame:
    """The trials for which an SQL expression over the knobs is true.

    A knob's dot is no table's: init.scheme is read as "init.scheme". Raises InputError for an
    expression that is none, and where no trial is left.
    """
    knobs = "|".join(re.escape(knob) for knob in KNOBS)
    quoted = re.sub(rf"(?<![\w.\"'`])({knobs})(?![\w.\"'`])", r'"\1"', where)
    try:
        chosen = trials.filter(pl.sql_expr(quoted))
    except pl.exceptions.PolarsError as error:
        why = str(error).splitlines()[0]
        raise InputError(
            f"--where takes a condition on knobs such as \"init.scheme = 'gpt2'\" (a text stands "
            f"in quotes), not {where!r}: {why[:120]}"
        ) from error
    if chosen.is_empty():
        raise InputError(f"--where {where!r} is true of none of the {trials.height} trials")
    return chosen


def read_tables(
    what: Mapping[str, Rows], folders: Mapping[str, Path]
) -> tuple[dict[str, pl.DataFrame], dict[str, str]]:
    """Some tables of many trials, `folders` by trial key; -> also why which cannot be read.

    A trial is left out whole; where none is left, there is no table. Raises InputError for another
    schema.
    """
    unreadable: dict[str, str] = {}
    try:
        return {table: read_table(table, rows, folders) for table, rows in what.items()}, {}
    except UNREADABLE:
        for key, folder in folders.items():
            try:
                for table, rows in what.items():
                    read_table(table, rows, {key: folder})
            except UNREADABLE as error:
                unreadable[key] = f"{table} cannot be read: {str(error).splitlines()[0]}"
    whole = {key: folder for key, folder in folders.items() if key not in unreadable}
    if not whole:
        return {}, unreadable
    return {table: read_table(table, rows, whole) for table, rows in what.items()}, unreadable


def read_table(table: str, rows: Rows, folders: Mapping[str, Path]) -> pl.DataFrame:
    """One table of many trials, as read_tables."""
    keys = {str(folder / f"{table}.parquet"): key for key, folder in folders.items()}
    for file, key in keys.items():
        found = pl.read_parquet_metadata(file).get("schema_version")
        if found != str(SCHEMA_VERSION):
            raise InputError(
                f"{file} of trial {key} has schema version {found}: this report reads "
                f"{SCHEMA_VERSION}"
            )
    # One scan over all files: a read for each would take longer than all else together.
    read = rows(pl.scan_parquet(list(keys), include_file_paths="file")).collect()
    # A path stands beside each of its rows: it is looked up once for all that follow one another.
    files = read["file"]
    firsts = files.filter(files.ne_missing(files.shift()))
    trial_key = pl.Series("trial_key", [keys[file] for file in firsts], pl.String)
    return read.drop("file").insert_column(0, trial_key.gather(files.rle_id()))


def read_some(
    table: str, sweep: RunTables, keys: Sequence[str], *columns: str
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Some columns of a table that is read of a few trials; -> also why which cannot be read."""
    folders = {key: sweep.folders[key] for key in keys}
    _fetch_all(sweep.uri, sweep.cache, [table], folders)
    tables, unreadable = read_tables({table: lambda rows: rows.select(*columns, "file")}, folders)
    return tables.get(table, pl.DataFrame(schema={"trial_key": pl.String})), unreadable
