"""The only reader of MLflow: from a sweep's name to its trials and their tables.

A sweep is one experiment. Its own run (kind=sweep) holds plan.json, the keys of its trials; each
trial is a run (kind=trial) whose Parquet artifacts are what the analysis reads. Of several runs of
one key a finished one counts, else the newest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import polars as pl
import requests
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from gptcore.config import KNOBS, InputError
from gptcore.records import PRIMARY, SCHEMA_VERSION

SERVER_SECONDS = 5.0

for chatty in ("mlflow.store.db.utils", "alembic"):
    logging.getLogger(chatty).setLevel(logging.WARNING)


@dataclass(frozen=True)
class RunTables:
    """A sweep as frames."""

    sweep: str
    plan: Mapping[str, Any]
    claims_digest: str | None  # of the claims as they stood before the sweep's first trial
    trials: pl.DataFrame
    """One row a trial of the plan: trial_key, run_id, status, reason, then every knob."""
    tables: Mapping[str, pl.DataFrame]
    """The rows of finished trials by table, as gptcore.records says, behind a column trial_key."""


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
        if uri.startswith(("http://", "https://")):
            # MLflow's client would go on trying for minutes.
            requests.get(f"{uri.rstrip('/')}/health", timeout=SERVER_SECONDS).raise_for_status()
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


def search_runs(client: MlflowClient, experiment_ids: list[str], kind: str) -> list[Run]:
    """All runs of a kind (trial, sweep) in the experiments, newest first."""
    runs: list[Run] = []
    page = None
    while True:
        found = client.search_runs(
            experiment_ids,
            f"tags.kind = '{kind}'",
            ViewType.ACTIVE_ONLY,
            max_results=1000,
            order_by=["attributes.start_time DESC"],
            page_token=page,
        )
        runs += found
        if not (page := found.token):
            return runs


def trial_runs(client: MlflowClient, sweep: str) -> dict[str, Run]:
    """The run that counts for every trial key of a sweep's experiment; none where there is none."""
    experiment = client.get_experiment_by_name(sweep)
    runs = search_runs(client, [experiment.experiment_id], "trial") if experiment else []
    runs.sort(key=lambda run: run.info.status != "FINISHED")
    by_key: dict[str, Run] = {}
    for run in runs:
        by_key.setdefault(run.data.tags["trial_key"], run)
    return by_key


def trial_status(run: Run | None) -> str:
    """finished, diverged, failed, stopped, running, or missing where there is no run."""
    return "missing" if run is None else run.data.tags["trial_status"]


def _all(rows: pl.LazyFrame) -> pl.LazyFrame:
    return rows


READ: dict[str, Callable[[pl.LazyFrame], pl.LazyFrame]] = {
    "init": _all,
    "training": _all,
    "weights": lambda rows: rows.filter(
        pl.col("kind").is_in(["q", "k", "v", "qkv"]) | (pl.col("step") == 0)
    ).drop("size", "frobenius", "cosine", "grad_rms"),
    "text_losses": _all,
    "token_groups": lambda rows: rows.filter(
        pl.col("mask").is_in(["none", PRIMARY["mask"]]),
        text=PRIMARY["text"], positions=PRIMARY["positions"],
    ).drop("n_tokens", "log_mean_prob"),
    "group_weights": _all,
    # In place of fifty thousand ids a trial.
    "group_members": lambda rows: rows.select(
        "file", "group", n_tokens=pl.col("counts").list.len(),
        n_occurrences=pl.col("counts").list.sum(),
    ),
}  # fmt: skip
"""The tables that a report rests on, and what of them; all else stays where it is."""


def read_sweep(uri: str, name: str | None, where: str | None = None) -> RunTables:
    """The named sweep, or the one launched last; of it the trials for which `where` is true.

    `where` is an SQL expression over the knobs. Finished trials whose tables cannot be read have
    the status unreadable. Raises InputError where there is nothing to read, and for tables of
    another schema.
    """
    if not has_started(uri):
        raise InputError(f"there is no sweep yet: {uri.removeprefix('sqlite:///')} does not exist")
    client = connect(uri)
    experiments = client.search_experiments(view_type=ViewType.ACTIVE_ONLY)
    sweeps = search_runs(client, [experiment.experiment_id for experiment in experiments], "sweep")
    sweeps.sort(key=lambda run: float(run.data.tags["launched"]))
    chosen = [run for run in sweeps if name in (None, run.data.tags["sweep"])]
    if not sweeps:
        raise InputError(f"there is no sweep yet in {shown(uri)}")
    if not chosen:
        known = ", ".join(run.data.tags["sweep"] for run in sweeps)
        raise InputError(f"there is no sweep {name}: the sweeps of this store are {known}")
    sweep = chosen[-1]
    runs = trial_runs(client, sweep.data.tags["sweep"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = client.download_artifacts(sweep.info.run_id, "plan.json", folder)
        except (OSError, MlflowException) as error:
            raise InputError(
                f"the plan of sweep {sweep.data.tags['sweep']} is not at "
                f"{sweep.info.artifact_uri}: was the runs folder moved?"
            ) from error
        plan = json.loads(Path(file).read_text())
        trials = pl.DataFrame(
            [
                {
                    "trial_key": key,
                    "run_id": runs[key].info.run_id if key in runs else None,
                    "status": trial_status(runs.get(key)),
                    "reason": runs[key].data.tags.get("reason", "") if key in runs else "",
                    **trial["params"],
                }
                for key, trial in plan["trials"].items()
            ],
            infer_schema_length=None,
        )
        if where is not None:
            trials = selected(trials, where)
        finished = trials.filter(pl.col("status") == "finished")
        if finished.is_empty():
            raise InputError(
                f"sweep {sweep.data.tags['sweep']} has no finished trials yet"
                + (f" for which {where}" if where else "")
            )
        folders = {
            key: artifact_folder(client, runs[key], Path(folder)) for key in finished["trial_key"]
        }
        tables, unreadable = read_tables(folders)
        trials = trials.with_columns(
            status=pl.when(pl.col("trial_key").is_in(list(unreadable)))
            .then(pl.lit("unreadable"))
            .otherwise("status"),
            reason=pl.col("trial_key").replace_strict(unreadable, default=pl.col("reason")),
        )
    return RunTables(
        sweep.data.tags["sweep"], plan, sweep.data.tags.get("claims_digest"), trials, tables
    )


def artifact_folder(client: MlflowClient, run: Run, scratch: Path) -> Path:
    """Where a run's artifacts lie: in place for a local store, else fetched into `scratch`."""
    parts = urllib.parse.urlsplit(run.info.artifact_uri)
    if parts.scheme == "file":
        return Path(urllib.parse.unquote(parts.path))
    folder = scratch / run.info.run_id
    folder.mkdir()
    for table in READ:
        client.download_artifacts(run.info.run_id, f"{table}.parquet", str(folder))
    return folder


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
            f"--where takes a condition on knobs such as \"init.scheme = 'gpt2'\", not {where!r}: "
            f"{why}"
        ) from error
    if chosen.is_empty():
        raise InputError(f"--where {where!r} is true of none of the {trials.height} trials")
    return chosen


def read_tables(
    folders: Mapping[str, Path],
) -> tuple[dict[str, pl.DataFrame], dict[str, str]]:
    """The tables of READ of many trials, `folders` by trial key; -> also why which cannot be read.

    A trial is left out whole. Raises InputError for another schema, and where no trial can be read.
    """
    try:
        return {table: read_table(table, folders) for table in READ}, {}
    except (OSError, pl.exceptions.PolarsError):
        unreadable = {}
        for key, folder in folders.items():
            try:
                for table in READ:
                    read_table(table, {key: folder})
            except (OSError, pl.exceptions.PolarsError) as error:
                unreadable[key] = f"{table} cannot be read: {str(error).splitlines()[0]}"
    whole = {key: folder for key, folder in folders.items() if key not in unreadable}
    if not whole:
        key, why = next(iter(unreadable.items()))
        raise InputError(f"no trial can be read: of {key} the {why}")
    return {table: read_table(table, whole) for table in READ}, unreadable


def read_table(table: str, folders: Mapping[str, Path]) -> pl.DataFrame:
    """One table of many trials, `folders` by trial key. Raises InputError for another schema."""
    keys = {str(folder / f"{table}.parquet"): key for key, folder in folders.items()}
    for file, key in keys.items():
        found = pl.read_parquet_metadata(file).get("schema_version")
        if found != str(SCHEMA_VERSION):
            raise InputError(
                f"{file} of trial {key} has schema version {found}: this report reads "
                f"{SCHEMA_VERSION}"
            )
    # One scan over all files: a read for each would take longer than all else together.
    rows = READ[table](pl.scan_parquet(list(keys), include_file_paths="file")).collect()
    return rows.select(
        pl.col("file").replace_strict(keys).alias("trial_key"), pl.all().exclude("file")
    )
