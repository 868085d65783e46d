"""The command line, in this process and without Ray: plans, dry runs, debug runs, bad input."""

import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from analysis.claims import CLAIMS
from analysis.power import say_power
from gptcore import corpus
from gptcore.config import KNOBS, TrialConfig
from gptcore.corpus import CORPORA
from helpers.paths import ROOT
from helpers.trials import TINY, WORDS, flags, key_of, undisturbed_tables
from sweeps.launch import main
from sweeps.plan import complete_seeds, make_plan
from sweeps.presets import PRESETS, trials_of
from tracking.address import StoreAddress


def run(*arguments):
    return main("doc", PRESETS, list(arguments))


@pytest.fixture
def runs_dir(tmp_path):
    return tmp_path / "runs"


BAD = [
    (["--preset", "huge"], "unknown preset 'huge': take quick, init, shape, "),
    (["--init.scheme", "xavier"], "init.scheme 'xavier' is unknown: "),
    (["--init.scheme", "modle5"], "is unknown: did you mean model5? take one of model5, normal"),
    (["--init.scheme", "gpt2", "normal", "--init.std", "0.1"], "gpt2 does not take init.std"),
    (["--preset", "optimizer", "--optim.name", "adamw"], "--preset optimizer sets optim.name"),
    (["--preset", "optimizer", "--optim.beta1", "0.8"], "sgd does not take optim.beta1"),
    (["--optim.warmup", "200"], "optim.warmup must be below train.steps"),
    (["--corpus.name", "moby"], "corpus.name 'moby' is neither a corpus (gulliver, pydocs) nor"),
    (["--corpus.subset", "part-5"], "corpus.subset 'part-5' is unknown"),
    (
        ["--init.sceed", "1"],
        "unknown argument --init.sceed: did you mean --init.seed? --help names",
    ),
    (["extra"], "unknown argument extra"),
    (["--name=--"], "argument --name: it takes a value, not --"),
    (["--train.steps"], "--train.steps: expected at least one argument"),
    (["--train.steps", "ten"], "train.steps takes a whole number >= 1 and <= 10000000, not 'ten'"),
    (["--train.steps", "10", "0"], "train.steps takes a whole number >= 1 and <= 10000000, not 0"),
    (["--optim.lr", "-1"], "optim.lr takes a finite number > 0, not -1.0"),
    (["--optim.lr", "-1e-3"], "optim.lr takes a finite number > 0, not -0.001"),
    (["--optim.lr", "-1e3"], "optim.lr takes a finite number > 0, not -1000.0"),
    (["--optim.lr", "-1e-25"], "optim.lr takes a finite number > 0, not -1e-25"),
    (["--name", "x", "--until-decided", "0"], "from 8 to 1000 here, not 0"),
    (
        ["--init.seed", str(2**128)],
        "init.seed takes a whole number >= 0 and <= 9007199254740992, not 340",
    ),
    (["--until-decided", "1000000000"], "from 8 to 1000 here, not 1000000000"),
    (["--model.n_head", "5"], "5 heads do not divide a width of 32"),
    (["--probes.layers", "1,9"], "there is no layer 9, the model has 0 to 3"),
    (
        ["--model.context", "200000"],
        "a context of 200000 with 4 corpus.windows needs at least 1600008",
    ),
    (["--watch", "--dry-run"], "--watch shows a running sweep: it cannot be combined with"),
    (["--watch", "--debug"], "--watch shows a running sweep: it cannot be combined with"),
    (["--name", "../up"], "--name takes up to 100 letters"),
    (["--train.device", "cuda:7"], "train.device takes auto, cpu, cuda, not 'cuda:7'"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD]
)
def test_bad_input_is_one_sentence_exit_code_2_and_nothing_written(
    arguments, says, runs_dir, capsys
):
    corpus_given = [] if "--corpus.name" in arguments else ["--corpus.name", "pydocs"]
    assert run(*arguments, "--runs-dir", str(runs_dir), *corpus_given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not runs_dir.exists()


def test_bad_texts_are_refused(runs_dir, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    assert run("--runs-dir", str(runs_dir), "--corpus.name", str(tmp_path / "short.txt")) == 2
    assert "a context of 64 with 4 corpus.windows needs at least 520" in capsys.readouterr().err


def test_a_runs_folder_that_cannot_be_written_is_refused(tiny, capsys):
    for mode in ([], ["--debug"]):
        assert run("--runs-dir", "/proc/runs", *flags(tiny), *mode) == 2
        assert "--runs-dir /proc/runs cannot be written" in capsys.readouterr().err


def test_a_tracking_server_that_does_not_answer_is_refused(tiny, runs_dir, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert run("--runs-dir", str(runs_dir), *flags(tiny)) == 2
    assert "the tracking store http://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_a_book_that_was_asked_for_and_cannot_be_had_is_refused(runs_dir, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "GULLIVER_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(corpus, "DOWNLOAD_TRIES", 1)
    assert run("--runs-dir", str(runs_dir), "--corpus.name", "gulliver") == 2
    assert "name that folder in GPTCORE_CORPORA" in capsys.readouterr().err


def test_where_nobody_asked_for_the_book_the_stand_in_is_announced(runs_dir, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "GULLIVER_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(corpus, "DOWNLOAD_TRIES", 1)
    assert run("--runs-dir", str(runs_dir), "--debug", "--train.steps", "1") == 0
    assert (
        "NOTE: pydocs (Python's manual) is used instead of the default corpus"
        in capsys.readouterr().out
    )
    plan = make_plan("quick", "quick", PRESETS["quick"].spaces)
    assert {config.corpus.name for config in plan.trials.values()} == {"pydocs"}
    assert "is used instead" in " ".join(plan.notes)


@pytest.mark.full
def test_a_dry_run_lists_the_trials_and_leaves_nothing_but_what_it_measured(runs_dir, capsys):
    text = ["--corpus.name", "pydocs", "--corpus.tokenizer", "bytes"]
    assert run("--runs-dir", str(runs_dir), "--dry-run", *text) == 0
    output = capsys.readouterr().out
    assert "sweep quick: 48 trials, 0 done, 48 missing" in output
    assert output.count("│ missing │") == 48
    assert f"8 seeds in every configuration, {len(CLAIMS)} claims:" in output
    assert [file.name for file in runs_dir.iterdir()] == ["measurements"]


def test_a_dry_run_that_measures_nothing_starts_no_ray_and_writes_nothing(
    runs_dir, monkeypatch, capsys
):
    monkeypatch.setattr(
        "sweeps.execution.ray_cluster.ray.init", lambda **_: pytest.fail("Ray was started")
    )
    wanted = ["--runs-dir", str(runs_dir), "--corpus.name", "pydocs", "--train.device", "cpu"]
    assert run(*wanted, "--dry-run", "--no-estimate") == 0
    output = capsys.readouterr().out
    assert "sweep quick: 48 trials, 0 done, 48 missing" in output
    assert output.count("│ missing │") == 48
    assert f"8 seeds in every configuration, {len(CLAIMS)} claims:" in output
    single = "not measured (--no-estimate): one trial per core, time and memory are not known\n"
    assert single in output
    assert run(*wanted, "--dry-run", "--no-estimate", "--array", "5") == 0
    assert single.replace("one trial", "one array of up to 5 trials") in capsys.readouterr().out
    assert not runs_dir.exists()


def test_a_dry_run_that_measures_nothing_refuses_a_gpu_that_is_not_there(
    runs_dir, monkeypatch, capsys
):
    monkeypatch.setattr("sweeps.execution.ray_cluster.schedulable_machines", lambda: [{"CPU": 2.0}])
    wanted = ["--runs-dir", str(runs_dir), "--corpus.name", "pydocs", "--train.device", "cuda"]
    assert run(*wanted, "--dry-run", "--no-estimate") == 2
    assert "train.device is cuda, but Ray has no GPU" in capsys.readouterr().err


def command(*arguments, **options):
    """Run the command in a process of its own."""
    script = [sys.executable, str(ROOT / "sweeps" / "init_sweep.py"), *arguments]
    return subprocess.run(script, text=True, **options)


def test_an_output_that_takes_nothing_is_named_and_not_the_disk(runs_dir):
    wanted = ["--runs-dir", str(runs_dir), "--corpus.name", "pydocs", "--dry-run", "--no-estimate"]
    with Path("/dev/full").open("w") as full:
        done = command(*wanted, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == ("error: standard output cannot be written: No space left on device\n")


def test_a_console_of_few_characters_gets_question_marks(tiny, runs_dir):
    done = command(
        "--runs-dir", str(runs_dir), *flags(tiny), "--name", "x", "--init.scheme", "gpt2",
        "--corpus.name", "/no/such/ü", capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: corpus.name '/no/such/")
    assert done.stderr.count("\n") == 1


def test_debug_says_in_one_sentence_that_memory_does_not_suffice(runs_dir, capsys):
    wide = ["--model.d_model", "1000000", "--model.n_head", "1", "--corpus.name", "pydocs"]
    assert run("--runs-dir", str(runs_dir), "--debug", *wide) == 1
    error = capsys.readouterr().err
    assert re.match(r"error: trial [0-9a-f]{12} failed: out of memory: an allocation of ", error)
    assert error.count("\n") == 1


def test_a_user_without_a_home_is_given_one_that_nobody_else_can_enter(tmp_path):
    """Containers run commands under user ids that no file knows."""
    code = (
        "from pathlib import Path\n"
        "def unknown(): raise RuntimeError('no home')\n"
        "if 'HOME' not in __import__('os').environ: Path.home = staticmethod(unknown)\n"
        "import os, sweeps\n"
        "print(os.environ['HOME'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**environment, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    home = Path(done.stdout.strip())
    assert home.parent == tmp_path
    assert home.stat().st_mode & 0o777 == 0o700


def test_a_dry_run_knows_what_is_done(finished_sweep, capsys):
    words = TrialConfig.from_flat(WORDS)
    arguments = [
        *flags(words),
        "--no-estimate",
        "--init.scheme",
        "model5",
        "gpt2",
        "--init.seed",
        "0",
        "1",
        "9",
    ]
    assert run("--runs-dir", str(finished_sweep), "--name", "small", "--dry-run", *arguments) == 0
    assert "sweep small: 6 trials, 4 done, 2 missing" in capsys.readouterr().out


def test_a_name_alone_means_the_trials_that_the_sweep_has(finished_sweep, capsys):
    """Otherwise `--name small --redo failed` would replace its plan by that of the preset."""
    given = ["--runs-dir", str(finished_sweep), "--dry-run", "--no-estimate"]
    assert run(*given, "--name", "small") == 0
    said = capsys.readouterr().out
    assert "sweep small: the trials of its last command, python sweeps/init_sweep.py" in said
    assert "sweep small: 6 trials, 5 done, 1 missing" in said
    for trials, more in ((48, ["--preset", "quick"]), (12, ["--init.seed", "0", "1"])):
        assert run(*given, "--name", "small", "--corpus.name", "pydocs", *more) == 0
        assert f"sweep small: {trials} trials" in capsys.readouterr().out
    assert run(*given, "--name", "new", "--corpus.name", "pydocs") == 0
    assert "sweep new: 48 trials" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("", "it takes a folder, not an empty name"),
        ("s3://lab/runs", "GPT_SWEEPS_BUCKET takes a bucket"),
        ("http://server:5000", "MLFLOW_TRACKING_URI a tracking server"),
        ("{file}", "is a file, not a folder"),
        ("{file}/runs", "is a file, not a folder"),
        ("/tmp/" + "x" * 300, "File name too long"),
        ("/tmp/" + "x/" * 300, "its path has 604 bytes, of at most 400"),
        ("/tmp/is it so?", "a folder with % or ? in its name"),
        ("/tmp/a%20b", "a folder with % or ? in its name"),
        ("~nobody-of-this-name/runs", "home directory"),
        ("{loop}/runs", "loop"),
    ],
)
def test_a_folder_that_can_never_be_used_is_refused_at_once(folder, says, tmp_path, tiny, capsys):
    file, loop = tmp_path / "file", tmp_path / "loop"
    file.touch()
    loop.symlink_to(loop)
    given = folder.format(file=file, loop=loop)
    assert run("--runs-dir", given, *flags(tiny)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument --runs-dir: ")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_a_tilde_is_the_users_home(way, tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    given = ["--runs-dir=~/runs"]
    if way == "environment":
        monkeypatch.setenv("GPT_SWEEPS_RUNS_DIR", "~/runs")
        given = []
    assert run(*given, *flags(tiny), "--debug") == 0
    assert (tmp_path / "home" / "runs" / "debug").is_dir()
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


def test_debug_leaves_the_rows_of_the_trial_and_prints_the_init(tiny, runs_dir, capsys):
    assert run("--runs-dir", str(runs_dir), "--debug", *flags(tiny)) == 0
    output = capsys.readouterr().out
    assert "wte" in output
    assert "0.02000" in output
    assert [f"step {step:4d}  loss" in output for step in range(7)] == [True] * 6 + [False]
    for table, expected in undisturbed_tables(tiny).items():
        debugged = pl.read_parquet(runs_dir / "debug" / key_of(tiny) / f"{table}.parquet")
        assert debugged.equals(expected), table


def test_a_text_of_ones_own_is_known_by_its_full_path(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("a tale " * 100)
    monkeypatch.chdir(tmp_path)
    plan = make_plan("n", "p", [{"corpus.name": ["book.txt"], "model.context": [8]}])
    (config,) = plan.trials.values()
    assert config.corpus.name == str(tmp_path / "book.txt")


def test_help_names_every_knob_and_preset(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert all(f"--{key}" in output for key in KNOBS)
    joined = "".join(output.split())  # a line may end at the hyphen of a name
    assert all(f"{preset}:" in joined for preset in PRESETS)


def test_mlflow_is_opened_by_what_is_printed():
    folder, command = Path("/a b"), "python -m tracking.pages --runs-dir '/a b' --name 'c d'"
    file = StoreAddress("sqlite:////a b/mlflow.db")
    assert file.mlflow_command(folder, "c d") == command
    other = StoreAddress("sqlite:////e.db")
    assert other.mlflow_command(folder, "c d") == f"MLFLOW_TRACKING_URI=sqlite:////e.db {command}"
    server = StoreAddress("http://server:5000/")
    assert server.mlflow_command(folder, "c d") == "http://server:5000/"
    assert server.chart_page("7").startswith("http://server:5000/#/experiments/7/")


def test_every_corpus_can_be_named_on_the_command_line(book, runs_dir, capsys):
    for name in CORPORA:
        wanted = ["--debug", "--train.steps", "1", "--corpus.name", name, "--corpus.subset", "all"]
        assert run("--runs-dir", str(runs_dir), *wanted) == 0


def test_a_plan_says_what_its_seeds_can_decide():
    def said(seeds):
        space = {**{key: [value] for key, value in TINY.items()}, "init.seed": [*range(seeds)]}
        plan = make_plan("n", "p", [{**space, "init.scheme": ["model5", "gpt2"]}])
        return "\n".join(say_power(complete_seeds(plan.trials.values()), CLAIMS))

    few = said(2)
    assert f"2 seeds in every configuration, {len(CLAIMS)} claims:" in few
    assert "cannot support depth_gradient: 6 seeds can, if every seed agrees" in few
    many = said(6)
    assert "cannot" not in many
    assert "can support, if every seed agrees: depth_gradient" in many


def test_help_and_debug_wait_for_no_import_that_they_do_not_need():
    loaded = "import sys, sweeps.launch; print({'ray', 'mlflow', 'polars'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "set()\n"


def test_an_unknown_claim_is_refused(runs_dir, capsys):
    assert run("--runs-dir", str(runs_dir), "--claims", "orders") == 2
    assert "there is no claim orders: did you mean order?" in capsys.readouterr().err
    assert not runs_dir.exists()


def test_the_data_seed_follows_the_seed_unless_it_is_given():
    assert [one.corpus.data_seed for one in trials_of({"init.seed": [0, 3]})] == [0, 3]
    given = trials_of({"init.seed": [0, 3], "corpus.data_seed": [5]})
    assert [one.corpus.data_seed for one in given] == [5, 5]
