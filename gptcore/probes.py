"""What is looked at while a model trains. A probe turns one moment of training into rows.

The moment is after the loss and the gradient of a step are known and before its update, so that
everything recorded at step k is of one state of the model: the one that k updates made. Probes only
read. What the update does is looked at after it, by update_rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcore.config import ProbesConfig
from gptcore.model import GPT, Part, parts_of
from gptcore.records import (
    HistogramRow,
    Row,
    SpectrumRow,
    TokenGroupRow,
    UpdateRow,
    WeightRow,
)
from gptcore.token_groups import TokenGroups

MIN_TOKENS = 20
"""A mean over fewer tokens of a group than this is not reported."""

HISTOGRAM_EDGES = [0.01 * math.sinh(u / 10) for u in range(-67, 68)]
"""Shared by all runs: 0.001 wide around 0, a tenth of the value far out, ending at +-4.06."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One recorded step of a trial."""

    step: int
    model: GPT
    initial: Mapping[str, Tensor]  # the values of every tensor at step 0, by name
    groups: TokenGroups
    ids_BT: Tensor  # inputs of the step's batch
    hidden_BTD: Tensor
    log_z_BT: Tensor


@dataclass(frozen=True)
class Probe:
    rows: Callable[[Moment], Sequence[Row]]
    cadence: str  # the knob of ProbesConfig that says how often


def observe(moment: Moment, config: ProbesConfig, *, last: bool) -> list[Row]:
    """The rows of every probe that is due at the moment's step."""
    rows: list[Row] = []
    with torch.no_grad():
        for probe in PROBES.values():
            if last or moment.step % getattr(config, probe.cadence) == 0:
                rows.extend(probe.rows(moment))
    return rows


def model_parts(model: GPT) -> list[Part]:
    """Every parameter tensor of the model, the merged QKV also as its three parts.

    A tied head is left out: it is the token embedding.
    """
    return [
        part
        for name, module in model.named_modules()
        for part in parts_of(name, module)
        if part.kind != "head" or not model.tied
    ]


def weight_rows(moment: Moment) -> list[WeightRow]:
    """Statistics of every parameter tensor and its gradient, and how far it is from its start."""
    parts = model_parts(moment.model)
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
            cosine=None if math.isnan(cosine) else cosine,
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
    centred_PN = values_PN - mean_P1
    std_P1 = centred_PN.square().mean(1, keepdim=True).sqrt()
    kurtosis_P = centred_PN.div_(std_P1).square_().square_().mean(1) - 3
    mean_P, std_P = mean_P1.squeeze(1), std_P1.squeeze(1)
    # Not aminmax(dim=1), which goes element by element.
    max_abs_P = torch.maximum(values_PN.amax(1), -values_PN.amin(1)).abs()  # no -0.0
    displacement_P, initial_P = _rms(values_PN - initial_PN), _rms(initial_PN)
    # The law of cosines: w . w0 = (|w|^2 + |w0|^2 - |w - w0|^2) / 2.
    square_P = std_P.square() + mean_P.square()
    product_P = (square_P + initial_P.square() - displacement_P.square()) / 2
    cosine_P = product_P / (square_P.sqrt() * initial_P)
    return torch.stack(
        [mean_P, std_P, kurtosis_P, max_abs_P, displacement_P, cosine_P, _rms(grad_PN)], dim=1
    )


def _rms(values_PN: Tensor) -> Tensor:
    return values_PN.square().mean(1).sqrt()


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


def update_rows(step: int, model: GPT, before: Mapping[str, Tensor]) -> list[UpdateRow]:
    """What the update of a step did; `before` are the values that values_of gave before it."""

    def sizes(values_PN: Tensor, before_PN: Tensor) -> Tensor:
        return torch.stack([_rms(values_PN - before_PN), _rms(before_PN)], dim=1)

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
            for part, (rms, rms_before) in _by_part(sizes, model_parts(model), before)
        ]


def values_of(model: GPT) -> dict[str, Tensor]:
    """A copy of every tensor that model_parts names."""
    return {part.name: part.values.detach().clone() for part in model_parts(model)}


def spectrum_rows(moment: Moment) -> list[SpectrumRow]:
    """Largest singular value of every weight matrix, from the smaller of its two Gram matrices."""
    parts = [part for part in model_parts(moment.model) if part.values.dim() == 2]
    rows = []
    for part in parts:
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
    for part in model_parts(moment.model):
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


def token_group_rows(moment: Moment) -> list[TokenGroupRow]:
    """Mean log-probability of every group under every mask, from what the loss already computed.

    Over the T positions of a sequence, log p(j) = z_j - log Z sums to
    (sum_t h_t) . w_j - sum_t log Z_t: one row of logits a sequence stands for all its positions.
    """
    B, T = moment.ids_BT.shape
    weight_VD = moment.model.head.weight
    logit_sum_BV = (moment.hidden_BTD.sum(1) @ weight_VD.T).double()
    log_z_sum_B = moment.log_z_BT.double().sum(1)
    present_BV = torch.zeros_like(logit_sum_BV, dtype=torch.bool).scatter_(1, moment.ids_BT, True)
    left_in = {
        "sequence": ~present_BV,
        "batch": ~present_BV.any(0).expand(B, -1),
        "none": torch.ones_like(present_BV),
    }
    rows = []
    for group, ids in moment.groups.ids.items():
        columns = torch.from_numpy(ids).to(weight_VD.device)
        logit_sum_BG = logit_sum_BV[:, columns]
        for mask, left_in_BV in left_in.items():
            keep_BG = left_in_BV[:, columns]
            pairs = int(keep_BG.sum())
            n_tokens = pairs / B
            mean_logit = log_z = None
            if n_tokens >= MIN_TOKENS:
                mean_logit = float((logit_sum_BG * keep_BG).sum()) / (T * pairs)
                log_z = float((log_z_sum_B * keep_BG.sum(1)).sum()) / (T * pairs)
            rows.append(
                TokenGroupRow(
                    step=moment.step,
                    group=group,
                    mask=mask,
                    n_tokens=n_tokens,
                    mean_logprob=None
                    if mean_logit is None or log_z is None
                    else mean_logit - log_z,
                    mean_logit=mean_logit,
                    log_z=log_z,
                )
            )
    return rows


PROBES: dict[str, Probe] = {
    "weights": Probe(weight_rows, cadence="every"),
    "spectra": Probe(spectrum_rows, cadence="spectrum_every"),
    "histograms": Probe(histogram_rows, cadence="histogram_every"),
    "token_groups": Probe(token_group_rows, cadence="every"),
}
