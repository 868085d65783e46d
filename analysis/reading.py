"""Read the Parquet tables of trials, which anybody may have made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import polars as pl

from gptcore.config import LARGEST_INTEGER, InputError
from gptcore.records import SCHEMA_VERSION, TABLES
from tracking.tables import may_be_null, schema_of
from tracking.untrusted import PLAIN, one_line

UNREADABLE = (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""Errors of reading a table that is damaged or missing, or not one of ours."""
LARGEST = 1e100
"""No number of a trial is larger, unless it is infinite: larger ones have no squares."""
Rows = Callable[[pl.LazyFrame], pl.LazyFrame]
"""Selects rows and columns of a table, before they are read. The column `file` has to stay."""


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


def empty_tables(what: Mapping[str, Rows]) -> dict[str, pl.DataFrame]:
    """Return tables without rows, for a sweep without a finished trial."""
    empty = {
        table: pl.DataFrame(schema={**schema_of(TABLES[table]), "file": pl.String})
        for table in what
    }
    return {
        table: rows(empty[table].lazy())
        .select(pl.col("file").alias("trial_key"), pl.exclude("file"))
        .collect()
        for table, rows in what.items()
    }


def read_table(table: str, rows: Rows, folders: Mapping[str, Path]) -> pl.DataFrame:
    """Read one table of many trials, as read_tables does."""
    keys = {str(folder / f"{table}.parquet"): key for key, folder in folders.items()}
    for file, key in keys.items():
        found = pl.read_parquet_metadata(file).get("schema_version")
        if found != str(SCHEMA_VERSION):
            raise InputError(
                f"{file} of trial {key} has schema version {one_line(str(found))[:20]}: this "
                f"report reads version {SCHEMA_VERSION}"
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
        if kind.is_numeric():
            numbers = column.filter(column.is_finite()) if kind.is_float() else column
            largest = LARGEST_INTEGER if kind.is_integer() else LARGEST
            ends = (numbers.min(), numbers.max())
            if any(abs(cast(float, end)) > largest for end in ends if end is not None):
                raise ValueError(f"the column {name} has a number that none can be")
