"""Probes: functions that measure models during training, and return rows.

Probes run when the loss and the gradient of a step are known, and before its update. So everything
recorded at step k describes the model after k updates. Probes only read. The effect of an update is
measured after it, by update_rows.

A probe measures K models at once. It returns tensors, and a function that makes rows of their
values once these have come from the device. Shapes are those of gptcore.array.

This is one file because all probes share the tensors of one step, and a new probe resembles the
others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from gptcore.array import RUNS_TOGETHER, ModelArray
from gptcore.config import ProbesConfig
from gptcore.model import CausalSelfAttention, Part, split_heads
from gptcore.records import (
    ActivationRow,
    AttentionRow,
    HistogramRow,
    Row,
    SpectrumRow,
    TextLossRow,
    UpdateRow,
    WeightRow,
)
from gptcore.steps import StepOutput
from gptcore.token_groups import TokenGroups
from gptcore.token_probs import (
    GroupTensors,
    Measured,
    Reading,
    group_weight_rows,
    read,
    target_logits,
    token_group_rows,
    tokens_row,
)
from gptcore.weights import THIRDS, RowWeights, TiledWeights, Weights, stacked_values

HISTOGRAM_EDGES = [0.01 * math.sinh(u / 10) for u in range(-67, 68)]
"""Edges of the bins in all runs. A bin is 0.001 wide near 0, and a tenth of its value far from 0.
The outer edges are +-4.06."""


class Watched(Protocol):
    """What probes need of a trial besides its model."""

    @property
    def initial(self) -> Mapping[str, Tensor]:
        """Values at step 0 of the tensors of model_parts, by name."""

    @property
    def fixed_texts(self) -> Mapping[str, Tensor]:
        """Windows of each text, [B, T + 1]."""

    @property
    def groups(self) -> TokenGroups:
        """Groups of the tokens of the training text."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Models that are measured together: all of an array on a GPU, one of them on a CPU."""

    members: range  # their places in the array
    layers: Sequence[int]  # the blocks to measure
    n_head: int
    outputs: Callable[[Tensor], dict[str, Tensor]]  # as ModelArray.outputs
    values: Callable[[Part], Tensor]  # those of each model, [K, ...]
    weights: Weights
    head_KVD: Tensor
    initial_head_KVD: Tensor  # at step 0
    fixed_texts_KBS: Mapping[str, Tensor]  # windows of each text, S = T + 1
    groups: GroupTensors
    histogram_edges: Tensor  # on the device, because what is recorded cannot copy from the host
    together: bool  # on a device where few calls count for more than few bytes

    @property
    def model_ids(self) -> slice:
        return slice(self.members.start, self.members.stop)


def subjects_of(
    array: ModelArray, trials: Sequence[Watched], layers: Sequence[int]
) -> list[Subject]:
    """Divide the models of an array into those that are measured together."""
    device = array.models[0].wte.weight.device
    K, together = len(trials), RUNS_TOGETHER[device.type]
    return [
        _subject(array, trials, layers, members, together)
        for members in ([range(K)] if together else [range(k, k + 1) for k in range(K)])
    ]


def _subject(
    array: ModelArray,
    trials: Sequence[Watched],
    layers: Sequence[int],
    members: range,
    together: bool,
) -> Subject:
    model, device = array.models[members.start], array.models[0].wte.weight.device
    of = slice(members.start, members.stop)
    initial = [trial.initial for trial in trials[of]]
    head_KVD = array.parameters["wte.weight" if model.tied else "head.weight"].detach()[of]
    attention = model.blocks[0].attn
    assert isinstance(attention, CausalSelfAttention)
    return Subject(
        members=members,
        layers=layers,
        n_head=attention.n_head,
        outputs=functools.partial(array.outputs, of=of),
        values=functools.partial(stacked_values, array, of=of),
        weights=RowWeights(array, layers, initial)
        if together
        else TiledWeights(model, layers, initial[0]),
        head_KVD=head_KVD,
        initial_head_KVD=_stack([values["wte" if model.tied else "head"] for values in initial]),
        fixed_texts_KBS={
            text: _stack([trial.fixed_texts[text] for trial in trials[of]])
            for text in trials[0].fixed_texts
        },
        groups=GroupTensors.of([trial.groups for trial in trials[of]], head_KVD.shape[1], device),
        histogram_edges=torch.tensor(HISTOGRAM_EDGES, device=device),
        together=together,
    )


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors. A single one, often a large one, is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


@dataclass(frozen=True)
class Moment:
    """What probes can read of K models at one step."""

    subject: Subject
    batch: Reading

    @functools.cached_property
    def probe_outputs(self) -> dict[str, Tensor]:
        """The output of every module on the probe text, computed once for all probes."""
        return self.subject.outputs(self.subject.fixed_texts_KBS["probe"][..., :-1])

    @functools.cached_property
    def readings(self) -> dict[str, Reading]:
        """The output of the models on the fixed texts, computed once for all probes."""
        subject, found = self.subject, {}
        for text, windows_KBS in subject.fixed_texts_KBS.items():
            ids_KBT = windows_KBS[..., :-1]
            outputs = self.probe_outputs if text == "probe" else subject.outputs(ids_KBT)
            found[text] = read(text, ids_KBT, outputs["hidden"], subject.head_KVD, subject.groups)
        return found


def moment_of(subject: Subject, output: StepOutput) -> Moment:
    """Return what probes can read after the gradients of a step of the array."""
    of = subject.model_ids
    batch = Reading(
        text="batch",
        ids_KBT=output.ids_KBT[of],
        hidden_KBTD=output.hidden_KBTD[of],
        log_z_KBT=output.log_z_KBT[of],
    )
    return Moment(subject, batch)


@dataclass(frozen=True)
class Probe:
    """A function that measures, and the knob that says how often it runs."""

    measure: Callable[[Moment], Sequence[Measured]]
    cadence: str | None  # a knob of ProbesConfig; None for the first and the last step only
    waits: bool = False  # whether it waits for the GPU, so that it cannot be recorded


def probes_due(config: ProbesConfig, step: int, *, last: bool) -> list[str]:
    """Return the names of probes that run at this step; `last` says whether it is the last one."""
    cadences = {
        name: getattr(config, probe.cadence) if probe.cadence else math.inf
        for name, probe in PROBES.items()
    }
    return [name for name, every in cadences.items() if last or step % every == 0]


@torch.no_grad()
def observe(moment: Moment, probes: Sequence[str]) -> list[Measured]:
    """Run the probes."""
    return [measured for name in probes for measured in PROBES[name].measure(moment)]


def weight_rows(moment: Moment) -> list[Measured]:
    """Measure every parameter tensor, its gradient, and its distance from step 0."""
    parts = moment.subject.weights.parts

    def rows(step: int, table: Any) -> list[Row]:
        return [
            WeightRow(
                step=step,
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
                # x / 0 where the tensor is 0 at step 0
                cosine=cosine if math.isfinite(cosine) else None,
                grad_rms=grad_rms,
            )
            for part, (mean, std, kurtosis, max_abs, displacement, cosine, grad_rms) in zip(
                parts, table, strict=True
            )
        ]

    return [Measured(moment.subject.weights.statistics(), rows)]


@torch.no_grad()
def update_rows(subject: Subject) -> list[Measured]:
    """Measure the update of a step; call subject.weights.remember() before the update."""
    parts = subject.weights.parts

    def rows(step: int, table: Any) -> list[Row]:
        return [
            UpdateRow(
                step=step,
                tensor=part.name,
                kind=part.kind,
                layer=part.layer,
                rms=rms,
                ratio=rms / rms_before if rms_before else None,
            )
            for part, (rms, rms_before) in zip(parts, table, strict=True)
        ]

    return [Measured(subject.weights.changes(), rows)]


T = TypeVar("T")


def _alike(items: Sequence[T], key: Callable[[T], object], together: bool) -> list[list[T]]:
    """Divide items into those that are computed in one call: alike ones if `together`."""
    if not together:
        return [[item] for item in items]
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def spectrum_rows(moment: Moment) -> list[Measured]:
    """Compute the largest singular value of every weight matrix W.

    The squares of the singular values are the eigenvalues of W^T W and of W W^T, whichever is
    smaller.
    """
    subject = moment.subject
    matrices = [part for part in subject.weights.parts if part.values.dim() == 2]
    return [
        _spectra(subject, parts)
        for parts in _alike(matrices, lambda part: part.values.shape, subject.together)
    ]


OVERFLOW = 0.999 * torch.finfo(torch.float32).max
"""The square of a singular value is at least as large as any element of W^T W, and what overflows
there counts as the largest float."""


def _spectra(subject: Subject, parts: Sequence[Part]) -> Measured:
    """Compute the spectra of matrices of one shape, [K, P, 2]: largest square, sum of squares."""
    values = [subject.values(part) for part in parts]
    W = torch.stack(values, dim=1) if subject.together else values[0][0]
    tall = W if W.shape[-2] >= W.shape[-1] else W.mT
    # Squares of huge weights overflow, and a model that diverged is among those of an array.
    gram = (tall.mT @ tall).nan_to_num()
    squares = torch.linalg.eigvalsh(gram)  # in ascending order
    table = torch.stack([squares[..., -1], squares.sum(-1)], dim=-1)

    def rows(step: int, table: Any) -> list[Row]:
        return [
            SpectrumRow(
                step=step,
                tensor=part.name,
                kind=part.kind,
                layer=part.layer,
                spectral_norm=math.sqrt(max(largest, 0.0)) if largest < OVERFLOW else math.inf,
                stable_rank=total / largest if 0 < largest < OVERFLOW else None,
            )
            for part, (largest, total) in zip(parts, table, strict=True)
        ]

    return Measured(table.view(len(subject.members), len(parts), 2), rows)


def histogram_rows(moment: Moment) -> list[Measured]:
    """Count the elements of each block's merged QKV weight in the bins of HISTOGRAM_EDGES."""
    subject, n_bins = moment.subject, len(HISTOGRAM_EDGES) + 1
    parts = [part for part in subject.weights.parts if part.kind == "qkv"]

    def counts(values_KXN: Tensor) -> Tensor:
        bins = torch.bucketize(values_KXN, subject.histogram_edges, right=True)
        if not subject.together:
            return torch.bincount(bins.flatten(), minlength=n_bins).view(1, 1, -1)
        return bins.new_zeros(*bins.shape[:2], n_bins).scatter_add_(2, bins, torch.ones_like(bins))

    found = [
        counts(torch.stack([subject.values(part).flatten(1) for part in same], dim=1))
        for same in _alike(parts, lambda part: part.kind, subject.together)
    ]

    def rows(step: int, table: Any) -> list[Row]:
        return [
            HistogramRow(
                step=step,
                kind=part.kind,
                layer=part.layer,
                edges=HISTOGRAM_EDGES,
                counts=[int(count) for count in by_bin],
            )
            for part, by_bin in zip(parts, table, strict=True)
            if part.layer is not None
        ]

    return [Measured(torch.cat(found, dim=1), rows)]


def activation_rows(moment: Moment) -> list[Measured]:
    """Measure the activations and the attention of each block on the probe text."""
    subject, outputs = moment.subject, moment.probe_outputs
    sites: list[tuple[str, int | None, Tensor]] = [
        ("embedding", None, outputs["embedding"]),
        ("hidden", None, outputs["hidden"]),
    ]
    queries, keys = [], []
    for layer in subject.layers:
        block = f"blocks.{layer}"
        qkv = outputs[f"{block}.attn.qkv"]
        sites += zip(THIRDS, [layer] * 3, qkv.chunk(3, dim=-1), strict=True)
        sites += [("attn", layer, outputs[f"{block}.attn"])]
        sites += [("fc", layer, outputs[f"{block}.mlp.fc"])]
        sites += [("mlp", layer, outputs[f"{block}.mlp"]), ("residual", layer, outputs[block])]
        q, k, _ = split_heads(qkv, subject.n_head)
        queries.append(q)
        keys.append(k)
    places = [(site, layer) for site, layer, _ in sites]
    sizes = _sizes([values for _, _, values in sites], subject.together)

    def rows(step: int, table: Any) -> list[Row]:
        return [
            ActivationRow(step=step, site=site, layer=layer, rms=rms, max_abs=max_abs)
            for (site, layer), (rms, max_abs) in zip(places, table, strict=True)
        ]

    if not subject.layers:
        return [Measured(sizes, rows)]
    if subject.together:
        attention = _attention(torch.stack(queries, dim=1), torch.stack(keys, dim=1))
    else:
        each = [_attention(q[0], k[0]) for q, k in zip(queries, keys, strict=True)]
        attention = torch.stack(each)[None]
    return [Measured(sizes, rows), Measured(attention, _attention_rows(subject.layers))]


def _sizes(sites: Sequence[Tensor], together: bool) -> Tensor:
    """Compute the RMS and the largest |.| of activations, each [K, ...], as [K, sites, 2]."""
    if not together:
        return torch.stack([torch.stack([x.square().mean().sqrt(), x.abs().max()]) for x in sites])[
            None
        ]
    indexed = list(enumerate(sites))
    order, found = [], []
    for same in _alike(indexed, lambda site: site[1].shape, together):
        x_KXN = torch.stack([x for _, x in same], dim=1).flatten(2)
        found.append(torch.stack([x_KXN.square().mean(2).sqrt(), x_KXN.abs().amax(2)], dim=2))
        order += [i for i, _ in same]
    back = sorted(range(len(order)), key=order.__getitem__)
    tables = torch.cat(found, dim=1).unbind(1)
    return torch.stack([tables[i] for i in back], dim=1)


def _attention(q_XBHTC: Tensor, k_XBHTC: Tensor) -> Tensor:
    """Measure each head without position 0, which sees only itself.

    Returns:
        [..., H, 3]: entropy, its share of the largest possible, and largest logit.
    """
    T, C = q_XBHTC.shape[-2:]
    future_TT = torch.ones(T, T, dtype=torch.bool, device=q_XBHTC.device).triu(1)
    logits_XBHTT = (q_XBHTC @ k_XBHTC.mT / math.sqrt(C)).masked_fill(future_TT, -math.inf)
    entropy_XBHT = torch.special.entr(logits_XBHTT.softmax(-1)).sum(-1)[..., 1:]
    uniform_T = torch.arange(2, T + 1, device=q_XBHTC.device).log()
    return torch.stack(
        [
            entropy_XBHT.mean((-3, -1)),
            (entropy_XBHT / uniform_T).mean((-3, -1)),
            logits_XBHTT[..., 1:, :].amax((-4, -2, -1)),
        ],
        dim=-1,
    )


def _attention_rows(layers: Sequence[int]) -> Callable[[int, Any], list[Row]]:
    def rows(step: int, by_layer: Any) -> list[Row]:
        return [
            AttentionRow(
                step=step,
                layer=layer,
                head=head,
                entropy=entropy,
                entropy_share=share,
                max_logit=max_logit,
            )
            for layer, table in zip(layers, by_layer, strict=True)
            for head, (entropy, share, max_logit) in enumerate(table)
        ]

    return rows


def batch_group_rows(moment: Moment) -> list[Measured]:
    """Measure token groups on the batch of the step, from what its loss has computed already."""
    return [_group_rows(moment, moment.batch)]


def _group_rows(moment: Moment, reading: Reading) -> Measured:
    subject = moment.subject
    return token_group_rows(reading, subject.head_KVD, subject.groups, padded=subject.together)


def fixed_text_rows(moment: Moment) -> list[Measured]:
    """Measure the loss and token groups on the fixed texts."""
    found = []
    for text, reading in moment.readings.items():
        targets_KBT = moment.subject.fixed_texts_KBS[text][..., 1:]
        logits_KBT = target_logits(reading, moment.subject.head_KVD, targets_KBT)
        means_K2 = torch.stack(
            [reading.log_z_KBT.flatten(1).mean(1), logits_KBT.flatten(1).mean(1)], dim=1
        )
        found += [Measured(means_K2, _text_loss_rows(text)), _group_rows(moment, reading)]
    return found


def _text_loss_rows(text: str) -> Callable[[int, Any], list[Row]]:
    def rows(step: int, means: Any) -> list[Row]:
        log_z, target_logit = means
        return [TextLossRow(step=step, text=text, loss=log_z - target_logit, log_z=log_z)]

    return rows


def group_weights(moment: Moment) -> list[Measured]:
    """Measure the rows of the head's weight of each token group."""
    subject = moment.subject
    return [group_weight_rows(subject.head_KVD, subject.initial_head_KVD, subject.groups)]


def tokens_rows(moment: Moment) -> list[Measured]:
    """Measure every token on the probe text, and its row of the head's weight."""
    subject, reading = moment.subject, moment.readings["probe"]
    return [tokens_row(reading, subject.head_KVD, subject.initial_head_KVD, subject.groups)]


PROBES: dict[str, Probe] = {
    "weights": Probe(weight_rows, cadence="every"),
    "spectra": Probe(spectrum_rows, cadence="spectrum_every", waits=True),
    "histograms": Probe(histogram_rows, cadence="histogram_every"),
    "activations": Probe(activation_rows, cadence="every"),
    "batch_groups": Probe(batch_group_rows, cadence="every"),
    "fixed_texts": Probe(fixed_text_rows, cadence="text_every"),
    "group_weights": Probe(group_weights, cadence="text_every"),
    "tokens": Probe(tokens_rows, cadence=None),
}
