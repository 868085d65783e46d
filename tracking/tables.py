"""Rows as Parquet files: one file a table, complete or absent."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import polars as pl

from gptcore.files import write_atomically
from gptcore.records import SCHEMA_VERSION, TABLES, Row

COLUMN_TYPES = {
    int: pl.Int64(),
    float: pl.Float64(),
    str: pl.String(),
    list[int]: pl.List(pl.Int64),
    list[float]: pl.List(pl.Float64),
    list[float | None]: pl.List(pl.Float64),
}


def schema_of(row_type: type[Row]) -> dict[str, pl.DataType]:
    """Return the columns of a table and their types, from the fields of its row type."""
    hints = get_type_hints(row_type)
    return {
        entry.name: COLUMN_TYPES[_without_none(hints[entry.name])] for entry in fields(row_type)
    }


def may_be_null(row_type: type[Row], column: str) -> bool:
    """Return whether a column of a table may lack values; also one that a reader has made."""
    hint = get_type_hints(row_type).get(column, type(None) | int)
    return types.NoneType in get_args(hint)


def _without_none(hint: type) -> type:
    if get_origin(hint) is types.UnionType:
        (hint,) = (arg for arg in get_args(hint) if arg is not types.NoneType)
    return hint


def write_tables(tables: Mapping[str, Sequence[Row]], folder: Path) -> list[Path]:
    """Write each table of a trial into a folder. Return the files.

    A file carries its schema version as Parquet metadata.
    """
    files = []
    for table, rows in tables.items():
        schema = schema_of(TABLES[table])
        columns = {name: [getattr(row, name) for row in rows] for name in schema}
        frame = pl.DataFrame(columns, schema=schema)
        file = folder / f"{table}.parquet"
        version = {"schema_version": str(SCHEMA_VERSION)}
        write_atomically(file, functools.partial(frame.write_parquet, metadata=version))
        files.append(file)
    return files
