"""How much a look at the models costs a GPU, counted without one, and what a look leaves alone."""

from collections import Counter

import pytest
import torch

from gptcore import array, train
from gptcore.config import TrialConfig
from gptcore.experiment import Trial, _prepare, one_thread
from gptcore.looks import OnTheWay
from gptcore.model import CHUNK_AND_TILE
from gptcore.probes import PROBES
from gptcore.records import MemoryRecorder
from helpers.tape import Count

EVERY = ["weights", "activations", "batch_groups"]
"""The probes of a look that is due every few steps."""


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setitem(array.RUNS_TOGETHER, "cpu", True)
    monkeypatch.setitem(CHUNK_AND_TILE, "cpu", CHUNK_AND_TILE["cuda"])


@pytest.fixture
def waits(monkeypatch):
    """How often the host asks for values of a tensor, by the method."""
    found: Counter[str] = Counter()
    for name in ("tolist", "item", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)

        def counted(self, *arguments, _method=method, _name=name):
            found[_name] += 1
            return _method(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return found


def training_of(n_layer, count):
    """An array at its first step, after the gradients."""
    config = TrialConfig.from_flat(
        {
            "model.n_layer": n_layer,
            "model.n_head": 4,
            "model.d_model": 64,
            "model.context": 64,
            "corpus.name": "pydocs",
            "corpus.tokenizer": "bytes",
            "train.device": "cpu",
        }
    )
    members = [_prepare(Trial(config, MemoryRecorder()), {}) for _ in range(count)]
    training = train.Training(members, 0.0, 4)
    training.steps.load([[member.batch(0) for member in members]] * 4, [1e-3] * 4)
    training.steps.gradients()
    return training


def operations(function):
    with Count() as count:
        function()
    assert count.waits == 0, count.operations
    return sum(count.operations.values())


# One model after the other and part by part, 6 layers took 1,673 operations for the weights and
# their update, 2,223 for all that is due every few steps, and 2,533 for a full look, with 94 waits.
@pytest.mark.parametrize(
    ("n_layer", "count", "weights", "every", "full"),
    [(6, 1, 120, 280, 600), (12, 1, 120, 340, 720), (6, 4, 120, 360, 860)],
)
def test_a_look_is_few_operations_and_waits_for_nothing(
    waits, n_layer, count, weights, every, full
):
    with one_thread():
        training = training_of(n_layer, count)
        looks, members = training.looks, range(count)
        waits.clear()
        update = operations(lambda: looks.after_update(members))
        assert operations(lambda: looks.before_update(["weights"], members)) + update <= weights
        assert operations(lambda: looks.before_update(EVERY, members)) + update <= every
        assert operations(lambda: looks.before_update(list(PROBES), members)) <= full
    assert not waits


def test_a_look_comes_to_the_host_in_one_copy(monkeypatch, waits):
    copies = []

    class Counted(OnTheWay):
        def __init__(self, tensors):
            copies.append(len(tensors))
            super().__init__(tensors)

    monkeypatch.setattr(train, "OnTheWay", Counted)
    with one_thread():
        training = training_of(2, 2)
        training.runs_ahead = True  # as where steps are recorded
        training.run_segment(0)
        waits.clear()
        rows = training.members[0].recorder.rows
        assert not rows["training"]
        training.read()
    assert len(copies) == 1
    assert all(rows[table] for table in ("training", "weights", "updates", "tokens"))
    # After the copy, the host makes lists of what each probe measured of each model.
    assert set(waits) == {"tolist"}
