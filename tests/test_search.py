"""Searches on Ray with a real study: what they find, and that they continue."""

import json
import sqlite3

import numpy as np
import polars as pl
import pytest

from analysis.claims import CLAIMS
from analysis.counterexamples import distance, seeds_to_contradict, sentences
from analysis.decisions import ALPHA, CONTRADICTED
from analysis.part_verdicts import judge_part
from gptcore.config import TrialConfig
from helpers.driving import kill, outcome, start, wait_for
from helpers.store import runs_of
from helpers.trials import TINY, flags
from sweeps import launch
from sweeps.presets import PRESETS
from sweeps.search import largest_trial, main
from tracking.address import store_address
from tracking.store import trial_status

SEARCHED = ("init.scheme", "init.std", "init.gain", "init.cut", "init.nu", "optim.lr")


def tiny_flags(more, *open_knobs):
    """The command line of a tiny trial that leaves some knobs to the search."""
    words = flags(TrialConfig.from_flat({**TINY, **more}))
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for pair in pairs if pair[0][2:] not in (*SEARCHED, *open_knobs) for word in pair]


def run(runs_dir, *arguments):
    return outcome(start("search.py", runs_dir, *arguments), 400)


def has_answers(file):
    """Whether the study in the file has a trial that is answered."""
    try:
        with sqlite3.connect(file) as store:
            (count,) = store.execute("select count(*) from trial_values").fetchone()
    except sqlite3.OperationalError:  # it is being made
        return False
    return count > 0


BAD = [
    ([], "the following arguments are required: goal"),
    (["worst"], "invalid choice: 'worst'"),
    (["refute"], "refute takes a --claim: init_table, "),
    (["refute", "--claim", "huge"], "invalid choice: 'huge'"),
    (["best", "--claim", "order"], "--claim is an option of refute, not of best"),
    (["best", "--metric", "accuracy"], "invalid choice: 'accuracy'"),
    (["best", "--trials", "0"], "--trials takes a whole number >= 1"),
    (["best", "--optim.lr", "1..0.1"], "optim.lr takes a range from low to high"),
    (["best", "--init.scheme", "huge"], "init.scheme 'huge' is unknown"),
    (
        ["best", "--model.n_layer", "1..x"],
        "model.n_layer takes a whole number >= 1 and <= 1000, not 'x'",
    ),
    (
        ["best", "--init.scheme", "gpt2", "--init.std", "0.01..0.1"],
        "init.std is a parameter of no scheme or optimiser in this search: leave it out",
    ),
    (["refute", "--claim", "rare_flips"], "invalid choice: 'rare_flips'"),
    (
        ["best", "--corpus.tokenizer", "gpt2", "bytes"],
        "best takes one --corpus.tokenizer",
    ),
    (["best", "--name", "../up"], "--name takes up to 100 letters"),
    (["refute", "--claim", "order", "--init.seed", "0", "1"], "refute takes one --init.seed"),
    (
        ["refute", "--claim", "depth_gradient", "--seeds", "5"],
        "--seeds takes at least 7 to contradict depth_gradient with --finds 3, not 5",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD]
)
def test_bad_input_is_one_sentence_exit_code_2_and_nothing_written(
    arguments, says, tmp_path, capsys
):
    runs_dir = tmp_path / "runs"
    assert main([*arguments, "--corpus.name", "pydocs", "--runs-dir", str(runs_dir)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not runs_dir.exists()


@pytest.mark.parametrize("name", CLAIMS)
def test_a_number_beyond_its_distance_contradicts_and_the_seeds_suffice_for_it(name):
    for rule in CLAIMS[name].parts.values():
        if not rule.decides:
            continue
        alpha = ALPHA / 3
        seeds = seeds_to_contradict(name, alpha)
        for value in (-3.0, -0.2, 0.0, 0.02, 0.2, 1.0, 3.0):
            value = float(value > 0) if rule.centre == "share" else value
            seed = np.arange(seeds)
            runs = pl.DataFrame(
                {"scheme": "", "config": "", "seed": seed, "data_seed": seed,
                 "value": value + (rule.centre != "share") * 1e-9 * (seed - seeds / 2)}
            )  # fmt: skip
            contradicts = judge_part(rule, runs, False, alpha).verdict == CONTRADICTED
            assert contradicts == (distance(rule, value) < 0), (name, value)
            if seeds > 2 and contradicts:
                one_less = judge_part(rule, runs[1:], False, alpha)
                assert one_less.verdict != CONTRADICTED


def test_a_claim_that_no_trial_has_a_number_for_is_not_measured():
    """For example rare tokens over bytes. `none found` would look like evidence for the claim."""
    assert sentences("rare_falls", [], 30, measured=0) == [
        "rare_falls: not measured, because none of 30 trials has the number for it"
    ]
    assert sentences("rare_falls", [], 30, measured=1) == [
        "rare_falls: no counterexample found in 30 trials"
    ]


@pytest.mark.parametrize("choices", [["bytes", "gpt2"], ["gpt2", "bytes"]])
def test_the_largest_trial_of_a_search_has_the_larger_vocabulary(choices):
    assert largest_trial({"corpus.tokenizer": choices}).model.vocab_size == 50257


@pytest.mark.full
def test_the_best_is_found_once_by_a_search_that_was_killed(tmp_path):
    runs_dir = tmp_path / "runs"
    arguments = [
        "best", "--trials", "12", "--no-report", "--no-estimate",
        *tiny_flags({"train.steps": 100}, "model.n_layer", "probes.text_every"),
        "--probes.text_every", "10", "--init.scheme", "normal", "student_t",
        "--model.n_layer", "1..2",
    ]  # fmt: skip
    process = start("search.py", runs_dir, *arguments)
    wait_for(lambda: has_answers(runs_dir / "optuna.db"))
    kill(process)
    code, output = run(runs_dir, *arguments)
    assert code == 0, output
    assert "search best: 12 trials, 0 done" not in output
    found = json.loads((runs_dir / "reports" / "best" / "search.json").read_text())
    assert [one["number"] for one in found["trials"]] == list(range(12))
    states = {one["state"] for one in found["trials"]}
    assert states <= {"complete", "pruned"}
    assert "complete" in states
    runs = runs_of(store_address(runs_dir).uri)
    assert len(runs) == 12
    for one in found["trials"]:
        run_of_trial = runs[one["trial_key"]]
        assert run_of_trial.info.status == ("FINISHED" if one["state"] == "complete" else "KILLED")
        if one["state"] == "complete":
            assert one["value"] == run_of_trial.data.metrics["loss/val"]
        else:
            assert trial_status(run_of_trial) == "pruned"
            assert "pruned at step" in run_of_trial.data.tags["reason"]
    assert set(found["importances"]) >= {"init.scheme", "optim.lr"}
    for name in ("history.png", "importances.png"):
        assert (runs_dir / "reports" / "best" / name).read_bytes().startswith(b"\x89PNG")
    started = {run.info.run_id for run in runs.values()}
    code, output = run(runs_dir, *arguments)
    assert (code, "Ray:" in output) == (0, False), output
    assert {run.info.run_id for run in runs_of(store_address(runs_dir).uri).values()} == started
    code, output = run(runs_dir, *arguments, "--metric", "loss/probe")
    assert (code, "was started with other choices (the claim or metric)" in output) == (2, True), (
        output
    )


def test_a_claim_is_refuted_on_fresh_seeds_where_it_does_not_hold(tmp_path, capsys):
    """With a tiny learning rate rows hardly move, which contradicts the claim."""
    runs_dir = tmp_path / "runs"
    code, output = run(
        runs_dir, "refute", "--claim", "unused_rows_move", "--trials", "6", "--finds", "2",
        "--seeds", "2", "--no-estimate", *tiny_flags({"init.scheme": "gpt2"}),
        "--init.scheme", "gpt2", "--optim.lr", "1e-8", "1e-2",
    )  # fmt: skip
    assert code == 0, output
    assert "unused_rows_move: 1 counterexample found in 6 trials" in output
    found = json.loads((runs_dir / "reports" / "unused_rows_move" / "search.json").read_text())
    (find,) = found["finds"]
    assert (find["knobs"], find["verdict"], find["seeds"]) == ({"optim.lr": 1e-8}, CONTRADICTED, 2)
    assert list(find) == ["trial_key", "knobs", "distance", "seeds", "verdict", "parts"]
    assert list(find["parts"]["displacement"]) == [
        "estimate", "sd", "df", "supported_p", "contradicted_p", "not_supported_p", "verdict",
        "doubts", "configurations", "prediction", "variance",
    ]  # fmt: skip
    runs = runs_of(store_address(runs_dir).uri).values()
    seeds = [run.data.params["init.seed"] for run in runs]
    assert sorted(seeds) == ["0", "0", "1", "2"]
    reported = json.loads((runs_dir / "reports" / "unused_rows_move" / "findings.json").read_text())
    assert reported["claims"]["standing"] == "exploratory"
    assert "unused_rows_move: 1 counterexample found in 6 trials" in reported["notes"]
    page = (runs_dir / "reports" / "unused_rows_move" / "report.html").read_text()
    opened = page[: page.index('<table class="matrix">')]
    assert "unused_rows_move: 1 counterexample found in 6 trials" in opened
    sweep = [*flags(TrialConfig.from_flat(TINY)), "--name", "unused_rows_move"]
    assert launch.main("", PRESETS, ["--runs-dir", str(runs_dir), *sweep]) == 2
    says = "unused_rows_move is the name of a search: continue that with sweeps/search.py, or take"
    assert says in capsys.readouterr().err
    assert (runs_dir / "reports" / "unused_rows_move" / "report.html").exists()
