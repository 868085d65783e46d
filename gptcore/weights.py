"""Statistics of parameter tensors, of their gradients and of their updates.

There are two ways to compute the same statistics. On a CPU, tensors are read in tiles that fit the
cache. On a GPU, a call costs more than the elements of a small tensor, so that all tensors of all
models are computed in one set of calls. Shapes are those of gptcore.array, with P parts, and 7
statistics: mean, std, excess kurtosis, max |.|, RMS displacement, cosine, RMS of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gptcore.array import ModelArray
from gptcore.model import GPT, Part, parts_of

TILE = 1 << 16
"""The number of elements of a tile on a CPU."""

MAX_ROW_ELEMENTS = 1 << 27
"""The number of elements of which a GPU keeps intermediate values at a time: 512 MB each."""


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


def values_of(model: GPT, layers: Sequence[int]) -> dict[str, Tensor]:
    """Copy every tensor of model_parts; return the copies by name."""
    return copies_of(model_parts(model, layers))


def copies_of(parts: Sequence[Part]) -> dict[str, Tensor]:
    """Copy the values of parts; return the copies by name."""
    return {part.name: part.values.detach().clone() for part in parts}


THIRDS = ("q", "k", "v")
"""The kinds of the parts of the merged QKV weight."""


def stacked_values(array: ModelArray, part: Part, of: slice = slice(None)) -> Tensor:
    """Return the values of a part of some models of an array, [K, ...], without gradient."""
    if part.kind not in THIRDS:
        return _stacked_parameter(array, part.name).detach()[of]
    merged = _stacked_parameter(array, part.name[:-1] + "qkv").detach()[of]
    return merged.chunk(3, dim=1)[THIRDS.index(part.kind)]


def _stacked_parameter(array: ModelArray, part: str) -> Tensor:
    """Return the parameter that a part is the whole of; a part's name leaves out `.weight`."""
    return array.parameters[part if part in array.parameters else f"{part}.weight"]


class Weights(Protocol):
    """The parts of some models, and their statistics."""

    @property
    def parts(self) -> Sequence[Part]:
        """The parts of the first of the models."""

    def statistics(self) -> Tensor:
        """Compute the statistics of every part, [K, P, 7]."""

    def remember(self) -> None:
        """Keep the values of now, for `changes`. Call it after `statistics`."""

    def changes(self) -> Tensor:
        """Compute the RMS of the change since `remember`, and the RMS before it, [K, P, 2]."""


class TiledWeights:
    """The statistics of one model, tile by tile."""

    def __init__(self, model: GPT, layers: Sequence[int], initial: Mapping[str, Tensor]) -> None:
        """List the parts of a model; `initial` has their values at step 0, by name."""
        self.parts, self.initial = model_parts(model, layers), initial
        self.before: Mapping[str, Tensor] = {}

    def statistics(self) -> Tensor:
        """Compute the statistics of every part, [1, P, 7]."""
        grads = {part.name: part.grad for part in self.parts if part.grad is not None}
        return _by_part(_statistics, self.parts, self.initial, grads)[None]

    def remember(self) -> None:
        """Keep the values of now."""
        self.before = copies_of(self.parts)

    def changes(self) -> Tensor:
        """Compute the RMS of the change since `remember`, and the RMS before it, [1, P, 2]."""

        def sizes(values_PN: Tensor, before_PN: Tensor) -> Tensor:
            return torch.stack([_rms(values_PN, before_PN), _rms(before_PN)], dim=1)

        return _by_part(sizes, self.parts, self.before)[None]


def _statistics(values_PN: Tensor, initial_PN: Tensor, grad_PN: Tensor) -> Tensor:
    """Compute the statistics of P tensors of N elements, [P, 7]."""
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
    cosine_P = _cosine(
        std_P.square() + mean_P.square(), initial_P.square(), displacement_P.square()
    )
    return torch.stack(
        [mean_P, std_P, kurtosis_P, max_abs_P, displacement_P, cosine_P, _rms(grad_PN)], dim=1
    )


def _cosine(square: Tensor, initial_square: Tensor, displacement_square: Tensor) -> Tensor:
    """Return the cosine of w and w0 from mean squares, by the law of cosines.

    w . w0 = (|w|^2 + |w0|^2 - |w - w0|^2) / 2.
    """
    product = (square + initial_square - displacement_square) / 2
    return product / (square.sqrt() * initial_square.sqrt())


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
) -> Tensor:
    """Compute statistics of many tensors, all tensors of one size in one call.

    Most tensors are small, so that a call costs more than its elements.

    Args:
        statistics: maps [P, N] values, and [P, N] of each of `others`, to [P, statistics].
        parts: the tensors.
        others: further tensors of the same shapes, by the name of the part.

    Returns:
        The statistics in the order of the parts, [P, statistics].
    """
    by_size: dict[int, list[int]] = {}
    for p, part in enumerate(parts):
        by_size.setdefault(part.values.numel(), []).append(p)
    tables = []
    for same_size in by_size.values():
        columns = [[parts[p].values for p in same_size]]
        columns += [[other[parts[p].name] for p in same_size] for other in others]
        tables.append(statistics(*map(_stacked, columns)))
    order = [p for same_size in by_size.values() for p in same_size]
    return torch.cat(tables)[torch.tensor(order).argsort()]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack P tensors to [P, N]. A single tensor, often a large one, is not copied."""
    if len(tensors) == 1:
        return tensors[0].reshape(1, -1)
    return torch.stack([tensor.flatten() for tensor in tensors])


class RowWeights:
    """The statistics of all models of an array, in one set of calls.

    The size of every parameter is a multiple of D = d_model. So the parameters of a model are R
    rows of D elements. Sums over the elements of a row are taken first. Then they are added up over
    the rows of each of L leaves, which are the parts that are not made of other parts: the merged
    QKV weight is made of three leaves, and every other part is one leaf.
    """

    def __init__(
        self,
        array: ModelArray,
        layers: Sequence[int],
        initial: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Find the rows of all parts; `initial` has each model's values at step 0, by name."""
        first = array.models[0]
        self.parts = model_parts(first, layers)
        device, D = first.wte.weight.device, first.wte.weight.shape[1]
        leaves = [part for part in self.parts if part.kind != "qkv"]
        tensors = [part.name for part in self.parts if part.kind not in THIRDS]  # in the same order
        self.parameters = [_stacked_parameter(array, name) for name in tensors]
        rows_L = torch.tensor([leaf.values.numel() // D for leaf in leaves], device=device)
        self.leaf_of_row_R = torch.arange(len(leaves), device=device).repeat_interleave(rows_L)
        self.size_L = (rows_L * D).double()
        # Which leaves make which parts, as Q pairs: sums over the leaves of a part are of pairs.
        pairs = [
            (i, p)
            for p, part in enumerate(self.parts)
            for i, leaf in enumerate(leaves)
            if leaf is part
            or (leaf.kind in THIRDS and (part.kind, part.layer) == ("qkv", leaf.layer))
        ]
        self.leaf_Q, self.part_Q = torch.tensor(pairs, device=device).T
        self.size_P = self._by_part(self.size_L)
        self.initial_KRD = torch.stack(
            [torch.cat([values[name].reshape(-1, D) for name in tensors]) for values in initial]
        )
        self.initial_square_KP = self._mean_of_parts(_row_sums(self.initial_KRD.square()))
        self.now_KRD = torch.empty_like(self.initial_KRD)

    def statistics(self) -> Tensor:
        """Compute the statistics of every part, [K, P, 7], in float64."""
        torch.cat(self._rows(self.parameters, slice(None)), 1, out=self.now_KRD)
        return torch.cat([self._statistics(of) for of in self._portions()])

    def _portions(self) -> list[slice]:
        """Divide the models into those whose intermediate values fit MAX_ROW_ELEMENTS."""
        K, R, D = self.now_KRD.shape
        some = max(1, MAX_ROW_ELEMENTS // (R * D))
        return [slice(start, start + some) for start in range(0, K, some)]

    def _rows(self, tensors: Sequence[Tensor], of: slice) -> list[Tensor]:
        """Divide stacked tensors of some models into rows of D elements."""
        D = self.now_KRD.shape[2]
        return [(some := tensor.detach()[of]).reshape(len(some), -1, D) for tensor in tensors]

    def _statistics(self, of: slice) -> Tensor:
        """Compute the statistics of some of the models."""
        values_KRD, size_L = self.now_KRD[of], self.size_L
        grads = [stacked.grad for stacked in self.parameters if stacked.grad is not None]
        grad_KRD = torch.cat(self._rows(grads, of), 1)
        # Moments of z = (x - centre) / scale, where a leaf's centre is its rounded mean, and its
        # scale the largest |x|: powers of small numbers would be 0 in float32.
        centre_KL = (self._by_leaf(_row_sums(values_KRD)) / size_L).float()
        row_max_KR = values_KRD.abs().amax(2)
        leaf_of_row_KR = self.leaf_of_row_R.expand_as(row_max_KR)
        max_KL = torch.zeros_like(centre_KL).scatter_reduce(1, leaf_of_row_KR, row_max_KR, "amax")
        scale_KL = max_KL.masked_fill(max_KL == 0, 1.0)
        z_KRD = values_KRD - centre_KL[:, self.leaf_of_row_R, None]
        z_KRD /= scale_KL[:, self.leaf_of_row_R, None]
        square_KRD = z_KRD.square()
        sums = [_row_sums(z_KRD), _row_sums(square_KRD)]
        sums += [_row_sums(z_KRD.mul_(square_KRD)), _row_sums(square_KRD.square_())]
        del z_KRD, square_KRD
        power_411 = torch.arange(1, 5, device=scale_KL.device)[:, None, None]
        s1, s2, s3, s4 = self._by_leaf(torch.stack(sums)) * scale_KL.double() ** power_411
        centre_KL = centre_KL.double()
        mean_KP = self._by_part(centre_KL * size_L + s1) / self.size_P
        # From moments about the centre of each leaf to moments about the mean of each part.
        shift_KQ = centre_KL[:, self.leaf_Q] - mean_KP[:, self.part_Q]
        (s1, s2, s3, s4), n_Q = torch.stack([s1, s2, s3, s4])[..., self.leaf_Q], size_L[self.leaf_Q]
        second_KQ = s2 + shift_KQ * (2 * s1 + shift_KQ * n_Q)
        fourth_KQ = s4 + shift_KQ * (
            4 * s3 + shift_KQ * (6 * s2 + shift_KQ * (4 * s1 + shift_KQ * n_Q))
        )
        moments_2KP = self._add_pairs(torch.stack([second_KQ, fourth_KQ])) / self.size_P
        variance_KP = moments_2KP[0].clamp(min=0)
        kurtosis_KP = moments_2KP[1] / variance_KP.square() - 3
        max_KP = max_KL.new_zeros(mean_KP.shape).scatter_reduce(
            1, self.part_Q.expand_as(shift_KQ), max_KL[:, self.leaf_Q], "amax"
        )
        squares_2KR = torch.stack(
            [
                _row_sums((values_KRD - self.initial_KRD[of]).square_()),
                _row_sums(grad_KRD.square_()),
            ]
        )
        displacement_KP, grad_KP = self._mean_of_parts(squares_2KR)
        cosine_KP = _cosine(
            variance_KP + mean_KP.square(), self.initial_square_KP[of], displacement_KP
        )
        return torch.stack(
            [
                mean_KP,
                variance_KP.sqrt(),
                kurtosis_KP,
                max_KP,
                displacement_KP.sqrt(),
                cosine_KP,
                grad_KP.sqrt(),
            ],
            dim=2,
        )

    def remember(self) -> None:
        """Keep the values of now: `statistics` has copied them already."""

    def changes(self) -> Tensor:
        """Compute the RMS of the change since `statistics`, and the RMS before it, [K, P, 2]."""
        squares = []
        for of in self._portions():
            before_KRD = self.now_KRD[of]
            after_KRD = torch.cat(self._rows(self.parameters, of), 1)
            squares.append(
                torch.stack(
                    [_row_sums((after_KRD - before_KRD).square_()), _row_sums(before_KRD.square())]
                )
            )
        return self._mean_of_parts(torch.cat(squares, 1)).sqrt().permute(1, 2, 0)

    def _by_leaf(self, sums_XR: Tensor) -> Tensor:
        """Add up the rows of each leaf, [..., R] to [..., L]."""
        zeros = sums_XR.new_zeros(*sums_XR.shape[:-1], len(self.size_L))
        return zeros.index_add_(-1, self.leaf_of_row_R, sums_XR)

    def _mean_of_parts(self, sums_XR: Tensor) -> Tensor:
        """Divide sums over the rows of each part by its size, [..., R] to [..., P]."""
        return self._by_part(self._by_leaf(sums_XR)) / self.size_P

    def _by_part(self, sums_XL: Tensor) -> Tensor:
        """Add up the leaves of each part, [..., L] to [..., P]."""
        return self._add_pairs(sums_XL[..., self.leaf_Q])

    def _add_pairs(self, values_XQ: Tensor) -> Tensor:
        """Add up the pairs of each part, [..., Q] to [..., P]."""
        zeros = values_XQ.new_zeros(*values_XQ.shape[:-1], len(self.parts))
        return zeros.index_add_(-1, self.part_Q, values_XQ)


def _row_sums(values_KRD: Tensor) -> Tensor:
    """Add up the elements of each row in float64, [K, R]."""
    return values_KRD.sum(2, dtype=torch.float64)
