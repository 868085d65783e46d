"""How the parameters move: one short function an optimiser, and the learning rate over time.

An optimiser takes parameters by name, each stacked over K models, [K, ...], and treats every model
as if it were alone. Its keyword parameters are config keys: `beta1` is `optim.beta1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import unwrap

import torch
from torch import Tensor
from torch.optim import Optimizer

from gptcore.config import OptimConfig, check_choice, parameters_of

Parameters = Mapping[str, Tensor]


class _Plain(Optimizer):
    """PyTorch's optimiser without the import of its compiler, two seconds of every process, which
    its methods make only to say that they are not to be compiled."""

    add_param_group = unwrap(Optimizer.add_param_group)
    load_state_dict = unwrap(Optimizer.load_state_dict)
    state_dict = unwrap(Optimizer.state_dict)
    zero_grad = unwrap(Optimizer.zero_grad)


class _AdamW(_Plain, torch.optim.AdamW):
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class _Adam(_Plain, torch.optim.Adam):
    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class _SGD(_Plain, torch.optim.SGD):
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


def adamw(
    parameters: Parameters, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float
) -> Optimizer:
    """Adam with decoupled weight decay, lr * weight_decay * w. Loshchilov & Hutter 2019."""
    return _AdamW(parameters.values(), lr, (beta1, beta2), eps, weight_decay, fused=True)


def adam(
    parameters: Parameters, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float
) -> Optimizer:
    """Adam; weight decay is added to the gradient. Kingma & Ba 2015.

    A large `eps` makes rows with small gradients move in proportion to them, as under SGD.
    """
    return _Adam(parameters.values(), lr, (beta1, beta2), eps, weight_decay, fused=True)


def coupled_adam(
    parameters: Parameters, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float
) -> Optimizer:
    """AdamW whose second moment of token rows is their mean over the vocabulary.

    Stollenwerk & Stollenwerk 2025, *Better Embeddings with Coupled Adam*: a row that is never read
    then moves in proportion to its gradient, not by its own scale. Token embedding and untied head
    are each averaged, both by choice of this project; all else is AdamW.
    """
    coupled = ("wte.weight", "head.weight")
    groups = [
        {"params": [p for name, p in parameters.items() if (name in coupled) == side],
         "coupled": side}
        for side in (True, False)
    ]  # fmt: skip
    return _CoupledAdam(
        groups, {"betas": (beta1, beta2), "eps": eps, "lr": lr, "weight_decay": weight_decay}
    )


def sgd(parameters: Parameters, lr: float, weight_decay: float, momentum: float) -> Optimizer:
    """Gradient descent with heavy-ball momentum; weight decay is added to the gradient."""
    return _SGD(
        parameters.values(), momentum=momentum, fused=True, lr=lr, weight_decay=weight_decay
    )


class _CoupledAdam(_Plain):
    """AdamW; in groups with `coupled`, rows share the mean of their second moments."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                square = weight.grad.square()
                if group["coupled"]:
                    square = square.mean(-2, keepdim=True)
                state = self.state[weight]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(weight)
                    state["exp_avg_sq"] = torch.zeros_like(square)
                state["step"] += 1
                state["exp_avg"].lerp_(weight.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(square, 1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_()
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] / (1 - beta1 ** state["step"])
                weight.addcdiv_(
                    state["exp_avg"], root.add_(group["eps"]).expand_as(weight), value=-rate
                )


def make_optimizer(parameters: Parameters, config: OptimConfig) -> Optimizer:
    """The optimiser that the config names, over these parameters."""
    make = OPTIMIZERS[config.name]
    return make(parameters, **{name: getattr(config, name) for name in parameters_of(make)})


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of the update that makes step + 1 out of step, of `steps` updates in all."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * SCHEDULES[config.schedule]((step - config.warmup) / (steps - config.warmup))


def check_optim(config: OptimConfig) -> None:
    """Raise InputError for an unknown optimiser or schedule, or a knob that it does not take."""
    check_choice("optim", config, "name", OPTIMIZERS)
    check_choice("optim", config, "schedule", SCHEDULES)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "adam": adam,
    "coupled_adam": coupled_adam,
    "sgd": sgd,
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
}
"""Name -> factor on the learning rate, by how much of the training after the warm-up is done."""
