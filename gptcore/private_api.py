"""The parts of PyTorch that its documentation does not promise, all in one module.

Each use has its reason. They are the same in PyTorch 2.13.0, which is installed, and 2.11.0.
tests/test_private_api_torch.py fails, with a sentence, when another version changes one of them.
"""

from __future__ import annotations

from inspect import unwrap

import torch
from torch import Tensor, nn


class Optimizer(torch.optim.Optimizer):
    """PyTorch's base class of optimisers, without the import of PyTorch's compiler.

    Reason: PyTorch wraps these methods to exclude them from compilation, and the wrappers import
    `torch._dynamo`, which costs every process two seconds. Nothing is compiled here. The wrappers
    keep the method itself as `__wrapped__`, where inspect.unwrap finds it.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


# The wrapper of `step` imports the compiler too, and turns gradients off, as no_grad does here.
class AdamW(Optimizer, torch.optim.AdamW):
    """torch.optim.AdamW without the import of PyTorch's compiler."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class Adam(Optimizer, torch.optim.Adam):
    """torch.optim.Adam without the import of PyTorch's compiler."""

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class SGD(Optimizer, torch.optim.SGD):
    """torch.optim.SGD without the import of PyTorch's compiler."""

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


def is_shaped_like_parameter(entry: object) -> bool:
    """Return whether an entry of an optimiser's state has the shape of the parameter.

    Reason: an array of K models has to split the state of its optimiser into K states. PyTorch does
    not document what its optimisers store: moments, in the shape of the parameter, and the number
    of updates, a scalar, which all models share.
    """
    return isinstance(entry, Tensor) and entry.dim() > 0


def share_memory_with(parameter: nn.Parameter, values: Tensor, grad: Tensor) -> None:
    """Make a parameter and its gradient views of tensors of the same shape.

    Reason: the parameter has to stay the object that its module, or two tied modules, refer to.
    PyTorch does not document the assignment to `Tensor.data` by which this is possible.
    """
    parameter.data, parameter.grad = values, grad


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let the updates of an optimiser be recorded in a CUDA graph, with an lr that can change.

    Reason: PyTorch documents `capturable` and a tensor as the learning rate for the constructor.
    Both are kept in the parameter groups, where they are set here for all optimisers alike. The
    updates before the recording are not recorded, of which PyTorch would warn.
    """
    for group in optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
    vars(optimizer)["_warned_capturable_if_run_uncaptured"] = True
