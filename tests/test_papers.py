"""Figures as files, tables for a paper, and the options --figure and --format."""

import re

import polars as pl
import pytest

from analysis import papers
from analysis.report import main

BARS = {
    "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
    "data": {"values": [{"x": 1, "y": 2}, {"x": 2, "y": 3}]},
    "mark": "bar",
    "encoding": {
        "x": {"field": "x", "type": "ordinal"},
        "y": {"field": "y", "type": "quantitative"},
    },
}


@pytest.mark.parametrize(("pixels", "millimetres"), [(200, 85), (600, 170)])
def test_a_figure_is_as_wide_as_a_column_or_a_page(tmp_path, pixels, millimetres):
    files = papers.write_figure({**BARS, "width": pixels}, tmp_path, "bars", papers.FORMATS)
    assert [file.name for file in files] == ["bars.svg", "bars.pdf", "bars.png"]
    svg, pdf, png = (file.read_bytes() for file in files)
    assert f'width="{millimetres}.00mm"'.encode() in svg
    assert b"currentColor" not in svg
    points = float(re.search(rb"/MediaBox\s*\[0 0 ([\d.]+)", pdf)[1])
    assert points / 72 * 25.4 == pytest.approx(millimetres, rel=0.01)
    assert int.from_bytes(png[16:20]) == pytest.approx(millimetres / 25.4 * papers.PRINT_DPI, abs=2)


def test_the_text_of_a_printed_figure_has_at_least_seven_points(tmp_path):
    (file,) = papers.write_figure({**BARS, "width": 370}, tmp_path, "bars", ["svg"])
    svg = file.read_text()
    pixels = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)px"', svg)]
    assert min(sizes) / pixels * papers.COLUMN / 25.4 * 72 >= 7


def test_a_table_in_latex_escapes_special_characters():
    table = pl.DataFrame({"a_b": ["5% & $x$", None, "two\nlines"], "p": [0.5, None, 1e-5]})
    lines = papers.latex(table).splitlines()
    assert lines[1] == r"\begin{tabular}{lr}"
    assert lines[3] == r"a\_b & p \\"
    assert lines[5] == r"5\% \& \$x\$ & $0.5$ \\"
    assert lines[6] == r"-- & -- \\"
    assert lines[7] == r"two lines & $1 \times 10^{-5}$ \\"


@pytest.mark.parametrize(
    ("weights", "data", "says"),
    [
        ([0, 1], [0, 1], "the order of the batches and the draws of tokens."),
        ([0, 1], [3, 3], "are the same in all trials."),
        ([0, 0, 1, 1], [2, 3, 2, 3], "have 2 seeds of their own."),
    ],
)
def test_the_methods_say_what_a_seed_fixes(weights, data, says):
    trials = pl.DataFrame({"init.seed": weights, "corpus.data_seed": data})
    assert says in papers.say_seeds(trials)


def test_one_figure_can_be_written_in_one_format(two_sweeps, tmp_path, capsys):
    flags = ["--runs-dir", str(two_sweeps), "--name", "one", "--out", str(tmp_path)]
    assert main([*flags, "--figure", "losses", "--format", "svg"]) == 0
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()] == [
        "figures/losses.svg"
    ]
    assert capsys.readouterr().out == f"report: {tmp_path}/figures\n"


def test_a_new_report_leaves_no_figure_of_an_earlier_one(two_sweeps, tmp_path):
    """The numbers may have changed."""
    flags = ["--runs-dir", str(two_sweeps), "--name", "one", "--out", str(tmp_path)]
    assert main([*flags, "--figure", "losses", "--format", "svg"]) == 0
    (tmp_path / "figures" / "mine.svg").touch()
    assert main(flags) == 0
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        "mine.svg", "qkv_std.png", "group_log_probs.png"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--figure", "lossess"], "there is no figure lossess: did you mean losses? the figures"),
        (["--figure", "losses", "--format", "gif"], "invalid choice: 'gif'"),
        (["--figure", "tau_by_rate"], "there are no numbers for the figure tau_by_rate"),
    ],
)
def test_an_unknown_figure_or_format_gives_one_sentence(two_sweeps, tmp_path, capsys, flags, says):
    code = main(["--runs-dir", str(two_sweeps), "--name", "one", "--out", str(tmp_path), *flags])
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1)
    assert says in said
    assert not any(tmp_path.iterdir())
