"""Interim analyses: their schedule, their error rate, and sweeps that grow until decided."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from test_verdicts import null_numbers, trials, values

from analysis.claims import CLAIMS
from analysis.decisions import ALPHA, CONTRADICTED, SUPPORTED, UNDERPOWERED
from analysis.interim import (
    MAX_ANALYSES,
    InterimPlan,
    plan_interim,
    remaining_alpha,
    schedule,
    spent,
    supportable,
)
from analysis.power import Forecast
from analysis.report import main as report
from analysis.stats import Estimate
from analysis.verdicts import Finding, judge
from gptcore.config import InputError, TrialConfig
from helpers.driving import outcome, start
from helpers.store import make_sweep
from helpers.trials import TINY, flags
from sweeps.launch import main
from sweeps.plan import seeds_of, with_more_seeds
from sweeps.presets import PRESETS
from tracking.address import store_address

BUDGETS = [(1, 2), (2, 4), (2, 7), (4, 12), (2, 16), (2, 20), (8, 40), (2, 60), (50, 100), (9, 9)]


@pytest.mark.parametrize(("given", "most"), BUDGETS)
def test_a_schedule_spends_the_error_rate_once_and_ends_at_the_maximum(given, most):
    planned = schedule(given, most)
    sizes = [one.seeds for one in planned]
    assert sum(one.alpha for one in planned) == pytest.approx(ALPHA, abs=1e-12)
    assert min(one.alpha for one in planned) > 0
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= given
    assert sizes[-1] == most
    assert len(planned) <= MAX_ANALYSES
    assert schedule(given, most) == planned


@pytest.mark.parametrize(("given", "most"), BUDGETS)
def test_every_analysis_but_the_last_can_support_all_that_the_maximum_can(given, most):
    wanted = supportable(most, ALPHA)
    first, *later = schedule(given, most)
    for one in [first, *later[:-1]]:
        assert wanted <= supportable(one.seeds, one.alpha)
    if first.seeds > given:
        fewer = first.seeds - 1
        assert not wanted <= supportable(fewer, spent(fewer / most))


def test_spending_is_lan_and_demets_function_after_pocock():
    """Their alphas of five equally spaced analyses at 5% (Lan & DeMets 1983, alpha_3*)."""
    assert spent(0) == 0
    assert spent(1) == pytest.approx(ALPHA)
    cumulative = [spent(share / 5) for share in range(1, 6)]
    assert cumulative == pytest.approx([0.0148, 0.0262, 0.0354, 0.0432, 0.05], abs=5e-5)


NO_NUMBERS = Finding.without_numbers(UNDERPOWERED)


def found(**verdicts):
    return {name: replace(NO_NUMBERS, verdict=verdicts.get(name, UNDERPOWERED)) for name in CLAIMS}


def test_a_decided_claim_keeps_its_verdict_and_undecided_ones_go_on():
    plan = plan_interim(range(60), 2, [])
    assert set(plan.undecided()) == set(CLAIMS)
    plan = plan.with_findings(found(order="contradicted", rare_flips="not measured"))
    assert plan.made[0].decided == ("order",)
    assert set(plan.undecided()) == set(CLAIMS) - {"order", "rare_flips"}
    plan = plan.with_findings(found(order=SUPPORTED, widening=SUPPORTED))
    current = plan.current_findings()
    assert (current["order"].verdict, current["order"].analysis) == ("contradicted", 1)
    assert (current["widening"].verdict, current["widening"].analysis) == (SUPPORTED, 2)
    assert (current["order"].alpha, current["widening"].alpha) == tuple(
        planned.alpha for planned in plan.schedule[:2]
    )
    assert not plan.is_over
    assert plan.with_findings(found(**dict.fromkeys(CLAIMS, "not supported"))).is_over
    for _ in range(3):
        plan = plan.with_findings(found())
    assert plan.is_over
    assert plan.undecided()


def test_a_sweep_does_not_wait_for_a_claim_that_its_maximum_cannot_support():
    plan = plan_interim(range(4), 2, [])
    assert "depth_gradient" not in plan.waits_for
    assert plan.with_findings(found(**dict.fromkeys(plan.waits_for, SUPPORTED))).is_over


def test_other_verdicts_have_the_alpha_that_the_interim_analyses_leave():
    plans = [plan_interim(range(most), 2, []).with_findings(found()) for most in (40, 60)]
    alphas = [plan.schedule[0].alpha for plan in plans]
    assert remaining_alpha([]) == ALPHA
    assert remaining_alpha(plans[:1]) == alphas[0]
    assert remaining_alpha(plans) == pytest.approx(alphas[0] * alphas[1] / ALPHA)
    # Its sum over all pairs of analyses at which two sweeps may end is the error rate.
    (analysis,) = plans[0].made
    ends = [
        [replace(plan, made=(analysis,) * (k + 1)) for k in range(len(plan.schedule))]
        for plan in plans
    ]
    total = sum(remaining_alpha([one, two]) for one in ends[0] for two in ends[1])
    assert total == pytest.approx(ALPHA)


def test_what_is_stored_of_interim_analyses_is_read_as_it_was():
    """looks.json keeps its keys and their order, for sweeps that are older than this code."""
    estimate = {"seeds": 2, "value": 1.0, "low": None, "high": None}
    part = {
        "estimate": estimate, "sd": 0.5, "df": 1.0, "supported_p": 0.25, "contradicted_p": 0.9,
        "not_supported_p": 0.9, "verdict": UNDERPOWERED, "doubts": ["equal numbers"],
        "configurations": 1, "prediction": None, "variance": {}, "decides": True,
    }  # fmt: skip
    finding = {
        "verdict": UNDERPOWERED, "verdict_of_finished": UNDERPOWERED, "course": None, "p": 0.25,
        "p_holm": 0.5, "runs": 2, "counted_against": 0, "seeds": 2, "schemes": 1,
        "configurations": 1, "undefined_in": [], "parts": {"tau": part},
        "forecast": {"half": 5, "most": None, "would_be": SUPPORTED}, "depends_on": None,
    }  # fmt: skip
    stored = {
        "seeds": [0, 1, 2], "trials": ["a", "b"], "claims_digest": "d", "asked": ["order"],
        "waits_for": ["depth_gradient"],
        "schedule": [{"seeds": 2, "alpha": 0.03}, {"seeds": 3, "alpha": 0.02}],
        "looks": [
            {"seeds": 2, "alpha": 0.03, "decided": ["order"],
             "findings": {"depth_gradient": finding,
                          "order": {**finding, "parts": {"o": {**part, "prediction": estimate}}}}}
        ],
    }  # fmt: skip
    plan = InterimPlan.from_json(stored)
    assert json.dumps(plan.to_json()) == json.dumps(stored)
    found = plan.made[0].findings["order"]
    assert found.parts["o"].prediction == Estimate(**estimate)
    assert found.forecast == Forecast(half=5, most=None, would_be=SUPPORTED)


@pytest.mark.full
def test_null_sweeps_with_all_interim_analyses_seldom_decide_anything(capsys):
    """All claims are at their bounds, in 100 sweeps of up to 60 seeds and five analyses. At most 5%
    of the sweeps may have any claim supported or contradicted."""
    rng, sweeps, wrong, naive = np.random.default_rng(0), 100, 0, 0
    runs, planned = trials(60), plan_interim(range(60), 2, [])
    assert len(planned.schedule) == MAX_ANALYSES
    for _ in range(sweeps):
        numbers = {
            name: {part: null_numbers(rule, rng, 1, 60) for part, rule in claim.parts.items()}
            for name, claim in CLAIMS.items()
        }
        frames = {
            name: pl.concat([values(runs, some, part) for part, some in parts.items()])
            for name, parts in numbers.items()
        }
        decided = below = False
        for one in planned.schedule:
            seen = runs.head(one.seeds)
            found = judge(CLAIMS, frames, seen, general=False, alpha=one.alpha)
            verdicts = [finding.verdict for finding in found.values()]
            decided |= SUPPORTED in verdicts or CONTRADICTED in verdicts
            below |= min(finding.p_holm for finding in found.values()) < ALPHA
        wrong += decided
        naive += below
    with capsys.disabled():
        print(f"\n{wrong} of {sweeps} null sweeps over five analyses; {naive} had p < 0.05 at one")
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
def test_planted_effects_are_found_before_the_maximum_of_seeds(capsys):
    rng, sweeps, most, taken, supported = np.random.default_rng(0), 20, 60, [], 0
    runs = trials(most)
    for _ in range(sweeps):
        frames = {
            name: pl.concat(
                [values(runs, planted(rule, rng, most), part) for part, rule in one.parts.items()]
            )
            for name, one in CLAIMS.items()
        }
        plan = plan_interim(range(most), 2, [])
        while not plan.is_over:
            one = plan.schedule[len(plan.made)]
            seen = runs.head(one.seeds)
            plan = plan.with_findings(judge(CLAIMS, frames, seen, general=False, alpha=one.alpha))
        taken.append(plan.made[-1].seeds)
        supported += sum(one.verdict == SUPPORTED for one in plan.current_findings().values())
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
    assert f"from 3 to 1000 here, not {most}" in capsys.readouterr().err
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
    """A sweep run until decided, with up to four seeds: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("grown")
    code, output = run(folder, "--until-decided", "4")
    assert code == 0, output
    return folder, output


@pytest.mark.full
def test_a_sweep_gets_seeds_until_its_claims_are_decided(grown):
    folder, output = grown
    assert "interim analyses at 2, 3, 4 seeds, alpha 0.031, 0.01, 0.0086; 0 made" in output
    assert "interim analysis 1 of 3, 2 seeds, alpha 0.031: decided " in output
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
        shown = (one["verdict"], one["look"], one["alpha"], one["seeds"])
        if name in decided:
            assert shown == decided[name]
        else:
            assert one["verdict"] in (UNDERPOWERED, "not measured")
            assert one["look"] == len(looks["taken"])
    page = (folder / "runs" / "reports" / "grows" / "report.html").read_text()
    assert '<h3 id="interim-analyses">Interim analyses</h3>' in page
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
    assert "interim analysis 1 of 3" not in output
    assert findings_of(folder) == before
    for arguments, says in (
        (["--until-decided", "5"], "has interim analyses at 2, 3, 4 seeds, not 2, 3, 4, 5"),
        (["--until-decided", "4", "--init.scheme", "gpt2"], "with other trials than these"),
        ([], "continue it with --until-decided 4"),
        (["--dry-run"], "continue it with --until-decided 4"),
    ):
        assert main("doc", PRESETS, [*wanted, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert findings_of(folder) == before


@pytest.mark.full
def test_a_part_of_a_grown_sweep_is_judged_at_the_alpha_that_is_left(grown, tmp_path):
    folder, _ = grown
    wanted = ["--runs-dir", str(folder / "runs"), "--name", "grows", "--out", str(tmp_path)]
    assert report([*wanted, "--where", "init.seed < 2"]) == 0
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert findings["looks"] is None
    assert findings["claims"]["alpha"] == findings_of(folder)["claims"]["alpha"] < ALPHA
    assert any("judged while seeds were added" in note for note in findings["notes"])


@pytest.mark.full
def test_a_sweep_that_is_killed_goes_through_the_same_analyses(grown, tmp_path):
    process = drive(tmp_path, "--until-decided", "4")
    for line in process.stdout:
        if line.startswith("interim analysis 1 of 3"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert report(["--runs-dir", str(tmp_path / "runs"), "--name", "grows"]) == 0
    assert len(findings_of(tmp_path)["looks"]["taken"]) == 1
    code, output = run(tmp_path, "--until-decided", "4")
    assert code == 0, output
    assert "; 1 made" in output
    assert "interim analysis 1 of 3" not in output
    again, undisturbed = findings_of(tmp_path), findings_of(grown[0])
    assert again["looks"] == undisturbed["looks"]
    assert again["claims"] == undisturbed["claims"]


def test_a_sweep_that_was_run_without_gets_no_interim_analyses(tmp_path, capsys):
    make_sweep(store_address(tmp_path).uri, tmp_path, "grows", [{"init.seed": 0}], base=TINY)
    wanted = ["--runs-dir", str(tmp_path), *KNOBS, "--until-decided", "4"]
    assert main("doc", PRESETS, wanted) == 2
    assert "sweep grows was run without --until-decided" in capsys.readouterr().err
