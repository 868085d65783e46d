"""The first screen: question, answer, matrix, the source's numbers, and the next commands."""

import json
import re
import shlex
from dataclasses import replace

import pytest

from analysis import answers
from analysis.claim_table import ALL, estimates, weakest_part
from analysis.claims import CLAIMS
from analysis.decisions import CONTRADICTED, SUPPORTED, UNDERPOWERED
from analysis.findings import find
from analysis.frames import frames_of_runs, with_scheme
from analysis.next_steps import next_steps, with_flags
from analysis.power import HEADLINES
from analysis.replication import replication
from analysis.runs import read_sweeps
from analysis.sweep_verdicts import measured
from helpers.store import store_in
from sweeps.command_line import add_knobs, parse, sweep_parser


@pytest.fixture(scope="module")
def read(two_sweeps):
    """Read a sweep. Return the sweep, the findings and the statistics of the runs."""
    sweep = read_sweeps(store_in(two_sweeps), ["one"], None, two_sweeps / "cache")
    sweep = replace(sweep, trials=with_scheme(sweep.trials))
    by_run = frames_of_runs(sweep)
    return sweep, find(sweep, by_run, measured(sweep)), by_run


def with_verdicts(findings, name, **verdicts):
    """Return findings in which a claim has these verdicts by scheme, and the first one pooled."""
    here, by = dict(findings.claims.here), findings.claims.by["scheme"]
    changed = {
        scheme: {**found, name: replace(found[name], verdict=verdicts[scheme])}
        for scheme, found in by.items()
    }
    here[name] = replace(here[name], verdict=next(iter(verdicts.values())), depends_on=None)
    claims = replace(findings.claims, here=here, by={"scheme": changed})
    return replace(findings, claims=claims)


def test_the_question_is_the_question_of_the_sweep(read):
    sweep, findings, _ = read
    said = answers.question(sweep, findings)
    for word in ("14 claims", "n_layer", *sweep.trials["init.scheme"].unique(), "seed"):
        assert str(word) in said
    one = replace(findings, claims=replace(findings.claims, asked=["order"]))
    said = answers.question(sweep, one)
    assert said.startswith("Does this hold when a GPT")
    assert said.endswith(f"? “{CLAIMS['order'].says}”")


def test_the_answer_names_the_schemes_where_they_differ_and_counts_all_claims(read):
    _, findings, _ = read
    first, second = findings.claims.by["scheme"]
    same = with_verdicts(findings, "never_suppressed", **{first: SUPPORTED, second: SUPPORTED})
    assert any("is supported under all 2 schemes" in one for one in answers.answer(same))
    split = with_verdicts(findings, "never_suppressed", **{first: SUPPORTED, second: CONTRADICTED})
    (said,) = (one for one in answers.answer(split) if "never occur" in one)
    assert re.search(f"supported under {first} .*; contradicted under {second}", said)
    assert answers.answer(findings)[-1].startswith("Over all schemes together, of 14 claims: ")


def test_the_matrix_has_a_cell_for_every_claim_and_scheme_with_one_number_in_a_row(read):
    _, findings, _ = read
    found = answers.matrix(findings, list(CLAIMS), most=24)
    assert [row.name for row in found.rows][: len(HEADLINES)] == list(HEADLINES)
    assert {row.name for row in found.rows} == set(CLAIMS)
    for row in found.rows:
        assert len(row.schemes) == len(found.schemes) == 2
        part = weakest_part(findings.claims.here[row.name])
        if part:
            assert row.must_be.removeprefix("median ").startswith(f"{part} ")
    assert answers.matrix(findings, ["order"], most=1).left_out == 1


def test_there_is_no_verdict_for_all_schemes_if_one_scheme_has_another_verdict(read):
    _, findings, _ = read
    first, second = findings.claims.by["scheme"]
    for other in (CONTRADICTED, UNDERPOWERED):
        split = with_verdicts(findings, "order", **{first: SUPPORTED, second: other})
        (row,) = answers.matrix(split, ["order"], most=24).rows
        assert row.pooled.remark == "as a mean"
        assert [cell.verdict for cell in row.schemes] == [SUPPORTED, other]
        assert ALL not in estimates(split).filter(claim="order")["scheme"].to_list()
        asked = replace(split, claims=replace(split.claims, asked=["order"]))
        assert "all 2 schemes" not in answers.answer(asked)[0]
    both = with_verdicts(findings, "order", **{first: SUPPORTED, second: SUPPORTED})
    (row,) = answers.matrix(both, ["order"], most=24).rows
    assert row.pooled.remark != "as a mean"


def test_the_description_of_a_cell_is_about_the_number_in_the_cell(read):
    _, findings, _ = read
    for row in answers.matrix(findings, list(CLAIMS), most=24).rows:
        part = weakest_part(findings.claims.here[row.name])
        for cell in row.schemes:
            assert cell.effect == "" or f"{part} " in cell.description


def test_a_selection_of_trials_has_no_next_commands(read):
    sweep, findings, _ = read
    assert next_steps(replace(sweep, stamps={}), findings) == []
    once = replace(sweep, commands=(f"{sweep.commands[0]} --init.seed 0 1 --redo all --watch",))
    for step in next_steps(once, findings):
        assert "--redo" not in step.command
        assert "--watch" not in step.command


def test_numbers_that_agree_with_the_source_are_marked(read):
    sweep, findings, by_run = read
    rows = {row.what: row for row in replication(sweep, findings, by_run)}
    mlp = rows["std of linear weights (MLP) at the start"]
    assert set(mlp.found) == set(findings.depth_gradient)
    for number, agrees in mlp.found.values():
        assert agrees == (abs(float(number) / 0.02 - 1) < 0.03 + 1e-9)
    layer = rows["layer whose QKV weights widen most"]
    assert all(agrees == (number == "0") for number, agrees in layer.found.values())


def test_the_next_commands_can_be_run(read):
    sweep, findings, _ = read
    assert next_steps(sweep, findings) == []  # the command does not name its trials
    named = replace(sweep, commands=(f"{sweep.commands[0]} --init.seed 0 1",))
    steps = next_steps(named, findings)
    assert steps
    for step in steps:
        words = shlex.split(step.command)
        assert words[:2] == ["python", "sweeps/init_sweep.py"]
        parser = sweep_parser("")
        add_knobs(parser, "")
        parse(parser, words[2:])


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [
        ("x.py --init.seed 0 1 --name a", {"init.seed": ["2"]}, "x.py --name a --init.seed 2"),
        ("python x.py --name=a", {"name": "b"}, "python x.py --name b"),
        ("python x.py", {"optim.lr": ["0.1", "0.2"]}, "python x.py --optim.lr 0.1 0.2"),
    ],
)  # fmt: skip
def test_a_flag_replaces_an_earlier_flag_of_the_same_name(command, flags, expected):
    assert with_flags(command, **flags) == expected


def test_findings_without_numbers_have_an_answer(read):
    _, findings, _ = read
    empty = {name: replace(found, parts={}) for name, found in findings.claims.here.items()}
    none = replace(findings, claims=replace(findings.claims, here=empty))
    assert answers.answer(none) == ["No finished trial has numbers, so nothing is decided yet."]
    assert json.dumps(answers.answer(none))
