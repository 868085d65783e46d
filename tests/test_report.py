import json
import re
import shutil
import sqlite3
from pathlib import Path

import polars as pl
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from analysis.claims import CLAIMS
from analysis.figures import FIGURES
from analysis.findings import of_seeds, with_scheme
from analysis.report import SECTIONS, main
from analysis.runs import (
    READ,
    chart_page,
    connect,
    read_sweeps,
    tracking_uri,
    trial_runs,
)
from analysis.verdicts import UNDERPOWERED, UNTESTED
from conftest import SCREENSHOTS
from gptcore.config import InputError, TrialConfig
from gptcore.records import PRIMARY


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
        mask=PRIMARY["mask"],
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
    assert re.search(
        r"\d+ seeds would decide it: (not )?supported. In general, from 2 conf", summary
    )
    assert list(findings["by"]) == ["scheme"]


def test_claims_that_changed_after_the_first_trial_are_exploratory(
    finished_sweep, tmp_path, monkeypatch
):
    monkeypatch.setattr("analysis.findings.digest", lambda: "another")
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


def moved(runs_dir, to):
    """A copy of a runs folder whose artifacts are those of the copy."""
    shutil.copytree(runs_dir, to)
    with sqlite3.connect(to / "mlflow.db") as store:
        store.execute(
            "update runs set artifact_uri = replace(artifact_uri, ?, ?)", (str(runs_dir), str(to))
        )
    return to


@pytest.mark.parametrize("damage", ["missing", "cut short", "not Parquet"])
def test_a_damaged_table_leaves_its_trial_out_and_the_report_says_so(
    finished_sweep, tmp_path, damage
):
    runs_dir = moved(finished_sweep, tmp_path / "runs")
    runs = trial_runs(connect(tracking_uri(runs_dir))).values()
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
        (["--name", "small", "none"], "there is no sweep none: the sweeps of this store are small"),
        (["--claims", "order", "ordre"], "there is no claim ordre: the claims are init_table, "),
        (["--shuffle-labels", "-1"], "a seed is a whole number from 0, not '-1'"),
        (["--shuffle-labels", "x"], "a seed is a whole number from 0, not 'x'"),
        (["--where", "init.scheme = gpt2"], "(a text stands in quotes), not"),
        (["--out", ""], "--out takes a folder for the report's files, not the current one"),
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


def test_a_folder_in_the_place_of_a_file_leaves_the_report_as_it_was(
    finished_sweep, tmp_path, capsys
):
    (tmp_path / "trials.parquet").mkdir()
    (tmp_path / "report.html").write_text("before")
    assert main(["--runs-dir", str(finished_sweep), "--out", str(tmp_path)]) == 2
    assert "has a folder trials.parquet in it" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "trials.parquet"]


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
        "command": "",
        "trials": {"k": {"params": {"init.seed": 0}}},
    }
    SweepRun(client, open_experiment(client, "empty", tmp_path), plan, launched=1)
    assert main(["--runs-dir", str(tmp_path)]) == 2
    assert "sweep empty has no finished trials yet" in capsys.readouterr().err


def test_runs_of_one_seed_count_once():
    runs = pl.DataFrame({"seed": [0, 0, 1, 2], "subset": "all", "x": [1.0, 3.0, 5.0, None]})
    assert of_seeds(runs, "x") == [2.0, 5.0]
    assert of_seeds(runs.with_columns(x=pl.col("x") > 2), "x") == [0.5, 1.0]
    halves = runs.with_columns(pl.Series("subset", ["all", "0-0.5", "all", "all"]))
    assert of_seeds(halves, "x") == [2.0]  # of seed 1 there is the whole text alone


def test_what_a_sweep_varies_beside_seeds_and_subsets_is_told_apart():
    trials = pl.DataFrame(
        {
            "init.scheme": ["model5", "model5", "gpt2"],
            "init.seed": [0, 1, 0],
            "corpus.subset": ["all", "0-0.5", "all"],
            "optim.lr": [0.1, 0.1, 0.1],
        }
    )
    others = TrialConfig().to_flat()
    trials = trials.with_columns(
        pl.lit(value).alias(knob) for knob, value in others.items() if knob not in trials.columns
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


def test_a_scheme_without_finished_trials_is_still_in_the_findings(report):
    findings = json.loads((report / "findings.json").read_text())
    diverged = "model5, optim.lr 1e+30"
    assert findings["depth_gradient"][diverged]["runs"] == 0
    assert findings["depth_gradient"][diverged]["tau"]["value"] is None
    assert findings["rare_tokens"][diverged]["groups"]["never_used"]["change"]["value"] is None
    assert {by["init_table"]["verdict"] for label, by in findings["claims"]["by"]["scheme"].items()
            if label == diverged} == {UNTESTED}  # fmt: skip


def test_every_claim_and_figure_has_its_section():
    assert {claim.section for claim in CLAIMS.values()} == set(SECTIONS)
    assert {figure.section for figure in FIGURES.values()} == set(SECTIONS)


def test_every_number_of_the_page_is_in_the_findings(report):
    """Estimates in tables; what figures show is in the Parquet files that they name."""
    findings = (report / "findings.json").read_text()
    numbers = map(float, re.findall(r"-?\d+\.\d+(?:e-?\d+)?", findings))
    known = {f"{number:.3g}" for number in numbers}
    page = (report / "report.html").read_text()
    cells = re.findall(r"<td>(-?[\d.e-]+) \[(-?[\d.e-]+), (-?[\d.e-]+)\]</td>", page)
    assert len(cells) > 100
    for number in {number for cell in cells for number in cell if "." in number}:
        assert number in known, number


def test_several_sweeps_are_read_as_one(two_sweeps, tmp_path):
    runs = ["--runs-dir", str(two_sweeps), "--out", str(tmp_path)]
    assert main([*runs, "--name", "one", "two"]) == 0
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert findings["sweep"] == "one + two"
    # What one of them has run and the other only planned is there once.
    assert findings["trials"]["finished"] == len(findings["runs"]) == 4
    assert {run["corpus.subset"] for run in findings["runs"]} == {"all", "0-0.25"}
    assert findings["claims"]["standing"] == "confirmatory"
    page = (tmp_path / "report.html").read_text()
    assert "init_sweep.py --name one</code> and <code>python" in page
    assert page.count("viewStateShareKey=sweep") == 2
    # And it is in the report of each.
    assert main([*runs, "--name", "two"]) == 0
    assert json.loads((tmp_path / "findings.json").read_text())["trials"]["finished"] == 3


def test_the_report_of_several_sweeps_has_a_folder_of_its_own(two_sweeps):
    assert main(["--runs-dir", str(two_sweeps), "--name", "two", "one"]) == 0
    assert (two_sweeps / "reports" / "two+one" / "report.html").exists()


def test_schemes_are_compared_seed_by_seed(two_sweeps, tmp_path):
    names = ["--name", "one", "two"]
    assert main(["--runs-dir", str(two_sweeps), "--out", str(tmp_path), *names]) == 0
    compared = json.loads((tmp_path / "findings.json").read_text())["comparisons"]
    assert compared["reference"] == "model5"
    found = compared["claims"]["never_suppressed"]["never"]["gpt2"]
    changes = pl.read_parquet(tmp_path / "group_changes.parquet").filter(group="never_100")
    by_scheme = changes.pivot("scheme", index="subset", values="change")
    assert found["value"] == pytest.approx((by_scheme["gpt2"] - by_scheme["model5"]).mean())
    assert (found["seeds"], found["low"], found["p_holm"]) == (1, None, 1.0)  # one seed says little


def test_claims_can_be_chosen_and_stay_corrected_for_all(finished_sweep, tmp_path):
    chosen = ["--claims", "order", "widening"]
    assert main(["--runs-dir", str(finished_sweep), "--out", str(tmp_path), *chosen]) == 0
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<a href="#claim-(\w+)">', page) == ["order", "widening"]
    summary = (tmp_path / "summary.md").read_text()
    assert summary.count("\n- ") == 2
    assert f"Note: 2 of {len(CLAIMS)} claims are shown, corrected for all of them." in summary
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert set(findings["claims"]["here"]) == set(CLAIMS)


@pytest.mark.parametrize(("table", "sweep"), [("histograms", "one"), ("tokens", "two")])
def test_a_damaged_table_of_a_figure_costs_the_figure_that_run(two_sweeps, tmp_path, table, sweep):
    runs_dir = moved(two_sweeps, tmp_path / "runs")
    damaged = {}
    for key, run in trial_runs(connect(tracking_uri(runs_dir))).items():
        if run.data.tags["sweep"] != sweep:
            continue
        damaged[key] = Path(run.info.artifact_uri.removeprefix("file://"), f"{table}.parquet")
        damaged[key].write_bytes(b"x")
    out = tmp_path / "report"
    names = ["--name", "one", "two"]
    assert main(["--runs-dir", str(runs_dir), "--out", str(out), *names]) == 0
    findings = json.loads((out / "findings.json").read_text())
    left_out = [note for note in findings["notes"] if "left out of a figure" in note]
    # Of histograms both schemes of the first subset are drawn, of tokens one scheme on each.
    assert len(left_out) == (2 if table == "histograms" else 1)
    for note in left_out:
        assert f"{table} cannot be read" in note
        assert note.split()[1] in damaged
    assert findings["trials"]["finished"] == 4  # what is claimed rests on other tables


def test_what_is_chosen_or_shuffled_confirms_nothing_and_leaves_the_report(two_sweeps):
    runs = ["--runs-dir", str(two_sweeps), "--name", "one"]
    assert main(runs) == 0
    reports = two_sweeps / "reports"
    whole = (reports / "one" / "findings.json").read_text()
    assert main([*runs, "--where", "init.scheme = 'gpt2'"]) == 0
    assert main([*runs, "--shuffle-labels", "0"]) == 0
    assert (reports / "one" / "findings.json").read_text() == whole
    standing = {
        folder: json.loads((reports / folder / "findings.json").read_text())["claims"]["standing"]
        for folder in ("one", "one-selected", "one-shuffled")
    }
    assert standing == {
        "one": "confirmatory", "one-selected": "exploratory", "one-shuffled": "exploratory"
    }  # fmt: skip


def test_what_tells_no_configurations_apart_makes_no_scheme(two_sweeps):
    sweep = read_sweeps(tracking_uri(two_sweeps), ["one"], None, two_sweeps / "cache")
    trials = sweep.trials.with_columns(
        pl.Series("train.device", ["cpu", "auto"]), pl.Series("probes.every", [1, 2])
    )
    assert with_scheme(trials)["scheme"].to_list() == ["model5", "gpt2"]


def test_a_report_over_http_is_that_of_the_same_runs_on_disk(server_sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_sweep)
    out, cache = tmp_path / "report", tmp_path / "cache"
    assert main(["--runs-dir", str(tmp_path), "--out", str(out)]) == 0
    findings = json.loads((out / "findings.json").read_text())
    assert findings["trials"]["finished"] == 4
    files = sorted(cache.rglob("*.parquet"))
    assert len(list(cache.iterdir())) == 4
    assert {file.stem for file in files} == {*READ, "histograms"}
    before = [file.stat().st_mtime_ns for file in files]
    assert main(["--runs-dir", str(tmp_path), "--out", str(out)]) == 0
    assert [file.stat().st_mtime_ns for file in files] == before  # fetched once
    # What the cache lacks is fetched, what it holds is read.
    files[0].unlink()
    assert main(["--runs-dir", str(tmp_path), "--out", str(out)]) == 0
    assert json.loads((out / "findings.json").read_text()) == findings


def test_a_table_that_a_server_lacks_leaves_its_trial_out(server_sweep, tmp_path, monkeypatch):
    fetch = MlflowClient.download_artifacts
    runs = trial_runs(connect(server_sweep))
    lacks, cut = [run.info.run_id for run in list(runs.values())[:2]]

    def worse(client, run_id, path, folder):
        if (run_id, path) == (lacks, "init.parquet"):
            return fetch(client, run_id, "nothing.parquet", folder)
        file = fetch(client, run_id, path, folder)
        if (run_id, path) == (cut, "init.parquet"):
            Path(file).write_bytes(Path(file).read_bytes()[:50])
        return file

    listed = MlflowClient.list_artifacts
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_sweep)
    monkeypatch.setattr(MlflowClient, "download_artifacts", worse)
    monkeypatch.setattr(
        MlflowClient,
        "list_artifacts",
        lambda client, run_id: [f for f in listed(client, run_id) if f.path != "init.parquet"],
    )
    assert main(["--runs-dir", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    findings = json.loads((tmp_path / "report" / "findings.json").read_text())
    assert findings["trials"]["unreadable"] == 2
    assert sum("init cannot be read" in note for note in findings["notes"]) == 2


def test_a_server_that_dies_while_tables_are_fetched_is_named(server_sweep, tmp_path, monkeypatch):
    def dies(*_):
        raise MlflowException("the server has gone away")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_sweep)
    monkeypatch.setattr("analysis.runs._fetch", dies)
    with pytest.raises(
        InputError, match=f"cannot be read from {server_sweep}: the server has gone"
    ):
        read_sweeps(server_sweep, [], None, tmp_path)


@pytest.mark.browser
def test_a_browser_draws_every_figure_without_a_network(two_sweeps, tmp_path, page):
    out = tmp_path / "report"
    names = ["--name", "one", "two"]
    assert main(["--runs-dir", str(two_sweeps), "--out", str(out), *names]) == 0
    page.goto((out / "report.html").as_uri())
    page.wait_for_function(f"document.querySelectorAll('svg.marks').length >= {len(FIGURES)}")
    found = page.eval_on_selector_all(".chart", "charts => charts.map(chart => chart.id)")
    assert sorted(found) == sorted(FIGURES)
    for name in FIGURES:  # each has marks, and a name for those who cannot see it
        assert page.locator(f"#{name} svg.marks path, #{name} svg.marks line").count() > 10, name
        label = page.locator(f"#{name} [role=graphics-document]").get_attribute("aria-label")
        assert label == FIGURES[name].caption
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "report.png", full_page=True)
    assert page.asked == []
    assert page.said == []


@pytest.mark.browser
def test_a_figure_tells_its_numbers_where_the_mouse_is(two_sweeps, tmp_path, page):
    assert main(["--runs-dir", str(two_sweeps), "--out", str(tmp_path), "--name", "one"]) == 0
    page.goto((tmp_path / "report.html").as_uri())
    mark = page.locator("#init_errors g.mark-symbol.role-mark path").first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert {"scheme", "subset", "seed", "kind", "expected", "found"} == set(
        tip.locator("td.key").all_inner_texts()
    )


@pytest.mark.browser
def test_the_page_can_be_used_by_keyboard(two_sweeps, tmp_path, page):
    assert main(["--runs-dir", str(two_sweeps), "--out", str(tmp_path), "--name", "one"]) == 0
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("#histograms input[type=range]")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#verdicts")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "region"
    # The time-lapse: another step is another drawing.
    slider = page.locator("#histograms input[type=range]")
    before = page.locator("#histograms svg.marks").inner_html()
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(300)
    assert page.locator("#histograms svg.marks").inner_html() != before
    every = page.locator("table")
    assert every.count() == page.locator("table:has(caption):has(th[scope=col])").count()


@pytest.mark.browser
def test_mlflow_opens_on_the_sweep_with_its_charts(server_sweep, page):
    experiment = connect(server_sweep).get_experiment_by_name("served").experiment_id
    page.set_viewport_size({"width": 1900, "height": 1100})
    page.goto(chart_page(server_sweep, experiment))
    page.get_by_text("What the claims are about").wait_for(timeout=60_000)
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length >= 4")
    page.wait_for_timeout(2000)
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "mlflow.png")
    text = page.inner_text("body")
    assert "4 matching runs" in text
    assert "Group by: init.scheme" in text
    assert "share key" not in text  # of an error
    titles = ("loss/val", "qkv_std/layer_00", "logprob/never_used")
    assert all(title in text for title in titles)
