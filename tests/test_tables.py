from dataclasses import asdict, fields

import polars as pl
import pytest

from gptcore.records import SCHEMA_VERSION, TABLES
from helpers.trials import undisturbed
from tracking.tables import schema_of, write_tables


@pytest.mark.parametrize("table", TABLES)
def test_every_table_comes_back_as_it_was(table, tiny, tmp_path):
    recorder = undisturbed(tiny)
    write_tables(recorder.rows, tmp_path)
    frame = pl.read_parquet(tmp_path / f"{table}.parquet")
    assert frame.columns == [entry.name for entry in fields(TABLES[table])]
    assert frame.to_dicts() == [asdict(row) for row in recorder.rows[table]]


@pytest.mark.parametrize("table", TABLES)
def test_every_table_can_be_empty_and_says_its_version(table, tmp_path):
    (file,) = write_tables({table: []}, tmp_path)
    assert pl.read_parquet(file).schema == schema_of(TABLES[table])
    assert pl.read_parquet_metadata(file)["schema_version"] == str(SCHEMA_VERSION)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{table}.parquet"]
