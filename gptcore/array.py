"""Models of one shape that train side by side, each as if it were alone.

On a GPU that a model is too small to fill, by one call an operation (VMAP), a step of K of them
takes little longer than of one.
A trial by itself is an array of one. Shapes as in gptcore.model, and: K models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gptcore.config import OptimConfig
from gptcore.model import GPT, CausalSelfAttention, HeadOutput, loss_of
from gptcore.optimizers import make_optimizer

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bf16-head": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
"""Name of a precision -> dtype of the products of the head, and of what lies before it. What adds a
bias rounds its sum to bfloat16 as well, but not under vmap."""

VMAP = {"cpu": False, "cuda": True}
"""Whether the trunks of an array are gone through together on a device. On a CPU that is no faster
than one by one, which gives each trial the very bits that it has alone."""

State = Mapping[str, Any]
"""A model and its optimiser's state as plain tensors, whatever array they come from."""


class ModelArray:
    """Models with their optimiser. Every parameter and its gradient is held stacked, [K, ...]; the
    models' own are views of that, so that each can be looked at, and used, as any model."""

    def __init__(
        self, models: Sequence[GPT], config: OptimConfig, precision: str = "float32"
    ) -> None:
        """The models begin as they are, and become the array's."""
        self.models, self.config = list(models), config
        self.head_dtype, self.trunk_dtype = DTYPES[precision]
        self.parameters: dict[str, Tensor] = {
            name: nn.Parameter(
                torch.stack([model.get_parameter(name) for model in models]).detach()
            )
            for name, _ in models[0].named_parameters()
        }
        for name, stacked in self.parameters.items():
            # Kept from step to step: new memory would have to be found and zeroed at each.
            stacked.grad = torch.zeros_like(stacked)
            for model, values, grad in zip(models, stacked.detach(), stacked.grad, strict=True):
                own = model.get_parameter(name)
                own.data, own.grad = values, grad
        self.optimizer = make_optimizer(self.parameters, config)
        vmapped = len(models) > 1 and VMAP[models[0].wte.weight.device.type]
        self.side_by_side = _SideBySide(models[0]) if vmapped else None

    def gradients(self, ids_KBT: Tensor, targets_KBT: Tensor) -> tuple[Tensor, list[HeadOutput]]:
        """Make the gradient of every model's own loss; -> the hidden states, [K, B, T, D], without
        gradient, and what each model's head gives.

        Both ends of a model are as large as the vocabulary. Their gradients are written where they
        belong, and autograd is left what lies between.
        """
        self.optimizer.zero_grad(set_to_none=False)
        K, _, T = ids_KBT.shape
        table_KVD, position_KTD = self.parameters["wte.weight"], self.parameters["wpe.weight"]
        assert table_KVD.grad is not None
        assert position_KTD.grad is not None
        V = table_KVD.shape[1]
        rows_KBT = ids_KBT + V * torch.arange(K, device=ids_KBT.device)[:, None, None]
        with torch.no_grad():
            x_KBTD = table_KVD.flatten(0, 1)[rows_KBT] + position_KTD[:, None, :T]
        with torch.autocast(
            ids_KBT.device.type, self.trunk_dtype, enabled=self.trunk_dtype != torch.float32
        ):
            hidden_KBTD = self._trunk(x_KBTD.requires_grad_())
        heads = [
            loss_of(hidden_BTD, model.head.weight, targets_BT, self.head_dtype)
            for model, hidden_BTD, targets_BT in zip(
                self.models, hidden_KBTD.detach(), targets_KBT, strict=True
            )
        ]
        hidden_KBTD.backward(torch.stack([head.grad_BTD for head in heads]))
        assert x_KBTD.grad is not None
        table_KVD.grad.flatten(0, 1).index_add_(0, rows_KBT.flatten(), x_KBTD.grad.flatten(0, 2))
        position_KTD.grad[:, :T] += x_KBTD.grad.sum(1)
        return hidden_KBTD.detach(), heads

    def _trunk(self, x_KBTD: Tensor) -> Tensor:
        trunk = self.side_by_side
        if trunk is None:
            return torch.stack(
                [model.trunk(x_BTD) for model, x_BTD in zip(self.models, x_KBTD, strict=True)]
            )
        parameters = {f"model.{name}": stacked for name, stacked in self.parameters.items()}

        def of_one(parameters: dict[str, Tensor], x_BTD: Tensor) -> Tensor:
            hidden_BTD: Tensor = functional_call(trunk, parameters, x_BTD)
            return hidden_BTD

        hidden_KBTD: Tensor = vmap(of_one)(parameters, x_KBTD)
        return hidden_KBTD

    def update(self, lr: float, clip: float, norm_K: Tensor) -> None:
        """Change the parameters by their gradients, which are scaled to a norm of `clip` where a
        model's is larger; 0 does not clip."""
        if clip:
            scale_K = (clip / (norm_K + 1e-6)).clamp(max=1.0).float()
            for stacked in self.parameters.values():
                assert stacked.grad is not None
                stacked.grad *= scale_K.view(-1, *[1] * (stacked.dim() - 1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def norms(self) -> Tensor:
        """L2 norm of each model's whole gradient, [K], float64.

        Row by row first: a float32 sum over a whole embedding loses a thousandth.
        """
        grads = [stacked.grad for stacked in self.parameters.values() if stacked.grad is not None]
        K = len(self.models)
        return torch.cat([grad.norm(dim=-1).view(K, -1) for grad in grads], 1).double().norm(dim=1)

    def state(self, k: int) -> State:
        """All that model k needs to go on, in this array or another one; its tensors are copies."""
        optimizer = self.optimizer.state_dict()
        return {
            "model": {
                name: values.detach().clone() for name, values in self.models[k].named_parameters()
            },
            "optimizer": {
                **optimizer,
                "state": {
                    index: {
                        name: value[k].clone() if _is_of_models(value) else value
                        for name, value in its.items()
                    }
                    for index, its in optimizer["state"].items()
                },
            },
        }

    def load(self, states: Sequence[State]) -> None:
        """Bring every model to its state; all have had as many updates."""
        with torch.no_grad():
            for model, state in zip(self.models, states, strict=True):
                for name, values in model.named_parameters():
                    values.copy_(state["model"][name])
        of_each = [state["optimizer"]["state"] for state in states]
        stacked = {
            index: {
                name: torch.stack([state[index][name] for state in of_each])
                if _is_of_models(value)
                else value
                for name, value in its.items()
            }
            for index, its in of_each[0].items()
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": stacked})


def _is_of_models(value: object) -> bool:
    """Whether each model has its own of an optimiser's state; a count of updates is a scalar."""
    return isinstance(value, Tensor) and value.dim() > 0


class _SideBySide(nn.Module):
    """The trunk of a model like this one, as functional_call and vmap take it: without values."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to("meta")
        for module in self.model.modules():
            if isinstance(module, CausalSelfAttention):
                module.attend = _attend_side_by_side

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.model.trunk(x_BTD)


def _attend_side_by_side(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    attended: Tensor = _Attention.apply(q, k, v, is_causal)
    return attended


class _Attention(torch.autograd.Function):
    """Attention for vmap: to it a further model is as good as a further sequence.

    PyTorch's own rule goes through the models one by one on a CPU, and on a GPU keeps nothing for
    the backward pass, since under vmap no tensor says that it wants a gradient.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        raise NotImplementedError("for use under vmap alone")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, is_causal: bool
    ) -> tuple[Tensor, int]:
        """The models' own dimension is joined to that of their sequences, and parted again."""
        q, k, v = (
            x.movedim(dim, 0).flatten(0, 1) for x, dim in zip((q, k, v), in_dims[:3], strict=True)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return y.unflatten(0, (info.batch_size, -1)), 0
