"""The training loop, run by gptcore.experiment: its rows, its result, and that it repeats."""

from dataclasses import replace

import pytest
import torch

from gptcore.config import TrialConfig
from gptcore.experiment import run_trial
from gptcore.optimizers import OPTIMIZERS
from gptcore.records import TABLES, MemoryRecorder
from helpers.trials import WORDS, with_knobs


def run(config):
    recorder = MemoryRecorder()
    assert run_trial(config, recorder) is recorder.result
    return recorder


def test_a_trial_fills_every_table_from_step_0_to_the_last(tiny):
    recorder = run(tiny)
    assert recorder.result.status == "finished"
    assert recorder.result.steps == 5
    steps = {table: [row.step for row in recorder.rows[table]] for table in
             ("training", "weights", "histograms", "token_groups")}  # fmt: skip
    assert steps["training"] == [0, 1, 2, 3, 4, 5]
    assert sorted(set(steps["weights"])) == sorted(set(steps["token_groups"])) == [0, 2, 4, 5]
    assert sorted(set(steps["histograms"])) == [0, 4, 5]
    assert {row.step for row in recorder.rows["tokens"]} == {0, 5}
    assert all(recorder.rows[table] for table in TABLES)
    assert [row.lr is None for row in recorder.rows["training"]] == [False] * 5 + [True]
    assert sorted({row.step for row in recorder.rows["updates"]}) == [0, 2, 4]
    assert recorder.result.loss == recorder.rows["training"][-1].loss


def test_each_update_is_as_large_as_the_weights_moved(tiny):
    """Remembered too late, the weights before an update would be those after it."""
    recorder = run(with_knobs(tiny, probes__every=1, optim__name="sgd", optim__momentum=0.0))
    moved = [row for row in recorder.rows["updates"] if row.kind != "k_bias"]
    assert moved
    assert all(row.rms > 0 for row in moved if row.tensor.endswith("weight"))


def test_weights_so_large_that_their_squares_overflow_end_no_trial(tiny):
    recorder = run(with_knobs(tiny, init__scheme="normal", init__std=1e20))
    assert recorder.result.status == "diverged"


def test_the_same_config_gives_bitwise_the_same_rows(tiny):
    first = run(tiny)
    torch.manual_seed(99)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    again = run(tiny)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert first.rows == again.rows


def test_probing_more_often_changes_nothing(tiny):
    seldom = run(replace(tiny, probes=replace(tiny.probes, every=1000, text_every=1000)))
    often = run(replace(tiny, probes=replace(tiny.probes, every=1, text_every=1)))
    assert seldom.rows["training"] == often.rows["training"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("norm", ["pre", "post", "deepnet"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_control_makes_a_trial_that_finishes(tiny, name, norm, tied):
    recorder = run(with_knobs(tiny, optim__name=name, model__norm=norm, model__tied=tied))
    assert recorder.result.status == "finished"
    kinds = {row.kind for row in recorder.rows["weights"]}
    assert ("head" in kinds) == (not tied)
    assert {row.kind for row in recorder.rows["init"]} == kinds - {"qkv"}


def test_probes_measure_only_the_given_layers_and_windows(tiny):
    rows = run(with_knobs(tiny, probes__layers="1", corpus__windows=2)).rows
    for table in ("weights", "updates", "spectra", "histograms", "activations", "attention"):
        assert {row.layer for row in rows[table]} <= {None, 1}, table
        assert 1 in {row.layer for row in rows[table]}, table
    assert [len(row.starts) for row in rows["fixed_texts"]] == [2, 2]


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_start_where_they_are_and_move_by_what_the_head_moves(tiny, tied):
    first, last = run(with_knobs(tiny, model__tied=tied, model__vocab_size=320)).rows["tokens"]
    assert set(first.displacement) == {0.0}
    assert min(last.displacement) > 0
    assert len(last.norm) == len(last.log_prob) == 257  # the rows beyond are no tokens


def test_the_gradients_norm_is_that_of_its_tensors(tiny):
    rows = run(with_knobs(tiny, model__d_model=64, probes__every=1)).rows
    for row in rows["training"]:
        squares = [
            tensor.size * tensor.grad_rms**2
            for tensor in rows["weights"]
            if tensor.step == row.step and tensor.kind not in ("q", "k", "v")
        ]
        assert row.grad_norm == pytest.approx(sum(squares) ** 0.5, rel=1e-5)


def test_the_schedule_and_the_clip_are_those_of_the_rows(tiny):
    rows = run(with_knobs(tiny, optim__schedule="linear", optim__warmup=1)).rows["training"]
    lr = tiny.optim.lr
    assert [row.lr for row in rows] == [lr, lr, 0.75 * lr, 0.5 * lr, 0.25 * lr, None]
    # Under plain descent the first update's loss change shows the clipped step.
    free = run(with_knobs(tiny, optim__name="sgd", optim__lr=0.1)).rows["training"]
    norm = free[0].grad_norm
    clipped = run(with_knobs(tiny, optim__name="sgd", optim__lr=0.1, optim__clip=norm / 2))
    halved = run(with_knobs(tiny, optim__name="sgd", optim__lr=0.05))
    assert clipped.rows["training"][0].grad_norm == norm
    assert clipped.rows["training"][1].loss == pytest.approx(halved.rows["training"][1].loss)
    assert clipped.rows["training"][1].loss != free[1].loss


@pytest.mark.parametrize(
    "knob",
    ["init__seed", "corpus__data_seed", "optim__lr", "optim__beta1", "optim__warmup"],
)
def test_knobs_take_effect(tiny, knob):
    key = knob.replace("__", ".")
    value = tiny.to_flat()[key]
    other = run(with_knobs(tiny, **{knob: value / 2 if value else 2}))
    assert other.rows["training"] != run(tiny).rows["training"]


def test_weight_decay_shrinks_what_no_gradient_moves(tiny):
    small = {"optim__lr": 0.01, "train__steps": 5}
    free, decayed = (
        run(with_knobs(tiny, **small, optim__weight_decay=decay)) for decay in (0.0, 10.0)
    )

    def end_std(recorder):
        rows = [row for row in recorder.rows["weights"] if row.tensor == "blocks.1.mlp.fc"]
        return rows[-1].std

    assert end_std(decayed) < end_std(free)


def test_training_learns(tiny):
    recorder = run(with_knobs(tiny, train__steps=60, optim__lr=0.01, probes__every=60))
    losses = [row.loss for row in recorder.rows["training"]]
    assert losses[-1] < losses[0] - 2


def test_the_untrained_model_is_at_the_closed_form():
    """-(ln V + d std^2 / 2): hidden states of unit variance meet rows of variance std^2."""
    from math import log

    words = TrialConfig.from_flat(WORDS)  # of which many are singletons
    rows = run(with_knobs(words, model__d_model=64, train__steps=1)).rows["token_groups"]
    start = {
        row.group: row.mean_logprob
        for row in rows
        if row.step == 0 and row.mask == "none" and row.text == "probe"
    }
    expected = -(log(50257) + 64 * 0.02**2 / 2)
    for group in ("singletons", "never_used"):
        assert start[group] == pytest.approx(expected, abs=0.02)


def test_a_diverging_trial_is_a_result_with_all_that_came_before(tiny):
    recorder = run(with_knobs(tiny, optim__lr=1e30, train__steps=50))
    assert recorder.result.status == "diverged"
    assert "at step" in recorder.result.reason
    assert 0 < recorder.result.steps < 50
    assert [row.step for row in recorder.rows["training"]] == list(range(recorder.result.steps))


def test_a_loss_that_is_nan_from_the_start_is_a_result_too(tiny):
    recorder = run(with_knobs(tiny, init__scheme="normal", init__std=1e30))
    assert recorder.result.status == "diverged"
    assert (recorder.result.steps, recorder.result.loss) == (0, None)


def test_batches_follow_the_data_seed_alone(tiny):
    """Schemes and seeds are compared on identical batches: the masks leave the same tokens."""

    def left_in(**knobs):
        rows = run(with_knobs(tiny, **knobs)).rows["token_groups"]
        return [row.n_tokens for row in rows if row.group == "singletons" or row.mask == "batch"]

    assert left_in() == left_in(init__scheme="gpt2") == left_in(init__seed=3)
    assert left_in() != left_in(corpus__data_seed=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_gpu_gives_the_cpus_trajectory_up_to_rounding(tiny):
    cpu, gpu = run(tiny), run(with_knobs(tiny, train__device="cuda"))
    for a, b in zip(cpu.rows["training"], gpu.rows["training"], strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-4)
