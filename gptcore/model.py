"""GPT-2 in plain PyTorch, and the head that turns its hidden states into a loss.

Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*: token and position
embeddings, pre-LN blocks, a final LayerNorm, and an output head tied to the token embedding. Knobs
change the tying and the place of LayerNorm. There is no dropout.

The suffix of a tensor's name is its shape: B sequences, T positions, D = d_model, H heads,
C = D / H, E = 3 D, V = vocab_size, N = B * T tokens, G groups of tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.config import ModelConfig
from gptcore.precision import DTYPES, products


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position attends to itself and to earlier positions."""

    attend: Callable[..., Tensor] = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return what attention adds to the residual stream, [B, T, D]."""
        q, k, v = split_heads(self.qkv(x_BTD), self.n_head)
        y_BHTC = self.attend(q, k, v, is_causal=True)
        return self.proj(y_BHTC.transpose(1, 2).flatten(2))


def split_heads(qkv_BTE: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a merged product, [..., B, T, 3 D], into Q, K and V, each [..., B, H, T, D / H]."""
    q, k, v = qkv_BTE.unflatten(-1, (3, n_head, -1)).movedim(-3, 0).transpose(-3, -2)
    return q, k, v


class MLP(nn.Module):
    """Two linear layers with a GELU between them; the hidden width is 4 d_model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return what the MLP adds to the residual stream, [B, T, D]."""
        return self.proj(F.gelu(self.fc(x_BTD)))


class Block(nn.Module):
    """Attention and MLP, each a branch f of the residual stream x, combined by `model.norm`.

    pre: x + f(LN(x)) (Radford et al. 2019).
    post: LN(x + f(x)) (Vaswani et al. 2017).
    deepnet: LN(alpha x + f(x)) with alpha = (2 n_layer)^(1/4) (Wang et al. 2022, the values for a
    model that has only a decoder).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.alpha = (2 * config.n_layer) ** 0.25 if config.norm == "deepnet" else 1.0
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the residual stream after the block, [B, T, D]."""
        for norm, branch in ((self.ln_1, self.attn), (self.ln_2, self.mlp)):
            if self.pre:
                x_BTD = x_BTD + branch(norm(x_BTD))
            else:
                x_BTD = norm(self.alpha * x_BTD + branch(x_BTD))
        return x_BTD


class GPT(nn.Module):
    """GPT-2 from token ids to final hidden states; head_loss continues to the loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # With `norm` post and deepnet, the last block already ends with a LayerNorm.
        self.ln_f = nn.LayerNorm(config.d_model) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.wte.weight

    @property
    def tied(self) -> bool:
        """Whether the head and the token embedding are one tensor."""
        return self.head.weight is self.wte.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the hidden states, [B, T, D], after the final LayerNorm; T is at most context."""
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        return self.trunk(self.wte(ids_BT) + self.wpe(positions_T))

    def trunk(self, x_BTD: Tensor) -> Tensor:
        """Run what lies between the embeddings and the head: the blocks and the final LayerNorm."""
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.ln_f(x_BTD)


@contextmanager
def module_outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the latest output of every module, by its name, while the context lasts."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.update({name: output})

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


class Part(NamedTuple):
    """One tensor of parameters, as the initialisation draws it and the probes measure it."""

    name: str  # blocks.0.attn.q
    kind: str  # q k v qkv proj fc mlp_proj wte wpe head, or bias ln_weight ln_bias
    layer: int | None  # None outside the blocks
    values: Tensor
    grad: Tensor | None = None  # of the same shape; None before the first backward pass


def parts_of(name: str, module: nn.Module) -> Iterator[Part]:
    """Yield the parameters that belong to the module itself, and not to a module inside it.

    The merged QKV weight is yielded as one part `qkv`, and as three parts `q`, `k` and `v`, which
    are views of it.

    Args:
        name: the name of the module in the model, such as `blocks.0.attn.qkv`.
    """
    path = name.split(".")
    layer = int(path[1]) if path[0] == "blocks" and len(path) > 1 else None
    for leaf, values in module.named_parameters(recurse=False):
        if isinstance(module, nn.LayerNorm):
            yield Part(f"{name}.{leaf}", f"ln_{leaf}", layer, values, values.grad)
        elif leaf == "bias":
            yield Part(f"{name}.bias", "bias", layer, values, values.grad)
        elif path[-1] == "qkv":
            yield Part(name, "qkv", layer, values, values.grad)
            grads = [None] * 3 if values.grad is None else values.grad.chunk(3)
            for kind, rows, grad in zip("qkv", values.chunk(3), grads, strict=True):
                yield Part(name.removesuffix("qkv") + kind, kind, layer, rows, grad)
        else:
            kind = "mlp_proj" if path[-2:] == ["mlp", "proj"] else path[-1]
            yield Part(name, kind, layer, values, values.grad)


class HeadOutput(NamedTuple):
    """What the head computes from hidden states and targets."""

    loss: Tensor  # [], mean cross-entropy, nats per token
    log_z_BT: Tensor  # log of the sum of exp(logits)
    grad_BTD: Tensor  # gradient of the loss with respect to the hidden states


CHUNK_AND_TILE = {"cpu": (256, 1024), "cuda": (2048, 1 << 20)}
"""Tokens in a chunk and vocabulary entries in a tile, by device. On a CPU, a tile of logits is 1 MB
in float32 and stays in the cache of a core. A GPU is faster with few large products."""


class Workspace:
    """Scratch memory of heads, which is kept from step to step.

    New memory of this size would have to be mapped and zeroed by the operating system at every
    step. Heads of different shapes have different memory, so that a CUDA graph finds its own again.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def empty(self, name: str, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the memory of this name and shape, with whatever was last written there."""
        key = (name, shape, dtype, device)
        if key not in self._kept:
            self._kept[key] = torch.empty(*shape, dtype=dtype, device=device)
        return self._kept[key]


@torch.no_grad()
def head_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    dtype: torch.dtype | None = None,
    workspace: Workspace | None = None,
) -> HeadOutput:
    """Compute the mean cross-entropy of next-token prediction, and its gradients, without autograd.

    The logits are z = h W^T. The gradient with respect to W is added to weight_VD.grad in place, so
    that no step allocates new memory as large as the vocabulary.

    The logits of all tokens never exist at once. With p = softmax(z) over N tokens,
    d loss / d z = (p - onehot) / N. For each chunk of tokens, exp(z) is computed in tiles of the
    vocabulary. The sums of exp(z) are Z, and its products with W and h are the gradients, which are
    scaled by 1 / Z afterwards: the softmax itself is never written. Every product reads or writes a
    tile that fits the cache of a core, and only plain copies move exp(z) to and from memory. This
    is why it is faster than the same arithmetic on full rows.

    Args:
        hidden_BTD: h, the final hidden states.
        weight_VD: W, the weight of the head.
        targets_BT: the ids of the next tokens.
        dtype: of logits, exp(z) and the factors of every product; by default the dtype of the
            weight. Z, and sums over tiles and chunks, always have the dtype of the weight.
        workspace: scratch memory of earlier calls; by default there is none.
    """
    workspace = workspace or Workspace()
    h_ND, y_N, w_VD = hidden_BTD.flatten(0, 1), targets_BT.flatten(), weight_VD.detach()
    (N, D), V = h_ND.shape, w_VD.shape[0]
    dtype = dtype or w_VD.dtype
    is_low = dtype != w_VD.dtype
    chunk, tile = CHUNK_AND_TILE[h_ND.device.type]
    if weight_VD.grad is None:
        weight_VD.grad = torch.zeros_like(w_VD)
    log_z_N, dh_ND, dw_VD = h_ND.new_empty(N), torch.empty_like(h_ND), weight_VD.grad
    one_tile = tile >= V  # the tile then holds the maximum, and the CPU need not wait for the GPU
    small_logits = not one_tile and _has_small_logits(h_ND, w_VD)
    empty = functools.partial(workspace.empty, dtype=dtype, device=h_ND.device)
    exp_VC = empty("exp", V, min(chunk, N))
    tile_TC = exp_VC if one_tile else empty("tile", tile, min(chunk, N))
    factor_VD = empty("weight", V, D).copy_(w_VD) if is_low else w_VD

    def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
        if is_low:
            sums += a @ b
        else:
            sums.addmm_(a, b)

    for start in range(0, N, chunk):
        h, y, log_z, dh = (every[start : start + chunk] for every in (h_ND, y_N, log_z_N, dh_ND))
        exp_tiles = exp_VC[:, : len(h)].split(tile)
        # exp(z) = 2^(z / ln 2): on a CPU, torch.exp2 takes a third of the time of torch.exp.
        h_in_bits = (h / math.log(2)).to(dtype)
        shift = h.new_zeros(len(h))
        if not small_logits and not one_tile:
            shift = (factor_VD @ h_in_bits.T).amax(0)
        total, dh_DC = h.new_zeros(len(h)), h.new_zeros(D, len(h))
        for w, exp in zip(factor_VD.split(tile), exp_tiles, strict=True):
            bits = torch.mm(w, h_in_bits.T, out=tile_TC[: len(w), : len(h)])
            if one_tile:
                shift = bits.amax(0)
            if not small_logits:
                bits -= shift
            torch.exp2(bits, out=exp)
            total += exp.sum(0, dtype=total.dtype)
            add_product(dh_DC, w.T, exp)
        log_z.copy_(total.log() + shift.to(total.dtype) * math.log(2))
        scale = (1 / (total * N))[:, None]
        dh.copy_(dh_DC.T * scale).sub_(w_VD[y], alpha=1 / N)
        scaled_h = (h * scale).to(dtype)
        for dw, exp in zip(dw_VD.split(tile), exp_tiles, strict=True):
            add_product(dw, exp if one_tile else tile_TC[: len(dw), : len(h)].copy_(exp), scaled_h)
        dw_VD.index_add_(0, y, h, alpha=-1 / N)
    loss = (log_z_N - (h_ND * w_VD[y_N]).sum(1)).mean()
    return HeadOutput(loss, log_z_N.view_as(targets_BT), dh_ND.view_as(hidden_BTD))


def stacked_rows(ids_KX: Tensor, V: int) -> Tensor:
    """Return the row of each model's token in tables of V rows that lie one after the other."""
    first_K = V * torch.arange(len(ids_KX), device=ids_KX.device)
    return ids_KX + first_K.view(-1, *[1] * (ids_KX.dim() - 1))


@torch.no_grad()
def head_losses(
    hidden_KBTD: Tensor,
    weight_KVD: Tensor,
    targets_KBT: Tensor,
    dtype: torch.dtype,
    workspace: Workspace,
) -> list[HeadOutput]:
    """Compute head_loss of K models in one set of calls, which needs K times the memory.

    This is for a device whose tile holds the vocabulary. The gradient is added to weight_KVD.grad.
    See head_loss for the arguments.
    """
    h_KND, y_KN, w_KVD = hidden_KBTD.flatten(1, 2), targets_KBT.flatten(1), weight_KVD.detach()
    (K, N, D), V, dw_KVD = h_KND.shape, w_KVD.shape[1], weight_KVD.grad
    assert dw_KVD is not None
    chunk, _ = CHUNK_AND_TILE[h_KND.device.type]
    factor_KVD = w_KVD
    if dtype != w_KVD.dtype:
        factor_KVD = workspace.empty("weight", K, V, D, dtype=dtype, device=w_KVD.device)
        factor_KVD.copy_(w_KVD)
    rows_KN = stacked_rows(y_KN, V)
    target_KND = w_KVD.flatten(0, 1)[rows_KN]
    log_z_KN, dh_KND = h_KND.new_empty(K, N), torch.empty_like(h_KND)
    for start in range(0, N, chunk):
        of = slice(start, start + chunk)
        h_KCD = h_KND[:, of]
        exp_KVC = workspace.empty("exp", K, V, h_KCD.shape[1], dtype=dtype, device=h_KCD.device)
        torch.bmm(factor_KVD, (h_KCD / math.log(2)).to(dtype).mT, out=exp_KVC)
        shift_K1C = exp_KVC.amax(1, keepdim=True)
        exp_KVC.sub_(shift_K1C).exp2_()
        total_KC = exp_KVC.sum(1, dtype=w_KVD.dtype)
        log_z_KN[:, of] = total_KC.log() + shift_K1C[:, 0].to(total_KC.dtype) * math.log(2)
        scale_KC1 = (1 / (total_KC * N))[..., None]
        dh_KDC = torch.bmm(factor_KVD.mT, exp_KVC).to(w_KVD.dtype)
        dh_KND[:, of] = (dh_KDC.mT * scale_KC1).sub_(target_KND[:, of], alpha=1 / N)
        scaled_KCD = (h_KCD * scale_KC1).to(dtype)
        if dtype == dw_KVD.dtype:
            dw_KVD.baddbmm_(exp_KVC, scaled_KCD)
        else:
            dw_KVD += torch.bmm(exp_KVC, scaled_KCD)
    dw_KVD.flatten(0, 1).index_add_(0, rows_KN.flatten(), h_KND.flatten(0, 1), alpha=-1 / N)
    loss_K = (log_z_KN - (h_KND * target_KND).sum(2)).mean(1)
    return [
        HeadOutput(loss, log_z_N.view(targets_KBT.shape[1:]), dh_ND.view(hidden_KBTD.shape[1:]))
        for loss, log_z_N, dh_ND in zip(loss_K, log_z_KN, dh_KND, strict=True)
    ]


def head_errors(
    hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, precision: str
) -> tuple[float, float]:
    """Measure the error that a `train.precision` causes in the head, compared with float32.

    Returns:
        The absolute error of the loss, in nats, and the larger relative error of the two gradients,
        each the L2 norm of the error over the L2 norm of the gradient.
    """
    losses, gradients = [], []
    for each in ("float32", precision):
        weight = weight_VD.detach()  # a new tensor on the same memory, which has no gradient yet
        with products(each):
            head = head_loss(hidden_BTD, weight, targets_BT, DTYPES[each][0])
        assert weight.grad is not None
        losses.append(head.loss)
        gradients.append((head.grad_BTD, weight.grad))
    errors = [((a - b).norm() / a.norm()).item() for a, b in zip(*gradients, strict=True)]
    return abs((losses[0] - losses[1]).item()), max(errors)


def softmax_sums(hidden_ND: Tensor, weight_VD: Tensor, member_GV: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the probabilities of groups of tokens, without gradient.

    Args:
        member_GV: 1 where a token is in a group, else 0.

    Returns:
        The probability of each group, [N, G], and log Z, [N].
    """
    chunk, tile = CHUNK_AND_TILE[hidden_ND.device.type]
    if len(hidden_ND) > chunk:
        parts = [softmax_sums(part, weight_VD, member_GV) for part in hidden_ND.split(chunk)]
        sums, log_z = zip(*parts, strict=True)
        return torch.cat(sums), torch.cat(log_z)
    tiles = weight_VD.split(tile)
    shift_N = hidden_ND.new_zeros(len(hidden_ND))
    # In a GPU's tiles the shift costs less than waiting for the answer would.
    if tile == CHUNK_AND_TILE["cuda"][1] or not _has_small_logits(hidden_ND, weight_VD):
        shift_N = torch.stack([(w @ hidden_ND.T).amax(0) for w in tiles]).amax(0)
    total_N, sums_GN = torch.zeros_like(shift_N), hidden_ND.new_zeros(len(member_GV), len(shift_N))
    bits_DN, shift_bits_N = (hidden_ND / math.log(2)).T, shift_N / math.log(2)
    for w, member in zip(tiles, member_GV.split(len(tiles[0]), dim=1), strict=True):
        bits = (w @ bits_DN).sub_(shift_bits_N)
        exp = torch.exp2(bits, out=bits)
        total_N += exp.sum(0)
        sums_GN.addmm_(member, exp)
    return (sums_GN / total_N).T, total_N.log() + shift_N


def _has_small_logits(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Return whether exp(z) cannot overflow, so that no maximum has to be subtracted from z.

    |z| <= |h| |w|. Below 40, exp(|z|) and its sum over the vocabulary are far inside float32.
    """
    return (hidden_ND.norm(dim=1).max() * weight_VD.norm(dim=1).max()).item() < 40.0
