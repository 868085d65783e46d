"""Train the GPT of gptcore in JAX: vmap over the models of an array, lax.scan over the steps.

    echo '{"size": 4, "model.d_model": 128}' | python benchmarks/jax_peer.py

For the comparison in benchmarks/gpu.py alone. Reads one array per line of JSON from stdin: knobs of
a trial, and `size`, the number of models. Answers each with a line: `seconds` of one training step
and `bytes` of memory, or an `error`. JAX_PLATFORMS chooses the device.

The model is gptcore's with tied weights, norm `pre` and the optimiser adamw at a constant learning
rate. Names of parameters, and suffixes of names that give the shape, are those of gptcore.model.
"""

import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp

from gptcore.config import OptimConfig, TrialConfig
from gptcore.init_schemes import initialise
from gptcore.model import GPT

Arrays = dict[str, jax.Array]

PRECISIONS = {
    "float32": ("highest", jnp.float32, jnp.float32),
    "tf32": ("tensorfloat32", jnp.float32, jnp.float32),
    "bf16-head": ("highest", jnp.bfloat16, jnp.float32),
    "bf16": ("highest", jnp.bfloat16, jnp.bfloat16),
}
"""JAX's name for the precision of float32 products, and the dtypes of the head and of the trunk.
Without such a name, JAX computes float32 products in tf32 on a GPU."""

STEPS, CALLS = 10, 5
"""Steps in one call of the compiled loop, and the calls that are timed."""


class State(NamedTuple):
    """A model and the state of its optimiser; in an array, each with K models in front."""

    weights: Arrays
    mean: Arrays  # Adam's first moment
    square: Arrays  # Adam's second moment
    step: jax.Array  # updates made


def layer_norm(weights: Arrays, name: str, x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(weights: Arrays, name: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    weight, bias = (weights[f"{name}.{leaf}"].astype(dtype) for leaf in ("weight", "bias"))
    return x.astype(dtype) @ weight.T + bias


def loss_of(
    weights: Arrays, ids_BT: jax.Array, targets_BT: jax.Array, config: TrialConfig
) -> jax.Array:
    """Compute the mean cross-entropy of one model, in nats per token."""
    _, head_dtype, dtype = PRECISIONS[config.train.precision]
    B, T = ids_BT.shape
    x_BTD = weights["wte.weight"][ids_BT] + weights["wpe.weight"][:T]
    for layer in range(config.model.n_layer):
        block = f"blocks.{layer}"
        normed = layer_norm(weights, f"{block}.ln_1", x_BTD)
        qkv = linear(weights, f"{block}.attn.qkv", normed, dtype)
        q, k, v = jnp.moveaxis(qkv.reshape(B, T, 3, config.model.n_head, -1), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(B, T, -1)
        x_BTD += linear(weights, f"{block}.attn.proj", attended, dtype)
        normed = layer_norm(weights, f"{block}.ln_2", x_BTD)
        inner = jax.nn.gelu(linear(weights, f"{block}.mlp.fc", normed, dtype), approximate=False)
        x_BTD += linear(weights, f"{block}.mlp.proj", inner, dtype)
    hidden_BTD = layer_norm(weights, "ln_f", x_BTD).astype(head_dtype)
    logits_BTV = (hidden_BTD @ weights["wte.weight"].astype(head_dtype).T).astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits_BTV, -1) - chosen_BT).mean()


def adamw(state: State, gradient: Arrays, config: OptimConfig) -> State:
    """Clip the gradient of one model to its largest norm, and update the model."""
    norm = jnp.sqrt(sum(jnp.square(values).sum() for values in gradient.values()))
    clip = jnp.minimum(config.clip / (norm + 1e-6), 1.0) if config.clip else 1.0
    step = state.step + 1
    rate = config.lr / (1 - config.beta1**step)
    correction = 1 / (1 - config.beta2**step)
    weights, mean, square = {}, {}, {}
    for name, weight in state.weights.items():
        values = gradient[name] * clip
        mean[name] = config.beta1 * state.mean[name] + (1 - config.beta1) * values
        square[name] = config.beta2 * state.square[name] + (1 - config.beta2) * values**2
        change = rate * mean[name] / (jnp.sqrt(square[name] * correction) + config.eps)
        weights[name] = weight * (1 - config.lr * config.weight_decay) - change
    return State(weights, mean, square, step)


@functools.partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="state_K")
def train(
    state_K: State, key_K: jax.Array, tokens: jax.Array, config: TrialConfig, steps: int
) -> tuple[State, jax.Array]:
    """Train the models of an array, each on random windows of the tokens.

    Args:
        key_K: a random key for each model, which draws its windows.
        steps: number of updates.

    Returns:
        The state after the last update, and the losses before each, [steps, K].
    """

    def model_step(state: State, key: jax.Array) -> tuple[State, jax.Array]:
        context = config.model.context
        starts = jax.random.randint(key, (config.train.batch_size,), 0, len(tokens) - context)
        windows = tokens[starts[:, None] + jnp.arange(context + 1)]
        loss, gradient = jax.value_and_grad(loss_of)(
            state.weights, windows[:, :-1], windows[:, 1:], config
        )
        return adamw(state, gradient, config.optim), loss

    keys = jax.vmap(lambda key: jax.random.split(key, steps), out_axes=1)(key_K)
    with jax.default_matmul_precision(PRECISIONS[config.train.precision][0]):
        return jax.lax.scan(jax.vmap(model_step), state_K, keys)


def weights_of(model: GPT) -> Arrays:
    """Copy the parameters of our model, by name."""
    return {name: jnp.array(values.detach().numpy()) for name, values in model.named_parameters()}


@jax.jit
def state_of(weights: list[Arrays]) -> State:
    """Make an array of models that have not been updated."""
    stacked = {name: jnp.stack([each[name] for each in weights]) for name in weights[0]}
    mean, square = ({name: jnp.zeros_like(x) for name, x in stacked.items()} for _ in range(2))
    return State(stacked, mean, square, jnp.zeros(len(weights), jnp.int32))


def measure(config: TrialConfig, size: int) -> dict[str, float]:
    """Measure the median time of one training step of an array, and the memory that it takes."""
    model, V = GPT(config.model), config.model.vocab_size
    initialise(model, config.init)
    state = state_of([weights_of(model)] * size)
    keys = jax.random.split(jax.random.key(0), size)
    draws = jax.random.uniform(jax.random.key(1), 100_000)
    tokens = (V**draws).astype(jnp.int32) - 1  # by Zipf's law
    compiled = train.lower(state, keys, tokens, config, STEPS).compile()
    times = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        state, losses = compiled(state, keys, tokens)
        losses.block_until_ready()
        times.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {
        "seconds": statistics.median(times[1:]) / STEPS,
        "bytes": held - memory.alias_size_in_bytes,
    }


def main() -> None:
    for line in sys.stdin:
        knobs = json.loads(line)
        size = knobs.pop("size")
        try:
            answer = measure(TrialConfig.from_flat(knobs), size)
        except Exception as error:  # whatever it is, the next array may fit
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
