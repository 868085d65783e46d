"""From the names of sweeps to frames: all trials, and the tables of finished trials."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from mlflow.entities import Run
from rich.console import Console
from rich.progress import Progress

from analysis.depth_gradient import STEPS
from analysis.reading import UNREADABLE, Rows, empty_tables, read_tables
from gptcore.config import (
    COMPARED_KNOBS,
    KNOBS,
    InputError,
    Scalar,
    TrialConfig,
    did_you_mean,
)
from gptcore.records import PRIMARY
from tracking.store import Store, named_runs, trial_status
from tracking.sweep_run import SEARCH_GOALS, RecordedPlan, read_plan
from tracking.tags import say_incomplete
from tracking.untrusted import check_no_link, one_line

DOWNLOADS = 16
"""How many tables are fetched from a server at the same time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunTables:
    """One sweep, or several as one, as frames."""

    name: str  # the names of several sweeps are joined by " + "
    notes: tuple[str, ...]
    commands: tuple[str, ...]  # that made the sweeps
    pages: tuple[str, ...]  # addresses of a tracking server's charts of the sweeps
    stamps: Mapping[str, str]
    """The digest of the claims when a trial was planned, before it had a result, by trial key. No
    trial has one if trials were selected, combined or changed after a result was seen."""
    asked: tuple[str, ...]  # the claims that the sweeps ask; empty for all claims
    trials: pl.DataFrame
    """One row for each trial of the plans: trial_key, run_id, status, reason, then every knob."""
    tables: Mapping[str, pl.DataFrame]
    """By name the tables of READ, with the rows of finished trials: trial_key, then the columns of
    gptcore.records that READ keeps."""
    folders: Mapping[str, Path]
    """By trial key the folder of its tables: that of its run, or a folder of the cache."""
    made_with: Mapping[str, tuple[str, ...]]
    """The values of each tag of PROVENANCE in the runs of trials."""
    store: Store
    cache: Path
    sweep_runs: tuple[Run, ...]  # the own MLflow runs of the sweeps


PROVENANCE = ("git_commit", "versions", "device", "corpus_digest")
"""Tags of the runs of trials that say where the numbers come from."""


ENDED = ("finished", "diverged", "failed")
"""A sweep can be reported when a trial has one of these statuses."""


class ReadTables(dict[str, pl.DataFrame]):
    """Tables by name. A table that READ does not name is an error that says so."""

    def __missing__(self, table: str) -> pl.DataFrame:
        raise KeyError(f"the table {table} is not read: name it in READ (analysis/runs.py)")


def _all(rows: pl.LazyFrame) -> pl.LazyFrame:
    return rows


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
    *,
    tables_read: Mapping[str, Rows] = READ,
    quiet: bool = False,
) -> RunTables:
    """Read sweeps as one. A finished trial whose tables cannot be read gets the status unreadable.

    Args:
        store: where the sweeps are recorded.
        names: of the sweeps. Without names, the sweep launched last is read.
        where: an SQL expression over the knobs, for a selection of trials.
        cache: the folder for tables that are fetched from a server, in a folder for each run.
        keys: read only the trials with these keys.
        tables_read: the tables to read, and a function that selects rows and columns of each.
        quiet: whether to hide the progress bar while tables are downloaded.

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
    if not trials["status"].is_in(ENDED).any():
        condition = f" for which {where}" if where else ""
        raise InputError(f"sweep {name} has no trials with a result yet{condition}")
    folders: dict[str, Path] = {}
    unreadable: dict[str, str] = {}
    for key in finished:
        try:
            folders[key] = _folder(store, runs[key], cache)
        except InputError as error:
            unreadable[key] = str(error)
    _fetch_all(store, cache, tables_read, folders, quiet)
    tables, damaged = (
        read_tables(tables_read, folders) if finished else (empty_tables(tables_read), {})
    )
    unreadable |= damaged
    if not tables:
        key, why = next(iter(unreadable.items()))
        raise InputError(f"no trial can be read; trial {key}: {why}")
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
        pages=tuple(store.address.chart_page(run.info.experiment_id) for run in sweeps)
        if store.address.is_server
        else (),
        stamps={} if chosen else {key: one.stamp for key, one in plans[0].trials.items()},
        asked=plans[0].claims if len({plan.claims for plan in plans}) == 1 else (),
        trials=trials.with_columns(
            status=pl.when(pl.col("trial_key").is_in(list(unreadable)))
            .then(pl.lit("unreadable"))
            .otherwise("status"),
            reason=pl.col("trial_key").replace_strict(unreadable, default=pl.col("reason")),
        ),
        tables=ReadTables(tables),
        folders={key: folder for key, folder in folders.items() if key not in unreadable},
        made_with={
            tag: tuple(
                dict.fromkeys(
                    one_line(runs[key].data.tags[tag])
                    for key in trials["trial_key"]
                    if key in runs and runs[key].data.tags.get(tag)
                )
            )
            for tag in PROVENANCE
        },
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


def _folder(store: Store, run: Run, cache: Path) -> Path:
    """Return the folder of a run's tables, which for a server is in the cache.

    Raises:
        InputError: they are where nothing is read.
    """
    if here := store.folder_of(run):
        return here
    folder: Path = cache / run.info.run_id
    check_no_link(folder, cache.parent)
    return folder


def _fetch_all(
    store: Store,
    cache: Path,
    tables: Iterable[str],
    folders: Mapping[str, Path],
    quiet: bool = False,
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
    bar = Progress(console=Console(stderr=True), transient=True, disable=quiet)
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

    def unknown(name: str) -> InputError:
        return InputError(
            f"--where {where!r}: there is no knob {name}: {did_you_mean(name, KNOBS)}"
            "`python sweeps/init_sweep.py --help` lists them"
        )

    def quote(match: re.Match[str]) -> str:
        name = match[0]
        if name[0] in "'\"`" or "." not in name:
            return name
        if name not in KNOBS:
            raise unknown(name)
        return f'"{name}"'

    quoted = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`|[A-Za-z_][\w.]*", quote, where)
    try:
        chosen = trials.filter(pl.sql_expr(quoted))
    except pl.exceptions.PolarsError as error:
        why = str(error).splitlines()[0]
        missing = re.match(r'unable to find column "(.*?)"', why)
        if missing and did_you_mean(missing[1], KNOBS):  # else it may be a text without quotes
            raise unknown(missing[1]) from error
        raise InputError(
            f"--where takes a condition on knobs such as \"init.scheme = 'gpt2'\" (texts are in "
            f"quotes), not {where!r}: {why.partition(';')[0][:120]}"
        ) from error
    if chosen.is_empty():
        raise InputError(f"--where {where!r} is true of none of the {trials.height} trials")
    return chosen


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
