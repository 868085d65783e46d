"""Fixtures that tests share: private folders, a tiny trial, sweeps made once, a browser.

What tests share that is no fixture is in tests/helpers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gptcore.config import Scalar, TrialConfig
from helpers.paths import CHROMIUM, REAL_CORPORA, ROOT
from helpers.servers import free_port, start_server
from helpers.store import made_once, make_sweep, store_in
from helpers.trials import TINY

# xdist's first process reads this file before it starts the others: no torch, no MLflow here.
if TYPE_CHECKING:
    from tracking.store import Store

# Tests run on every core already: a second thread in each process would only stand in the way.
# This is for the processes that tests start, xdist's among them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="run everything, also what is marked `full`"
    )


LONGEST = (
    "test_faults", "test_sweep", "test_soak", "test_onprem", "test_slurm", "test_trainable",
    "test_runs", "test_array", "test_search", "test_report", "test_store", "test_write_points",
    "test_server",
)  # fmt: skip
"""The files that take longest, which begin first: else one process ends long after the others."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `full`, unless they are asked for by --all, -m or their name."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        )
    )
    named = any("::" in argument for argument in config.args)
    if config.getoption("--all") or config.getoption("-m") or named:
        return
    full = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=full)
    items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tests out of the user's cache, home, corpora and tracking server."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the folder of the session, which its processes share
    for variable, name in (("GPTCORE_CACHE", "cache"), ("GPT_SWEEPS_TEST_SHARED", "shared")):
        folder = base / name
        folder.mkdir(mode=0o700, exist_ok=True)
        os.environ[variable] = str(folder)
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ.pop("GPTCORE_CORPORA", None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["RAY_ADDRESS"] = "local"  # never a cluster that happens to run here


@pytest.fixture
def tiny() -> TrialConfig:
    """A trial of a fraction of a second, on the corpus that is always there."""
    return TrialConfig.from_flat(TINY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A new store in a runs folder of the test's own."""
    return store_in(tmp_path)


@pytest.fixture
def experiment_id(store: Store, tmp_path: Path) -> str:
    """The experiment of a sweep without trials in that store."""
    return store.open_experiment("sweep", tmp_path)


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


@pytest.fixture(scope="session")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a sweep `small`: 4 trials finished, one diverged, one missing."""
    from tracking.address import store_address

    def make(runs_dir: Path) -> None:
        knobs: list[dict[str, Scalar]] = [
            {"init.scheme": scheme, "init.seed": seed}
            for scheme in ("model5", "gpt2")
            for seed in (0, 1)
        ]
        knobs += [{"init.seed": 2, "optim.lr": 1e30}, {"init.seed": 3}]
        make_sweep(store_address(runs_dir).uri, runs_dir, "small", knobs, missing=1)

    return made_once("finished_sweep", make, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def two_sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with sweeps `one` and `two`: 2 schemes x 2 subsets, a subset each, and in `two`
    a trial that `one` has run."""
    from tracking.address import store_address

    def make(runs_dir: Path) -> None:
        uri = store_address(runs_dir).uri
        schemes: list[dict[str, Scalar]] = [{"init.scheme": name} for name in ("model5", "gpt2")]
        make_sweep(uri, runs_dir, "one", schemes)
        halves = [{**scheme, "corpus.subset": "0-0.25"} for scheme in schemes]
        make_sweep(uri, runs_dir, "two", [*halves, schemes[0]])

    return made_once("two_sweeps", make, tmp_path_factory.mktemp("two"))


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


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A laptop on which nobody has called Ray, in the checkout."""
    import boto3

    from helpers.amazon import spare_the_wait

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(ROOT)
    spare_the_wait(monkeypatch)
    return tmp_path


@pytest.fixture
def amazon(at_home: Path) -> Iterator[Any]:
    """Amazon in this process, with a bucket: a session of boto3."""
    import boto3
    from moto import mock_aws

    from helpers.amazon import REGION, fill

    with mock_aws():
        session = boto3.Session(region_name=REGION)
        fill(session)
        yield session


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
