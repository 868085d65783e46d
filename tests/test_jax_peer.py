"""The peer in JAX trains the model that we train: else its speed says nothing about ours.

XLA compiles each training loop, which takes most of a minute of one core altogether.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from gptcore.array import ModelArray
from gptcore.config import OptimConfig, TrialConfig
from gptcore.corpus import load_corpus
from gptcore.init_schemes import initialise
from gptcore.model import GPT
from gptcore.precision import DTYPES
from helpers.trials import with_knobs

jax = pytest.importorskip("jax", reason="JAX is not installed: pip install jax")

from benchmarks import jax_peer  # noqa: E402


@pytest.fixture(autouse=True)
def exact_products():
    """Keep JAX from rounding the factors of float32 products, where it finds a GPU."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def clipped(tiny: TrialConfig) -> TrialConfig:
    """A tiny trial whose gradient is longer than its limit."""
    return replace(tiny, optim=OptimConfig(clip=1.0))


def model_of(config: TrialConfig, seed: int = 0) -> GPT:
    model = GPT(config.model)
    initialise(model, with_knobs(config, init__seed=seed).init)
    return model


def batch_of(config: TrialConfig) -> list[np.ndarray]:
    corpus = load_corpus(config.corpus, config.model.context)
    return list(corpus.batch(0, batch_size=config.train.batch_size, seed=0))


def tokens_of(config: TrialConfig):
    tokens = load_corpus(config.corpus, config.model.context).tokens
    return jax.numpy.asarray(tokens.astype(np.int32))


def difference(one, other) -> float:
    """Return the largest absolute difference of two arrays."""
    one, other = np.asarray(one), np.asarray(other)
    assert one.shape == other.shape
    return np.abs(one - other).max()


def test_loss_and_gradient_are_those_of_our_model(tiny):
    model, (ids, targets) = model_of(tiny), batch_of(tiny)
    weights = jax_peer.weights_of(model)
    array = ModelArray([model], tiny.optim)
    _, (head,) = array.gradients(torch.tensor(ids)[None], torch.tensor(targets)[None])
    with_gradient = jax.jit(jax.value_and_grad(jax_peer.loss_of), static_argnums=3)
    loss, gradient = with_gradient(weights, ids, targets, tiny)
    assert float(loss) == pytest.approx(head.loss.item(), abs=1e-4)
    assert gradient.keys() == array.parameters.keys()
    for name, stacked in array.parameters.items():
        assert difference(gradient[name], stacked.grad[0].numpy()) < 1e-4, name


def test_an_update_is_that_of_our_optimiser(clipped):
    model = model_of(clipped)
    state = jax_peer.state_of([jax_peer.weights_of(model)])
    array, rng = ModelArray([model], clipped.optim), np.random.default_rng(0)
    one_update = functools.partial(jax_peer.adamw, config=clipped.optim)
    update = jax.jit(jax.vmap(one_update))
    for _ in range(3):
        gradient = {}
        for name, stacked in array.parameters.items():
            values = rng.normal(size=stacked.shape).astype(np.float32)
            gradient[name] = values
            stacked.grad.copy_(torch.tensor(values))
        array.update(clipped.optim.lr, clipped.optim.clip, array.norms())
        state = update(state, gradient)
    for name, stacked in array.parameters.items():
        assert difference(state.weights[name], stacked.detach().numpy()) < 1e-5, name


def test_an_array_gives_what_each_of_its_models_gives_alone(clipped):
    config = with_knobs(clipped, model__n_layer=1)
    weights = [jax_peer.weights_of(model_of(config, seed)) for seed in (0, 1)]
    keys = [jax.random.key(0), jax.random.key(1)]

    def trained(members: list[int]):
        state = jax_peer.state_of([weights[k] for k in members])
        key_K = jax.numpy.stack([keys[k] for k in members])
        state, losses = jax_peer.train(state, key_K, tokens_of(config), config, 4)
        return state.weights, losses

    together, losses = trained([0, 1])
    assert losses[0, 0] != losses[0, 1]
    for k in (0, 1):
        alone, losses_alone = trained([k])
        assert difference(losses_alone[:, 0], losses[:, k]) < 1e-4
        for name, values in alone.items():
            assert difference(np.asarray(values)[0], np.asarray(together[name])[k]) < 1e-4, name


def test_training_in_bfloat16_lowers_the_loss(clipped):
    config = with_knobs(clipped, model__n_layer=1, train__precision="bf16")
    state = jax_peer.state_of([jax_peer.weights_of(model_of(config))])
    key_K = jax.random.key(0)[None]
    _, losses = jax_peer.train(state, key_K, tokens_of(config), config, 30)
    assert losses[-5:].mean() < losses[:5].mean() - 0.05


def test_every_precision_of_an_array_has_a_counterpart():
    assert DTYPES.keys() <= jax_peer.PRECISIONS.keys()
