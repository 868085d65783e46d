"""From the names of sweeps to frames: their trials, and the tables of those that finished.

Only finished trials have rows; the others are in `trials` with their status.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from mlflow.entities import Run
from rich.console import Console
from rich.progress import Progress

from analysis.depth_gradient import STEPS
from gptcore.config import KNOBS, InputError, TrialConfig
from gptcore.records import PRIMARY, SCHEMA_VERSION
from tracking.store import Store, artifact_folder, named_runs, trial_status

DOWNLOADS = 16
"""Tables fetched at a time from a server."""

UNREADABLE = (OSError, pl.exceptions.PolarsError)
"""What reading a table that is damaged or not there raises."""


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
    store: Store
    cache: Path
    looks: tuple[Mapping[str, Any], ...] = ()  # analysis.interim' Record of each sweep that has one


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
    store: Store,
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
    if not store.address.exists:
        raise InputError(f"there is no sweep yet: {store.address.database} does not exist")
    store.open()
    sweeps = named_runs(store, names)
    name = " + ".join(run.data.tags["sweep"] for run in sweeps)
    plans = [store.read_json(run, "plan.json") for run in sweeps]
    runs = store.trial_runs()
    trials = _trials(plans, runs)
    if where is not None:
        trials = selected(trials, where)
    if keys is not None:
        trials = trials.filter(pl.col("trial_key").is_in(list(keys)))
    finished = trials.filter(pl.col("status") == "finished")["trial_key"].to_list()
    if not finished:
        condition = f" for which {where}" if where else ""
        raise InputError(f"sweep {name} has no finished trials yet{condition}")
    folders = {key: artifact_folder(runs[key]) or cache / runs[key].info.run_id for key in finished}
    _fetch_all(store, cache, READ, folders)
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
        pages=tuple(store.address.chart_page(run.info.experiment_id) for run in sweeps),
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
        store=store,
        cache=cache,
        looks=tuple(filter(None, (_looks_of(store, run) for run in sweeps))),
    )


def read_looks(store: Store, sweep: str) -> dict[str, Any] | None:
    """What a sweep keeps of its looks, analysis.interim's Record: empty where it was run without,
    None where there is no such sweep."""
    if not store.address.exists:
        return None
    store.open()
    run = store.sweep_runs().get(sweep)
    return _looks_of(store, run) if run else None


def _looks_of(store: Store, sweep: Run) -> dict[str, Any]:
    if "until_decided" not in sweep.data.tags:
        return {}
    looks: dict[str, Any] = store.read_json(sweep, "looks.json")
    return looks


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


def _fetch_all(
    store: Store, cache: Path, tables: Iterable[str], folders: Mapping[str, Path]
) -> None:
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
    store.open()
    bar = Progress(console=Console(stderr=True), transient=True)
    with ThreadPoolExecutor(max_workers=DOWNLOADS) as pool, bar:
        fetched = pool.map(lambda one: _fetch(store, *one), missing)
        for _ in bar.track(fetched, total=len(missing), description="fetching tables"):
            pass


def _fetch(store: Store, folder: Path, table: str) -> None:
    """Put one table of a finished run, which never changes, into its folder: all of it or none.

    None where the run lacks it or has no Parquet file there: whoever reads it says so.
    """
    name = f"{table}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not store.fetch(folder.name, name, Path(scratch)):
            return
        try:
            pl.read_parquet_metadata(Path(scratch, name))
        except pl.exceptions.PolarsError:
            return
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
    _fetch_all(sweep.store, sweep.cache, [table], folders)
    tables, unreadable = read_tables({table: lambda rows: rows.select(*columns, "file")}, folders)
    return tables.get(table, pl.DataFrame(schema={"trial_key": pl.String})), unreadable
