"""The probabilities that models give to tokens and to groups of tokens, on some sequences.

Shapes are those of gptcore.array, and U distinct tokens among the inputs; P = 2: position 0, and
all other positions. Nothing here waits for the device: `Measured` holds tensors, and makes rows of
their values later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcore.model import softmax_sums, stacked_rows
from gptcore.records import GroupWeightRow, Row, TokenGroupRow, TokensRow
from gptcore.token_groups import TokenGroups

MIN_TOKENS = 20
"""A mean over fewer tokens of a group is not reported."""

MIN_PROB_SHARE = 1e-4
"""The probability of the tokens that a mask leaves of a group is not reported if it is a smaller
fraction of the probability of the group: it is the difference of two sums, and mostly rounding
error."""


@dataclass(frozen=True)
class Measured:
    """Numbers that a probe has computed of K models, and how they become rows.

    For example, a probe of the largest entry of each model's head could return
    `Measured(head_KVD.flatten(1).amax(1), lambda step, value: [HeadRow(step=step, max=value)])`.
    """

    values: Tensor  # [K, ...], of any dtype
    rows: Callable[[int, Any], Sequence[Row]]
    """Makes the rows of one model from the step and its values, as nested lists of floats."""


@dataclass(frozen=True)
class GroupTensors:
    """The token groups of K trials, on the device of their models."""

    names: Sequence[str]
    members_KGV: Tensor  # 1 where a token is in a group, else 0
    counts_KX: Tensor  # occurrences of each token, of the tokenizer's X tokens
    log_unigram_KX: Tensor  # log-prob of each token under the unigram model of the training text
    log_unigram_KG: Tensor  # its sum over the tokens of each group

    @classmethod
    def of(cls, groups: Sequence[TokenGroups], V: int, device: torch.device) -> GroupTensors:
        """Copy the groups of K trials to a device, for models of V tokens."""
        members_KGV = torch.zeros(len(groups), len(groups[0].ids), V)
        for members_GV, of_trial in zip(members_KGV, groups, strict=True):
            for member_V, ids in zip(members_GV, of_trial.ids.values(), strict=True):
                member_V[torch.from_numpy(ids)] = 1
        sums = [[each.log_unigram[ids].sum() for ids in each.ids.values()] for each in groups]
        return cls(
            names=list(groups[0].ids),
            members_KGV=members_KGV.to(device),
            counts_KX=torch.tensor([each.counts.tolist() for each in groups], device=device),
            log_unigram_KX=torch.stack([torch.from_numpy(each.log_unigram) for each in groups]).to(
                device
            ),
            log_unigram_KG=torch.tensor(sums, dtype=torch.float64, device=device),
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The output of K models on some sequences."""

    text: str  # batch, probe or held_out
    ids_KBT: Tensor  # inputs
    hidden_KBTD: Tensor
    log_z_KBT: Tensor
    prob_KBTG: Tensor | None = None  # probability of each group of tokens; None for a batch


def read(
    text: str, ids_KBT: Tensor, hidden_KBTD: Tensor, head_KVD: Tensor, groups: GroupTensors
) -> Reading:
    """Compute the probability of each token group on a text, from its final hidden states."""
    found = [
        softmax_sums(hidden_BTD.flatten(0, 1), weight_VD, members_GV)
        for hidden_BTD, weight_VD, members_GV in zip(
            hidden_KBTD, head_KVD, groups.members_KGV, strict=True
        )
    ]
    return Reading(
        text=text,
        ids_KBT=ids_KBT,
        hidden_KBTD=hidden_KBTD,
        log_z_KBT=torch.stack([log_z_N for _, log_z_N in found]).view_as(ids_KBT),
        # One model's is not copied: another layout in memory would be summed in another order.
        prob_KBTG=(
            found[0][0][None] if len(found) == 1 else torch.stack([prob_NG for prob_NG, _ in found])
        ).view(*ids_KBT.shape, -1),
    )


def target_logits(reading: Reading, head_KVD: Tensor, targets_KBT: Tensor) -> Tensor:
    """Return the logit of the next token at each position, [K, B, T]."""
    return (reading.hidden_KBTD * rows_of_tokens(head_KVD, targets_KBT)).sum(3)


def rows_of_tokens(weight_KVD: Tensor, ids_KX: Tensor) -> Tensor:
    """Return each model's rows of a weight for its own tokens, [K, ..., D]."""
    return weight_KVD.flatten(0, 1)[stacked_rows(ids_KX, weight_KVD.shape[1])]


def product(a_KXY: Tensor, b_KYZ: Tensor) -> Tensor:
    """Multiply the matrices of each model. One model alone is multiplied without a batch, which
    keeps the order of sums that trials have had before arrays were measured together."""
    if len(a_KXY) == 1:
        return (a_KXY[0] @ b_KYZ[0])[None]
    return a_KXY @ b_KYZ


def distinct_tokens(ids_KN: Tensor, *, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Find the distinct tokens of each model's inputs.

    Args:
        ids_KN: tokens, of one model unless `padded`.
        padded: whether U is N, which is known without waiting for the device. The places after the
            distinct tokens then repeat one of them.

    Returns:
        The distinct tokens in ascending order, [K, U]; the place of each input among them, [K, N];
        and 1 at the places of distinct tokens, 0 after them, [K, U].
    """
    if not padded:
        present_U, which_N = ids_KN.unique(return_inverse=True)
        return present_U[None], which_N.view_as(ids_KN), torch.ones_like(present_U)[None]
    sorted_KN, order_KN = ids_KN.sort(dim=1)
    is_new_KN = torch.ones_like(sorted_KN)
    is_new_KN[:, 1:] = sorted_KN[:, 1:] != sorted_KN[:, :-1]
    place_KN = is_new_KN.cumsum(1) - 1
    which_KN = torch.empty_like(ids_KN).scatter_(1, order_KN, place_KN)
    present_KN = sorted_KN[:, :1].repeat(1, ids_KN.shape[1]).scatter_(1, place_KN, sorted_KN)
    is_used_KN = torch.zeros_like(ids_KN).scatter_(1, place_KN, 1)
    return present_KN, which_KN, is_used_KN


MASKS = ("sequence", "prefix", "batch", "none")


def token_group_rows(
    reading: Reading, head_KVD: Tensor, groups: GroupTensors, *, padded: bool
) -> Measured:
    """Compute the mean log-probability of every group under every mask.

    This needs no logits of the complete vocabulary: over the tokens j of a group, the logits
    z_tj = h_t . w_j sum to h_t . (sum_j w_j). The values of the tokens that a mask leaves out are
    then subtracted. They are among the inputs, so there are few of them.

    Args:
        reading: the output of the models on the sequences.
        head_KVD: the weights of the heads.
        groups: the groups, with the unigram model of the training text.
        padded: as in distinct_tokens.
    """
    members_KGV = groups.members_KGV
    K, B, T = reading.ids_KBT.shape
    present_KU, which_KN, is_used_KU = distinct_tokens(reading.ids_KBT.flatten(1), padded=padded)
    U, G = present_KU.shape[1], members_KGV.shape[1]
    position_T = torch.arange(T, device=present_KU.device)
    first_KBU = torch.full((K, B, U), T, device=present_KU.device)
    first_KBU.scatter_reduce_(2, which_KN.view(K, B, T), position_T.expand(K, B, T), "amin")
    is_present_KBU = first_KBU < T
    from_first_KBTU = (position_T[:, None] >= first_KBU[:, :, None, :]).to(head_KVD.dtype)

    # The terms of the sums: for each token that can be left out, and over all tokens of a group.
    log_z_KBT1, hidden_KND = reading.log_z_KBT[..., None], reading.hidden_KBTD.flatten(1, 2)
    logit_KBTU = product(hidden_KND, rows_of_tokens(head_KVD, present_KU).mT).view(K, B, T, U)
    size_K11G = members_KGV.sum(2)[:, None, None]
    token_values = {"tokens": torch.ones_like(log_z_KBT1), "log_z": log_z_KBT1, "logit": logit_KBTU}
    group_values = {
        "tokens": size_K11G,
        "log_z": log_z_KBT1 * size_K11G,
        "logit": product(hidden_KND, product(members_KGV, head_KVD).mT).view(K, B, T, G),
    }
    if reading.prob_KBTG is not None:
        token_values["prob"] = (logit_KBTU - log_z_KBT1).exp()
        group_values["prob"] = reading.prob_KBTG
    group_values["unigram"] = groups.log_unigram_KG[:, None, None]
    values_KQBTU = torch.stack([x.expand(K, B, T, U) for x in token_values.values()], dim=1)
    # Before they are repeated for U tokens, because longer rows may be summed in another order.
    sums = [_by_position(x).expand(K, 2, B, U) for x in token_values.values()]
    sums_KQPBU = torch.stack(sums, dim=1)
    left_out_KMQPBU = torch.stack(
        [
            sums_KQPBU * is_present_KBU[:, None, None],
            _by_position(values_KQBTU * from_first_KBTU[:, None]),
            sums_KQPBU,
            torch.zeros_like(sums_KQPBU),
        ],
        dim=1,
    )
    # In float64, because float32 cannot hold large counts of pairs exactly.
    left_out_KMQPU = left_out_KMQPBU.sum(4, dtype=torch.float64)
    unigram_K11U = groups.log_unigram_KX.gather(1, present_KU)[:, None, None]
    left_out_KMQPU = torch.cat(
        [left_out_KMQPU, (left_out_KMQPU[:, :, 0] * unigram_K11U)[:, :, None]], dim=2
    )
    members_KUG = members_KGV.gather(2, present_KU[:, None].expand(-1, G, -1)).mT
    members_KUG = members_KUG.double() * is_used_KU[..., None]
    if padded:
        left_out_KMQPG = left_out_KMQPU.flatten(1, 3) @ members_KUG
    else:  # one product after another, because a larger one may sum in another order
        each = [out_PU @ members_KUG[0] for out_PU in left_out_KMQPU.flatten(0, 2)]
        left_out_KMQPG = torch.stack(each)
    left_out_KMQPG = left_out_KMQPG.view(*left_out_KMQPU.shape[:4], G)
    values_KBTG = [x.double().expand(K, B, T, G) for x in group_values.values()]
    if padded:
        totals_KQPBG = _by_position(torch.stack(values_KBTG, dim=1))
    else:  # one after another, each in its layout in memory, which decides the order of the sum
        totals_KQPBG = torch.stack([_by_position(x) for x in values_KBTG], dim=1)
    totals_KQPG = totals_KQPBG.sum(3)
    left_KMQPG = totals_KQPG[:, None] - left_out_KMQPG
    text, names, sums_of = reading.text, groups.names, list(group_values)
    if "prob" in sums_of:
        prob_KMPG = left_KMQPG[:, :, sums_of.index("prob")]
        total_K1PG = totals_KQPG[:, None, sums_of.index("prob")]
        prob_KMPG.masked_fill_(prob_KMPG < MIN_PROB_SHARE * total_K1PG, 0.0)
    n_positions = {"first": B, "rest": B * (T - 1)}

    def rows(step: int, by_mask: Any) -> list[Row]:
        found: list[Row] = []
        for mask, table in zip(MASKS, by_mask, strict=True):
            for p, (positions, n) in enumerate(n_positions.items()):
                for g, group in enumerate(names):
                    sums = {name: table[q][p][g] for q, name in enumerate(sums_of)}
                    pairs = sums.pop("tokens")
                    means = {name: value / pairs for name, value in sums.items()} if pairs else None
                    found.append(
                        TokenGroupRow(
                            step=step,
                            text=text,
                            group=group,
                            mask=mask,
                            positions=positions,
                            n_tokens=pairs / n,
                            **_values(means if pairs / n >= MIN_TOKENS else None),
                        )
                    )
        return found

    return Measured(left_KMQPG, rows)


def _by_position(values_XBTU: Tensor) -> Tensor:
    """Sum over position 0, and over all other positions, [..., B, T, U] to [..., 2, B, U]."""
    return torch.stack([values_XBTU[..., 0, :], values_XBTU[..., 1:, :].sum(-2)], dim=-3)


def _values(means: dict[str, float] | None) -> dict[str, float | None]:
    """Return the values of a row, from means over its pairs of position and token."""
    if means is None:
        return dict.fromkeys(("mean_logprob", "log_mean_prob", "mean_logit", "log_z", "excess"))
    log_prob = means["logit"] - means["log_z"]
    return {
        "mean_logprob": log_prob,
        "log_mean_prob": math.log(means["prob"]) if means.get("prob") else None,
        "mean_logit": means["logit"],
        "log_z": means["log_z"],
        "excess": log_prob - means["unigram"],
    }


def group_weight_rows(head_KVD: Tensor, initial_KVD: Tensor, groups: GroupTensors) -> Measured:
    """Measure each group's rows of the head's weight, and their distance from step 0."""
    squares_KV2 = torch.stack(
        [head_KVD.norm(dim=2).square(), (head_KVD - initial_KVD).norm(dim=2).square()], dim=2
    )
    size_KG1 = groups.members_KGV.sum(2, keepdim=True)
    rms_KG2 = (product(groups.members_KGV, squares_KV2) / (size_KG1 * head_KVD.shape[2])).sqrt()

    def rows(step: int, by_group: Any) -> list[Row]:
        return [
            GroupWeightRow(step=step, group=group, rms=rms, rms_displacement=displacement)
            for group, (size, rms, displacement) in zip(groups.names, by_group, strict=True)
            if size
        ]

    return Measured(torch.cat([size_KG1, rms_KG2], dim=2), rows)


def tokens_row(
    reading: Reading, head_KVD: Tensor, initial_KVD: Tensor, groups: GroupTensors
) -> Measured:
    """Measure the log-probability of every token, and its row of the head's weight."""
    # Mean of log p(j) = z_j - log Z over all positions except 0, [K, V, B].
    log_prob_KVB = product(head_KVD, reading.hidden_KBTD[:, :, 1:].mean(2).mT).double()
    log_prob_KVB -= reading.log_z_KBT[:, :, 1:].double().mean(2)[:, None]
    absent_KVB = torch.ones_like(log_prob_KVB, dtype=torch.bool)
    absent_KVB.mT.scatter_(2, reading.ids_KBT, False)
    sequences_KV = absent_KVB.sum(2)
    X = groups.counts_KX.shape[1]  # the model may have more rows than there are tokens
    columns = {
        "count": groups.counts_KX,
        "log_unigram": groups.log_unigram_KX,
        "log_prob": log_prob_KVB.mean(2),
        "log_prob_masked": (log_prob_KVB * absent_KVB).sum(2) / sequences_KV,
        "sequences": sequences_KV,
        "norm": head_KVD.norm(dim=2),
        "displacement": (head_KVD - initial_KVD).norm(dim=2),
    }

    def rows(step: int, values: Any) -> list[Row]:
        found = dict(zip(columns, values, strict=True))
        masked = zip(found["log_prob_masked"], found.pop("sequences"), strict=True)
        found["log_prob_masked"] = [value if n else None for value, n in masked]
        found["count"] = [int(count) for count in found["count"]]
        return [TokensRow(step=step, **found)]

    return Measured(torch.stack([column[:, :X].double() for column in columns.values()], 1), rows)
