"""Three tiny trials whose numbers are checked in: only an intended change may move them.

    python tests/test_golden.py    # writes golden.json anew; raise EXPERIMENT_VERSION with it

Another CPU or build of PyTorch rounds differently. The tolerances allow that, and are far below the
effect of a change in the arithmetic.
"""

import json
import tempfile
from pathlib import Path

import pytest

from gptcore.config import TrialConfig
from gptcore.experiment import run_trial
from gptcore.records import MemoryRecorder, is_primary

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = {"loss": 1e-4, "held_out_loss": 1e-4, "never_used": 1e-4, "qkv_std": 1e-6}
"""Absolute."""

TRIALS = {
    "model5": {"init.scheme": "model5"},
    "gpt2, untied, post-norm, sgd": {
        "init.scheme": "gpt2",
        "model.tied": False,
        "model.norm": "post",
        "optim.name": "sgd",
        "optim.lr": 0.1,
    },
    "deepnet, coupled adam, cosine": {
        "init.scheme": "deepnet",
        "model.norm": "deepnet",
        "optim.name": "coupled_adam",
        "optim.schedule": "cosine",
        "optim.warmup": 3,
        "optim.clip": 1.0,
    },
}
SMALL = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.d_model": 16,
    "model.context": 16,
    "train.steps": 10,
    "train.batch_size": 4,
    "train.device": "cpu",
}


def trajectory(knobs, folder):
    text = folder / "text.txt"
    text.write_text("".join(f"{n} men saw {n * n % 97} ships. " for n in range(1000)))
    recorder = MemoryRecorder()
    run_trial(TrialConfig.from_flat({**SMALL, **knobs, "corpus.name": str(text)}), recorder)
    rows = recorder.rows
    return {
        "loss": [row.loss for row in rows["training"]],
        "held_out_loss": [row.loss for row in rows["text_losses"] if row.text == "held_out"],
        "qkv_std": [row.std for row in rows["weights"] if row.kind == "qkv"],
        "never_used": [
            row.mean_logprob
            for row in rows["token_groups"]
            if is_primary(row) and row.group == "never_used"
        ],
    }


@pytest.mark.parametrize("name", TRIALS)
def test_the_trajectory_is_the_one_that_was_checked_in(name, tmp_path):
    golden = json.loads(GOLDEN.read_text())[name]
    found = trajectory(TRIALS[name], tmp_path)
    assert list(found) == list(golden)
    for series, values in found.items():
        assert values == pytest.approx(golden[series], abs=TOLERANCE[series], rel=0), series


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        golden = {name: trajectory(knobs, Path(folder)) for name, knobs in TRIALS.items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    write()
