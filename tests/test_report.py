"""The report of a small sweep: files, numbers, sentences, and bad input.

This is one file because all of these tests use the report of one sweep.
"""

import json
import re
import shutil
from pathlib import Path

import polars as pl
import pytest

from analysis.claims import CLAIMS
from analysis.decisions import NOT_MEASURED, UNDERPOWERED
from analysis.figures import ALL_CLAIMS, FIGURES, FIRST_SCREEN
from analysis.frames import RunFrames
from analysis.measures import NEVER_100, UNUSED
from analysis.page import SECTIONS
from analysis.report import MAIN_FIGURES, main
from analysis.runs import READ
from gptcore.records import PRIMARY
from helpers.store import make_sweep
from helpers.trials import TINY
from tracking.address import store_address


@pytest.fixture(scope="module")
def built(finished_sweep, tmp_path_factory):
    """The report of a sweep, built once."""
    out = tmp_path_factory.mktemp("built") / "report"
    assert main(["--runs-dir", str(finished_sweep), "--out", str(out)]) == 0
    return out


@pytest.fixture
def report(built, tmp_path):
    """A copy of the report, to be changed."""
    return Path(shutil.copytree(built, tmp_path / "report"))


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


ESTIMATE = ["seeds", "value", "low", "high"]
FINDING = [
    "verdict", "verdict_of_finished", "course", "p", "p_holm", "runs", "counted_against", "seeds",
    "schemes", "configurations", "undefined_in", "parts", "forecast", "depends_on",
]  # fmt: skip
KEYS = {
    "": [
        "sweep", "notes", "trials", "scope", "looks", "claims", "depth_gradient", "rare_tokens",
        "comparisons", "specifications", "runs",
    ],
    "trials": ["finished", "diverged", "failed", "unreadable", "unfinished"],
    "claims": [
        "digest", "standing", "exploratory_trials", "alpha", "asked", "here", "in_general", "by"
    ],
    "claims.here.*": FINDING,
    "claims.in_general.*": FINDING,
    "claims.by.*.*.*": FINDING,
    "claims.here.*.parts.*": [
        "estimate", "sd", "df", "supported_p", "contradicted_p", "not_supported_p", "verdict",
        "doubts", "configurations", "prediction", "variance", "decides",
    ],
    "claims.here.*.parts.*.estimate": ESTIMATE,
    "claims.in_general.*.parts.*.prediction": ESTIMATE,
    "depth_gradient.*": [
        "runs", "tau", "tau_of_runs", "first_layer_widest", "widest_layer_of_runs",
        "median_growth_by_layer", "median_growth",
    ],
    "depth_gradient.*.tau": ESTIMATE,
    "rare_tokens.*": [
        "runs", "measured_on", "groups", "change_by_subset", "never_below_rare_below_common",
        "never_below_singletons_below_common",
    ],
    "rare_tokens.*.groups.*": [
        "start", "end", "change", "logit_change", "log_z_change", "excess"
    ],
    "rare_tokens.*.groups.*.*": ESTIMATE,
    "rare_tokens.*.never_below_rare_below_common": ESTIMATE,
    "comparisons": ["reference", "claims"],
    "comparisons.claims.*.*.*": [*ESTIMATE, "p", "p_holm"],
    "specifications.*": ["verdicts", "by_choice", "joint_p", "all"],
    "specifications.depth_gradient.all.*": [
        "weight", "measure", "step", *ESTIMATE, "verdict"
    ],
    "specifications.rare_falls.all.*": [
        "mask", "group", "step", "baseline", *ESTIMATE, "verdict"
    ],
    "specifications.rare_falls.by_choice": ["mask", "group", "step", "baseline"],
    "runs.*": [
        "trial_key", "init.scheme", "init.seed", "optim.lr", "status", "reason", "last_loss", "tau",
        "widest_layer",
    ],
}  # fmt: skip
"""The keys of findings.json by path, in their order: other programs read them."""


def at_path(value, path):
    """Every value at a path of keys; `*` stands for all of them."""
    if not path:
        return [value]
    key, _, rest = path.partition(".")
    if key != "*":
        return at_path(value[key], rest)
    every = value.values() if isinstance(value, dict) else value
    return [found for one in every for found in at_path(one, rest)]


@pytest.mark.parametrize("path", KEYS)
def test_the_keys_of_the_findings_and_their_order_stay(built, path):
    found = at_path(json.loads((built / "findings.json").read_text()), path)
    assert found
    assert [list(one) for one in found] == [KEYS[path]] * len(found)


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


def test_every_figure_of_runs_has_the_schemes_in_one_order(report):
    """Colours are given to schemes in this order."""
    schemes = pl.read_parquet(report / "trials.parquet")["scheme"].unique(maintain_order=True)
    for name in {FIGURES[figure].frame for figure in FIGURES} & {*RunFrames.__annotations__}:
        found = pl.read_parquet(report / f"{name}.parquet")["scheme"].unique(maintain_order=True)
        assert found.to_list() == [scheme for scheme in schemes if scheme in found], name


def test_the_main_figures_are_pictures_too(report):
    for name in MAIN_FIGURES:
        picture = (report / "figures" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    assert sorted(MAIN_FIGURES) == ["group_log_probs", "qkv_std"]


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
        (line,) = (line for line in summary.splitlines() if line.startswith(f"- `{name}`: "))
        assert f"| `{name}`: {claim.says} | " in summary
        assert findings["here"][name]["verdict"] in line.lower()
    # Two seeds cannot decide on a median, and the report says how many would.
    assert findings["here"]["depth_gradient"]["verdict"] == UNDERPOWERED
    assert re.search(r"\d+ seeds would decide the claim in half of all cases", summary)
    assert "In general: too few schemes or seeds (2 schemes; at least 3" in summary
    assert list(findings["by"]) == ["scheme"]


def test_claims_that_changed_after_the_first_trial_are_exploratory(
    finished_sweep, tmp_path, monkeypatch
):
    monkeypatch.setattr("analysis.sweep_verdicts.digest", lambda asked=(): "another")
    assert main(["--runs-dir", str(finished_sweep), "--out", str(tmp_path)]) == 0
    findings = json.loads((tmp_path / "findings.json").read_text())["claims"]
    assert findings["standing"] == "exploratory"
    assert "Exploratory: these trials were planned after" in (tmp_path / "report.html").read_text()


def test_a_report_can_be_of_some_trials(finished_sweep, tmp_path):
    where = "init.scheme = 'gpt2' AND init.seed < 1"
    assert main(["--runs-dir", str(finished_sweep), "--out", str(tmp_path), "--where", where]) == 0
    trials = pl.read_parquet(tmp_path / "trials.parquet")
    assert trials.select("init.scheme", "init.seed").rows() == [("gpt2", 0)]
    note = f"Note: Only the trials for which {where}.".replace("<", r"\<")  # else it were markup
    assert note in (tmp_path / "summary.md").read_text()


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
        (
            ["--claims", "order", "ordre"],
            "there is no claim ordre: did you mean order? the claims are",
        ),
        (["--shuffle-labels", "-1"], "a seed is a whole number from 0, not '-1'"),
        (["--shuffle-labels", "x"], "a seed is a whole number from 0, not 'x'"),
        (["--where", "init.scheme = gpt2"], "(texts are in quotes), not"),
        (["--out", ""], "--out takes a folder for the files of the report, not the current folder"),
        (["--where", "init.scheme = 'none'"], "is true of none of the 6 trials"),
        (
            ["--where", "init.shceme = 'gpt2'"],
            "there is no knob init.shceme: did you mean init.scheme? `python sweeps/init_sweep.py",
        ),
        (["--where", "optim_lr = 0.1"], "there is no knob optim_lr: did you mean optim.lr?"),
        (["--where", "corpus.name = '/tmp/my.txt'"], "is true of none of the 6 trials"),
        (["--where", "init.seed + 1"], "takes a condition on knobs such as"),
        (["--where", "drop ("], "takes a condition on knobs such as"),
        (["--where", "init.seed > 2"], "has no trials with a result yet for which init.seed > 2"),
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


def test_a_scheme_without_finished_trials_is_still_in_the_findings(report):
    findings = json.loads((report / "findings.json").read_text())
    diverged = "model5, optim.lr 1e+30"
    assert findings["depth_gradient"][diverged]["runs"] == 0
    assert findings["depth_gradient"][diverged]["tau"]["value"] is None
    assert findings["rare_tokens"][diverged]["groups"]["never_used"]["change"]["value"] is None
    assert {by["init_table"]["verdict"] for label, by in findings["claims"]["by"]["scheme"].items()
            if label == diverged} == {NOT_MEASURED}  # fmt: skip


def test_every_claim_and_figure_has_its_section():
    assert {claim.section for claim in CLAIMS.values()} <= set(SECTIONS)
    assert {figure.section for figure in FIGURES.values()} == {*SECTIONS, FIRST_SCREEN, ALL_CLAIMS}


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
    # Who joins sweeps may have seen the results of each.
    assert findings["claims"]["standing"] == "exploratory"
    assert findings["notes"][1] == (
        "The sweeps differ in corpus.subset; verdicts on all of them average over that."
    )
    page = (tmp_path / "report.html").read_text()
    assert "init_sweep.py --name one; python" in page
    for name in ("one", "two"):
        assert f"-m tracking.pages --runs-dir {two_sweeps} --name {name}</code>" in page
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
    found = compared["claims"]["never_suppressed"][UNUSED]["gpt2"]
    changes = pl.read_parquet(tmp_path / "group_changes.parquet").filter(group="never_used")
    by_scheme = changes.pivot("scheme", index="subset", values="change")
    assert found["value"] == pytest.approx((by_scheme["gpt2"] - by_scheme["model5"]).mean())
    assert (found["seeds"], found["low"], found["p_holm"]) == (1, None, 1.0)  # one seed says little


def test_claims_can_be_chosen_and_stay_corrected_for_all(finished_sweep, tmp_path):
    chosen = ["--claims", "order", "widening"]
    assert main(["--runs-dir", str(finished_sweep), "--out", str(tmp_path), *chosen]) == 0
    page = (tmp_path / "report.html").read_text()
    linked = dict.fromkeys(re.findall(r'<a href="#claim-(\w+)"', page))
    assert list(linked) == ["order", "widening"]
    summary = (tmp_path / "summary.md").read_text()
    assert summary.count("\n- ") == 2
    assert f"Note: 2 of {len(CLAIMS)} claims are shown, corrected for all claims." in summary
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert set(findings["claims"]["here"]) == set(CLAIMS)


def test_what_is_chosen_or_shuffled_confirms_nothing_and_leaves_the_report(two_sweeps):
    runs = ["--runs-dir", str(two_sweeps), "--name", "one"]
    assert main(runs) == 0
    reports = two_sweeps / "reports"
    whole = (reports / "one" / "findings.json").read_text()
    assert main([*runs, "--where", "init.scheme = 'gpt2'"]) == 0
    assert main([*runs, "--shuffle-labels", "0"]) == 0
    assert main([*runs, "--claims", "order"]) == 0
    assert (reports / "one" / "findings.json").read_text() == whole
    standing = {
        folder: json.loads((reports / folder / "findings.json").read_text())["claims"]["standing"]
        for folder in ("one", "one-selected", "one-shuffled", "one-claims")
    }
    # Claims that are shown are corrected for all of them: that is no choice.
    assert standing == {
        "one": "confirmatory", "one-selected": "exploratory", "one-shuffled": "exploratory",
        "one-claims": "confirmatory",
    }  # fmt: skip


def test_a_sweep_over_bytes_says_what_cannot_be_measured(tmp_path, capsys):
    knobs = [
        {"init.scheme": scheme, "init.seed": seed, "corpus.subset": subset}
        for scheme in ("model5", "gpt2")
        for seed in (0, 1)
        for subset in ("all", "0-0.5")
    ]
    make_sweep(store_address(tmp_path).uri, tmp_path, "over-bytes", knobs, base=TINY)
    assert main(["--runs-dir", str(tmp_path)]) == 0
    folder = tmp_path / "reports" / "over-bytes"
    found = json.loads((folder / "findings.json").read_text())["claims"]["here"]
    without = {name for name, one in found.items() if one["verdict"] == NOT_MEASURED}
    # Hardly any byte of a text is rare.
    assert without == {"order", "rare_falls", "rare_flips", "never_suppressed"}
    assert list(found["never_suppressed"]["parts"]) == [NEVER_100, UNUSED]
    assert found["depth_gradient"]["parts"]["tau"]["estimate"]["seeds"] == 2
    page = (folder / "report.html").read_text()
    assert "Not measured: no finished run has the numbers that the claim needs" in page


def of(**knobs):
    return {knob.replace("__", "."): value for knob, value in knobs.items()}


ODD_SWEEPS = {
    "all runs diverged": [of(init__seed=seed, optim__lr=1e30) for seed in (0, 1)],
    "Q starts at 0": [
        of(init__scheme="mup", model__tied=False, init__seed=seed) for seed in (0, 1)
    ],
    "one seed": [of(init__scheme=scheme) for scheme in ("gpt2", "model5")],
    "one scheme": [of(init__scheme="gpt2", init__seed=seed) for seed in range(3)],
    "a scheme that diverged": [
        *(of(init__scheme="gpt2", init__seed=seed) for seed in (0, 1)),
        *(of(init__scheme="model5", init__seed=seed, optim__lr=1e30) for seed in (0, 1)),
    ],
    "one seed missing in each configuration": [
        of(init__scheme=scheme, init__seed=seed)
        for number, scheme in enumerate(("gpt2", "model5", "normal"))
        for seed in range(3)
        if seed != number
    ],
}


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(odd, marks=() if odd in list(ODD_SWEEPS)[:2] else pytest.mark.full)
        for odd in ODD_SWEEPS
    ],
)
def test_every_sweep_with_a_result_gives_a_complete_report(odd, tmp_path):
    make_sweep(store_address(tmp_path).uri, tmp_path, "odd", ODD_SWEEPS[odd], base=TINY)
    assert main(["--runs-dir", str(tmp_path), "--name", "odd"]) == 0
    folder = tmp_path / "reports" / "odd"
    found = json.loads((folder / "findings.json").read_text())
    assert set(found["claims"]["here"]) == set(CLAIMS)
    assert len(found["runs"]) == len(ODD_SWEEPS[odd])
    verdicts = {name: one["verdict"] for name, one in found["claims"]["here"].items()}
    if odd == "all runs diverged":
        assert set(verdicts.values()) == {NOT_MEASURED}
        assert found["trials"]["diverged"] == 2
    if odd == "Q starts at 0":
        assert verdicts["widening"] == NOT_MEASURED
        assert "tau of q" not in found["claims"]["here"]["depth_gradient"]["parts"]
    if odd == "a scheme that diverged":
        assert not set(verdicts.values()) & {"supported", "contradicted"}
    if odd == "one seed missing in each configuration":
        assert found["claims"]["here"]["mask_matters"]["seeds"] == 3
    page = (folder / "report.html").read_text()
    assert all(f'id="claim-{name}"' in page for name in CLAIMS)
