"""Arrays: models of one shape that train together, each as if it were the only one.

A small model does not fill a GPU. There, a training step of K models takes little longer than a
step of one model, because vmap makes one call of each operation for all of them. A trial that runs
alone is an array of one model. Shapes are those of gptcore.model, with K models in front.
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
from gptcore.model import (
    GPT,
    CausalSelfAttention,
    HeadOutput,
    Workspace,
    head_loss,
    head_losses,
    module_outputs,
    stacked_rows,
)
from gptcore.optimizers import make_optimizer
from gptcore.precision import DTYPES, products
from gptcore.private_api import is_shaped_like_parameter, make_capturable, share_memory_with

RUNS_TOGETHER = {"cpu": False, "cuda": True}
"""Whether the models of an array are computed and measured together, by type of device. On a CPU
this would not be faster, and one after another each trial keeps the exact bits it has alone."""

HEADS_TOGETHER_FROM = {torch.float32: 16, torch.bfloat16: 32}
"""Number of models from which on their heads are computed in one set of calls, by the heads' dtype.
On an H200, a step of 32 models is 1.26 times as fast so in float32, and 1.03 times in bfloat16."""

State = Mapping[str, Any]
"""The state of one model and of its optimiser, as plain tensors, from an array of any size."""


class ModelArray:
    """Models and their optimiser.

    Every parameter and its gradient is stored stacked over the models, [K, ...]. The parameters of
    each model are views of it, so each model can be read and used like any other.
    """

    def __init__(
        self,
        models: Sequence[GPT],
        config: OptimConfig,
        precision: str = "float32",
        capturable: bool = False,
    ) -> None:
        """Stack the parameters of the models, which from now on belong to the array.

        Args:
            models: of one shape, on one device; they keep their values.
            config: of the optimiser.
            precision: as `train.precision`.
            capturable: whether updates can be recorded, as gptcore.replay does. The learning rate
                is then a tensor that changes in place.
        """
        self.models, self.config = list(models), config
        self.workspace = Workspace()
        self.precision, (self.head_dtype, self.trunk_dtype) = precision, DTYPES[precision]
        self.parameters: dict[str, Tensor] = {
            name: nn.Parameter(
                torch.stack([model.get_parameter(name) for model in models]).detach()
            )
            for name, _ in models[0].named_parameters()
        }
        for name, stacked in self.parameters.items():
            # Kept from step to step, because to find and zero new memory at each step is slow.
            stacked.grad = torch.zeros_like(stacked)
            for model, values, grad in zip(models, stacked.detach(), stacked.grad, strict=True):
                share_memory_with(model.get_parameter(name), values, grad)
        self.optimizer = make_optimizer(self.parameters, config)
        if capturable:
            make_capturable(self.optimizer, models[0].wte.weight.device)
        vmapped = len(models) > 1 and RUNS_TOGETHER[models[0].wte.weight.device.type]
        self.vmapped_trunk = _VmappedTrunk(models[0]) if vmapped else None

    def gradients(self, ids_KBT: Tensor, targets_KBT: Tensor) -> tuple[Tensor, list[HeadOutput]]:
        """Compute the gradient of every model's loss into the gradients of the parameters.

        The embeddings and the head are as large as the vocabulary. Their gradients are computed
        here without autograd, straight into place; autograd does the trunk between them.

        Returns:
            The final hidden states, [K, B, T, D], without gradient, and the output of each model's
            head.
        """
        with products(self.precision):
            return self._gradients(ids_KBT, targets_KBT)

    def _gradients(self, ids_KBT: Tensor, targets_KBT: Tensor) -> tuple[Tensor, list[HeadOutput]]:
        self.optimizer.zero_grad(set_to_none=False)
        T = ids_KBT.shape[2]
        table_KVD, position_KTD = self.parameters["wte.weight"], self.parameters["wpe.weight"]
        assert table_KVD.grad is not None
        assert position_KTD.grad is not None
        rows_KBT, x_KBTD = self._embed(ids_KBT)
        # No weight is used twice in a step, and a cached copy must not outlive the step.
        with torch.autocast(
            ids_KBT.device.type,
            self.trunk_dtype,
            enabled=self.trunk_dtype != torch.float32,
            cache_enabled=False,
        ):
            hidden_KBTD = self._trunk(x_KBTD.requires_grad_())
        heads = self._heads(hidden_KBTD.detach(), targets_KBT)
        hidden_KBTD.backward(torch.stack([head.grad_BTD for head in heads]))
        assert x_KBTD.grad is not None
        table_KVD.grad.flatten(0, 1).index_add_(0, rows_KBT.flatten(), x_KBTD.grad.flatten(0, 2))
        position_KTD.grad[:, :T] += x_KBTD.grad.sum(1)
        return hidden_KBTD.detach(), heads

    @torch.no_grad()
    def _embed(self, ids_KBT: Tensor) -> tuple[Tensor, Tensor]:
        """Return each id's row in the stacked table, [K, B, T], and the first block's input."""
        table_KVD, position_KTD = self.parameters["wte.weight"], self.parameters["wpe.weight"]
        rows_KBT = stacked_rows(ids_KBT, table_KVD.shape[1])
        x_KBTD = table_KVD.flatten(0, 1)[rows_KBT] + position_KTD[:, None, : ids_KBT.shape[2]]
        return rows_KBT, x_KBTD

    def _heads(self, hidden_KBTD: Tensor, targets_KBT: Tensor) -> list[HeadOutput]:
        if self.vmapped_trunk and len(self.models) >= HEADS_TOGETHER_FROM[self.head_dtype]:
            stacked = self.parameters["wte.weight" if self.models[0].tied else "head.weight"]
            return head_losses(hidden_KBTD, stacked, targets_KBT, self.head_dtype, self.workspace)
        return [
            head_loss(hidden_BTD, model.head.weight, targets_BT, self.head_dtype, self.workspace)
            for model, hidden_BTD, targets_BT in zip(
                self.models, hidden_KBTD, targets_KBT, strict=True
            )
        ]

    def _trunk(self, x_KBTD: Tensor) -> Tensor:
        trunk = self.vmapped_trunk
        if trunk is None:
            return torch.stack(
                [model.trunk(x_BTD) for model, x_BTD in zip(self.models, x_KBTD, strict=True)]
            )
        parameters = {f"model.{name}": stacked for name, stacked in self.parameters.items()}

        def one_trunk(parameters: dict[str, Tensor], x_BTD: Tensor) -> Tensor:
            hidden_BTD: Tensor = functional_call(trunk, parameters, x_BTD)
            return hidden_BTD

        hidden_KBTD: Tensor = vmap(one_trunk)(parameters, x_KBTD)
        return hidden_KBTD

    @torch.no_grad()
    def outputs(self, ids_KBT: Tensor, of: slice = slice(None)) -> dict[str, Tensor]:
        """Run models, by default all, and return the outputs of modules, [K, ...], by their name.

        `embedding` is the input of the first block, and `hidden` the final hidden states.
        """
        trunk = self.vmapped_trunk
        if trunk is None:
            found = [
                _outputs(model, ids_BT)
                for model, ids_BT in zip(self.models[of], ids_KBT, strict=True)
            ]
            if len(found) == 1:
                return {name: output[None] for name, output in found[0].items()}
            return {name: torch.stack([outputs[name] for outputs in found]) for name in found[0]}
        _, x_KBTD = self._embed(ids_KBT)

        def one_trunk(parameters: dict[str, Tensor], x_BTD: Tensor) -> dict[str, Tensor]:
            with module_outputs(trunk.model) as outputs:
                hidden_BTD = functional_call(trunk, parameters, x_BTD)
            return {**outputs, "hidden": hidden_BTD}

        parameters = {f"model.{name}": stacked for name, stacked in self.parameters.items()}
        return {**vmap(one_trunk)(parameters, x_KBTD), "embedding": x_KBTD}

    def update(self, lr: float | Tensor, clip: float, norm_K: Tensor) -> None:
        """Update the parameters by their gradients.

        Args:
            lr: learning rate; a tensor, [], if the array is capturable.
            clip: the largest norm of a model's gradient, which is scaled down to it; 0 for no
                limit.
            norm_K: what norms() returns.
        """
        if clip:
            scale_K = (clip / (norm_K + 1e-6)).clamp(max=1.0).float()
            for stacked in self.parameters.values():
                assert stacked.grad is not None
                stacked.grad *= scale_K.view(-1, *[1] * (stacked.dim() - 1))
        for group in self.optimizer.param_groups:
            if isinstance(lr, Tensor):
                group["lr"].copy_(lr)
            else:
                group["lr"] = lr
        self.optimizer.step()

    def norms(self) -> Tensor:
        """Return the L2 norm of each model's gradient, over all its parameters, [K], float64."""
        # Row by row first: a float32 sum over all of an embedding is wrong by a thousandth.
        grads = [stacked.grad for stacked in self.parameters.values() if stacked.grad is not None]
        K = len(self.models)
        return torch.cat([grad.norm(dim=-1).view(K, -1) for grad in grads], 1).double().norm(dim=1)

    def state(self, k: int) -> State:
        """Return all that model k needs to continue in this or another array, as copies."""
        optimizer = self.optimizer.state_dict()
        return {
            "model": {
                name: values.detach().clone() for name, values in self.models[k].named_parameters()
            },
            "optimizer": {
                **optimizer,
                "state": {
                    index: {
                        name: entry[k].clone() if is_shaped_like_parameter(entry) else entry
                        for name, entry in entries.items()
                    }
                    for index, entries in optimizer["state"].items()
                },
            },
        }

    def load(self, states: Sequence[State]) -> None:
        """Set every model, and the optimiser, to these states, one per model.

        All models must have made the same number of updates.
        """
        with torch.no_grad():
            for model, state in zip(self.models, states, strict=True):
                for name, values in model.named_parameters():
                    values.copy_(state["model"][name])
        optimizer_states = [state["optimizer"]["state"] for state in states]
        stacked = {
            index: {
                name: torch.stack([state[index][name] for state in optimizer_states])
                if is_shaped_like_parameter(entry)
                else entry
                for name, entry in entries.items()
            }
            for index, entries in optimizer_states[0].items()
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": stacked})


def _outputs(model: GPT, ids_BT: Tensor) -> dict[str, Tensor]:
    """Run one model, and return what ModelArray.outputs returns."""
    with module_outputs(model) as outputs:
        hidden_BTD = model(ids_BT)
    return {**outputs, "embedding": outputs["wte"] + outputs["wpe"], "hidden": hidden_BTD}


class _VmappedTrunk(nn.Module):
    """The trunk of a model, without parameter values, for functional_call under vmap."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to("meta")
        for module in self.model.modules():
            if isinstance(module, CausalSelfAttention):
                module.attend = _attend_under_vmap

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.model.trunk(x_BTD)


def _attend_under_vmap(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    attended: Tensor = _VmappedAttention.apply(q, k, v, is_causal)
    return attended


class _VmappedAttention(torch.autograd.Function):
    """Attention under vmap, which treats the models as further sequences of one batch.

    PyTorch's own rule for vmap computes the models one after another on a CPU. On a GPU it keeps
    nothing for the backward pass, because under vmap no tensor says that it needs a gradient.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        raise NotImplementedError("this attention works only under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, is_causal: bool
    ) -> tuple[Tensor, int]:
        """Merge the dimension of the models with that of the sequences, and split it again."""
        q, k, v = (
            x.movedim(dim, 0).flatten(0, 1) for x, dim in zip((q, k, v), in_dims[:3], strict=True)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return y.unflatten(0, (info.batch_size, -1)), 0
