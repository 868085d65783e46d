"""What the pages of the documentation say about files and commands, checked against the code."""

import contextlib
import io
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from analysis import report
from gptcore.records import TABLES
from helpers.paths import ROOT
from sweeps import search
from sweeps.launch import main
from sweeps.presets import PRESETS
from tracking import pages

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.png"))
MOST_LINES, MOST_WORDS, MOST_BYTES = 130, 60, 300_000

NOT_RUN = {
    "README.md": ["needs an AWS account"],
    "CONTRIBUTING.md": ["needs a browser and a finished sweep"],
    "docs/sweeps.md": ["needs another machine"],
    "docs/cluster.md": [
        "needs an AWS account", "needs a cluster", "needs an AWS account", "needs several machines",
        "needs Slurm", "needs runs of a job", "needs a cluster",
    ],
}  # fmt: skip
"""Why a block of commands is only parsed and not run, for each page in order."""


@dataclass(frozen=True)
class Block:
    language: str
    reason: str  # why it is not run: from the HTML comment above it
    text: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page."""
    found = re.findall(
        r"(?:^<!-- [\w ]+: ([\w ]+) -->\n)?^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S
    )
    return [Block(language, reason, text) for reason, language, text in found]


def prose(page: Path) -> str:
    """Return a page without its code blocks and formulas."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"\$\$.*?\$\$", "", text, flags=re.S)


def paragraphs(page: Path) -> list[str]:
    """Return the paragraphs and list items of a page, without headings, tables and comments."""
    parts = re.split(r"\n\s*\n|\n(?=- |\d+\. )", prose(page))
    return [part.strip() for part in parts if not re.match(r"\s*(\||#|<!--|!\[)", part)]


def commands(page: Path) -> list[str]:
    """Return every command of a page, without comments."""
    lines = [
        line for block in blocks(page) if not block.language for line in block.text.split("\n")
    ]
    joined = [part for line in lines for part in line.partition("  #")[0].split(" && ")]
    return [part.strip() for part in joined if part.strip()]


EVERY_COMMAND = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


@pytest.fixture
def folder(tmp_path, book, monkeypatch):
    """An empty folder to run commands in, on a machine that has the book."""
    # Half of it has to be long enough for the largest context of a preset.
    book.write_bytes(
        book.read_bytes().replace(b"sailed on.", b"sailed " + b"on and " * 10 + b"on.")
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(arguments: list[str]) -> None:
    """Run a command of init_sweep.py as a dry run without measuring; --help ends by itself."""
    dry = [word for word in arguments if word not in ("--debug", "--dry-run", "--watch")]
    if "--redo" in arguments:  # takes trials that have been run
        dry = dry[: dry.index("--redo")]
    with contextlib.suppress(SystemExit):
        assert main("doc", PRESETS, [*dry, "--dry-run", "--no-estimate"]) == 0


def reports(arguments: list[str]) -> None:
    """Run report.py in a folder without runs: every argument is right, and no sweep is there."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert report.main(arguments) == 2
    assert "there is no sweep yet" in said.getvalue()


def opens_pages(arguments: list[str]) -> None:
    """Run the command in a folder without runs: every argument is right, and no sweep is there."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert pages.main(arguments) == 2
    assert "there is no sweep yet" in said.getvalue()


def click_parses(group, arguments: list[str]) -> None:
    """Check a command of a click program without running it."""
    name, *rest = arguments
    command = group.get_command(None, name)
    assert command, name
    if hasattr(command, "commands"):
        click_parses(command, rest)
    else:
        command.make_context(name, rest)


def ray_parses(arguments: list[str]) -> None:
    # Not at the top: it takes seconds, and every process of the tests reads this file.
    from ray.scripts.scripts import cli

    click_parses(cli, arguments)


def mlflow_parses(arguments: list[str]) -> None:
    from mlflow.cli import cli

    click_parses(cli, arguments)


def removal_parses(arguments: list[str]) -> None:
    # Not at the top: it brings Ray and boto3.
    from sweeps.clusters import aws_remove

    assert aws_remove.arguments(arguments).file.exists()


def installs(arguments: list[str]) -> None:
    """Check that pip is asked for extras that the project has."""
    assert arguments[:2] == ["install", "-e"]
    extras = re.findall(r"\[(\w+)\]", arguments[2])
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)


def pytest_parses(arguments: list[str]) -> None:
    assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
    options = {"--all", "-n", "0"}
    assert all(word in options or word.startswith("tests/") for word in arguments)


def submits(arguments: list[str]) -> None:
    """Check a batch script that is given to Slurm, and the flags after it."""
    script = "sweeps/clusters/slurm.sh"
    assert (ROOT / script).exists()
    sweep(arguments[arguments.index(script) + 1 :])


def serves(arguments: list[str]) -> None:
    """Check a tracking server that lacks only the file with its password."""
    from tracking import server

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert server.main(arguments) == 2
    assert "the password file FILE cannot be read" in said.getvalue()


def nothing(arguments: list[str]) -> None:
    """Accept a command whose arguments are not this project's to check."""


CHECKS = {
    "python sweeps/init_sweep.py": sweep,
    "python ~/gpt-sweeps/sweeps/init_sweep.py": sweep,
    "python sweeps/search.py": search.command_line,
    "python analysis/report.py": reports,
    "python -m tracking.pages": opens_pages,
    "python docs/make_pictures.py": nothing,
    "python -m sweeps.clusters.aws_remove": removal_parses,
    "python -m venv .venv": nothing,
    ". .venv/bin/activate": nothing,
    "pip": installs,
    "pytest": pytest_parses,
    ".ci/run": nothing,
    "mlflow": mlflow_parses,
    "ray": ray_parses,
    "RAY_AUTH_MODE=token ray": ray_parses,
    "ssh": nothing,
    "$EDITOR cluster.yaml": nothing,
    "sbatch": submits,
    "python -m tracking.server": serves,
}
"""How a command that begins in this way is checked."""


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_every_command_is_accepted(command, folder, capsys):
    begin = next((begin for begin in CHECKS if f"{command} ".startswith(f"{begin} ")), None)
    assert begin, f"no check is known for {command!r}"
    for word in re.findall(r"[\w./~-]+\.(?:py|yaml)\b", begin):
        assert (ROOT / word.removeprefix("~/gpt-sweeps/")).exists()
    (folder / "cluster.yaml").touch()
    (folder / "sweeps" / "clusters").mkdir(parents=True)
    (folder / "sweeps" / "clusters" / "onprem.yaml").touch()
    CHECKS[begin](shlex.split(command.removeprefix(begin)))


def test_only_known_blocks_are_not_run():
    found = {name_of(page): [one.reason for one in blocks(page) if one.reason] for page in PAGES}
    assert {name: reasons for name, reasons in found.items() if reasons} == NOT_RUN


def test_the_readme_has_the_commands_that_continuous_integration_runs():
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(line for line in lines if line.endswith("&& pytest"))
    start = "python -m venv .venv && . .venv/bin/activate && pip install -e"
    assert first == f"{start} '.[dev]' && pytest"
    assert f"{start} . && python sweeps/init_sweep.py" in lines


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_paragraph_is_long(page):
    long = [part for part in paragraphs(page) if len(part.split()) > MOST_WORDS]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)$", there.read_text(), re.M) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]
        assert not anchor or anchor in anchors, target


def named_files(page: Path) -> set[str]:
    """Return the paths in the checkout that a page names, in its sentences or in a text block."""
    words = re.findall(r"`([^`\s]+)`", prose(page))
    words += [word for one in blocks(page) if one.language == "text" for word in one.text.split()]
    tops = {path.name for path in ROOT.iterdir()}
    return {
        word
        for word in words
        if "/" in word and word.partition("/")[0] in tops and "<" not in word
        and not word.startswith("runs/")
    } | {word for word in words if re.fullmatch(r"\w+\.(yaml|toml)", word)}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page):
    assert [name for name in sorted(named_files(page)) if not (ROOT / name).exists()] == []


def test_the_file_tree_of_the_readme_exists():
    (tree,) = (one.text for one in blocks(ROOT / "README.md") if one.language == "text")
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        path = ROOT / folder / name if line.startswith(" ") else ROOT / name
        assert path.exists(), line
        assert path.is_dir() == name.endswith("/"), line


def test_every_folder_is_in_the_file_tree_of_the_readme():
    (tree,) = (one.text for one in blocks(ROOT / "README.md") if one.language == "text")
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True
    ).stdout.split()
    if not tracked:
        pytest.skip("this is not a checkout of git")
    folders = {file.partition("/")[0] for file in tracked if file.endswith(".py") and "/" in file}
    assert {name for name in folders if f"\n{name}/" not in f"\n{tree}"} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_function_that_is_named_is_in_its_file(page):
    for name, file in re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", prose(page)):
        text = (ROOT / file).read_text()
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b.*=", text, re.M), f"{name} in {file}"


def test_every_preset_is_explained():
    listed = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "sweeps.md").read_text(), re.M)
    assert listed[: len(PRESETS)] == list(PRESETS), "each preset has a line in docs/sweeps.md"


def test_every_table_of_a_trial_is_explained():
    text = (ROOT / "docs" / "sweeps.md").read_text()
    unexplained = [table for table in TABLES if f"`{table}`" not in text]
    assert not unexplained, "each table has a line in docs/sweeps.md"


def test_the_pictures_are_there_and_small():
    assert [file.name for file in PICTURES] == ["depth.png", "mlflow.png", "report.png"]
    assert all(file.stat().st_size <= MOST_BYTES for file in PICTURES)
