"""What gptcore uses of PyTorch without a promise is still there, in this version of PyTorch."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from gptcore import private_api
from helpers.paths import ROOT


def changed(what):
    """The sentence of a failure."""
    return f"PyTorch {torch.__version__} has changed {what}: adapt gptcore/private_api.py"


UNWRAPPED = [
    *[(torch.optim.Optimizer, private_api.Optimizer, name)
      for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad")],
    *[(getattr(torch.optim, name), getattr(private_api, name), "step")
      for name in ("AdamW", "Adam", "SGD")],
]  # fmt: skip
OPTIMIZERS = {"AdamW": {}, "Adam": {}, "SGD": {"momentum": 0.9}}


@pytest.mark.parametrize(("theirs", "ours", "method"), UNWRAPPED)
def test_the_methods_of_optimizers_are_wrapped_once_more(theirs, ours, method):
    wrapped = getattr(theirs, method)
    what = f"how {theirs.__name__}.{method} is wrapped"
    assert hasattr(wrapped, "__wrapped__"), changed(what)
    assert method in vars(ours)


ALL = """
import sys
import torch
from gptcore import private_api

for name in ("AdamW", "Adam", "SGD"):
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.ones(2, 3)
    optimizer = getattr(private_api, name)([weight], lr=0.1, fused=True)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad(set_to_none=False)
print("torch._dynamo" in sys.modules)
"""


def test_no_method_of_an_optimizer_imports_pytorchs_compiler():
    ended = subprocess.run([sys.executable, "-c", ALL], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "False\n", (
        changed("which methods of an optimiser import torch._dynamo") + f"\n{ended.stderr}"
    )


def stepped(module, name):
    """A parameter after three updates, and its optimiser."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4, 5, generator=generator))
    optimizer = getattr(module, name)(
        [weight], lr=0.1, weight_decay=0.1, fused=True, **OPTIMIZERS[name]
    )
    for _ in range(3):
        weight.grad = torch.randn(3, 4, 5, generator=generator)
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_unwrapped_step_gives_the_bits_of_pytorchs_own(name):
    ours, _ = stepped(private_api, name)
    theirs, _ = stepped(torch.optim, name)
    assert torch.equal(ours, theirs), changed(f"what the wrapper of {name}.step does")
    assert ours.grad_fn is None
    assert ours.is_leaf, changed(f"how {name}.step turns gradients off")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_is_scalars_and_tensors_like_the_parameter(name):
    weight, optimizer = stepped(private_api, name)
    entries = optimizer.state_dict()["state"][0]
    assert entries
    for entry, value in entries.items():
        alike = private_api.is_shaped_like_parameter(value)
        fits = value.shape == weight.shape if alike else torch.as_tensor(value).dim() == 0
        assert fits, changed(f"the state that {name} stores as {entry}")
    # The numbers of updates are shared by the models of an array, the moments are not.
    assert any(map(private_api.is_shaped_like_parameter, entries.values()))


def test_a_parameter_can_share_memory_with_a_part_of_another_tensor():
    stacked, grads = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    embedding, head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
    head.weight = embedding.weight
    private_api.share_memory_with(embedding.weight, stacked[1], grads[1])
    what = changed("the assignment to Tensor.data")
    assert head.weight is embedding.weight, what
    stacked += 1
    grads += 2
    assert torch.equal(head.weight, torch.ones(4, 3)), what
    assert torch.equal(head.weight.grad, torch.full((4, 3), 2.0)), what
