"""What tests share: a private cache and home, a tiny trial, a text that stands in for the book."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests

from gptcore.config import Scalar, TrialConfig, spelling
from gptcore.records import MemoryRecorder, Row, TrainingRow

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

ROOT = Path(__file__).resolve().parents[1]
REAL_CORPORA = ROOT.parent / "shared" / "corpora"

TINY = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.d_model": 16,
    "model.context": 16,
    "corpus.name": "pydocs",
    "train.steps": 5,
    "train.batch_size": 4,
    "train.device": "cpu",
    "probes.every": 2,
    "probes.histogram_every": 4,
}


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tests out of the user's cache, home, corpora and tracking server."""
    os.environ["GPTCORE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ.pop("GPTCORE_CORPORA", None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["RAY_ADDRESS"] = "local"  # never a cluster that happens to run here


@pytest.fixture
def tiny() -> TrialConfig:
    """A trial of a fraction of a second, on the corpus that is always there."""
    return TrialConfig.from_flat(TINY)


class Cut(Exception):
    """Stands for whatever ends a process in the middle of a trial."""


class CutAt(MemoryRecorder):
    """Raises Cut once it has been told of a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def log(self, rows: Sequence[Row]) -> None:
        super().log(rows)
        if any(isinstance(row, TrainingRow) and row.step == self.step for row in rows):
            raise Cut


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text with Gulliver's headings and Gutenberg's wrapping, found as the corpus gulliver."""
    parts = [
        f"PART {roman}. A VOYAGE.\n\n" + f"In part {roman} the captain sailed on. " * 80 + "\n\n"
        for roman in ("I", "II", "III", "IV")
    ]
    contents = "".join(f" PART {roman}. A VOYAGE.\n" for roman in ("I", "II", "III", "IV"))
    text = (
        "The Project Gutenberg eBook\n*** START OF THE PROJECT GUTENBERG EBOOK 829 ***\n\n"
        f"GULLIVER’S TRAVELS\n\n{contents}\n{''.join(parts)}"
        "\n*** END OF THE PROJECT GUTENBERG EBOOK 829 ***\nLicence\n"
    )
    folder = tmp_path / "corpora"
    folder.mkdir()
    (folder / "gulliver.txt").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    monkeypatch.setenv("GPTCORE_CORPORA", str(folder))
    return folder / "gulliver.txt"


@pytest.fixture
def real_gulliver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real book, where this machine has it."""
    if not (REAL_CORPORA / "gulliver.txt").exists():
        pytest.skip(f"Gulliver's Travels is not at {REAL_CORPORA}")
    monkeypatch.setenv("GPTCORE_CORPORA", str(REAL_CORPORA))


def flags(config: TrialConfig) -> list[str]:
    """The command line that asks for this one trial."""
    flat = config.to_flat()
    return [word for key, value in flat.items() for word in (f"--{key}", spelling(value))]


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
    return found


def start(
    script: str, runs_dir: Path, *arguments: str, **environment: str
) -> subprocess.Popen[str]:
    """A command of sweeps/, under way in another folder than the checkout, as a user may stand in.

    It is a group of processes of its own.
    """
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sweeps" / script), "--runs-dir", runs_dir.name, *arguments],
        cwd=runs_dir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def outcome(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str]:
    """The exit code of a command, which ends within so many seconds, and what it has printed."""
    output, _ = process.communicate(timeout=seconds)
    assert "Traceback" not in output, output
    return process.returncode, output


def runs_of(uri: str) -> dict[str, Any]:
    """The trials' runs in a store, each whole, by trial key: there is one of each."""
    from analysis.runs import connect, experiment_ids, search_runs

    client = connect(uri)
    found = search_runs(client, experiment_ids(client), "trial")
    runs = {run.data.tags["trial_key"]: client.get_run(run.info.run_id) for run in found}
    assert len(runs) == len(found)
    return runs


def workers() -> list[int]:
    """Process ids of our own Ray workers in the middle of a trial."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title, environment = (
                (process / name).read_bytes().decode(errors="replace")
                for name in ("cmdline", "environ")
            )
        except OSError:
            continue
        if title.startswith("ray::ImplicitFunc") and f"HOME={os.environ['HOME']}\0" in environment:
            found.append(int(process.name))
    return found


def make_sweep(
    uri: str, runs_dir: Path, name: str, knobs: Sequence[Mapping[str, Scalar]], missing: int = 0
) -> None:
    """Run tiny trials in this process and record them as a sweep, whose last ones are only planned.

    A trial that another sweep has already run is planned here, and not run again.
    """
    from analysis.claims import digest
    from analysis.runs import connect, trial_runs
    from gptcore.experiment import check_trial, run_trial
    from sweeps.mlflow_view import VIEW_TAG, view_of_sweep
    from sweeps.tracking import MlflowRecorder, SweepRun, open_experiment

    client = connect(uri)
    view = {VIEW_TAG: view_of_sweep(["init.scheme"], TINY["model.n_layer"])}
    experiment_id = open_experiment(client, name, runs_dir, view)
    trials = {}
    for one in knobs:
        config = TrialConfig.from_flat({**TINY, **one})
        trials[config.key(check_trial(config).digest)] = config
    done = trial_runs(client)
    for key, config in list(trials.items())[: len(trials) - missing]:
        if key not in done:
            flat = config.to_flat()
            label = f"{flat['init.scheme']}, {flat['corpus.subset']}, seed {flat['init.seed']}"
            tags = {"sweep": name}
            run_trial(config, MlflowRecorder(uri, experiment_id, key, label, flat, tags))
    plan = {
        "sweep": name,
        "tags": {},
        "claims_digest": digest(),
        "notes": ["made by a test <b>&</b>"],
        "command": f"python sweeps/init_sweep.py --name {name}",
        "trials": {key: {"params": config.to_flat()} for key, config in trials.items()},
    }
    SweepRun(client, experiment_id, plan, launched=time.time()).end("FINISHED")


@pytest.fixture(scope="session")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a sweep `small`: 4 trials finished, one diverged, one missing."""
    from analysis.runs import tracking_uri

    runs_dir = tmp_path_factory.mktemp("runs")
    knobs: list[dict[str, Scalar]] = [
        {"init.scheme": scheme, "init.seed": seed}
        for scheme in ("model5", "gpt2")
        for seed in (0, 1)
    ]
    knobs += [{"init.seed": 2, "optim.lr": 1e30}, {"init.seed": 3}]
    make_sweep(tracking_uri(runs_dir), runs_dir, "small", knobs, missing=1)
    return runs_dir


@pytest.fixture(scope="session")
def two_sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with sweeps `one` and `two`: 2 schemes x 2 subsets, a subset each, and in `two`
    a trial that `one` has run."""
    from analysis.runs import tracking_uri

    runs_dir = tmp_path_factory.mktemp("runs")
    uri = tracking_uri(runs_dir)
    schemes: list[dict[str, Scalar]] = [{"init.scheme": name} for name in ("model5", "gpt2")]
    make_sweep(uri, runs_dir, "one", schemes)
    halves = [{**scheme, "corpus.subset": "0-0.25"} for scheme in schemes]
    make_sweep(uri, runs_dir, "two", [*halves, schemes[0]])
    return runs_dir


def moved(runs_dir: Path, to: Path) -> Path:
    """A copy of a runs folder whose artifacts are those of the copy: it can be changed."""
    shutil.copytree(runs_dir, to)
    with sqlite3.connect(to / "mlflow.db") as store:
        store.execute(
            "update runs set artifact_uri = replace(artifact_uri, ?, ?)", (str(runs_dir), str(to))
        )
    return to


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def start_server(uri: str, folder: Path) -> subprocess.Popen[bytes]:
    """A real MLflow server that answers at `uri` and keeps everything in a folder.

    It is a group of processes, to be ended by os.killpg.
    """
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
        "--port", uri.rpartition(":")[2], "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while True:
        try:
            requests.get(f"{uri}/health", timeout=5).raise_for_status()
            return server
        except requests.RequestException:
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.5)


@pytest.fixture(scope="session")
def server_sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server with a sweep `served` of 2 schemes x 2 seeds."""
    folder = tmp_path_factory.mktemp("server")
    uri = f"http://127.0.0.1:{free_port()}"
    server = start_server(uri, folder)
    try:
        knobs: list[dict[str, Scalar]] = [
            {"init.scheme": scheme, "init.seed": seed}
            for scheme in ("model5", "gpt2")
            for seed in (0, 1)
        ]
        make_sweep(uri, folder, "served", knobs)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
SCREENSHOTS = ROOT / ".screenshots"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that keeps what its console says (`said`) and asks of other machines (`asked`)."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: page.said.append(f"error: {error}"))
    local = ("file:", "data:", "blob:", "http://127.0.0.1:")
    page.on(
        "request",
        lambda request: None if request.url.startswith(local) else page.asked.append(request.url),
    )
    yield page
    context.close()
