"""Optimisers, one short function each, and the learning rate at each step.

An optimiser takes parameters by name, each stacked over K models, [K, ...], and updates every model
as if it were the only one. The keyword parameters of these functions are config keys: `beta1` is
`optim.beta1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gptcore.config import OptimConfig, check_choice, parameters_of
from gptcore.private_api import SGD, Adam, AdamW, Optimizer

Parameters = Mapping[str, Tensor]


def adamw(
    parameters: Parameters, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float
) -> Optimizer:
    """Make Adam with decoupled weight decay, lr * weight_decay * w. Loshchilov & Hutter 2019."""
    return AdamW(parameters.values(), lr, (beta1, beta2), eps, weight_decay, fused=True)


def adam(
    parameters: Parameters, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float
) -> Optimizer:
    """Make Adam, where weight decay is added to the gradient. Kingma & Ba 2015.

    With a large `eps`, rows with small gradients move in proportion to them, as under SGD.
    """
    return Adam(parameters.values(), lr, (beta1, beta2), eps, weight_decay, fused=True)


def coupled_adam(
    parameters: Parameters, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float
) -> Optimizer:
    """Make AdamW in which all token rows share the mean of their second moments.

    Stollenwerk & Stollenwerk 2025, *Better Embeddings with Coupled Adam*: a row of a token that
    never occurs then moves in proportion to its gradient, and not by its own scale. The token
    embedding and an untied head are averaged separately, which is a choice of this project. All
    other parameters are updated as by AdamW.
    """
    coupled = ("wte.weight", "head.weight")
    groups = [
        {"params": [p for name, p in parameters.items() if (name in coupled) == is_coupled],
         "coupled": is_coupled}
        for is_coupled in (True, False)
    ]  # fmt: skip
    return _CoupledAdam(
        groups, {"betas": (beta1, beta2), "eps": eps, "lr": lr, "weight_decay": weight_decay}
    )


def sgd(parameters: Parameters, lr: float, weight_decay: float, momentum: float) -> Optimizer:
    """Make SGD with heavy-ball momentum, where weight decay is added to the gradient."""
    return SGD(parameters.values(), momentum=momentum, fused=True, lr=lr, weight_decay=weight_decay)


class _CoupledAdam(Optimizer):
    """AdamW that averages the second moments over the rows, in parameter groups with `coupled`."""

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
                if group.get("capturable") and not isinstance(state["step"], Tensor):
                    # Counted on the device. In float64, because 0.999 ** step is close to 1.
                    state["step"] = weight.new_full((), state["step"], dtype=torch.float64)
                state["step"] += 1
                state["exp_avg"].lerp_(weight.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(square, 1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_()
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] / (1 - beta1 ** state["step"])
                weight.sub_((state["exp_avg"] * rate).div_(root.add_(group["eps"])))


def make_optimizer(parameters: Parameters, config: OptimConfig) -> Optimizer:
    """Make the optimiser that the config names, for these parameters."""
    make = OPTIMIZERS[config.name]
    return make(parameters, **{name: getattr(config, name) for name in parameters_of(make)})


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of the update from `step` to `step + 1`, of `steps` updates."""
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
"""Factors on the learning rate by name. `progress` is the fraction of the training after the
warm-up that is done, from 0 to 1."""
