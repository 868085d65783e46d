"""The comparison of two sweeps."""

import json

import polars as pl
import pytest

from analysis.report import main


def compared(runs_dir, out, *names):
    flags = ["--runs-dir", str(runs_dir), "--out", str(out), "--name", *names, "--compare"]
    assert main(flags) == 0
    rows = json.loads((out / "comparison.json").read_text())
    return {row["claim"]: row for row in rows}, (out / "report.html").read_text()


def test_a_comparison_has_both_verdicts_and_the_differences_of_pairs(two_sweeps, tmp_path):
    rows, page = compared(two_sweeps, tmp_path, "one", "two")
    assert len(rows) == 14
    assert all(len(row["sides"]) == 2 for row in rows.values())
    frame = pl.read_parquet(tmp_path / "claims.parquet")
    for name, row in rows.items():
        for sweep, (_, number) in zip(("one", "two"), row["sides"], strict=True):
            found = frame.filter(claim=name, scheme=sweep, part=row["part"])
            assert found.height == (number != "–")
    assert "The sweeps differ in " in page


def test_the_difference_changes_its_sign_when_the_sweeps_are_exchanged(two_sweeps, tmp_path):
    rows, _ = compared(two_sweeps, tmp_path, "one", "two")
    again, _ = compared(two_sweeps, tmp_path / "back", "two", "one")
    for name, row in rows.items():
        difference, other = row["difference"], again[name]["difference"]
        if difference is not None and row["part"] == again[name]["part"]:
            assert difference["value"] == pytest.approx(-other["value"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--name", "one", "--compare"], "needs the names of two different sweeps"),
        (
            ["--name", "one", "one", "--compare"],
            "needs the names of two different sweeps",
        ),
        (["--name", "one", "two", "--compare", "--claims", "order"], "it cannot be combined"),
    ],
)
def test_bad_input_of_a_comparison_gives_one_sentence(two_sweeps, tmp_path, capsys, flags, says):
    code = main(["--runs-dir", str(two_sweeps), "--out", str(tmp_path / "out"), *flags])
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1)
    assert says in said
    assert not (tmp_path / "out").exists()
