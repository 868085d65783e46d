"""What is looked at while a model trains. A probe turns one moment of training into rows.

The moment is after the loss of a step is known and before its update, so that everything recorded
at step k is of one state of the model: the one that k updates made. Probes only read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcore.config import ProbesConfig
from gptcore.model import GPT, Part, parts_of
from gptcore.records import HistogramRow, Row, TokenGroupRow, WeightRow
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
    """Statistics of every parameter tensor, and how far it has come from its start."""
    parts = model_parts(moment.model)
    # One copy from the device for all tensors, instead of one for each number.
    table = torch.stack([_statistics(part.values, moment.initial[part.name]) for part in parts])
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
            rms_displacement=displacement,
        )
        for part, (mean, std, kurtosis, max_abs, displacement) in zip(
            parts, table.tolist(), strict=True
        )
    ]


def _statistics(values: Tensor, initial: Tensor) -> Tensor:
    """Mean, std, excess kurtosis, max |.|, RMS displacement: [5]."""
    mean = values.mean()
    # Centred first: a std from the sum of squares loses digits where |mean| >> std.
    centred = values - mean
    std = centred.square().mean().sqrt()
    kurtosis = centred.div_(std).square_().square_().mean() - 3
    max_abs = torch.stack(values.aminmax()).abs().max()
    displacement = (values - initial).square_().mean().sqrt()
    return torch.stack([mean, std, kurtosis, max_abs, displacement])


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
        for mask, left_in_BV in left_in.items():
            keep_BG = left_in_BV[:, columns]
            pairs = int(keep_BG.sum())
            n_tokens = pairs / B
            mean_logit = log_z = None
            if n_tokens >= MIN_TOKENS:
                mean_logit = float((logit_sum_BV[:, columns] * keep_BG).sum()) / (T * pairs)
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
    "histograms": Probe(histogram_rows, cadence="histogram_every"),
    "token_groups": Probe(token_group_rows, cadence="every"),
}
