"""The probabilities that a model gives to tokens and to groups of tokens, on some sequences.

Shapes are those of gptcore.model, and U distinct tokens among the inputs; P = 2: position 0, and
all other positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcore.model import GPT, softmax_sums
from gptcore.records import GroupWeightRow, TokenGroupRow, TokensRow
from gptcore.token_groups import TokenGroups

MIN_TOKENS = 20
"""A mean over fewer tokens of a group is not reported."""

MIN_PROB_SHARE = 1e-4
"""The probability of the tokens that a mask leaves of a group is not reported if it is a smaller
fraction of the probability of the group: it is the difference of two sums, and mostly rounding
error."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The output of the model on some sequences."""

    text: str  # batch, probe or held_out
    ids_BT: Tensor  # inputs
    hidden_BTD: Tensor
    log_z_BT: Tensor
    prob_BTG: Tensor | None = None  # probability of each group of tokens; None for a batch


def read(model: GPT, text: str, ids_BT: Tensor, groups: TokenGroups) -> Reading:
    """Run the model on the inputs of a text, and compute the probability of each token group."""
    hidden_BTD, weight_VD = model(ids_BT), model.head.weight
    members_GV = members_of(groups, weight_VD)
    prob_NG, log_z_N = softmax_sums(hidden_BTD.flatten(0, 1), weight_VD, members_GV)
    return Reading(
        text=text,
        ids_BT=ids_BT,
        hidden_BTD=hidden_BTD,
        log_z_BT=log_z_N.view_as(ids_BT),
        prob_BTG=prob_NG.view(*ids_BT.shape, -1),
    )


def members_of(groups: TokenGroups, weight_VD: Tensor) -> Tensor:
    """Return 1 where a token is in a group, else 0, [G, V], on the device of the head's weight."""
    members_GV = torch.zeros(len(groups.ids), len(weight_VD))
    for row, ids in zip(members_GV, groups.ids.values(), strict=True):
        row[torch.from_numpy(ids)] = 1
    return members_GV.to(weight_VD.device)


def token_group_rows(
    step: int, reading: Reading, weight_VD: Tensor, groups: TokenGroups
) -> list[TokenGroupRow]:
    """Compute the mean log-probability of every group under every mask.

    This needs no logits of the complete vocabulary: over the tokens j of a group, the logits
    z_tj = h_t . w_j sum to h_t . (sum_j w_j). The values of the tokens that a mask leaves out are
    then subtracted. They are among the inputs, so there are few of them.

    Args:
        reading: the output of the model on the sequences.
        weight_VD: the weight of the head.
        groups: the groups, with the unigram model of the training text.
    """
    members_GV = members_of(groups, weight_VD)
    B, T = reading.ids_BT.shape
    present_U, which_BT = reading.ids_BT.unique(return_inverse=True)
    position_T = torch.arange(T, device=present_U.device)
    first_BU = torch.full((B, len(present_U)), T, device=present_U.device)
    first_BU.scatter_reduce_(1, which_BT, position_T.expand(B, T), "amin")
    is_present_BU = first_BU < T
    from_first_BTU = (position_T[:, None] >= first_BU[:, None, :]).to(weight_VD.dtype)

    # The terms of the sums: for each token that can be left out, and over all tokens of a group.
    log_z_BT1, ones_BT1 = reading.log_z_BT[..., None], torch.ones_like(reading.log_z_BT)[..., None]
    logit_BTU = reading.hidden_BTD @ weight_VD[present_U].T
    size_G = members_GV.sum(1)
    unigram_G = torch.tensor([groups.log_unigram[ids].sum() for ids in groups.ids.values()])
    unigram_U = torch.from_numpy(groups.log_unigram[present_U.cpu().numpy()])
    token_values = {"tokens": ones_BT1, "log_z": log_z_BT1, "logit": logit_BTU}
    group_values = {
        "tokens": ones_BT1 * size_G,
        "log_z": log_z_BT1 * size_G,
        "logit": reading.hidden_BTD @ (members_GV @ weight_VD).T,
        "unigram": ones_BT1 * unigram_G.to(ones_BT1.device),
    }
    if reading.prob_BTG is not None:
        token_values["prob"] = (logit_BTU - log_z_BT1).exp()
        group_values["prob"] = reading.prob_BTG
    sums_PBU = {name: _by_position(values) for name, values in token_values.items()}
    left_out_PBU = {
        "sequence": {name: sums * is_present_BU for name, sums in sums_PBU.items()},
        "prefix": {
            name: _by_position(values * from_first_BTU) for name, values in token_values.items()
        },
        "batch": {name: sums.expand(2, B, len(present_U)) for name, sums in sums_PBU.items()},
        "none": {name: torch.zeros_like(first_BU).expand(2, -1, -1) for name in token_values},
    }
    members_UG = members_GV[:, present_U].T.double()
    # In float64, because float32 cannot hold large counts of pairs exactly.
    total_PG = {name: _by_position(values.double()).sum(1) for name, values in group_values.items()}
    n_positions = {"first": B, "rest": B * (T - 1)}
    rows = []
    for mask, out_PBU in left_out_PBU.items():
        out_PU = {name: sums.sum(1, dtype=torch.float64) for name, sums in out_PBU.items()}
        out_PU["unigram"] = out_PU["tokens"] * unigram_U.to(ones_BT1.device)
        left_PG = {name: total - out_PU[name] @ members_UG for name, total in total_PG.items()}
        if "prob" in left_PG:
            too_small = left_PG["prob"] < MIN_PROB_SHARE * total_PG["prob"]
            left_PG["prob"] = left_PG["prob"].masked_fill(too_small, 0.0)
        table = torch.stack(list(left_PG.values()), dim=2).tolist()
        for positions, by_group in zip(n_positions, table, strict=True):
            for group, sums in zip(groups.ids, by_group, strict=True):
                found = dict(zip(left_PG, sums, strict=True))
                pairs = found.pop("tokens")
                n_tokens = pairs / n_positions[positions]
                means = {name: value / pairs for name, value in found.items()} if pairs else None
                rows.append(
                    TokenGroupRow(
                        step=step,
                        text=reading.text,
                        group=group,
                        mask=mask,
                        positions=positions,
                        n_tokens=n_tokens,
                        **_values(means if n_tokens >= MIN_TOKENS else None),
                    )
                )
    return rows


def _by_position(values_BTX: Tensor) -> Tensor:
    """Sum over position 0, and over all other positions, [2, B, X]."""
    return torch.stack([values_BTX[:, 0], values_BTX[:, 1:].sum(1)])


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


def group_weight_rows(
    step: int, weight_VD: Tensor, initial_VD: Tensor, groups: TokenGroups
) -> list[GroupWeightRow]:
    """Measure each group's rows of the head's weight, and their distance from step 0."""
    members_GV = members_of(groups, weight_VD)
    squares_V2 = torch.stack(
        [weight_VD.norm(dim=1).square(), (weight_VD - initial_VD).norm(dim=1).square()], dim=1
    )
    elements_G1 = members_GV.sum(1, keepdim=True) * weight_VD.shape[1]
    rms_G2 = (members_GV @ squares_V2 / elements_G1).sqrt()
    return [
        GroupWeightRow(step=step, group=group, rms=rms, rms_displacement=displacement)
        for group, (rms, displacement) in zip(groups.ids, rms_G2.tolist(), strict=True)
        if len(groups.ids[group])
    ]


def tokens_row(
    step: int, reading: Reading, weight_VD: Tensor, initial_VD: Tensor, groups: TokenGroups
) -> TokensRow:
    """Measure the log-probability of every token, and its row of the head's weight."""
    # Mean of log p(j) = z_j - log Z over all positions except 0, [V, B].
    log_prob_VB = (weight_VD @ reading.hidden_BTD[:, 1:].mean(1).T).double()
    log_prob_VB -= reading.log_z_BT[:, 1:].double().mean(1)
    absent_VB = torch.ones_like(log_prob_VB, dtype=torch.bool)
    absent_VB.T.scatter_(1, reading.ids_BT, False)
    sequences_V = absent_VB.sum(1)
    masked_V = (log_prob_VB * absent_VB).sum(1) / sequences_V
    vocab = len(groups.counts)  # the model may have more rows than there are tokens

    def listed(values_V: Tensor) -> list[Any]:
        return values_V[:vocab].tolist()

    return TokensRow(
        step=step,
        count=groups.counts.tolist(),
        log_unigram=groups.log_unigram.tolist(),
        log_prob=listed(log_prob_VB.mean(1)),
        log_prob_masked=[
            value if n else None
            for value, n in zip(listed(masked_V), listed(sequences_V), strict=True)
        ],
        norm=listed(weight_VD.norm(dim=1)),
        displacement=listed((weight_VD - initial_VD).norm(dim=1)),
    )
