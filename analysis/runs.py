"""From the names of sweeps to frames: all trials, and the tables of finished trials."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from mlflow.entities import Run
from rich.console import Console
from rich.progress import Progress

from analysis.depth_gradient import STEPS
from gptcore.config import (
    COMPARED_KNOBS,
    KNOBS,
    LARGEST_INTEGER,
    InputError,
    Scalar,
    TrialConfig,
    did_you_mean,
)
from gptcore.records import PRIMARY, SCHEMA_VERSION, TABLES
from tracking.store import Store, named_runs, trial_status
from tracking.sweep_run import SEARCH_GOALS, RecordedPlan, read_plan
from tracking.tables import may_be_null, schema_of
from tracking.tags import say_incomplete
from tracking.untrusted import PLAIN, check_no_link, one_line

DOWNLOADS = 16
"""How many tables are fetched from a server at the same time."""

UNREADABLE = (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""Errors of reading a table that is damaged or missing, or not one of ours."""
LARGEST = 1e100
"""No number of a trial is larger, unless it is infinite: larger ones have no squares."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunTables:
    """One sweep, or several as one, as frames."""

    name: str  # the names of several sweeps are joined by " + "
    notes: tuple[str, ...]
    commands: tuple[str, ...]  # that made the sweeps
    pages: tuple[str, ...]  # addresses of MLflow's charts of the sweeps
    claims_digest: str | None
    """Digest of the claims before the first trial. None where sweeps differ in it, and for trials
    that were chosen, joined or changed in view of results."""
    trials: pl.DataFrame
    """One row for each trial of the plans: trial_key, run_id, status, reason, then every knob."""
    tables: Mapping[str, pl.DataFrame]
    """By name the tables of READ, with the rows of finished trials: trial_key, then the columns of
    gptcore.records that READ keeps."""
    folders: Mapping[str, Path]
    """By trial key the folder of its tables: that of its run, or a folder of the cache."""
    store: Store
    cache: Path
    sweep_runs: tuple[Run, ...]  # the own MLflow runs of the sweeps


class ReadTables(dict[str, pl.DataFrame]):
    """Tables by name. A table that READ does not name is an error that says so."""

    def __missing__(self, table: str) -> pl.DataFrame:
        raise KeyError(f"the table {table} is not read: name it in READ (analysis/runs.py)")


def _all(rows: pl.LazyFrame) -> pl.LazyFrame:
    return rows


Rows = Callable[[pl.LazyFrame], pl.LazyFrame]
"""Selects rows and columns of a table, before they are read. The column `file` has to stay."""

READ: dict[str, Rows] = {
    "init": _all,
    "training": _all,
    # Every kind of tensor, also those that no claim is about: a new claim would find nothing else.
    "weights": lambda rows: rows.drop("size", "mean", "frobenius", "cosine", "grad_rms"),
    "text_losses": _all,
    "token_groups": lambda rows: rows.filter(
        text=PRIMARY["text"], positions=PRIMARY["positions"]
    ).filter(
        (pl.col("mask") == PRIMARY["mask"])
        | pl.col("step").is_in([0, *STEPS])
        | (pl.col("step") == pl.col("step").max().over("file"))
    ).drop("text", "positions", "n_tokens", "log_mean_prob"),
    "group_weights": _all,
    # A list of ids has up to fifty thousand for each trial: only its length is read.
    "group_members": lambda rows: rows.select(
        "file", "group", n_tokens=pl.col("counts").list.len(),
        n_occurrences=pl.col("counts").list.sum(),
    ),
}  # fmt: skip
"""The tables that a report needs, and which of their rows and columns are read."""


def read_sweeps(
    store: Store,
    names: Sequence[str],
    where: str | None,
    cache: Path,
    keys: Collection[str] | None = None,
) -> RunTables:
    """Read sweeps as one. A finished trial whose tables cannot be read gets the status unreadable.

    Args:
        store: where the sweeps are recorded.
        names: of the sweeps. Without names, the sweep launched last is read.
        where: an SQL expression over the knobs, for a selection of trials.
        cache: the folder for tables that are fetched from a server, in a folder for each run.
        keys: read only the trials with these keys.

    Raises:
        InputError: there is nothing to read, or a table has another schema version.
    """
    if not store.address.exists:
        raise InputError(f"there is no sweep yet: {store.address.database} does not exist")
    store.open()
    sweeps = named_runs(store, names)
    name = " + ".join(run.data.tags["sweep"] for run in sweeps)
    plans = [read_plan(store, run) for run in sweeps]
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
    folders = {key: store.folder_of(runs[key]) or cache / runs[key].info.run_id for key in finished}
    for folder in folders.values():
        if folder.parent == cache:
            check_no_link(folder, cache)
    _fetch_all(store, cache, READ, folders)
    tables, unreadable = read_tables(READ, folders)
    if not tables:
        key, why = next(iter(unreadable.items()))
        raise InputError(f"no trial can be read; trial {key}: {why}")
    digests = {run.data.tags.get("claims_digest") for run in sweeps}
    # Trials that were chosen in view of results cannot confirm a claim, and whoever joins sweeps
    # may have seen the results of each.
    chosen = where or len(sweeps) > 1 or any(plan.preset in SEARCH_GOALS for plan in plans)
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    if differ := _knobs_of_sweeps(plans):
        notes[
            f"The sweeps differ in {', '.join(differ)}; verdicts on all of them average over that."
        ] = None
    return RunTables(
        name=name,
        notes=(
            *notes,
            *([f"Only the trials for which {where}."] if where else []),
            *(
                f"The {say_incomplete(run)}."
                for run in store.incomplete.values()
                if run.info.experiment_id in {one.info.experiment_id for one in sweeps}
            ),
        ),
        commands=tuple(plan.command for plan in plans),
        pages=tuple(store.address.chart_page(run.info.experiment_id) for run in sweeps),
        claims_digest=digests.pop() if len(digests) == 1 and not chosen else None,
        trials=trials.with_columns(
            status=pl.when(pl.col("trial_key").is_in(list(unreadable)))
            .then(pl.lit("unreadable"))
            .otherwise("status"),
            reason=pl.col("trial_key").replace_strict(unreadable, default=pl.col("reason")),
        ),
        tables=ReadTables(tables),
        folders={key: folder for key, folder in folders.items() if key not in unreadable},
        store=store,
        cache=cache,
        sweep_runs=tuple(sweeps),
    )


def _knobs_of_sweeps(plans: Sequence[RecordedPlan]) -> list[str]:
    """List the knobs, besides seeds, of which some sweep has values that another one lacks."""
    defaults = TrialConfig().to_flat()

    def values(plan: RecordedPlan, knob: str) -> set[Scalar]:
        return {trial.params.get(knob, defaults[knob]) for trial in plan.trials.values()}

    return [
        knob
        for knob in (*COMPARED_KNOBS, "corpus.subset")
        if any(values(plan, knob) != values(plans[0], knob) for plan in plans)
    ]


def _trials(plans: Sequence[RecordedPlan], runs: Mapping[str, Run]) -> pl.DataFrame:
    """Make RunTables.trials of the plans.

    Args:
        plans: of each sweep.
        runs: by trial key the run that counts.
    """
    defaults = TrialConfig().to_flat()
    params = {key: trial.params for plan in plans for key, trial in plan.trials.items()}
    return pl.DataFrame(
        [
            {
                "trial_key": key,
                "run_id": runs[key].info.run_id if key in runs else None,
                "status": trial_status(runs.get(key)),
                "reason": runs[key].data.tags.get("reason", "") if key in runs else "",
                # A plan that is older than a knob does not have the knob.
                **{**defaults, **flat},
            }
            for key, flat in params.items()
        ],
        infer_schema_length=None,
    )


def _fetch_all(
    store: Store, cache: Path, tables: Iterable[str], folders: Mapping[str, Path]
) -> None:
    """Fetch the tables that are missing in folders of the cache from a server.

    Raises:
        InputError: the server stops answering.
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
    """Fetch one table of a finished run into the run's folder, completely or not at all.

    A file that is missing on the server, or that is not Parquet, is not put there. The trial is
    then reported as unreadable, when its tables are read.
    """
    name = f"{table}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not store.fetch(folder.name, name, Path(scratch)):
            return
        try:
            pl.read_parquet_metadata(Path(scratch, name))
        except UNREADABLE:
            return
        Path(scratch, name).replace(folder / name)


def selected(trials: pl.DataFrame, where: str) -> pl.DataFrame:
    """Select the trials for which an SQL expression over the knobs is true.

    In SQL, a dot separates a table from a column. The names of knobs contain dots, so they are put
    into quotes here.

    Raises:
        InputError: this is no such expression, or it is true of no trial.
    """

    def quote(match: re.Match[str]) -> str:
        name = match[0]
        if name[0] in "'\"`" or "." not in name:
            return name
        if name not in KNOBS:
            raise InputError(
                f"--where {where!r}: there is no knob {name}: {did_you_mean(name, KNOBS)}"
                "`python sweeps/init_sweep.py --help` lists them"
            )
        return f'"{name}"'

    quoted = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`|[A-Za-z_][\w.]*", quote, where)
    try:
        chosen = trials.filter(pl.sql_expr(quoted))
    except pl.exceptions.PolarsError as error:
        why = str(error).splitlines()[0]
        raise InputError(
            f"--where takes a condition on knobs such as \"init.scheme = 'gpt2'\" (texts are in "
            f"quotes), not {where!r}: {why[:120]}"
        ) from error
    if chosen.is_empty():
        raise InputError(f"--where {where!r} is true of none of the {trials.height} trials")
    return chosen


def read_tables(
    what: Mapping[str, Rows], folders: Mapping[str, Path]
) -> tuple[dict[str, pl.DataFrame], dict[str, str]]:
    """Read tables of many trials. A trial with a table that cannot be read is left out of all.

    Args:
        what: the tables, and which of their rows and columns are read.
        folders: by trial key the folder of its tables.

    Returns:
        The frames by table, empty where no trial can be read; and by trial key, why it cannot be
        read.

    Raises:
        InputError: a table has another schema version.
    """
    unreadable: dict[str, str] = {}
    try:
        return {table: read_table(table, rows, folders) for table, rows in what.items()}, {}
    except InputError:
        raise
    except UNREADABLE:
        for key, folder in folders.items():
            try:
                for table, rows in what.items():
                    read_table(table, rows, {key: folder})
            except UNREADABLE as error:
                if isinstance(error, InputError):
                    raise
                why = one_line((str(error) or type(error).__name__).splitlines()[0])
                if isinstance(error, FileNotFoundError):
                    why += " (a run older than this table: --redo runs the trial again)"
                unreadable[key] = f"{table} cannot be read: {why}"
    readable = {key: folder for key, folder in folders.items() if key not in unreadable}
    if not readable:
        return {}, unreadable
    return {table: read_table(table, rows, readable) for table, rows in what.items()}, unreadable


def read_table(table: str, rows: Rows, folders: Mapping[str, Path]) -> pl.DataFrame:
    """Read one table of many trials, as read_tables does."""
    keys = {str(folder / f"{table}.parquet"): key for key, folder in folders.items()}
    for file, key in keys.items():
        found = pl.read_parquet_metadata(file).get("schema_version")
        if found != str(SCHEMA_VERSION):
            raise InputError(
                f"{file} of trial {key} has schema version {found}: this report reads version "
                f"{SCHEMA_VERSION}"
            )
    # One scan over all files: reading them one by one would take most of the time of a report.
    read = rows(
        pl.scan_parquet(list(keys), schema=schema_of(TABLES[table]), include_file_paths="file")
    ).collect()
    _check_values(table, read)
    # Rows of one file follow one another, so each path is translated to its trial key only once.
    files = read["file"]
    firsts = files.filter(files.ne_missing(files.shift()))
    trial_key = pl.Series("trial_key", [keys[file] for file in firsts], pl.String)
    return read.drop("file").insert_column(0, trial_key.gather(files.rle_id()))


def _check_values(table: str, read: pl.DataFrame) -> None:
    """Check what a table holds, which may be shown. Its columns have the right types.

    Raises:
        ValueError: a text is none of ours, a number cannot be one, or a number is missing.
    """
    needed = [name for name in read.columns if not may_be_null(TABLES[table], name)]
    for column in read.drop("file").iter_columns():
        name, kind = column.name, column.dtype
        if column.has_nulls() and name in needed:
            raise ValueError(f"the column {name} lacks values")
        if kind == pl.String and not column.unique().str.contains(f"^{PLAIN}$").all():
            raise ValueError(f"the column {name} has a text that is none of ours")
        largest = LARGEST_INTEGER if kind.is_integer() else LARGEST
        if (
            kind.is_numeric()
            and not (column.is_between(-largest, largest) | ~column.is_finite()).all()
        ):
            raise ValueError(f"the column {name} has a number that none can be")


def read_some(
    table: str, sweep: RunTables, keys: Sequence[str], *columns: str
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Read some columns of a table for a few trials, for a table that is too large to read fully.

    Returns:
        The frame, without rows where no trial can be read; and by trial key, why it cannot be read.
    """
    folders = {key: sweep.folders[key] for key in keys}
    _fetch_all(sweep.store, sweep.cache, [table], folders)
    tables, unreadable = read_tables({table: lambda rows: rows.select(*columns, "file")}, folders)
    return tables.get(table, pl.DataFrame(schema={"trial_key": pl.String})), unreadable
