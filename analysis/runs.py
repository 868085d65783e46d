"""The only reader of MLflow: from the names of sweeps to their trials and tables.

A sweep is one experiment. Its own run (kind=sweep) holds plan.json, the keys of its trials; each
trial is a run (kind=trial) whose Parquet artifacts are what the analysis reads. Of several runs of
one key, in one sweep or in several, a finished one counts, else the newest. Only finished trials
have rows; the others are in `trials` with their status.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import tempfile
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import numpy as np
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
    """By trial key where its tables lie, or are fetched to."""
    uri: str  # of the store
    is_local: bool  # the tables are read where the runs left them


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


def search_runs(client: MlflowClient, experiment_ids: list[str], kind: str) -> list[Run]:
    """All runs of a kind (trial, sweep) in the experiments, newest first, without what is measured.

    A store on this machine is asked directly: of 2,000 runs MLflow's own search makes a quarter of
    a million objects, most of them metrics that nobody reads.
    """
    if client.tracking_uri.startswith("sqlite:"):
        return _runs_in_file(client.tracking_uri, experiment_ids, kind)
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


def _runs_in_file(uri: str, experiment_ids: list[str], kind: str) -> list[Run]:
    """search_runs of a SQLite store."""
    asked = sqlalchemy.text(
        "select r.run_uuid, r.experiment_id, r.user_id, r.status, r.start_time, r.end_time, "
        "r.artifact_uri, t.key, t.value from runs r join tags t on t.run_uuid = r.run_uuid "
        "join tags k on k.run_uuid = r.run_uuid and k.key = 'kind' and k.value = :kind "
        "where r.lifecycle_stage = 'active' order by r.start_time desc, r.run_uuid"
    )
    wanted = set(map(int, experiment_ids))
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
    """finished, diverged, failed, stopped, running, or missing where there is no run."""
    return "missing" if run is None else run.data.tags["trial_status"]


def _all(rows: pl.LazyFrame) -> pl.LazyFrame:
    return rows


READ: dict[str, Callable[[pl.LazyFrame], pl.LazyFrame]] = {
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


def read_sweeps(uri: str, names: Sequence[str], where: str | None, cache: Path) -> RunTables:
    """The named sweeps as one, or the one launched last; of them the trials that `where` takes.

    `where` is an SQL expression over the knobs. Finished trials whose tables cannot be read have
    the status unreadable. `cache` keeps what is fetched from a server, by run. Raises InputError
    where there is nothing to read, and for tables of another schema.
    """
    if not has_started(uri):
        raise InputError(f"there is no sweep yet: {uri.removeprefix('sqlite:///')} does not exist")
    client = connect(uri)
    sweeps = _sweeps_named(client, names)
    name = " + ".join(run.data.tags["sweep"] for run in sweeps)
    plans = [_plan(client, run) for run in sweeps]
    runs = trial_runs(client)
    defaults = TrialConfig().to_flat()
    params = {key: trial["params"] for plan in plans for key, trial in plan["trials"].items()}
    trials = pl.DataFrame(
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
    if where is not None:
        trials = selected(trials, where)
    finished = trials.filter(pl.col("status") == "finished")["trial_key"].to_list()
    if not finished:
        condition = f" for which {where}" if where else ""
        raise InputError(f"sweep {name} has no finished trials yet{condition}")
    folders = _folders(client, {key: runs[key] for key in finished}, cache)
    is_local = all(folder.parent != cache for folder in folders.values())
    if not is_local:
        _fetch_all(
            client,
            [
                (runs[key].info.run_id, table, folder)
                for key, folder in folders.items()
                for table in READ
                if folder.parent == cache and not (folder / f"{table}.parquet").exists()
            ],
        )
    tables, unreadable = read_tables(folders)
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
        is_local=is_local,
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


def _plan(client: MlflowClient, sweep: Run) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = client.download_artifacts(sweep.info.run_id, "plan.json", folder)
        except (OSError, MlflowException) as error:
            raise InputError(
                f"the plan of sweep {sweep.data.tags['sweep']} is not at "
                f"{sweep.info.artifact_uri}: was the runs folder moved?"
            ) from error
        plan: dict[str, Any] = json.loads(Path(file).read_text())
        return plan


def _folders(client: MlflowClient, runs: Mapping[str, Run], cache: Path) -> dict[str, Path]:
    """By trial key the folder of its tables: in place for a local store, else in `cache`."""
    places = {key: urllib.parse.urlsplit(run.info.artifact_uri) for key, run in runs.items()}
    return {
        key: Path(urllib.parse.unquote(place.path))
        if place.scheme == "file"
        else cache / runs[key].info.run_id
        for key, place in places.items()
    }


def _fetch_all(client: MlflowClient, missing: Sequence[tuple[str, str, Path]]) -> None:
    """Fetch (run id, table, folder) from a server, several at a time.

    Raises InputError where the server stops answering.
    """
    if not missing:
        return
    bar = Progress(console=Console(stderr=True), transient=True)
    try:
        with ThreadPoolExecutor(max_workers=DOWNLOADS) as pool, bar:
            fetched = pool.map(lambda one: _fetch(client, *one), missing)
            for _ in bar.track(fetched, total=len(missing), description="fetching tables"):
                pass
    except (requests.RequestException, MlflowException) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"the runs cannot be read from {shown(client.tracking_uri)}: {shown(why)}"
        ) from error


def _fetch(client: MlflowClient, run_id: str, table: str, folder: Path) -> None:
    """Put one table of a finished run, which never changes, into its folder: all of it or none.

    None where the run lacks it or has no Parquet file there: whoever reads it says so.
    """
    name = f"{table}.parquet"
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


def read_table(
    table: str,
    folders: Mapping[str, Path],
    what: Callable[[pl.LazyFrame], pl.LazyFrame] | None = None,
) -> pl.DataFrame:
    """One table of many trials, `folders` by trial key; of it what READ says, or `what`.

    Raises InputError for another schema.
    """
    keys = {str(folder / f"{table}.parquet"): key for key, folder in folders.items()}
    for file, key in keys.items():
        found = pl.read_parquet_metadata(file).get("schema_version")
        if found != str(SCHEMA_VERSION):
            raise InputError(
                f"{file} of trial {key} has schema version {found}: this report reads "
                f"{SCHEMA_VERSION}"
            )
    # One scan over all files: a read for each would take longer than all else together.
    rows = (what or READ[table])(pl.scan_parquet(list(keys), include_file_paths="file")).collect()
    # A path stands beside each of its rows: it is looked up once for all that follow one another.
    files = rows["file"]
    firsts = files.filter(files.ne_missing(files.shift()))
    trial_key = pl.Series("trial_key", [keys[file] for file in firsts], pl.String)
    return rows.drop("file").insert_column(0, trial_key.gather(files.rle_id()))


def read_some(
    table: str, sweep: RunTables, keys: Sequence[str], *columns: str
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Some columns of a table that is read of a few trials; -> also why which cannot be read."""
    run_ids = dict(sweep.trials.select("trial_key", "run_id").rows())
    if not sweep.is_local:
        missing = [
            (run_ids[key], table, sweep.folders[key])
            for key in keys
            if not (sweep.folders[key] / f"{table}.parquet").exists()
        ]
        _fetch_all(connect(sweep.uri), missing)
    frames, unreadable = [], {}
    for key in keys:
        try:
            frames.append(
                read_table(
                    table, {key: sweep.folders[key]}, lambda rows: rows.select(*columns, "file")
                )
            )
        except (OSError, pl.exceptions.PolarsError) as error:
            unreadable[key] = f"{table} cannot be read: {str(error).splitlines()[0]}"
    return (pl.concat(frames) if frames else pl.DataFrame()), unreadable


def shuffled_labels(sweep: RunTables, seed: int) -> RunTables:
    """The sweep with the names of its token groups dealt anew within each run: a control, in which
    what is said of rare tokens is said of others as often.

    Dealt among the groups that the run has numbers for; the others keep their names.
    """
    rng = np.random.default_rng(seed)
    rows = sweep.tables["token_groups"].filter(mask=PRIMARY["mask"])
    of_runs = rows.group_by("trial_key").agg(
        numbered=pl.col("group").filter(pl.col("mean_logprob").is_not_null()).unique().sort(),
        group=pl.col("group").unique().sort(),
    )
    dealt = pl.concat(
        [
            pl.DataFrame({"trial_key": key, "group": groups}).with_columns(
                dealt=pl.col("group").replace(
                    dict(zip(numbered, rng.permutation(numbered).tolist(), strict=True))
                )
            )
            for key, numbered, groups in of_runs.sort("trial_key").rows()
        ]
    )
    tables = {
        table: sweep.tables[table]
        .join(dealt, on=["trial_key", "group"], maintain_order="left")
        .with_columns(group="dealt")
        .drop("dealt")
        for table in ("token_groups", "group_weights")
    }
    note = f"A control: the names of token groups are shuffled within each run (seed {seed})."
    return replace(
        sweep,
        notes=(*sweep.notes, note),
        claims_digest=None,
        tables={**sweep.tables, **tables},
    )
