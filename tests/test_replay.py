"""Functions that are recorded once and then repeated: the same training as step by step."""

import logging
import math

import numpy as np
import pytest
import torch

from gptcore import array, checkpoint, replay, train
from gptcore.experiment import Trial, run_trials
from gptcore.model import CHUNK_AND_TILE, GPT
from gptcore.optimizers import OPTIMIZERS
from gptcore.precision import DTYPES
from gptcore.records import MemoryRecorder
from gptcore.replay import replayed
from gptcore.steps import Steps
from helpers.tape import TapeGraphs
from helpers.trials import Cut, CutAt, three_of, with_knobs


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Models that run together in a GPU's tiles, and are read every tenth step."""
    monkeypatch.setitem(CHUNK_AND_TILE, "cpu", CHUNK_AND_TILE["cuda"])
    monkeypatch.setitem(array.RUNS_TOGETHER, "cpu", True)
    monkeypatch.setitem(train.DEVICE_SYNC_EVERY, "cpu", 10)


@pytest.fixture
def recording(monkeypatch, caplog):
    """Return what records functions from now on, as CUDA graphs do; a test fails if it cannot."""
    made: list[TapeGraphs] = []

    def make() -> TapeGraphs:
        made.append(TapeGraphs())
        return made[-1]

    yield lambda: monkeypatch.setitem(replay.GRAPHS, "cpu", make)
    assert [record.getMessage() for record in caplog.get_records("call")] == []
    # The step, the gradients and the update of each array, and its looks.
    assert max(graphs.recorded for graphs in made) >= 4


@pytest.fixture
def trio(tiny):
    """Three trials of 38 steps, each with its own start, data and text."""
    tiny = with_knobs(
        tiny, train__steps=38, probes__every=5, optim__clip=0.2, optim__schedule="cosine"
    )
    return three_of(tiny)


def run(configs, files=None):
    recorders = [MemoryRecorder() for _ in configs]
    files = files or [None] * len(configs)
    run_trials([Trial(*each) for each in zip(configs, recorders, files, strict=True)])
    return recorders


def assert_alike(found, expected):
    """Assert the same rows in the same order, with numbers equal up to rounding."""
    assert set(found.rows) == set(expected.rows)
    assert found.result.status == expected.result.status
    assert found.result.steps == expected.result.steps
    for table, rows in expected.rows.items():
        assert len(found.rows[table]) == len(rows), table
        for ours, theirs in zip(found.rows[table], rows, strict=True):
            # The gradient of K's bias is rounding error, which Adam makes as large as any other.
            noisy = getattr(ours, "kind", None) == "bias"
            for name in ("tensor", "layer") if noisy else type(ours).__slots__:
                mine, other = getattr(ours, name), getattr(theirs, name)
                if table == "histograms" and name == "counts":
                    mine, other = sum(mine), sum(other)  # rounding moves a few to the next bin
                if isinstance(other, list):
                    mine, other = (
                        [math.nan if value is None else value for value in values]
                        for values in (mine, other)
                    )
                if isinstance(other, float | list):
                    other = pytest.approx(other, rel=2e-3, abs=2e-5, nan_ok=True)
                assert mine == other, (table, ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_recorded_steps_are_the_steps_themselves(trio, recording, name):
    configs = [with_knobs(config, optim__name=name) for config in trio]
    expected = run(configs)
    recording()
    for ours, theirs in zip(run(configs), expected, strict=True):
        assert_alike(ours, theirs)
        looked_at = [*range(0, 38, 5), 38]
        assert sorted({row.step for row in ours.rows["weights"]}) == looked_at
        assert [row.step for row in ours.rows["training"]] == list(range(39))


@pytest.mark.parametrize("precision", [name for name in DTYPES if name != "tf32"])
def test_a_trial_alone_is_recorded_too(trio, recording, precision):
    config = with_knobs(trio[0], train__precision=precision)
    expected = run([config])
    recording()
    assert_alike(run([config])[0], expected[0])


def test_a_trial_that_diverges_leaves_without_disturbing_the_others(trio, recording):
    hot = with_knobs(trio[1], init__scheme="normal", init__std=1e30)
    expected = run([trio[0], hot, trio[2]])
    assert expected[1].result.status == "diverged"
    recording()
    for ours, theirs in zip(run([trio[0], hot, trio[2]]), expected, strict=True):
        assert_alike(ours, theirs)


def test_a_checkpoint_goes_on_into_recorded_steps(trio, recording, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "SHARE_OF_TIME", 1e9)  # saved whenever it can be
    expected = run(trio)
    configs = [with_knobs(config, train__checkpoint_seconds=0.0) for config in trio]
    files = [tmp_path / f"{k}.pt" for k in range(3)]
    recording()
    with pytest.raises(Cut):
        run_trials([Trial(c, CutAt(23), f) for c, f in zip(configs, files, strict=True)])
    assert {torch.load(file, weights_only=False)["step"] for file in files} == {21}
    for ours, theirs in zip(run(configs, files), expected, strict=True):
        assert_alike(ours, theirs)


def test_what_is_recorded_reads_and_writes_the_same_memory_each_time():
    x, total = torch.ones(3), torch.zeros(3)
    function = replayed(lambda: total.add_(x * 2).sum(), TapeGraphs(), warm_up_calls=1)
    for k in range(1, 5):
        x.fill_(float(k))
        assert float(function()) == 3 * k * (k + 1)
    assert total.tolist() == [20.0] * 3


def test_a_function_that_waits_for_the_device_is_run_as_it_is_with_one_line(caplog):
    x = torch.ones(3)
    graphs = TapeGraphs()
    function = replayed(lambda: x.sum().item(), graphs, warm_up_calls=0)
    with caplog.at_level(logging.WARNING):
        assert [function() for _ in range(3)] == [3.0] * 3
    (line,) = caplog.messages
    assert line.startswith("Training is slower than it could be")
    assert (graphs.tried, graphs.recorded) == (1, 0)


def test_without_a_way_to_record_functions_run_as_they_are():
    calls = []
    function = replayed(lambda: calls.append(1), None)
    for _ in range(5):
        function()
    assert len(calls) == 5


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture
def on_gpu(trio):
    return [with_knobs(config, train__steps=50, train__device="cuda") for config in trio]


def issued_one_by_one(configs, monkeypatch):
    """What the trials give without graphs."""
    with monkeypatch.context() as patch:
        patch.delitem(replay.GRAPHS, "cuda")
        return run(configs)


def assert_same_losses(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.result.status == theirs.result.status
        losses, expected_losses = (
            [row.loss for row in each.rows["training"]] for each in (ours, theirs)
        )
        assert losses == pytest.approx(expected_losses, abs=1e-5)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [1, 3])
def test_graphs_train_as_steps_issued_one_by_one_do(on_gpu, monkeypatch, caplog, name, count):
    configs = [with_knobs(config, optim__name=name) for config in on_gpu[:count]]
    expected = issued_one_by_one(configs, monkeypatch)
    assert_same_losses(run(configs), expected)
    assert not caplog.messages


@pytest.mark.gpu
@NO_GPU
def test_a_trial_that_diverges_leaves_its_graph(on_gpu, monkeypatch, caplog):
    configs = [on_gpu[0], with_knobs(on_gpu[1], init__scheme="normal", init__std=1e30), on_gpu[2]]
    expected = issued_one_by_one(configs, monkeypatch)
    assert expected[1].result.status == "diverged"
    assert_same_losses(run(configs), expected)
    assert not caplog.messages


@pytest.mark.gpu
@NO_GPU
def test_a_checkpoint_goes_on_into_a_graph(on_gpu, monkeypatch, caplog, tmp_path):
    expected = issued_one_by_one(on_gpu, monkeypatch)
    configs = [with_knobs(config, train__checkpoint_seconds=0.0) for config in on_gpu]
    files = [tmp_path / f"{k}.pt" for k in range(3)]
    with pytest.raises(Cut):
        run_trials([Trial(c, CutAt(23), f) for c, f in zip(configs, files, strict=True)])
    assert_same_losses(run(configs, files), expected)
    assert not caplog.messages


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_recorded_step_never_waits_for_the_gpu(tiny, count):
    device, graphs = torch.device("cuda"), replay.CudaGraphs()
    models = [GPT(tiny.model).to(device) for _ in range(count)]
    models = array.ModelArray(models, tiny.optim, capturable=True)
    steps = Steps(models, 1.0, (4, tiny.model.context + 1), 10, graphs)
    windows = [np.zeros((4, tiny.model.context + 1), dtype=np.int64)] * count
    steps.load([windows] * 10, [1e-3] * 10)
    for _ in range(5):
        steps.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            steps.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps.step.recorded is not None
    assert steps.stats_M3K.isfinite().all()
