"""Stores made by an attacker: they may give wrong numbers, and must not do anything worse.

This is one file because every test is an attack on the same store.
"""

import json
import re
import shutil
from html.parser import HTMLParser

import polars as pl
import pytest

from analysis.claims import CLAIMS, digest
from analysis.report import main
from gptcore.config import InputError
from gptcore.records import SCHEMA_VERSION
from helpers.hostile import COMMANDS, World, check_said, some
from helpers.store import job_of, moved, recorder_of, store_in
from sweeps import launch
from sweeps.ledger import sweep_lock
from sweeps.presets import PRESETS
from tracking.sweep_run import SweepRun, read_plan
from tracking.untrusted import printable

ESCAPES = "\x1b[31m\x1b]0;owned\x07\x9b2J\u202e\u2066\r"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'> ](http://evil) `x` |x|"
EVIL = f"{MARKUP}{ESCAPES}\n# heading\n<b>"


@pytest.fixture
def world(tmp_path, finished_sweep, monkeypatch):
    found = World(tmp_path, moved(finished_sweep, tmp_path / "runs"))
    # Another test may have made a report of the sweep that all share.
    shutil.rmtree(found.runs_dir / "reports", ignore_errors=True)
    monkeypatch.setenv("HOME", str(found.home))
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def report(world, capsys):
    """Return a function that writes a report, asserts that nothing else was done, and says how."""

    def write(*arguments, but=()):
        with world.untouched(*but):
            code = main(["--runs-dir", str(world.runs_dir), *arguments])
        out, err = capsys.readouterr()
        check_said(out, err, code)
        return code, err

    return write


@pytest.fixture
def dry_run(world, capsys):
    """Return a function that plans the sweep again from its record, and returns code, out, err."""

    def plan(*arguments):
        given = ["--runs-dir", str(world.runs_dir), "--name", "small", "--dry-run", *arguments]
        with world.untouched():
            code = launch.main("doc", PRESETS, [*given, "--no-estimate"])
        out, err = capsys.readouterr()
        check_said(out, err, code)
        return code, out, err

    return plan


NAMES = [
    "../../outside/x", "../../home/.ssh", "..", ".", "", " ", "a/b", "/etc/x", "a\0b", "-rf",
    "x" * 200, "a b", "small\n", "a\x1b[31mb", "\u202etxt", "~", "$HOME", "<b>", "a\\b", "é",
]  # fmt: skip


@pytest.mark.parametrize("name", some(NAMES, "../../outside/x", "a\x1b[31mb"))
def test_a_sweep_whose_name_is_none_is_named_and_left_out(world, report, name):
    world.tag(world.sweep_run, "sweep", name)
    code, said = report()
    assert code == 2
    assert "has no usable tag sweep" in said
    assert "takes up to 100 letters, digits, dots" in said


@pytest.mark.full
def test_beside_a_sweep_with_a_bad_name_the_others_are_read(world, report):
    other = "f" * 32
    names = [name for _, name, *_ in world.sql("pragma table_info(runs)") if name != "run_uuid"]
    listed = ", ".join(names)
    world.sql(f"insert into runs (run_uuid, {listed}) select ?, {listed} from runs "
              "where run_uuid = ?", other, world.sweep_run)  # fmt: skip
    for tag, value in {"kind": "sweep", "sweep": "../x", "launched": "9e9"}.items():
        world.tag(other, tag, value)
    assert report()[0] == 0
    summary = (world.runs_dir / "reports" / "small" / "summary.md").read_text()
    assert f"run {other} (sweep) has no usable tag sweep" in summary
    code, said = report("--name", "../x")
    assert code == 2
    assert "there is no sweep ../x" in said


def test_the_plan_cannot_give_the_sweep_another_name(world, dry_run):
    """The driver locks and reports under that name."""
    world.edit_plan(lambda plan: plan.update(sweep="../../outside/x"))
    code, out, _ = dry_run()
    assert code == 0
    assert "sweep small: 6 trials" in out


@pytest.mark.parametrize(
    "id", some(["../../outside", "", "x" * 32, "0" * 31, "A" * 32], "../../outside")
)
def test_a_run_whose_id_is_none_is_no_run(world, report, id):
    for table in ("runs", "tags"):
        world.sql(f"update {table} set run_uuid = ? where run_uuid = ?", id, world.sweep_run)
    assert report()[0] == 2


@pytest.mark.parametrize(
    "place", some(["{home}/.ssh", "{outside}/new", "{runs}/../outside"], "{home}/.ssh")
)
def test_files_of_runs_are_not_where_a_copied_database_says(world, report, tiny, place):
    place = place.format(home=world.home, outside=world.outside, runs=world.runs_dir)
    world.sql("update runs set artifact_uri = ?", f"file://{place}")
    store = store_in(world.runs_dir)
    plan = read_plan(store, store.sweep_runs()["small"])
    with world.untouched():
        assert report()[0] == 0  # they lie in the folder
    shutil.rmtree(world.files_of(world.sweep_run))
    code, said = report()
    assert code == 2
    assert (
        f"keeps its files at file://{place}, and those of this store are read and written" in said
    )
    experiment = store.sweep_runs()["small"].info.experiment_id
    shutil.rmtree(world.files_of(world.trials()[0]))
    (key,) = [
        key for key, run in store.trial_runs().items() if run.info.run_id == world.trials()[0]
    ]
    with world.untouched():
        with pytest.raises(InputError, match="read and written below"):
            SweepRun(store, experiment, plan, launched=1)
        with pytest.raises(InputError, match="read and written below"):
            store.client.log_text(world.sweep_run, "mine", "authorized_keys")
        with pytest.raises(InputError, match="read and written below"):
            recorder_of(store, experiment, job_of(tiny, key))


@pytest.mark.parametrize("location", some(["{home}/.ssh", "ftp://evil/x"], "{home}/.ssh"))
def test_a_new_run_does_not_write_where_its_experiment_says(world, tiny, location):
    location = f"file://{location.format(home=world.home)}"
    world.sql("update experiments set artifact_location = ?", location)
    store = store_in(world.runs_dir)
    with world.untouched(), pytest.raises(InputError, match="keeps its files at"):
        store.open_experiment("small", world.runs_dir)
    experiment = store.sweep_runs()["small"].info.experiment_id
    with world.untouched(), pytest.raises(InputError, match="read and written below"):
        recorder_of(store, experiment, job_of(tiny))


@pytest.mark.parametrize(
    "link", some(["reports", "artifacts", "locks", "mlflow.db", "checkpoints"], "reports")
)
def test_a_runs_folder_with_a_link_in_it_is_refused(world, report, link, capsys):
    there = world.outside / "x"
    place = world.runs_dir / link
    shutil.move(place, there) if place.exists() else there.mkdir()
    place.symlink_to(there)
    code, said = report()
    assert code == 2
    assert f"{place} is a link, by which a copied runs folder" in said
    with world.untouched():
        given = ["--runs-dir", str(world.runs_dir), "--corpus.name", "pydocs", "--debug"]
        assert launch.main("doc", PRESETS, given) == 2
    check_said(*capsys.readouterr(), 2)


def test_a_report_is_not_written_through_a_link(world, report):
    (world.runs_dir / "reports").mkdir()
    folder = world.runs_dir / "reports" / "small"
    folder.symlink_to(world.home / ".ssh")
    code, said = report()
    assert code == 2
    assert f"{folder} is a link" in said
    folder.unlink()
    folder.mkdir()
    (folder / "report.html").symlink_to(world.home / ".bashrc")
    (folder / "trials.parquet").symlink_to(world.home / ".ssh" / "id_rsa")
    assert report()[0] == 0
    assert not (folder / "report.html").is_symlink()


@pytest.mark.full
def test_files_of_a_run_are_not_written_through_a_link(world, report, tiny):
    store = store_in(world.runs_dir)
    key, run = next(
        (key, run) for key, run in store.trial_runs().items() if run.info.run_id in world.trials()
    )
    files = world.files_of(run.info.run_id)
    shutil.move(files, world.outside / "x")
    files.symlink_to(world.outside / "x")
    with world.untouched(), pytest.raises(InputError, match="is a link"):
        recorder_of(store, run.info.experiment_id, job_of(tiny, key))
    assert report()[0] == 0  # without this trial
    assert "is a link" in (world.runs_dir / "reports" / "small" / "summary.md").read_text()


def test_a_plan_or_a_report_is_not_kept_through_a_link(world):
    """MLflow writes into the file that a link points to."""
    store = store_in(world.runs_dir)
    plan = read_plan(store, store.sweep_runs()["small"])
    experiment = store.sweep_runs()["small"].info.experiment_id
    world.plan.unlink()
    world.plan.symlink_to(world.home / ".bashrc")
    (world.plan.parent / "report").symlink_to(world.home / ".ssh")
    with world.untouched(world.plan):
        sweep_run = SweepRun(store, experiment, plan, launched=1)
        with pytest.raises(InputError, match="report is a link"):
            sweep_run.keep([world.root / "home" / ".bashrc"])
    assert not world.plan.is_symlink()


def test_a_lock_is_not_taken_through_a_link(world):
    """It was emptied, and got the command line as its contents."""
    (world.runs_dir / "locks").mkdir()
    (world.runs_dir / "locks" / "small.json").symlink_to(world.home / ".bashrc")
    with (
        world.untouched(),
        pytest.raises(InputError, match="is a link"),
        sweep_lock(world.runs_dir, "small"),
    ):
        pass


def first_trial(plan):
    return next(iter(plan["trials"].values()))


PLANS = {
    "no object": lambda plan: plan.update(trials=[1]),
    "a trial that is a text": lambda plan: plan["trials"].update({"0" * 12: "x"}),
    "a key that is a path": lambda plan: plan["trials"].update({"../x": first_trial(plan)}),
    "a key with commands": lambda plan: plan["trials"].update({ESCAPES: first_trial(plan)}),
    "a billion steps": lambda plan: first_trial(plan)["params"].update({"train.steps": 10**9}),
    "a huge number": lambda plan: first_trial(plan)["params"].update({"init.seed": 10**400}),
    "no number": lambda plan: first_trial(plan)["params"].update({"optim.lr": float("nan")}),
    "a list for a knob": lambda plan: first_trial(plan)["params"].update({"init.seed": [1]}),
    "a column of ours": lambda plan: first_trial(plan)["params"].update({"status": "finished"}),
    "commands for a knob": lambda plan: first_trial(plan)["params"].update(
        {"init.scheme": ESCAPES}
    ),
    "a knob of commands": lambda plan: first_trial(plan)["params"].update({ESCAPES: 1}),
    "a command that is a number": lambda plan: plan.update(command=1),
    "notes that are a text": lambda plan: plan.update(notes="ab"),
    "notes of objects": lambda plan: plan.update(notes=[{"a": 1}]),
    "a preset that is a list": lambda plan: plan.update(preset=[]),
    "tags of numbers": lambda plan: plan.update(tags={"a": 1}),
}


@pytest.mark.parametrize("change", some(PLANS, "a key that is a path", "a billion steps"))
def test_a_plan_that_is_none_is_named(world, report, dry_run, change):
    world.edit_plan(PLANS[change])
    for code, *_, said in (report(), dry_run()):
        assert code == 2
        assert "plan.json is damaged (" in said


@pytest.mark.parametrize(
    "text", some(["[" * 100_000, "{" * 9, '"x"', "9" * 5000, "\xff", "NaN"], "[" * 100_000)
)
def test_a_file_that_is_no_plan_is_named(world, report, text):
    world.plan.write_bytes(text.encode("latin-1"))
    code, said = report()
    assert code == 2
    assert "plan.json is damaged (" in said


@pytest.mark.full
def test_a_plan_that_is_no_file_is_named(world, report):
    world.plan.unlink()
    world.plan.mkdir()
    assert report()[0] == 2
    world.plan.rmdir()
    world.plan.symlink_to("/dev/zero")
    assert report()[0] == 2


PART = {
    "estimate": {"seeds": 2, "value": 0.5, "low": 0.25, "high": 0.75}, "sd": 0.125, "df": 1.0,
    "supported_p": 0.25, "contradicted_p": 0.9, "not_supported_p": 0.9, "verdict": "underpowered",
    "doubts": [], "configurations": 1, "prediction": None, "variance": {}, "decides": True,
}  # fmt: skip
FINDING = {
    "verdict": "underpowered", "verdict_of_finished": "underpowered", "course": None, "p": 0.25,
    "p_holm": 0.5, "runs": 2, "counted_against": 0, "seeds": 2, "schemes": 1, "configurations": 1,
    "undefined_in": [], "parts": {}, "forecast": None, "depends_on": None,
}  # fmt: skip


def interim():
    """What looks.json holds after the first of two analyses."""
    findings = {name: {**FINDING, "parts": dict.fromkeys(CLAIMS[name].parts, PART)}
                for name in CLAIMS}  # fmt: skip
    return {
        "seeds": [0, 1, 2], "trials": [], "claims_digest": digest(), "asked": [],
        "waits_for": list(CLAIMS),
        "schedule": [{"seeds": 2, "alpha": 0.03}, {"seeds": 3, "alpha": 0.02}],
        "looks": [{"seeds": 2, "alpha": 0.03, "decided": [], "findings": findings}],
    }  # fmt: skip


def of_claim(stored):
    return stored["looks"][0]["findings"]["depth_gradient"]


LOOKS = {
    "no schedule": lambda it: it.update(schedule=[]),
    "more made than planned": lambda it: it.update(looks=it["looks"] * 9),
    "a claim is missing": lambda it: it["looks"][0]["findings"].pop("order"),
    "an alpha of 7": lambda it: it["schedule"][0].update(alpha=7),
    "an alpha that is no number": lambda it: it["schedule"][0].update(alpha=float("nan")),
    "a billion seeds": lambda it: it["schedule"][0].update(seeds=10**9),
    "a verdict of its own": lambda it: of_claim(it).update(verdict=EVIL),
    "a course of its own": lambda it: of_claim(it).update(course=EVIL),
    "a part of its own": lambda it: of_claim(it)["parts"].update({EVIL: PART}),
    "a number that is a text": lambda it: of_claim(it)["parts"]["tau"]["estimate"].update(low="x"),
    "a claim that there is not": lambda it: it.update(waits_for=["x"]),
    "decided and not found": lambda it: it["looks"][0].update(decided=["x"]),
    "more than it takes": lambda it: of_claim(it).update(more=1),
    "findings that are a list": lambda it: it["looks"][0].update(findings=[]),
}


@pytest.mark.full
def test_interim_analyses_that_somebody_wrote_by_hand_are_read(world, report):
    world.tag(world.sweep_run, "until_decided", "3")
    (world.plan.parent / "looks.json").write_text(json.dumps(interim()))
    assert report() == (0, "")


@pytest.mark.parametrize("change", some(LOOKS, "a verdict of its own"))
def test_interim_analyses_that_are_none_are_named(world, report, change):
    world.tag(world.sweep_run, "until_decided", "3")
    stored = interim()
    LOOKS[change](stored)
    (world.plan.parent / "looks.json").write_text(json.dumps(stored))
    code, said = report()
    assert code == 2
    assert "looks.json is damaged (" in said


def listed(*numbers):
    """A column that has the same list in every row."""
    return pl.lit(pl.Series([list(numbers)], dtype=pl.List(pl.Int64))).first()


def changed(name, make):
    """A change of a Parquet file: a new column in place of one."""
    return lambda frame: frame.with_columns(make(pl.col(name)).alias(name))


TABLES = {
    "text in place of numbers": ("training", changed("loss", lambda col: col.cast(pl.String))),
    "a column is missing": ("weights", lambda frame: frame.drop("std")),
    "a column of ours": ("weights", lambda frame: frame.with_columns(trial_key=pl.lit("x"))),
    "no rows": ("token_groups", lambda frame: frame.clear()),
    "no steps": ("training", changed("step", lambda col: pl.lit(None, pl.Int64))),
    "every row twice": ("token_groups", lambda frame: pl.concat([frame, frame])),
    "no numbers": ("weights", changed("std", lambda col: col * float("nan"))),
    "infinite numbers": ("weights", changed("rms_displacement", lambda col: col * float("inf"))),
    "huge numbers": ("weights", changed("std", lambda col: pl.lit(1e308))),
    "a huge step": ("weights", changed("step", lambda col: pl.lit(2**62))),
    "a negative layer": ("weights", changed("layer", lambda col: pl.lit(-(2**63)))),
    "markup": ("token_groups", changed("group", lambda col: pl.lit(EVIL))),
    "markup in a kind": ("init", changed("kind", lambda col: pl.lit(EVIL))),
    "more tokens than there are": ("tokens", changed("count", lambda col: listed(*[0] * 60_000))),
    "edges without counts": ("histograms", changed("counts", lambda col: listed(1))),
}  # fmt: skip


@pytest.mark.parametrize("change", some(TABLES, "markup"))
@pytest.mark.parametrize("where", some(["one trial", "all trials"], "one trial"))
def test_a_table_that_is_none_leaves_out_its_trial(world, report, change, where):
    table, edit = TABLES[change]
    runs = world.trials()
    for run_id in runs if where == "all trials" else runs[:1]:
        file = world.files_of(run_id) / f"{table}.parquet"
        edit(pl.read_parquet(file)).write_parquet(
            file, metadata={"schema_version": str(SCHEMA_VERSION)}
        )
    report()


@pytest.mark.full
@pytest.mark.parametrize("contents", [b"", b"PAR1", b"PAR1" + bytes(99) + b"PAR1"])
def test_a_file_that_is_no_table_leaves_out_its_trial(world, report, contents):
    file = world.files_of(world.trials()[0]) / "weights.parquet"
    file.write_bytes(contents)
    assert report()[0] == 0
    file.unlink()
    file.mkdir()
    assert report()[0] == 0


class Tags(HTMLParser):
    """The elements of a page, and their attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def made_evil(world):
    """Put markup and commands for terminals wherever a store holds a text."""

    def change(plan):
        plan.update(command=EVIL, notes=[EVIL, "[x](javascript:alert(1))"], preset=EVIL)
        plan.update(claims=[EVIL], tags={"notes": EVIL})
        for trial in plan["trials"].values():
            trial["params"]["init.scheme"] += MARKUP
            trial["params"]["corpus.name"] = MARKUP
            trial["corpus_digest"] = trial["stamp"] = EVIL

    world.edit_plan(change)
    for run_id in [*world.trials(), world.sweep_run]:
        for tag in ("reason", "host", "notes", "git_commit", "device", "mlflow.user"):
            world.tag(run_id, tag, EVIL)
    for run_id in world.trials():
        world.tag(run_id, "sweep", EVIL)
    world.sql("update runs set name = ?, user_id = ?", EVIL, EVIL)
    world.sql("update experiments set name = ? where experiment_id > 0", EVIL)


def test_texts_of_a_store_are_shown_as_they_are(world, report):
    made_evil(world)
    code, said = report()
    assert code == 0, said
    folder = world.runs_dir / "reports" / "small"
    page = Tags()
    page.feed(html := (folder / "report.html").read_text())
    assert len([1 for tag, _ in page.found if tag == "script"]) == 2
    assert not {"img", "b"} & {tag for tag, _ in page.found}
    assert not [name for _, attributes in page.found for name in attributes if name[:2] == "on"]
    assert "&lt;script&gt;alert(1)" in html
    summary = (folder / "summary.md").read_text()
    for text in (html.partition("<script>")[0], summary):
        assert not COMMANDS.search(text), COMMANDS.findall(text)
    plain = re.sub(r"\\.", "", summary)
    assert "<" not in plain
    assert not re.search(r"\[[^\]]*\]\(", plain)
    assert "\n# heading" not in plain


@pytest.mark.full
@pytest.mark.browser
def test_a_browser_runs_nothing_that_a_store_holds(world, report, page):
    made_evil(world)
    assert report()[0] == 0
    asked = []
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.goto((world.runs_dir / "reports" / "small" / "report.html").as_uri())
    page.wait_for_selector("#growth_by_layer svg")
    assert asked == page.asked == []
    assert not [line for line in page.said if line.startswith("error")]


def test_a_terminal_obeys_nothing_that_a_store_holds(world, dry_run):
    world.edit_plan(lambda plan: plan.update(command=EVIL, notes=[EVIL]))
    for run_id in world.trials():
        world.tag(run_id, "reason", EVIL)
        world.tag(run_id, "sweep", EVIL)
    code, out, _ = dry_run()
    assert code == 0
    assert "\\x1b[31m" in out
    assert not [line for line in out.splitlines() if line.startswith("# heading")]


def test_what_a_terminal_would_obey_is_shown_as_escapes():
    assert printable("a\tb\nü 漢 😀") == "a\tb\nü 漢 😀"
    assert printable(ESCAPES) == "\\x1b[31m\\x1b]0;owned\\x07\\x9b2J\\u202e\\u2066\\x0d"


def test_a_report_that_came_with_the_folder_is_not_taken_for_ours(world, capsys):
    """Its digest is a tag of the store, which whoever made the page can set as well."""
    (world.runs_dir / "reports" / "small").mkdir(parents=True)
    page = world.runs_dir / "reports" / "small" / "report.html"
    page.write_text("<script>alert(1)</script>")
    from sweeps import session as module

    kept = module._written(page)
    shutil.copytree(world.runs_dir, world.root / "copy")
    assert module._written(world.root / "copy" / "reports" / "small" / "report.html") != kept
