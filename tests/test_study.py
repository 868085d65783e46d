"""What a study suggests, and what it records of results."""

from dataclasses import replace
from pathlib import Path

import pytest

from gptcore.config import InputError, TrialConfig
from gptcore.experiment import check_knobs
from gptcore.init_schemes import INIT_SCHEMES
from gptcore.optimizers import OPTIMIZERS
from helpers.trials import TINY
from sweeps.execution.trainable import Recording
from sweeps.presets import trial_of
from sweeps.searching.study import (
    PARAMETERS,
    Range,
    Searcher,
    SearchQuestion,
    Suggestions,
    answered,
    open_study,
    parse_domain,
    suggested,
)
from tracking.address import StoreAddress
from tracking.job import Job

QUESTION = SearchQuestion(goal="best", of="loss/val", knobs={})
DOMAINS = {**PARAMETERS, "init.scheme": list(INIT_SCHEMES), "optim.lr": Range(1e-4, 1e-2)}
LONG = TrialConfig.from_flat({**TINY, "train.steps": 900, "probes.text_every": 50})


def study_in(folder, question=QUESTION):
    return open_study(folder, "s", question, LONG)


def suggestions(study, trials=4, done=(), answer=lambda key: 1.0, domains=DOMAINS):
    def prepare(config):
        key = config.key("digest")
        return Job(key, "a trial", config.to_flat(), {}), key in done

    pruned = []
    asked = Suggestions(
        study,
        trials,
        domains,
        prepare,
        answer,
        lambda *key_and_why: pruned.append(key_and_why),
        Recording(StoreAddress("sqlite:///a.db"), "1", Path()),
        "loss/val",
    )
    asked.pruned = pruned
    return asked


@pytest.mark.parametrize(
    ("knob", "texts", "domain"),
    [
        ("optim.lr", ["1e-4..1e-2"], Range(1e-4, 1e-2)),
        ("model.n_layer", ["2..8"], Range(2, 8)),
        ("optim.lr", ["0.1"], [0.1]),
        ("init.scheme", ["normal", "gpt2"], ["normal", "gpt2"]),
        ("corpus.name", ["../a..b"], ["../a..b"]),
        ("model.tied", ["true", "false"], [True, False]),
    ],
)
def test_a_knob_takes_values_or_a_range(knob, texts, domain):
    assert parse_domain(knob, texts) == domain


@pytest.mark.parametrize(
    ("knob", "texts", "says"),
    [
        ("optim.lr", ["0.1..0.01"], "optim.lr takes a range from low to high, not '0.1..0.01'"),
        ("optim.lr", ["0..1"], "optim.lr takes a finite number > 0, not 0.0"),
        ("model.n_layer", ["1..x"], "model.n_layer takes a whole number >= 1 and <= 1000, not 'x'"),
    ],
)
def test_what_is_no_range_is_refused(knob, texts, says):
    with pytest.raises(InputError, match=says):
        parse_domain(knob, texts)


def test_every_suggestion_is_a_trial_and_every_scheme_gets_its_parameters(tmp_path):
    study = study_in(tmp_path)
    domains = {
        **DOMAINS,
        "optim.name": list(OPTIMIZERS),
        "optim.beta2": [0.9, 0.99],
        "optim.momentum": Range(0.5, 0.9),
        "model.n_layer": Range(1, 3),
    }
    seen = set()
    for _ in range(60):
        trial = study.ask()
        flat = suggested(trial, domains)
        check_knobs(TrialConfig.from_flat(flat))
        assert ("optim.momentum" in flat) == (flat["optim.name"] == "sgd")
        assert ("init.nu" in flat) == (flat["init.scheme"] == "student_t")
        assert flat["optim.lr"] == float(f"{flat['optim.lr']:.3g}")
        seen.add(flat["init.scheme"])
        study.tell(trial, 1.0)
    assert len(seen) > len(INIT_SCHEMES) / 2


def test_a_study_continues_and_first_runs_suggestions_without_a_result(tmp_path):
    first = suggestions(study_in(tmp_path), trials=4)
    jobs = [first.suggest(name)["batch"][0] for name in "ab"]
    first.on_trial_complete("a", {"status": "finished"})
    # The driver dies here: b is never answered.
    second = suggestions(study_in(tmp_path), trials=4)
    assert second.left == 3
    assert second.suggest("c")["batch"][0] == jobs[1]
    for name in "def":
        second.suggest(name)
    assert second.suggest("g") == Searcher.FINISHED
    for name in "cde":
        second.on_trial_complete(name, {"status": "finished"})
    study = study_in(tmp_path)
    assert [one.number for one in answered(study)] == [0, 1, 2, 3]
    assert suggestions(study, trials=4).suggest("h") == Searcher.FINISHED
    assert suggestions(study, trials=5).suggest("h") != Searcher.FINISHED


def test_a_trial_that_has_been_run_is_answered_without_another_run(tmp_path):
    domains = {"init.scheme": ["gpt2"], "init.seed": [0, 1]}
    done = [trial_of({"init.scheme": "gpt2", "init.seed": seed}).key("digest") for seed in (0, 1)]
    asked = suggestions(study_in(tmp_path), trials=6, done=done, answer=done.index, domains=domains)
    assert asked.suggest("a") == Searcher.FINISHED
    assert asked.jobs == []
    assert {one.values[0] for one in answered(asked.study)} <= {0.0, 1.0}
    assert len(answered(asked.study)) == 6


def test_failed_diverged_and_refused_trials_have_no_value(tmp_path):
    asked = suggestions(study_in(tmp_path), trials=3, answer=lambda key: None)
    asked.suggest("a")
    asked.suggest("b")
    asked.on_trial_complete("a", {"status": "failed"})
    asked.on_trial_complete("b", {"status": "diverged"})
    bad = {**DOMAINS, "model.n_head": [3]}
    assert suggestions(asked.study, trials=3, domains=bad).suggest("c") == Searcher.FINISHED
    failed, diverged, refused = answered(asked.study)
    assert (failed.state.name, diverged.state.name, refused.state.name) == (
        "FAIL",
        "PRUNED",
        "FAIL",
    )
    assert "n_head" in refused.user_attrs["why"]


def test_trials_that_fall_behind_are_pruned_at_a_rung_and_never_at_the_end(tmp_path):
    asked = suggestions(study_in(tmp_path), domains={**DOMAINS, "train.steps": [900]})
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 0.5)):
        asked.suggest(name)
        pruned = [
            asked.prunes(name, {"step": step, "value": value}) for step in (0, 50, 100, 300, 900)
        ]
        # The first rung is at step 100, a ninth of all, where b is not in the best third.
        assert pruned == ([False, False, True, True, False] if name == "b" else [False] * 5), name
    assert asked.prunes.pruned == {"b": 300}
    key = asked.keys["b"]
    asked.on_trial_complete("b", {"step": 300})
    assert asked.pruned == [(key, "pruned at step 300")]
    assert answered(asked.study)[0].state.name == "PRUNED"
    assert not asked.prunes("a", {"step": 100, "status": "finished"})


def test_a_pruned_trial_is_not_run_again(tmp_path):
    domains = {"init.scheme": ["gpt2", "mup"]}
    asked = suggestions(study_in(tmp_path), trials=8, domains=domains)
    for name in "ab":
        if asked.suggest(name) == Searcher.FINISHED:
            break
        asked.prunes.pruned[name] = 50
        asked.on_trial_complete(name, {"step": 50})
    while asked.suggest("c") != Searcher.FINISHED:
        asked.on_trial_complete("c", {"status": "failed"})
    assert len(asked.jobs) == len({job.key for job in asked.jobs})
    assert len(answered(asked.study)) == 8
    assert not asked.errors


def test_an_error_is_kept_until_the_search_raises_it(tmp_path):
    def answer(key):
        raise OSError("no room")

    asked = suggestions(study_in(tmp_path), answer=answer)
    asked.suggest("a")
    asked.on_trial_complete("a", {"status": "finished"})
    assert [str(error) for error in asked.errors] == ["no room"]


def test_another_question_under_the_same_name_is_refused(tmp_path):
    study_in(tmp_path)
    study_in(tmp_path)
    with pytest.raises(
        InputError, match=r"search s was started with other choices \(the claim or metric\)"
    ):
        study_in(tmp_path, replace(QUESTION, of="loss/train"))


def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path):
    (tmp_path / "optuna.db").write_text("no database" * 100)
    with pytest.raises(InputError, match=r"optuna\.db cannot be read as an Optuna study: "):
        study_in(tmp_path)
    assert (tmp_path / "optuna.db").read_text() == "no database" * 100
