"""Trials that train together as an array: each gives what it gives alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gptcore import array, checkpoint, train
from gptcore.array import ModelArray
from gptcore.config import InputError, ModelConfig, OptimConfig, TrialConfig
from gptcore.experiment import Trial, conflicting_knobs, run_trial, run_trials
from gptcore.model import CHUNK_AND_TILE, GPT
from gptcore.optimizers import OPTIMIZERS
from gptcore.precision import DTYPES
from gptcore.records import MemoryRecorder
from helpers.trials import WORDS, Cut, CutAt, three_of, undisturbed, with_knobs


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Run and measure models together on a CPU too, except where a test turns it off again."""
    monkeypatch.setitem(array.RUNS_TOGETHER, "cpu", True)


@pytest.fixture
def trio(tiny):
    """Three trials that differ in all they may, with a vocabulary of several tiles of a CPU."""
    tiny = with_knobs(tiny, model__vocab_size=2500)
    return three_of(tiny)


def together(configs, files=None):
    recorders = [MemoryRecorder() for _ in configs]
    run_trials(
        [
            Trial(config, recorder, file)
            for config, recorder, file in zip(
                configs, recorders, files or [None] * len(configs), strict=True
            )
        ]
    )
    return recorders


def assert_alike(found, expected):
    """Assert equal losses within 1e-5, stds within a relative 1e-4, and as many rows."""
    assert found.result.status == expected.result.status
    assert found.result.steps == expected.result.steps
    assert set(found.rows) == set(expected.rows)
    for table, rows in expected.rows.items():
        assert len(found.rows[table]) == len(rows), table
    for ours, theirs in zip(found.rows["training"], expected.rows["training"], strict=True):
        assert ours.step == theirs.step
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5, rel=0)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
    for ours, theirs in zip(found.rows["weights"], expected.rows["weights"], strict=True):
        assert (ours.step, ours.tensor) == (theirs.step, theirs.tensor)
        if "bias" not in ours.tensor:  # the key part's has no gradient but rounding
            assert ours.std == pytest.approx(theirs.std, rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
def test_each_trial_of_an_array_is_what_it_is_alone(trio, name, tied):
    configs = [
        with_knobs(config, optim__name=name, model__tied=tied, optim__clip=0.5) for config in trio
    ]
    for found, config in zip(together(configs), configs, strict=True):
        assert_alike(found, undisturbed(config))


UNTIED = [
    # The head and the optimiser know nothing of each other: one untied model is enough for a start.
    pytest.param(name, False, marks=[] if name == "adamw" else pytest.mark.full)
    for name in OPTIMIZERS
]


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in OPTIMIZERS), *UNTIED])
def test_on_a_cpu_an_array_leaves_each_trial_the_bits_that_it_has_alone(
    trio, name, tied, monkeypatch
):
    monkeypatch.setitem(array.RUNS_TOGETHER, "cpu", False)
    knobs = {"optim__name": name, "model__tied": tied, "optim__clip": 0.5, "train__steps": 30}
    configs = [with_knobs(config, **knobs) for config in trio]
    configs.append(with_knobs(configs[1], init__std=1e18, init__scheme="normal"))  # diverges
    for found, config in zip(together(configs), configs, strict=True):
        assert found.rows == undisturbed(config).rows


def test_an_array_stays_with_its_trials_for_200_steps(trio, capsys):
    configs = [with_knobs(config, train__steps=200, probes__every=50) for config in trio]
    for found, config in zip(together(configs), configs, strict=True):
        expected = undisturbed(config)
        assert_alike(found, expected)
        losses, stds = (
            [
                (getattr(ours, column), getattr(theirs, column))
                for ours, theirs in zip(found.rows[table], expected.rows[table], strict=True)
            ]
            for table, column in (("training", "loss"), ("weights", "std"))
        )
        off = max(abs(ours - theirs) for ours, theirs in losses)
        share = max(abs(ours / theirs - 1) for ours, theirs in stds if theirs)
        with capsys.disabled():
            print(
                f"\narray and alone, {config.init.scheme}: {len(losses)} losses within {off:.1e}, "
                f"{len(stds)} stds within {share:.1e} of themselves",
                end="",
            )


def test_a_diverging_trial_does_not_change_the_others(trio):
    wild = with_knobs(trio[1], init__std=1e18, init__scheme="normal")
    recorders = together([trio[0], wild, trio[2]])
    expected = undisturbed(wild)
    assert expected.result.status == "diverged"
    for found, config in zip(recorders, [trio[0], wild, trio[2]], strict=True):
        assert_alike(found, undisturbed(config))
    assert recorders[1].result.reason == expected.result.reason


def test_a_trial_that_diverges_at_the_last_step_does_not_change_the_errors_of_others(
    trio, monkeypatch
):
    configs = [with_knobs(config, train__precision="bf16-head") for config in trio]
    has_diverged = train.Member.has_diverged

    def is_first_at_the_end(member, row):
        if member.config == configs[0] and row.step == configs[0].train.steps:
            member.status = "diverged"
            return True
        return has_diverged(member, row)

    monkeypatch.setattr(train.Member, "has_diverged", is_first_at_the_end)
    for found, config in zip(together(configs)[1:], configs[1:], strict=True):
        expected = undisturbed(config).result
        assert found.result.loss_error == pytest.approx(expected.loss_error, rel=0.1)
        assert found.result.gradient_error == pytest.approx(expected.gradient_error, rel=0.1)


@pytest.fixture
def saved(trio, tmp_path, monkeypatch):
    """The trio, saved at every step, and the checkpoint files."""
    monkeypatch.setattr(checkpoint, "SHARE_OF_TIME", float("inf"))
    configs = [with_knobs(config, train__checkpoint_seconds=0.0) for config in trio]
    return configs, [tmp_path / f"{k}.pt" for k in range(3)]


@pytest.mark.parametrize("interrupted", [0, 2])  # the first to log a step, and the last
def test_an_array_that_was_cut_off_ends_like_one_that_was_not(saved, interrupted):
    configs, files = saved
    recorders = [CutAt(3 if k == interrupted else 99) for k in range(3)]
    with pytest.raises(Cut):
        run_trials([Trial(*each) for each in zip(configs, recorders, files, strict=True)])
    assert {torch.load(file, weights_only=False)["step"] for file in files} == {3}
    resumed, whole = together(configs, files), together(configs)
    assert [one.rows for one in resumed] == [one.rows for one in whole]
    assert not any(file.exists() for file in files)


def test_an_array_goes_on_that_was_killed_while_it_saved_its_beginning(saved):
    configs, files = saved
    with pytest.raises(Cut):
        run_trials([Trial(c, CutAt(0), file) for c, file in zip(configs, files, strict=True)])
    files[1].unlink()
    assert [one.rows for one in together(configs, files)] == [one.rows for one in together(configs)]


def test_an_array_is_saved_at_one_step_and_takes_the_share_of_time_of_one_trial(
    tiny, tmp_path, monkeypatch
):
    """Use a clock on which a save takes one second, and a step ten."""
    monkeypatch.setattr(checkpoint, "SHARE_OF_TIME", 0.01)
    now, saved_at = [0.0], []
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])

    def write_in_a_second(*_):
        saved_at.append(now[0])
        now[0] += 1

    monkeypatch.setattr(checkpoint, "write_atomically", write_in_a_second)
    models = ModelArray([GPT(tiny.model) for _ in range(3)], tiny.optim)
    members = []
    for k in range(3):
        file = checkpoint.Checkpoint(tmp_path / f"{k}.pt", {}, pause=10.0)
        start = checkpoint.Progress(0, [], 0.0)
        members.append(SimpleNamespace(checkpoint=file, rows=[], start=start))
        now[0] += 6  # to prepare a trial takes time
    for step in range(70):
        train.save(members, models, step, now[0])
        now[0] += 10
    assert saved_at == [28, 29, 30, 331, 332, 333, 634, 635, 636]


def test_on_a_cpu_a_member_that_goes_on_alone_ends_as_if_it_had_always_been(saved, monkeypatch):
    monkeypatch.setitem(array.RUNS_TOGETHER, "cpu", False)
    configs, files = saved
    with pytest.raises(Cut):
        run_trials([Trial(c, CutAt(3), file) for c, file in zip(configs, files, strict=True)])
    resumed = MemoryRecorder()
    run_trial(configs[1], resumed, files[1])
    assert resumed.rows == undisturbed(configs[1]).rows


def test_trials_that_had_come_unequally_far_go_on_each_from_its_own_step(saved):
    configs, files = saved
    for config, file, step in zip(configs, files, (1, 4, 1), strict=True):
        with pytest.raises(Cut):
            run_trial(config, CutAt(step), file)
    for found, config in zip(together(configs, files), configs, strict=True):
        assert_alike(found, undisturbed(config))


def test_the_checkpoint_of_a_member_serves_it_alone_and_is_its_own_size(saved, tmp_path):
    configs, files = saved
    recorders = [CutAt(3 if k == 0 else 99) for k in range(3)]
    with pytest.raises(Cut):
        run_trials([Trial(*each) for each in zip(configs, recorders, files, strict=True)])
    with pytest.raises(Cut):
        run_trial(configs[0], CutAt(3), tmp_path / "alone.pt")
    sizes = [file.stat().st_size for file in (files[1], tmp_path / "alone.pt")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    resumed = MemoryRecorder()
    run_trial(configs[1], resumed, files[1])
    assert_alike(resumed, undisturbed(configs[1]))


@pytest.mark.parametrize("lr", [1e-3, 1e30])  # one that finishes, and one that diverges on the way
def test_reading_a_device_seldom_changes_no_row(tiny, monkeypatch, lr):
    config = with_knobs(
        tiny,
        train__steps=25,
        probes__every=10,
        probes__text_every=20,
        optim__lr=lr,
        optim__clip=0.1,
    )
    expected = undisturbed(config)
    monkeypatch.setitem(train.DEVICE_SYNC_EVERY, "cpu", 4)
    found = MemoryRecorder()
    run_trial(config, found)
    # A diverging trial has NaN among its rows, which does not equal itself.
    assert repr(found.rows) == repr(expected.rows)
    assert replace(found.result, seconds=1, tokens_per_second=1) == replace(
        expected.result, seconds=1, tokens_per_second=1
    )


def test_trials_that_cannot_train_together_are_refused_with_the_knobs(trio):
    assert conflicting_knobs(trio) == []
    trio[1] = with_knobs(trio[1], optim__lr=0.5, model__n_layer=1)
    with pytest.raises(InputError, match=r"they differ in model\.n_layer, optim\.lr"):
        run_trials([Trial(config, MemoryRecorder()) for config in trio])


@pytest.mark.parametrize("precision", ["bf16-head", "bf16"])
def test_less_precision_is_opt_in_and_its_error_is_reported(trio, precision):
    configs = [with_knobs(config, train__precision=precision) for config in trio]
    for found, config, exact in zip(together(configs), configs, trio, strict=True):
        expected = undisturbed(exact)
        for ours, theirs in zip(found.rows["training"], expected.rows["training"], strict=True):
            assert ours.loss != theirs.loss
            assert ours.loss == pytest.approx(theirs.loss, abs=2e-2)
        assert 0 < found.result.loss_error < 1e-2
        assert 0 < found.result.gradient_error < 1e-2
        assert expected.result.loss_error is None
        own = undisturbed(config)
        for ours, theirs in zip(found.rows["training"], own.rows["training"], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_heads_of_many_models_are_what_each_is_alone(monkeypatch, precision, tied):
    monkeypatch.setitem(CHUNK_AND_TILE, "cpu", (10, CHUNK_AND_TILE["cuda"][1]))  # 3 chunks
    config = ModelConfig(n_layer=1, n_head=2, d_model=16, context=8, vocab_size=300, tied=tied)
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(300, (2, 3, 3, 8), generator=generator)
    found = {}
    for first in (2, 100):  # together, and one after the other
        torch.manual_seed(0)
        models = ModelArray([GPT(config) for _ in range(3)], OptimConfig(), precision)
        dtype = models.head_dtype
        monkeypatch.setitem(array.HEADS_TOGETHER_FROM, dtype, first)
        _, heads = models.gradients(ids, targets)
        found[first] = [
            *(torch.stack(values) for values in zip(*heads, strict=True)),
            *(stacked.grad.clone() for stacked in models.parameters.values()),
        ]
    close = {"rtol": 1e-4, "atol": 1e-6} if precision == "float32" else {"rtol": 0.05, "atol": 2e-3}
    for ours, theirs in zip(found[2], found[100], strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_a_precision_that_the_device_has_not_is_refused_before_the_trial(tiny):
    config = with_knobs(tiny, train__precision="tf32")
    with pytest.raises(
        InputError, match=r"train\.precision is tf32, which a CPU does not have: take float32"
    ):
        run_trial(config, MemoryRecorder())


def test_tf32_holds_for_the_products_of_a_step_alone(tiny):
    models = ModelArray([GPT(tiny.model)], tiny.optim, "tf32")
    ids = torch.randint(tiny.model.vocab_size, (1, 4, tiny.model.context + 1))
    seen = []
    models._trunk = lambda x: seen.append(torch.get_float32_matmul_precision()) or x * 1.0
    models.gradients(ids[..., :-1], ids[..., 1:])
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_an_array_on_a_gpu_is_what_its_trials_are_alone_there(trio):
    configs = [with_knobs(config, train__device="cuda") for config in trio]
    for found, config in zip(together(configs), configs, strict=True):
        expected = undisturbed(config)
        for ours, theirs in zip(found.rows["training"], expected.rows["training"], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-3)


def step_without_values(config):
    """Run a step on tensors without values; it raises if a value is read."""
    with FakeTensorMode():
        models = ModelArray([GPT(config.model)], config.optim, config.train.precision)
        ids = torch.randint(config.model.vocab_size, (1, 4, config.model.context + 1))
        models.gradients(ids[..., :-1], ids[..., 1:])
        models.update(1e-3, 1.0, models.norms())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", DTYPES)
def test_a_step_in_a_gpus_tiles_asks_for_no_value(monkeypatch, name, precision):
    """So the CPU never waits for the GPU. Under vmap no value can be read anyway."""
    words = TrialConfig.from_flat(WORDS)  # a vocabulary of many tiles
    config = with_knobs(words, optim__name=name, train__precision=precision)
    monkeypatch.setitem(CHUNK_AND_TILE, "cpu", CHUNK_AND_TILE["cuda"])
    step_without_values(config)


def test_a_step_in_a_cpus_tiles_asks_how_large_logits_may_be():
    with pytest.raises(DataDependentOutputException):
        step_without_values(TrialConfig.from_flat(WORDS))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_never_waits_for_the_gpu(tiny, count):
    device = torch.device("cuda")
    models = ModelArray([GPT(tiny.model).to(device) for _ in range(count)], tiny.optim)
    ids = torch.randint(tiny.model.vocab_size, (count, 4, tiny.model.context + 1), device=device)

    def step():
        models.gradients(ids[..., :-1], ids[..., 1:])
        models.update(1e-3, 1.0, models.norms())

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
