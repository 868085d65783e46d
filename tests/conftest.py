"""What tests share: a private cache and home, a tiny trial, a text that stands in for the book."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptcore.config import TrialConfig, spelling

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


@pytest.fixture(scope="session")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a sweep `small`: 4 trials finished, one diverged, one missing."""
    from analysis.claims import digest
    from analysis.runs import connect, tracking_uri
    from gptcore.experiment import check_trial, run_trial
    from sweeps.tracking import MlflowRecorder, SweepRun, open_experiment

    runs_dir = tmp_path_factory.mktemp("runs")
    uri = tracking_uri(runs_dir)
    client = connect(uri)
    experiment_id = open_experiment(client, "small", runs_dir)
    knobs = [
        {"init.scheme": scheme, "init.seed": seed}
        for scheme in ("model5", "gpt2")
        for seed in (0, 1)
    ]
    knobs += [{"init.seed": 2, "optim.lr": 1e30}, {"init.seed": 3}]
    trials = {}
    for one in knobs:
        config = TrialConfig.from_flat({**TINY, **one})
        trials[config.key(check_trial(config).digest)] = config
    for key, config in list(trials.items())[:-1]:
        recorder = MlflowRecorder(uri, experiment_id, key, config.to_flat(), {"sweep": "small"})
        run_trial(config, recorder)
    plan = {
        "sweep": "small",
        "tags": {},
        "claims_digest": digest(),
        "notes": ["made by a test <b>&</b>"],
        "command": "python sweeps/init_sweep.py",
        "trials": {key: {"params": config.to_flat()} for key, config in trials.items()},
    }
    SweepRun(client, experiment_id, plan, launched=1).end("FINISHED")
    return runs_dir
