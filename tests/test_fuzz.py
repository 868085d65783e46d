"""Command lines that nobody would think of: each ends well, or with one sentence."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from analysis import report
from gptcore.config import KNOBS, TrialConfig, spelling
from helpers.store import moved
from sweeps import init_sweep, search
from sweeps.searching.runner import SearchRunner

DEFAULTS = TrialConfig().to_flat()

odd = st.one_of(
    st.sampled_from(
        [
            "", " ", "-1", "-1e-3", "0", "1", "2", "7", "1e3", "1e-300", "1e999", "nan", "-inf",
            "inf", "0x10", "1_000", " 5", "٣", "true", "True", "all", "0-0.25", "0-.5", "1-0", "..",
            "1e-4..1e-2", "part-1", "~", "~nobody/x", "/dev/null", "/proc/self/mem", "*", "a b",
            "%s", "{}", "\\", "'", '"; drop table runs; --', "\t", "é", "🐎", "\x7f", "--", "-",
            "=", "9" * 30, "9" * 5000, "x" * 300, "None", "null", "[1]", "model5", "gpt2", "bytes",
        ]
    ),
    st.text(max_size=12).filter(lambda text: "\0" not in text),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip
"""What may stand in the place of a value. No argument of a process can hold a NUL byte."""


def option(name, values, most=1):
    """An option with up to so many values, often with an equals sign."""
    return st.one_of(
        st.tuples(st.just(name), st.lists(values, min_size=0, max_size=most)).map(
            lambda pair: [pair[0], *pair[1]]
        ),
        values.map(lambda value: [f"{name}={value}"]),
    )


knobs = st.sampled_from(list(KNOBS)).flatmap(
    lambda knob: option(f"--{knob}", st.one_of(odd, st.just(spelling(DEFAULTS[knob]))), most=3)
)
names = option("--name", st.one_of(odd, st.sampled_from(["small", "../up", "a/b", "Default"])))
folders = option(
    "--runs-dir",
    st.one_of(
        odd.filter(lambda text: not text.startswith(("/", "~"))),
        st.sampled_from(["runs", "./runs", "a/b/c", "finished", "file", "file/x", "s3://b/x"]),
    ),
)
sweep_options = st.one_of(
    knobs, knobs, knobs, names, folders,
    option("--preset", st.one_of(odd, st.sampled_from(["quick", "init", "tying", "optimizer"]))),
    option("--array", st.one_of(odd, st.sampled_from(["auto", "off", "3"]))),
    option("--redo", st.one_of(odd, st.sampled_from(["all", "failed"])), most=2),
    option("--until-decided", st.one_of(odd, st.sampled_from(["5", "20", "60"]))),
    odd.map(lambda text: [text]),
)  # fmt: skip
search_options = st.one_of(
    knobs, knobs, names, folders,
    st.sampled_from([["best"], ["refute"]]),
    option("--metric", st.one_of(odd, st.just("loss/val"))),
    option("--claim", st.one_of(odd, st.sampled_from(["depth_gradient", "order", "rare_flips"]))),
    *(option(name, odd) for name in ("--trials", "--finds", "--seeds")),
    odd.map(lambda text: [text]),
)  # fmt: skip
report_options = st.one_of(
    names, folders,
    option("--where", st.one_of(odd, st.sampled_from(["init.seed < 1", "init.scheme = 'gpt2'"]))),
    option("--claims", st.one_of(odd, st.just("order")), most=3),
    option("--shuffle-labels", odd),
    odd.map(lambda text: [text]),
)  # fmt: skip


def line(options):
    return st.lists(options, max_size=5).map(
        lambda parts: [word for part in parts for word in part]
    )


@pytest.fixture
def sandbox(tmp_path, finished_sweep, monkeypatch):
    """A folder in a folder to run commands in, with a finished sweep and a file."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    moved(finished_sweep, inner / "finished")
    (inner / "file").touch()
    monkeypatch.chdir(inner)
    monkeypatch.setenv("HOME", str(tmp_path / "outer"))
    monkeypatch.delenv("GPT_SWEEPS_RUNS_DIR", raising=False)
    return tmp_path / "outer"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else None
        for path in folder.rglob("*")
        if not path.name.startswith("mlflow.db")  # SQLite's own files come and go
    }


def run(main, arguments, capsys, sandbox, may_write=()):
    """Run a command, and check how it ends."""
    before = contents(sandbox)
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as ended:  # --help
        code = ended.code
    said = capsys.readouterr()
    assert code in (0, 2), (arguments, code)
    assert "Traceback" not in said.out + said.err, arguments
    if code == 2:
        assert re.fullmatch(r"error: [^\n]+\n", said.err), (arguments, said.err)
    after = contents(sandbox)
    changed = dict(before.items() ^ after.items()).keys()
    assert all(path.startswith(tuple(may_write)) for path in changed), (arguments, changed)
    event(f"exit code {code}")


# A command line is read and checked in a hundredth of a second, and hundreds are tried. They are
# the same ones each time, because a change is not to fail by chance. GPT_SWEEPS_FUZZ_ANEW=1 tries
# others.
fuzz = settings(
    max_examples=500,
    derandomize="GPT_SWEEPS_FUZZ_ANEW" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    print_blob=True,
)


@pytest.mark.full
@fuzz
@given(arguments=line(sweep_options))
def test_any_command_line_of_a_sweep_ends_well_or_with_one_sentence(arguments, capsys, sandbox):
    given = [*arguments, "--dry-run", "--no-estimate"]
    if not any(word.startswith("--corpus.name") for word in arguments):
        given += ["--corpus.name", "pydocs"]
    run(init_sweep.main, given, capsys, sandbox)


@pytest.mark.full
@fuzz
@given(arguments=line(search_options))
def test_any_command_line_of_a_search_ends_well_or_with_one_sentence(
    arguments, capsys, sandbox, search_without_trials
):
    given = [*arguments, "--corpus.name", "pydocs"]
    run(search.main, given, capsys, sandbox, may_write=["inner/runs", "inner/a", "inner/finished"])


@pytest.fixture
def search_without_trials(monkeypatch):
    """A search that stops where its first trial would run."""
    monkeypatch.setattr(search, "finish_search", lambda *_: 0)
    monkeypatch.setattr(SearchRunner, "__init__", lambda *_: None)


@pytest.mark.full
@settings(parent=fuzz, max_examples=150)  # a report that can be made takes more than a second
@given(arguments=line(report_options))
def test_any_command_line_of_a_report_ends_well_or_with_one_sentence(arguments, capsys, sandbox):
    given = [*arguments, "--runs-dir", "finished", "--out", "report"]
    run(report.main, given, capsys, sandbox, may_write=["inner/report", "inner/finished/cache"])


def test_the_sandbox_notices_what_is_written(sandbox, capsys):
    def writes(_):
        Path("stray").touch()
        return 0

    with pytest.raises(AssertionError, match="stray"):
        run(writes, [], capsys, sandbox)
    Path("stray").unlink()

    def fails(_):
        raise KeyError("a tag")

    with pytest.raises(KeyError):
        run(fails, [], capsys, sandbox)
