"""Probes: functions that measure a model during training, and return rows.

Probes run when the loss and the gradient of a step are known, and before its update. So everything
recorded at step k describes the model after k updates. Probes only read. The effect of an update is
measured after it, by update_rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptcore.config import ProbesConfig
from gptcore.model import GPT, CausalSelfAttention, Part, parts_of
from gptcore.records import (
    ActivationRow,
    AttentionRow,
    GroupWeightRow,
    HistogramRow,
    Row,
    SpectrumRow,
    TextLossRow,
    TokenGroupRow,
    TokensRow,
    UpdateRow,
    WeightRow,
)
from gptcore.token_groups import TokenGroups
from gptcore.token_probs import Reading, group_weight_rows, read, token_group_rows, tokens_row

HISTOGRAM_EDGES = [0.01 * math.sinh(u / 10) for u in range(-67, 68)]
"""Edges of the bins in all runs. A bin is 0.001 wide near 0, and a tenth of its value far from 0.
The outer edges are +-4.06."""

TILE = 1 << 16
"""The number of elements that are processed at a time."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What probes can read at one step of a trial."""

    step: int
    model: GPT
    initial: Mapping[str, Tensor]  # values at step 0 of the tensors of model_parts, by name
    layers: Sequence[int]  # the blocks to measure
    groups: TokenGroups
    fixed_texts: Mapping[str, Tensor]  # windows of each text, [B, T + 1]
    batch: Reading

    @property
    def initial_head_VD(self) -> Tensor:
        """The weight of the head at step 0."""
        return self.initial["wte" if self.model.tied else "head"]

    @functools.cached_property
    def readings(self) -> dict[str, Reading]:
        """The output of the model on the fixed texts, computed once for all probes."""
        return {
            text: read(self.model, text, windows_BT[:, :-1], self.groups)
            for text, windows_BT in self.fixed_texts.items()
        }


@dataclass(frozen=True)
class Probe:
    """A function that returns rows, and the knob that says how often it runs."""

    rows: Callable[[Moment], Sequence[Row]]
    cadence: str | None  # a knob of ProbesConfig; None for the first and the last step only


def probes_due(config: ProbesConfig, step: int, *, last: bool) -> list[Probe]:
    """Return the probes that run at this step; `last` says whether it is the last one."""
    cadences = {
        name: getattr(config, probe.cadence) if probe.cadence else math.inf
        for name, probe in PROBES.items()
    }
    return [PROBES[name] for name, every in cadences.items() if last or step % every == 0]


@torch.no_grad()
def observe(moment: Moment, probes: Sequence[Probe]) -> list[Row]:
    """Run the probes, and return their rows."""
    return [row for probe in probes for row in probe.rows(moment)]


def model_parts(model: GPT, layers: Sequence[int]) -> list[Part]:
    """List the parameter tensors of these blocks, and those outside the blocks.

    The merged QKV weight is listed as one tensor and as its three parts. A tied head is left out,
    because it is the token embedding.
    """
    return [
        part
        for name, module in model.named_modules()
        for part in parts_of(name, module)
        if (part.layer is None or part.layer in layers) and (part.kind != "head" or not model.tied)
    ]


def weight_rows(moment: Moment) -> list[WeightRow]:
    """Measure every parameter tensor, its gradient, and its distance from step 0."""
    parts = model_parts(moment.model, moment.layers)
    grads = {part.name: part.grad for part in parts if part.grad is not None}
    return [
        WeightRow(
            step=moment.step,
            tensor=part.name,
            kind=part.kind,
            layer=part.layer,
            size=part.values.numel(),
            mean=mean,
            std=std,
            excess_kurtosis=None if math.isnan(kurtosis) else kurtosis,
            max_abs=max_abs,
            frobenius=math.sqrt(part.values.numel() * (std**2 + mean**2)),
            rms_displacement=displacement,
            cosine=cosine
            if math.isfinite(cosine)
            else None,  # x / 0 where the tensor is 0 at step 0
            grad_rms=grad_rms,
        )
        for part, (mean, std, kurtosis, max_abs, displacement, cosine, grad_rms) in _by_part(
            _statistics, parts, moment.initial, grads
        )
    ]


def _statistics(values_PN: Tensor, initial_PN: Tensor, grad_PN: Tensor) -> Tensor:
    """Compute the statistics of P tensors of N elements.

    Returns:
        [P, 7]: mean, std, excess kurtosis, max |.|, RMS displacement, cosine, RMS of the gradient.
    """
    mean_P1 = values_PN.mean(1, keepdim=True)
    # Subtract the mean first: E[x^2] - E[x]^2 loses digits where |mean| >> std.
    std_P1 = _mean(lambda values: (values - mean_P1).square(), values_PN)[:, None].sqrt()
    kurtosis_P = _mean(
        lambda values: ((values - mean_P1) / std_P1).square_().square_(), values_PN
    ).sub(3)
    mean_P, std_P = mean_P1.squeeze(1), std_P1.squeeze(1)
    # Not aminmax(dim=1), which is slow: it processes one element at a time.
    max_abs_P = torch.maximum(values_PN.amax(1), -values_PN.amin(1)).abs()  # avoids -0.0
    displacement_P, initial_P = _rms(values_PN, initial_PN), _rms(initial_PN)
    # The law of cosines: w . w0 = (|w|^2 + |w0|^2 - |w - w0|^2) / 2.
    square_P = std_P.square() + mean_P.square()
    product_P = (square_P + initial_P.square() - displacement_P.square()) / 2
    cosine_P = product_P / (square_P.sqrt() * initial_P)
    return torch.stack(
        [mean_P, std_P, kurtosis_P, max_abs_P, displacement_P, cosine_P, _rms(grad_PN)], dim=1
    )


def _mean(function: Callable[..., Tensor], *arguments_PN: Tensor) -> Tensor:
    """Return the mean of an elementwise function over each row, [P].

    It is computed in tiles, so that intermediate values stay in the cache.
    """
    P, N = arguments_PN[0].shape
    tiles = zip(*(values.split(max(1, TILE // P), dim=1) for values in arguments_PN), strict=True)
    return torch.stack([function(*tile).sum(1) for tile in tiles]).sum(0) / N


def _rms(values_PN: Tensor, minus_PN: Tensor | None = None) -> Tensor:
    """Return the root mean square of each row, or of its difference from `minus_PN`, [P]."""
    if minus_PN is None:
        return _mean(torch.square, values_PN).sqrt()
    return _mean(lambda values, minus: (values - minus).square_(), values_PN, minus_PN).sqrt()


def _by_part(
    statistics: Callable[..., Tensor], parts: Sequence[Part], *others: Mapping[str, Tensor]
) -> list[tuple[Part, list[float]]]:
    """Compute statistics of many tensors, all tensors of one size in one call.

    Most tensors are small, so that a call costs more than its elements. There is one copy from the
    device per size, and not one per number.

    Args:
        statistics: maps [P, N] values, and [P, N] of each of `others`, to [P, statistics].
        parts: the tensors.
        others: further tensors of the same shapes, by the name of the part.

    Returns:
        Each part with its statistics.
    """
    found: dict[str, list[float]] = {}
    by_size: dict[int, list[Part]] = {}
    for part in parts:
        by_size.setdefault(part.values.numel(), []).append(part)
    for same_size in by_size.values():
        columns = [[other[part.name] for part in same_size] for other in others]
        table = statistics(*map(_stacked, [[part.values for part in same_size], *columns]))
        found |= zip((part.name for part in same_size), table.tolist(), strict=True)
    return [(part, found[part.name]) for part in parts]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack P tensors to [P, N]. A single tensor, often a large one, is not copied."""
    if len(tensors) == 1:
        return tensors[0].reshape(1, -1)
    return torch.stack([tensor.flatten() for tensor in tensors])


def update_rows(
    step: int, model: GPT, layers: Sequence[int], before: Mapping[str, Tensor]
) -> list[UpdateRow]:
    """Measure the update of a step; `before` is what values_of returned before the update."""

    def sizes(values_PN: Tensor, before_PN: Tensor) -> Tensor:
        return torch.stack([_rms(values_PN, before_PN), _rms(before_PN)], dim=1)

    with torch.no_grad():
        return [
            UpdateRow(
                step=step,
                tensor=part.name,
                kind=part.kind,
                layer=part.layer,
                rms=rms,
                ratio=rms / rms_before if rms_before else None,
            )
            for part, (rms, rms_before) in _by_part(sizes, model_parts(model, layers), before)
        ]


def values_of(model: GPT, layers: Sequence[int]) -> dict[str, Tensor]:
    """Copy every tensor of model_parts; return the copies by name."""
    return {part.name: part.values.detach().clone() for part in model_parts(model, layers)}


def spectrum_rows(moment: Moment) -> list[SpectrumRow]:
    """Compute the largest singular value of every weight matrix W.

    The squares of the singular values are the eigenvalues of W^T W and of W W^T, whichever is
    smaller.
    """
    rows = []
    for part in model_parts(moment.model, moment.layers):
        if part.values.dim() != 2:
            continue
        tall = part.values if part.values.shape[0] >= part.values.shape[1] else part.values.T
        squares = torch.linalg.eigvalsh(tall.T @ tall)  # in ascending order
        largest, total = float(squares[-1]), float(squares.sum())
        rows.append(
            SpectrumRow(
                step=moment.step,
                tensor=part.name,
                kind=part.kind,
                layer=part.layer,
                spectral_norm=math.sqrt(max(largest, 0.0)),
                stable_rank=total / largest if largest > 0 else None,
            )
        )
    return rows


def histogram_rows(moment: Moment) -> list[HistogramRow]:
    """Count the elements of each block's merged QKV weight in the bins of HISTOGRAM_EDGES."""
    rows = []
    for part in model_parts(moment.model, moment.layers):
        if part.kind == "qkv" and part.layer is not None:
            edges = torch.tensor(HISTOGRAM_EDGES, device=part.values.device)
            bins = torch.bucketize(part.values.flatten(), edges, right=True)
            counts = torch.bincount(bins, minlength=len(HISTOGRAM_EDGES) + 1)
            rows.append(
                HistogramRow(
                    step=moment.step,
                    kind=part.kind,
                    layer=part.layer,
                    edges=HISTOGRAM_EDGES,
                    counts=counts.tolist(),
                )
            )
    return rows


def activation_rows(moment: Moment) -> list[ActivationRow | AttentionRow]:
    """Measure the activations and the attention of each block on the probe text."""
    with module_outputs(moment.model) as outputs:
        hidden_BTD = moment.model(moment.fixed_texts["probe"][:, :-1])
    sites: list[tuple[str, int | None, Tensor]] = [
        ("embedding", None, outputs["wte"] + outputs["wpe"]),
        ("hidden", None, hidden_BTD),
    ]
    attention: list[AttentionRow] = []
    for layer in moment.layers:
        block = f"blocks.{layer}"
        attn = moment.model.get_submodule(f"{block}.attn")
        assert isinstance(attn, CausalSelfAttention)
        q, k, v = attn.heads(outputs[f"{block}.attn.qkv"])
        sites += [("q", layer, q), ("k", layer, k), ("v", layer, v)]
        sites += [("attn", layer, outputs[f"{block}.attn"])]
        sites += [("fc", layer, outputs[f"{block}.mlp.fc"])]
        sites += [("mlp", layer, outputs[f"{block}.mlp"]), ("residual", layer, outputs[block])]
        attention += _attention_rows(moment.step, layer, q, k)
    sizes = torch.stack(
        [torch.stack([values.square().mean().sqrt(), values.abs().max()]) for _, _, values in sites]
    ).tolist()
    activations = [
        ActivationRow(step=moment.step, site=site, layer=layer, rms=rms, max_abs=max_abs)
        for (site, layer, _), (rms, max_abs) in zip(sites, sizes, strict=True)
    ]
    return [*activations, *attention]


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


def _attention_rows(step: int, layer: int, q_BHTC: Tensor, k_BHTC: Tensor) -> list[AttentionRow]:
    """Measure the attention of each head of a block, without position 0, which sees only itself."""
    T, C = q_BHTC.shape[-2:]
    future_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTC.device).triu(1)
    logits_BHTT = (q_BHTC @ k_BHTC.transpose(2, 3) / math.sqrt(C)).masked_fill(future_TT, -math.inf)
    entropy_BHT = torch.special.entr(logits_BHTT.softmax(3)).sum(3)[..., 1:]
    uniform_T = torch.arange(2, T + 1, device=q_BHTC.device).log()
    table = torch.stack(
        [
            entropy_BHT.mean((0, 2)),
            (entropy_BHT / uniform_T).mean((0, 2)),
            logits_BHTT[:, :, 1:].amax((0, 2, 3)),
        ],
        dim=1,
    )
    return [
        AttentionRow(
            step=step,
            layer=layer,
            head=head,
            entropy=entropy,
            entropy_share=share,
            max_logit=max_logit,
        )
        for head, (entropy, share, max_logit) in enumerate(table.tolist())
    ]


def batch_group_rows(moment: Moment) -> list[TokenGroupRow]:
    """Measure token groups on the batch of the step, from what its loss has computed already."""
    return token_group_rows(moment.step, moment.batch, moment.model.head.weight, moment.groups)


def fixed_text_rows(moment: Moment) -> list[TextLossRow | TokenGroupRow]:
    """Measure the loss and token groups on the fixed texts."""
    rows: list[TextLossRow | TokenGroupRow] = []
    weight_VD = moment.model.head.weight
    for text, reading in moment.readings.items():
        targets_BT = moment.fixed_texts[text][:, 1:]
        target_logits_BT = (reading.hidden_BTD * weight_VD[targets_BT]).sum(2)
        log_z = float(reading.log_z_BT.mean())
        loss = log_z - float(target_logits_BT.mean())
        rows.append(TextLossRow(step=moment.step, text=text, loss=loss, log_z=log_z))
        rows += token_group_rows(moment.step, reading, weight_VD, moment.groups)
    return rows


def group_weights(moment: Moment) -> list[GroupWeightRow]:
    """Measure the rows of the head's weight of each token group."""
    weight_VD = moment.model.head.weight
    return group_weight_rows(moment.step, weight_VD, moment.initial_head_VD, moment.groups)


def tokens_rows(moment: Moment) -> list[TokensRow]:
    """Measure every token on the probe text, and its row of the head's weight."""
    reading, weight_VD = moment.readings["probe"], moment.model.head.weight
    return [tokens_row(moment.step, reading, weight_VD, moment.initial_head_VD, moment.groups)]


PROBES: dict[str, Probe] = {
    "weights": Probe(weight_rows, cadence="every"),
    "spectra": Probe(spectrum_rows, cadence="spectrum_every"),
    "histograms": Probe(histogram_rows, cadence="histogram_every"),
    "activations": Probe(activation_rows, cadence="every"),
    "batch_groups": Probe(batch_group_rows, cadence="every"),
    "fixed_texts": Probe(fixed_text_rows, cadence="text_every"),
    "group_weights": Probe(group_weights, cadence="text_every"),
    "tokens": Probe(tokens_rows, cadence=None),
}
