"""Sweeps that are looked at while they grow: the schedule, its error rate, and the real thing."""

import json
import os
import signal

import numpy as np
import polars as pl
import pytest
from test_verdicts import null_numbers, trials, values

from analysis.claims import CLAIMS
from analysis.interim import (
    ALPHA,
    MOST_LOOKS,
    is_over,
    level,
    plan_looks,
    schedule,
    spent,
    standing,
    supportable,
    take,
    waiting,
)
from analysis.report import main as report
from analysis.runs import tracking_uri
from analysis.stats import holm
from analysis.verdicts import SUPPORTED, UNDERPOWERED, judge, p_value
from gptcore.config import InputError, TrialConfig
from helpers.driving import outcome, start
from helpers.store import make_sweep
from helpers.trials import TINY, flags
from sweeps.launch import main
from sweeps.plan import seeds_of, with_more_seeds
from sweeps.presets import PRESETS

BUDGETS = [(1, 2), (2, 4), (2, 7), (4, 12), (2, 16), (2, 20), (8, 40), (2, 60), (50, 100), (9, 9)]


@pytest.mark.parametrize(("given", "most"), BUDGETS)
def test_a_schedule_spends_the_whole_error_once_and_ends_at_its_budget(given, most):
    looks = schedule(given, most)
    sizes = [look["seeds"] for look in looks]
    assert sum(look["alpha"] for look in looks) == pytest.approx(ALPHA, abs=1e-12)
    assert min(look["alpha"] for look in looks) > 0
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= given
    assert sizes[-1] == most
    assert len(looks) <= MOST_LOOKS
    assert schedule(given, most) == looks


@pytest.mark.parametrize(("given", "most"), BUDGETS)
def test_every_look_but_the_last_can_support_all_that_the_budget_can(given, most):
    wanted = supportable(most, ALPHA)
    first, *later = schedule(given, most)
    for look in [first, *later[:-1]]:
        assert wanted <= supportable(look["seeds"], look["alpha"])
    if first["seeds"] > given:
        fewer = first["seeds"] - 1
        assert not wanted <= supportable(fewer, spent(fewer / most))


def test_spending_is_lan_and_demets_function_after_pocock():
    """Their levels of five equally spaced looks at 5% (Lan & DeMets 1983, alpha_3*)."""
    assert spent(0) == 0
    assert spent(1) == pytest.approx(ALPHA)
    cumulative = [spent(share / 5) for share in range(1, 6)]
    assert cumulative == pytest.approx([0.0148, 0.0262, 0.0354, 0.0432, 0.05], abs=5e-5)


def found(**verdicts):
    return {name: {"verdict": verdicts.get(name, UNDERPOWERED)} for name in CLAIMS}


def test_a_decided_claim_keeps_its_verdict_and_open_ones_go_on():
    record = plan_looks(range(60), 2, [])
    assert set(waiting(record)) == set(CLAIMS)
    record = take(record, found(order="contradicted", rare_flips="not measured"))
    assert record["looks"][0]["decided"] == ["order"]
    assert set(waiting(record)) == set(CLAIMS) - {"order", "rare_flips"}
    record = take(record, found(order=SUPPORTED, widening=SUPPORTED))
    stands = standing(record)
    assert (stands["order"]["verdict"], stands["order"]["look"]) == ("contradicted", 1)
    assert (stands["widening"]["verdict"], stands["widening"]["look"]) == (SUPPORTED, 2)
    assert (stands["order"]["alpha"], stands["widening"]["alpha"]) == tuple(
        look["alpha"] for look in record["schedule"][:2]
    )
    assert not is_over(record)
    assert is_over(take(record, found(**dict.fromkeys(CLAIMS, "not supported"))))
    for _ in range(3):
        record = take(record, found())
    assert is_over(record)
    assert waiting(record)


def test_a_claim_that_the_budget_cannot_support_holds_up_nothing():
    record = plan_looks(range(4), 2, [])
    assert "order" not in record["waits_for"]
    assert is_over(take(record, found(**dict.fromkeys(record["waits_for"], SUPPORTED))))


def test_what_is_judged_beside_the_looks_is_judged_at_what_they_leave():
    records = [take(plan_looks(range(most), 2, []), found()) for most in (40, 60)]
    alphas = [record["schedule"][0]["alpha"] for record in records]
    assert level([]) == ALPHA
    assert level(records[:1]) == alphas[0]
    assert level(records) == pytest.approx(alphas[0] * alphas[1] / ALPHA)
    # The level of whichever looks two sweeps end at, over all of them, is the error once.
    schedules = [[record["schedule"][: k + 1] for k in range(5)] for record in records]
    ends = [
        level([{"schedule": one, "looks": one}, {"schedule": two, "looks": two}])
        for one in schedules[0][: len(records[0]["schedule"])]
        for two in schedules[1]
    ]
    assert sum(ends) == pytest.approx(ALPHA)


@pytest.mark.full
def test_null_sweeps_followed_over_all_looks_seldom_support_anything(capsys):
    """All claims at once, 1,000 sweeps of up to 60 seeds, all five looks: at most 5% have any claim
    supported, at any look, that is not true."""
    rng, sweeps, wrong, naive = np.random.default_rng(0), 1000, 0, 0
    runs, planned = trials(60), plan_looks(range(60), 2, [])
    assert len(planned["schedule"]) == MOST_LOOKS
    for _ in range(sweeps):
        numbers = {
            name: {part: null_numbers(rule, rng, 1, 60) for part, rule in claim.parts.items()}
            for name, claim in CLAIMS.items()
        }
        frames = {
            name: pl.concat([values(runs, some, part) for part, some in parts.items()])
            for name, parts in numbers.items()
        }
        supported = looked = False
        for look in planned["schedule"]:
            p_values = [
                max(
                    p_value(CLAIMS[name].rule(part), some[: look["seeds"]].tolist())
                    for part, some in parts.items()
                    if CLAIMS[name].rule(part).decides
                )
                for name, parts in numbers.items()
            ]
            least = min(holm(p_values))
            looked |= least < ALPHA
            if least < look["alpha"]:  # or no claim can be supported
                judged = judge(CLAIMS, frames, runs.head(look["seeds"]), alpha=look["alpha"])
                supported |= SUPPORTED in [one["verdict"] for one in judged.values()]
        wrong += supported
        naive += looked
    with capsys.disabled():
        print(f"\n{wrong} of {sweeps} null sweeps over five looks; {naive} had p < 0.05 at a look")
    assert wrong <= 0.05 * sweeps


def planted(rule, rng, n_seeds):
    """Numbers of runs on the claim's side, one standard deviation beyond the bound."""
    if rule.centre == "share":
        return np.ones(n_seeds)
    if rule.low is not None and rule.high is not None:
        return rng.normal((rule.low + rule.high) / 2, (rule.high - rule.low) / 2, n_seeds)
    bound, sign = (rule.low, 1) if rule.low is not None else (rule.high, -1)
    return bound + sign * rng.normal(1, 1, n_seeds)


@pytest.mark.full
def test_planted_effects_are_found_before_the_budget_is_spent(capsys):
    rng, sweeps, most, taken, supported = np.random.default_rng(0), 20, 60, [], 0
    runs = trials(most)
    for _ in range(sweeps):
        frames = {
            name: pl.concat(
                [values(runs, planted(rule, rng, most), part) for part, rule in one.parts.items()]
            )
            for name, one in CLAIMS.items()
        }
        record = plan_looks(range(most), 2, [])
        while not is_over(record):
            look = record["schedule"][len(record["looks"])]
            record = take(
                record, judge(CLAIMS, frames, runs.head(look["seeds"]), alpha=look["alpha"])
            )
        taken.append(record["looks"][-1]["seeds"])
        supported += sum(one["verdict"] == SUPPORTED for one in standing(record).values())
    share = supported / (sweeps * len(CLAIMS))
    with capsys.disabled():
        print(f"\n{np.mean(taken):.1f} seeds on average of {most}; {share:.2f} of claims supported")
    assert np.mean(taken) < 0.7 * most
    assert share > 0.95


def test_seeds_are_added_after_those_given():
    spaces = [{"init.seed": [3, 0]}, {"init.seed": [3, 0], "optim.lr": [0.1]}]
    assert seeds_of([{}]) == [0]
    assert [space["init.seed"] for space in with_more_seeds(spaces, 4)] == [[3, 0, 4, 5]] * 2
    with pytest.raises(InputError, match="parts have the same seeds"):
        seeds_of([{"init.seed": [0]}, {}, {"init.seed": [1]}])


@pytest.mark.parametrize("most", ["0", "1", "-3", "2"])
def test_a_budget_below_the_seeds_given_is_refused(tmp_path, capsys, most):
    arguments = [*flags(TrialConfig.from_flat(TINY)), "--init.seed", "0", "1", "2"]
    code = main(
        "doc", PRESETS, [*arguments, f"--until-decided={most}", "--runs-dir", str(tmp_path)]
    )
    assert code == 2
    assert f"at least 3 here, not {most}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


KNOBS = [
    *flags(TrialConfig.from_flat(TINY)),
    "--init.seed",
    "0",
    "1",
    "--name",
    "grows",
    "--no-estimate",
]


def drive(folder, *arguments):
    return start("init_sweep.py", folder / "runs", *KNOBS, *arguments)


def run(folder, *arguments):
    return outcome(drive(folder, *arguments), 300)


def findings_of(folder):
    return json.loads((folder / "runs" / "reports" / "grows" / "findings.json").read_text())


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A sweep run until decided, with up to four seeds; -> its folder and what it printed."""
    folder = tmp_path_factory.mktemp("grown")
    code, output = run(folder, "--until-decided", "4")
    assert code == 0, output
    return folder, output


@pytest.mark.full
def test_a_sweep_gets_seeds_until_its_claims_are_decided(grown):
    folder, output = grown
    assert "looks at 2, 3, 4 seeds, levels 0.031, 0.01, 0.0086; 0 taken" in output
    assert "look 1 of 3, 2 seeds, level 0.031: decided " in output
    findings = findings_of(folder)
    looks, here = findings["looks"], findings["claims"]["here"]
    last = looks["taken"][-1]
    assert findings["trials"]["finished"] == last["seeds"]
    assert findings["claims"]["alpha"] == last["alpha"]
    decided = {
        name: (verdict, number, look["alpha"], look["seeds"])
        for number, look in enumerate(looks["taken"], 1)
        for name, verdict in look["decided"].items()
    }
    assert decided
    for name, one in here.items():
        told = (one["verdict"], one["look"], one["alpha"], one["seeds"])
        if name in decided:
            assert told == decided[name]
        else:
            assert one["verdict"] in (UNDERPOWERED, "not measured")
            assert one["look"] == len(looks["taken"])
    page = (folder / "runs" / "reports" / "grows" / "report.html").read_text()
    assert '<h3 id="looks">Looks</h3>' in page
    assert "Seeds were added until claims were decided" in page
    summary = (folder / "runs" / "reports" / "grows" / "summary.md").read_text()
    assert "Seeds were added until claims were decided" in summary


@pytest.mark.full
def test_running_it_again_starts_nothing_and_another_plan_is_refused(grown, capsys):
    folder, _ = grown
    before = findings_of(folder)
    wanted = ["--runs-dir", str(folder / "runs"), *KNOBS]
    assert main("doc", PRESETS, [*wanted, "--until-decided", "4"]) == 0
    output = capsys.readouterr().out
    assert ", 0 missing" in output
    assert "Ray:" not in output
    assert "look 1 of 3" not in output
    assert findings_of(folder) == before
    for arguments, says in (
        (["--until-decided", "5"], "is followed by looks at 2, 3, 4 seeds, not 2, 3, 4, 5"),
        (["--until-decided", "4", "--init.scheme", "gpt2"], "with other trials than these"),
        ([], "go on with --until-decided 4"),
        (["--dry-run"], "go on with --until-decided 4"),
    ):
        assert main("doc", PRESETS, [*wanted, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert findings_of(folder) == before


@pytest.mark.full
def test_a_part_of_a_grown_sweep_is_judged_at_the_level_that_is_left(grown, tmp_path):
    folder, _ = grown
    wanted = ["--runs-dir", str(folder / "runs"), "--name", "grows", "--out", str(tmp_path)]
    assert report([*wanted, "--where", "init.seed < 2"]) == 0
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert findings["looks"] is None
    assert findings["claims"]["alpha"] == findings_of(folder)["claims"]["alpha"] < ALPHA
    assert any("looked at while seeds were added" in note for note in findings["notes"])


@pytest.mark.full
def test_a_sweep_that_is_killed_goes_through_the_same_looks(grown, tmp_path):
    process = drive(tmp_path, "--until-decided", "4")
    for line in process.stdout:
        if line.startswith("look 1 of 3"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert report(["--runs-dir", str(tmp_path / "runs"), "--name", "grows"]) == 0
    assert len(findings_of(tmp_path)["looks"]["taken"]) == 1
    code, output = run(tmp_path, "--until-decided", "4")
    assert code == 0, output
    assert "; 1 taken" in output
    assert "look 1 of 3" not in output
    again, whole = findings_of(tmp_path), findings_of(grown[0])
    assert again["looks"] == whole["looks"]
    assert again["claims"] == whole["claims"]


def test_a_sweep_that_was_run_plainly_takes_no_looks(tmp_path, capsys):
    make_sweep(tracking_uri(tmp_path), tmp_path, "grows", [{"init.seed": 0}], base=TINY)
    wanted = ["--runs-dir", str(tmp_path), *KNOBS, "--until-decided", "4"]
    assert main("doc", PRESETS, wanted) == 2
    assert "sweep grows was run without --until-decided" in capsys.readouterr().err
