"""What is looked at while a model trains. A probe turns one moment of training into rows.

The moment is after the loss and the gradient of a step are known and before its update, so that
everything recorded at step k is of one state of the model: the one that k updates made. Probes only
read. What the update does is looked at after it, by update_rows.
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
"""Shared by all runs: 0.001 wide around 0, a tenth of the value far out, ending at +-4.06."""

TILE = 1 << 16
"""Elements that are worked on at a time."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One recorded step of a trial."""

    step: int
    model: GPT
    initial: Mapping[str, Tensor]  # step 0's values of the tensors that are looked at, by name
    layers: Sequence[int]  # the blocks that are looked at
    groups: TokenGroups
    fixed_texts: Mapping[str, Tensor]  # windows of each, [B, T + 1]
    batch: Reading

    @property
    def initial_head_VD(self) -> Tensor:
        return self.initial["wte" if self.model.tied else "head"]

    @functools.cached_property
    def readings(self) -> dict[str, Reading]:
        """The fixed texts as the model reads them."""
        return {
            text: read(self.model, text, windows_BT[:, :-1], self.groups)
            for text, windows_BT in self.fixed_texts.items()
        }


@dataclass(frozen=True)
class Probe:
    rows: Callable[[Moment], Sequence[Row]]
    cadence: str | None  # the knob of ProbesConfig that says how often; None: first and last step


def due(config: ProbesConfig, step: int, *, last: bool) -> list[Probe]:
    """The probes that look at this step."""
    cadences = {
        name: getattr(config, probe.cadence) if probe.cadence else math.inf
        for name, probe in PROBES.items()
    }
    return [PROBES[name] for name, every in cadences.items() if last or step % every == 0]


@torch.no_grad()
def observe(moment: Moment, probes: Sequence[Probe]) -> list[Row]:
    """What the probes see of the moment."""
    return [row for probe in probes for row in probe.rows(moment)]


def model_parts(model: GPT, layers: Sequence[int]) -> list[Part]:
    """Every parameter tensor of these blocks and outside the blocks.

    The merged QKV comes also as its three parts. A tied head, which is the token embedding, is left
    out.
    """
    return [
        part
        for name, module in model.named_modules()
        for part in parts_of(name, module)
        if (part.layer is None or part.layer in layers) and (part.kind != "head" or not model.tied)
    ]


def weight_rows(moment: Moment) -> list[WeightRow]:
    """Statistics of every parameter tensor and its gradient, and how far it is from its start."""
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
            cosine=cosine if math.isfinite(cosine) else None,  # x / 0 where a start is 0
            grad_rms=grad_rms,
        )
        for part, (mean, std, kurtosis, max_abs, displacement, cosine, grad_rms) in _by_part(
            _statistics, parts, moment.initial, grads
        )
    ]


def _statistics(values_PN: Tensor, initial_PN: Tensor, grad_PN: Tensor) -> Tensor:
    """Of each row: mean, std, excess kurtosis, max |.|, RMS displacement, cosine, gradient RMS.

    -> [P, 7].
    """
    mean_P1 = values_PN.mean(1, keepdim=True)
    # Centred first: a std from the sum of squares loses digits where |mean| >> std.
    std_P1 = _mean(lambda values: (values - mean_P1).square(), values_PN)[:, None].sqrt()
    kurtosis_P = _mean(
        lambda values: ((values - mean_P1) / std_P1).square_().square_(), values_PN
    ).sub(3)
    mean_P, std_P = mean_P1.squeeze(1), std_P1.squeeze(1)
    # Not aminmax(dim=1), which goes element by element.
    max_abs_P = torch.maximum(values_PN.amax(1), -values_PN.amin(1)).abs()  # no -0.0
    displacement_P, initial_P = _rms(values_PN, initial_PN), _rms(initial_PN)
    # The law of cosines: w . w0 = (|w|^2 + |w0|^2 - |w - w0|^2) / 2.
    square_P = std_P.square() + mean_P.square()
    product_P = (square_P + initial_P.square() - displacement_P.square()) / 2
    cosine_P = product_P / (square_P.sqrt() * initial_P)
    return torch.stack(
        [mean_P, std_P, kurtosis_P, max_abs_P, displacement_P, cosine_P, _rms(grad_PN)], dim=1
    )


def _mean(function: Callable[..., Tensor], *wholes_PN: Tensor) -> Tensor:
    """Mean of the function over each row, [P], tile by tile: intermediate values stay in cache."""
    P, N = wholes_PN[0].shape
    tiles = zip(*(whole.split(max(1, TILE // P), dim=1) for whole in wholes_PN), strict=True)
    return torch.stack([function(*tile).sum(1) for tile in tiles]).sum(0) / N


def _rms(values_PN: Tensor, minus_PN: Tensor | None = None) -> Tensor:
    """Root mean square of each row, or of its difference to another, [P]."""
    if minus_PN is None:
        return _mean(torch.square, values_PN).sqrt()
    return _mean(lambda values, minus: (values - minus).square_(), values_PN, minus_PN).sqrt()


def _by_part(
    statistics: Callable[..., Tensor], parts: Sequence[Part], *others: Mapping[str, Tensor]
) -> list[tuple[Part, list[float]]]:
    """Each part with its row of `statistics`(values, *others), all [P, N].

    Tensors of one size go together: most are small, and cost more by the call than by the element.
    One copy from the device for each size, instead of one for each number.
    """
    found: dict[str, list[float]] = {}
    by_size: dict[int, list[Part]] = {}
    for part in parts:
        by_size.setdefault(part.values.numel(), []).append(part)
    for same in by_size.values():
        columns = [[other[part.name] for part in same] for other in others]
        table = statistics(*map(_stacked, [[part.values for part in same], *columns]))
        found |= zip((part.name for part in same), table.tolist(), strict=True)
    return [(part, found[part.name]) for part in parts]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[P, N]; a single tensor, which may be the largest, is not copied."""
    if len(tensors) == 1:
        return tensors[0].reshape(1, -1)
    return torch.stack([tensor.flatten() for tensor in tensors])


def update_rows(
    step: int, model: GPT, layers: Sequence[int], before: Mapping[str, Tensor]
) -> list[UpdateRow]:
    """What the update of a step did; `before` are the values that values_of gave before it."""

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
    """A copy of every tensor that model_parts names."""
    return {part.name: part.values.detach().clone() for part in model_parts(model, layers)}


def spectrum_rows(moment: Moment) -> list[SpectrumRow]:
    """Largest singular value of every weight matrix, from the smaller of its two Gram matrices."""
    rows = []
    for part in model_parts(moment.model, moment.layers):
        if part.values.dim() != 2:
            continue
        tall = part.values if part.values.shape[0] >= part.values.shape[1] else part.values.T
        squares = torch.linalg.eigvalsh(tall.T @ tall)  # ascending, of the singular values
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
    """Histogram of each block's merged QKV weight on HISTOGRAM_EDGES."""
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
    """Size of every stream of activations, and of attention, on the probe text."""
    with watched(moment.model) as streams:
        hidden_BTD = moment.model(moment.fixed_texts["probe"][:, :-1])
    sites: list[tuple[str, int | None, Tensor]] = [
        ("embedding", None, streams["wte"] + streams["wpe"]),
        ("hidden", None, hidden_BTD),
    ]
    attention: list[AttentionRow] = []
    for layer in moment.layers:
        block = f"blocks.{layer}"
        attn = moment.model.get_submodule(f"{block}.attn")
        assert isinstance(attn, CausalSelfAttention)
        q, k, v = attn.heads(streams[f"{block}.attn.qkv"])
        sites += [("q", layer, q), ("k", layer, k), ("v", layer, v)]
        sites += [("attn", layer, streams[f"{block}.attn"])]
        sites += [("fc", layer, streams[f"{block}.mlp.fc"])]
        sites += [("mlp", layer, streams[f"{block}.mlp"]), ("residual", layer, streams[block])]
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
def watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What every module puts out while the context lasts, by its name."""
    streams: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: streams.update({name: output})

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


def _attention_rows(step: int, layer: int, q_BHTC: Tensor, k_BHTC: Tensor) -> list[AttentionRow]:
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
    """Token groups on the step's own batch, from what its loss already computed."""
    return token_group_rows(moment.step, moment.batch, moment.model.head.weight, moment.groups)


def fixed_text_rows(moment: Moment) -> list[TextLossRow | TokenGroupRow]:
    """Loss and token groups on the fixed texts."""
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
    """The head's rows of each token group."""
    weight_VD = moment.model.head.weight
    return group_weight_rows(moment.step, weight_VD, moment.initial_head_VD, moment.groups)


def tokens_rows(moment: Moment) -> list[TokensRow]:
    """Every token on the probe text, and its row of the head's weight."""
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
