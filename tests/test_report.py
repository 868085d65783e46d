import json
import re
import shutil
import sqlite3
import subprocess
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from analysis.claims import CLAIMS
from analysis.report import (
    claim_findings,
    find,
    main,
    of_seeds,
    render,
    statistics_of_runs,
    with_scheme,
)
from analysis.runs import READ, RunTables, connect, read_sweep, tracking_uri, trial_runs
from analysis.verdicts import UNDERPOWERED, UNTESTED
from gptcore.records import PRIMARY

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture
def report(finished_sweep, tmp_path):
    out = tmp_path / "report"
    assert main(["--runs-dir", str(finished_sweep), "--out", str(out)]) == 0
    return out


def test_findings_count_every_trial_and_give_each_scheme_its_numbers(report):
    findings = json.loads((report / "findings.json").read_text())
    assert findings["sweep"] == "small"
    assert findings["trials"] == {
        "finished": 4,
        "diverged": 1,
        "failed": 0,
        "unreadable": 0,
        "unfinished": 1,
    }
    assert set(findings["depth_gradient"]) == set(findings["rare_tokens"])
    assert set(findings["rare_tokens"]) == {
        "model5, optim.lr 0.001",
        "gpt2, optim.lr 0.001",
        "model5, optim.lr 1e+30",  # the trial that diverges
    }
    depth = findings["depth_gradient"]["gpt2, optim.lr 0.001"]
    assert depth["runs"] == depth["first_layer_widest"]["seeds"] == len(depth["tau_of_runs"]) == 2
    assert sum(depth["widest_layer_of_runs"].values()) == 2
    assert len(depth["median_growth_by_layer"]) == 2
    change = findings["rare_tokens"]["model5, optim.lr 0.001"]["groups"]["never_used"]["change"]
    assert change["seeds"] == 2
    assert change["low"] <= change["value"] <= change["high"]
    by_subset = findings["rare_tokens"]["model5, optim.lr 0.001"]["change_by_subset"]
    assert by_subset["all"]["never_used"] == change  # its only subset


def test_the_findings_are_those_of_the_rows(report):
    findings = json.loads((report / "findings.json").read_text())
    trials = pl.read_parquet(report / "trials.parquet").filter(pl.col("init.scheme") == "gpt2")
    rows = pl.read_parquet(report / "token_groups.parquet").filter(
        pl.col("trial_key").is_in(trials["trial_key"].to_list()),
        group="never_100",
        **PRIMARY,
    )
    start, end = (rows.filter(step=step)["mean_logprob"].mean() for step in (0, 5))
    group = findings["rare_tokens"]["gpt2, optim.lr 0.001"]["groups"]["never_100"]
    assert group["start"]["value"] == pytest.approx(start)
    assert group["change"]["value"] == pytest.approx(end - start)


def test_every_table_that_it_rests_on_is_written_as_parquet(report):
    names = {file.stem for file in report.glob("*.parquet")}
    assert names >= set(READ) | {"trials", "depth_gradient", "layer_growth"}
    assert pl.read_parquet(report / "training.parquet")["trial_key"].n_unique() == 4


def test_the_page_is_self_contained_and_escapes_what_people_wrote(report):
    page = (report / "report.html").read_text()
    outside_scripts = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bsrc=|<link|<script", outside_scripts)
    assert "made by a test &lt;b&gt;&amp;&lt;/b&gt;" in page
    assert page.count('<tr><th scope="row"><code>') == 6


def test_every_claim_has_a_verdict_a_sentence_and_a_place_on_the_page(report):
    findings = json.loads((report / "findings.json").read_text())["claims"]
    page, summary = (report / "report.html").read_text(), (report / "summary.md").read_text()
    assert findings["standing"] == "confirmatory"
    assert set(findings["here"]) == set(findings["in_general"]) == set(CLAIMS)
    for name, claim in CLAIMS.items():
        assert f'href="#claim-{name}"' in page
        assert f'id="claim-{name}"' in page
        (line,) = (line for line in summary.splitlines() if line.startswith(f"- {claim.says} "))
        assert findings["here"][name]["verdict"] in line.lower()
    # Two seeds cannot decide on medians and shares, and the report says how many would.
    assert {
        found["verdict"] for name, found in findings["here"].items()
        if {rule.centre for rule in CLAIMS[name].parts.values()} <= {"median", "share"}
    } == {UNDERPOWERED, UNTESTED}  # fmt: skip
    assert "seeds would decide it. In general, from 2 configurations: underpowered." in summary
    assert list(findings["by"]) == ["scheme"]


def test_claims_that_changed_after_the_first_trial_are_exploratory(
    finished_sweep, tmp_path, monkeypatch
):
    monkeypatch.setattr("analysis.report.digest", lambda: "another")
    assert main(["--runs-dir", str(finished_sweep), "--out", str(tmp_path)]) == 0
    findings = json.loads((tmp_path / "findings.json").read_text())["claims"]
    assert findings["standing"] == "exploratory"
    assert "Exploratory: the claims" in (tmp_path / "report.html").read_text()


def test_a_report_can_be_of_some_trials(finished_sweep, tmp_path):
    where = "init.scheme = 'gpt2' AND init.seed < 1"
    assert main(["--runs-dir", str(finished_sweep), "--out", str(tmp_path), "--where", where]) == 0
    trials = pl.read_parquet(tmp_path / "trials.parquet")
    assert trials.select("init.scheme", "init.seed").rows() == [("gpt2", 0)]
    assert f"Note: Only the trials for which {where}." in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("damage", ["missing", "cut short", "not Parquet"])
def test_a_damaged_table_leaves_its_trial_out_and_the_report_says_so(
    finished_sweep, tmp_path, damage
):
    runs_dir = tmp_path / "runs"
    shutil.copytree(finished_sweep, runs_dir)
    # Artifacts are where the store says: of the copy they are made those of the copy.
    with sqlite3.connect(runs_dir / "mlflow.db") as store:
        store.execute(
            "update runs set artifact_uri = replace(artifact_uri, ?, ?)",
            (str(finished_sweep), str(runs_dir)),
        )
    runs = trial_runs(connect(tracking_uri(runs_dir)), "small").values()
    run = next(run for run in runs if run.data.tags["trial_status"] == "finished")
    file = Path(run.info.artifact_uri.removeprefix("file://"), "token_groups.parquet")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100] if damage == "cut short" else b"x" * 99)
    out = tmp_path / "report"
    assert main(["--runs-dir", str(runs_dir), "--out", str(out)]) == 0
    findings = json.loads((out / "findings.json").read_text())
    assert findings["trials"]["unreadable"] == 1
    assert findings["trials"]["finished"] == 3
    (note,) = (note for note in findings["notes"] if "left out" in note)
    assert re.match(r"Trial [0-9a-f]{12} is left out: token_groups cannot be read: ", note)
    assert "is left out: token_groups" in (out / "report.html").read_text()


def test_a_second_report_takes_the_place_of_the_first(finished_sweep, report):
    before = sorted(report.iterdir())
    assert main(["--runs-dir", str(finished_sweep), "--name", "small", "--out", str(report)]) == 0
    assert sorted(report.iterdir()) == before


def test_the_default_folder_is_in_the_runs_folder(finished_sweep):
    assert main(["--runs-dir", str(finished_sweep)]) == 0
    assert (finished_sweep / "reports" / "small" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--name", "none"], "there is no sweep none: the sweeps of this store are small"),
        (["--where", "init.scheme = 'none'"], "is true of none of the 6 trials"),
        (["--where", "init.shceme = 'gpt2'"], "takes a condition on knobs such as"),
        (["--where", "init.seed + 1"], "takes a condition on knobs such as"),
        (["--where", "drop ("], "takes a condition on knobs such as"),
        (["--where", "init.seed > 2"], "has no finished trials yet for which init.seed > 2"),
        (["--nmae", "x"], "unrecognized arguments: --nmae x"),
        (["--out", "/proc/report"], "the report folder /proc/report cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(finished_sweep, capsys, arguments, says):
    assert main(["--runs-dir", str(finished_sweep), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_a_folder_without_sweeps_is_named_and_left_empty(tmp_path, capsys):
    assert main(["--runs-dir", str(tmp_path)]) == 2
    assert f"there is no sweep yet: {tmp_path}/mlflow.db does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    connect(tracking_uri(tmp_path))
    assert main(["--runs-dir", str(tmp_path)]) == 2
    assert "there is no sweep yet" in capsys.readouterr().err


def test_a_sweep_without_finished_trials_is_refused(tmp_path, capsys):
    from sweeps.tracking import SweepRun, open_experiment

    client = connect(tracking_uri(tmp_path))
    plan = {
        "sweep": "empty",
        "notes": [],
        "tags": {},
        "claims_digest": "d",
        "trials": {"k": {"params": {"init.seed": 0}}},
    }
    SweepRun(client, open_experiment(client, "empty", tmp_path), plan, launched=1)
    assert main(["--runs-dir", str(tmp_path)]) == 2
    assert "sweep empty has no finished trials yet" in capsys.readouterr().err


def drawn(page, tmp_path):
    """The figures that a browser without a network draws of a page; it must not complain."""
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=10000",
            "--enable-logging=stderr",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    figures = re.findall(r'<div id="(\w+)"[^>]*class="vega-embed[^"]*"', done.stdout)
    assert len(re.findall(r"<svg[^>]*class=\"marks\"", done.stdout)) == len(figures)
    assert "CONSOLE" not in done.stderr, done.stderr
    return figures


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.mark.browser
@needs_browser
def test_a_browser_draws_every_figure_without_a_network(report, tmp_path):
    found = drawn(report / "report.html", tmp_path)
    assert found == ["qkv_std", "growth_by_layer", "group_log_prob"]


@pytest.mark.browser
@needs_browser
def test_runs_on_texts_of_several_sizes_are_drawn_against_them(finished_sweep, tmp_path):
    sweep = read_sweep(tracking_uri(finished_sweep), "small")
    sizes = sweep.tables["group_members"].with_columns(
        n_occurrences=pl.col("n_occurrences") * pl.col("trial_key").rank("dense")
    )
    sweep = replace(
        sweep,
        trials=with_scheme(sweep.trials),
        tables={**sweep.tables, "group_members": sizes},
    )
    by_run = statistics_of_runs(sweep)
    findings = {**find(sweep, by_run), "claims": claim_findings(sweep)}
    page = tmp_path / "page.html"
    page.write_text(render(sweep, by_run, findings), encoding="utf-8")
    assert drawn(page, tmp_path)[-1] == "rare_by_size"


def test_runs_of_one_seed_count_once(finished_sweep):
    runs = pl.DataFrame({"seed": [0, 0, 1, 2], "x": [1.0, 3.0, 5.0, None]})
    assert of_seeds(runs, "x") == [2.0, 5.0]
    assert of_seeds(runs.with_columns(x=pl.col("x") > 2), "x") == [0.5, 1.0]


def test_what_a_sweep_varies_beside_seeds_and_subsets_is_told_apart():
    trials = pl.DataFrame(
        {
            "init.scheme": ["model5", "model5", "gpt2"],
            "init.seed": [0, 1, 0],
            "corpus.subset": ["all", "0-0.5", "all"],
            "optim.lr": [0.1, 0.1, 0.1],
        }
    )
    assert with_scheme(trials)["scheme"].to_list() == ["model5", "model5", "gpt2"]
    wider = trials.with_columns(
        pl.Series("model.tied", [True, True, False]), pl.Series("optim.lr", [0.1, 0.1, 1.0])
    )
    assert with_scheme(wider)["scheme"].to_list() == [
        "model5, model.tied true, optim.lr 0.1",
        "model5, model.tied true, optim.lr 0.1",
        "gpt2, model.tied false, optim.lr 1.0",
    ]


def test_a_scheme_without_finished_trials_is_still_in_the_findings():
    trials = pl.DataFrame(
        {
            "trial_key": ["a", "b"],
            "status": ["finished", "diverged"],
            "reason": ["", ""],
            "init.scheme": ["gpt2", "model5"],
            "corpus.subset": ["all", "all"],
            "init.seed": [0, 0],
        }
    )
    weights = pl.DataFrame(
        {
            "trial_key": ["a"] * 4,
            "kind": ["qkv"] * 4,
            "layer": [0, 1, 0, 1],
            "step": [0, 0, 5, 5],
            "std": [0.02, 0.02, 0.04, 0.03],
            "rms_displacement": [0.0, 0.0, 0.02, 0.01],
        }
    )
    groups = pl.DataFrame(
        [
            {"trial_key": "a", "group": group, "step": step, **PRIMARY}
            | {"mean_logprob": -10.0 - step, "mean_logit": 0.0, "log_z": 10.0 + step, "excess": 0.0}
            for group in ("common_100", "rare_100", "never_100", "singletons", "never_used")
            for step in (0, 5)
        ]
    )
    trials = with_scheme(trials)
    sweep = RunTables(
        "s", {"notes": []}, None, trials, {"weights": weights, "token_groups": groups}
    )
    findings = find(sweep, statistics_of_runs(sweep))
    assert findings["depth_gradient"]["model5"]["runs"] == 0
    assert findings["depth_gradient"]["model5"]["tau"]["value"] is None
    assert findings["depth_gradient"]["gpt2"]["tau"]["value"] == 1
    json.dumps(findings, allow_nan=False)
