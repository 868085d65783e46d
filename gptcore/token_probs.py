"""How probable a model finds tokens, on sequences that it reads.

Shapes as in gptcore.model, and: G token groups; U distinct tokens among the inputs; P = 2, position
0 and the rest.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcore.model import GPT, softmax_sums
from gptcore.records import TokenGroupRow, TokensRow
from gptcore.token_groups import TokenGroups

MIN_TOKENS = 20
"""A mean over fewer tokens of a group than this is not reported."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Sequences as the model reads them."""

    text: str  # batch, probe or held_out
    ids_BT: Tensor  # inputs
    hidden_BTD: Tensor
    log_z_BT: Tensor
    prob_BTG: Tensor | None = None  # summed over the tokens of each group; not known of a batch


def read(model: GPT, text: str, ids_BT: Tensor, groups: TokenGroups) -> Reading:
    """Let the model read a text, with the probability of the token groups."""
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
    """1 where a token is of a group, else 0, [G, V], beside the head's weight."""
    return _members(groups, len(weight_VD), weight_VD.dtype, weight_VD.device)


@functools.lru_cache(maxsize=1)
def _members(groups: TokenGroups, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    members_GV = torch.zeros(len(groups.ids), V, dtype=dtype)
    for row, ids in zip(members_GV, groups.ids.values(), strict=True):
        row[torch.from_numpy(ids)] = 1
    return members_GV.to(device)


def token_group_rows(
    step: int, reading: Reading, weight_VD: Tensor, groups: TokenGroups
) -> list[TokenGroupRow]:
    """Mean log-probability of every group under every mask; `weight_VD` is the head's.

    No logits of the whole vocabulary are needed beyond the log Z that the loss has: over the tokens
    j of a group, z_tj = h_t . w_j sums to h_t . (sum_j w_j). From that, what a mask leaves out is
    taken away: tokens among the inputs, which are few. All sums are over positions first: P is
    position 0 and the rest.
    """
    members_GV, device = members_of(groups, weight_VD), weight_VD.device
    B, T = reading.ids_BT.shape
    present_U, which_BT = reading.ids_BT.unique(return_inverse=True)
    position_T = torch.arange(T, device=device)
    first_BU = torch.full((B, len(present_U)), T, device=device)
    first_BU.scatter_reduce_(1, which_BT, position_T.expand(B, T), "amin")
    is_present_BU, from_first_BTU = first_BU < T, position_T[:, None] >= first_BU[:, None, :]

    # What is summed: of each token that can be left out, and over all tokens of a group.
    log_z_BT1, ones_BT1 = reading.log_z_BT[..., None], torch.ones_like(reading.log_z_BT)[..., None]
    logit_BTU = reading.hidden_BTD @ weight_VD[present_U].T
    size_G = members_GV.sum(1)
    unigram_V = torch.from_numpy(groups.log_unigram).to(device)
    unigram_G = torch.stack([unigram_V[ids].sum() for ids in groups.ids.values()])
    of_tokens = {"tokens": ones_BT1, "log_z": log_z_BT1, "logit": logit_BTU}
    of_groups = {
        "tokens": ones_BT1 * size_G,
        "log_z": log_z_BT1 * size_G,
        "logit": reading.hidden_BTD @ (members_GV @ weight_VD).T,
        "unigram": ones_BT1 * unigram_G,
    }
    if reading.prob_BTG is not None:
        of_tokens["prob"] = (logit_BTU - log_z_BT1).exp()
        of_groups["prob"] = reading.prob_BTG
    sums_PBU = {name: _by_position(values) for name, values in of_tokens.items()}
    left_out_PBU = {
        "sequence": {name: sums * is_present_BU for name, sums in sums_PBU.items()},
        "prefix": {name: _by_position(of_tokens[name] * from_first_BTU) for name in of_tokens},
        "batch": {name: sums.expand(2, B, len(present_U)) for name, sums in sums_PBU.items()},
        "none": {name: torch.zeros_like(first_BU).expand(2, -1, -1) for name in of_tokens},
    }
    members_UG = members_GV[:, present_U].T.double()
    positions_of = {"first": B, "rest": B * (T - 1)}
    rows = []
    for mask, out_PBU in left_out_PBU.items():
        out_PU = {name: sums.sum(1).double() for name, sums in out_PBU.items()}
        out_PU["unigram"] = out_PU["tokens"] * unigram_V[present_U]
        left_PG = {
            name: (
                _by_position(of_groups[name].double()).sum(1) - out_PU[name] @ members_UG
            ).tolist()
            for name in of_groups
        }
        for p, (positions, n_positions) in enumerate(positions_of.items()):
            for g, group in enumerate(groups.ids):
                pairs = left_PG["tokens"][p][g]
                n_tokens = pairs / n_positions
                values: dict[str, float | None] = {}
                if n_tokens >= MIN_TOKENS:
                    mean = {name: left_PG[name][p][g] / pairs for name in left_PG}
                    values["mean_logit"], values["log_z"] = mean["logit"], mean["log_z"]
                    values["mean_logprob"] = mean["logit"] - mean["log_z"]
                    values["excess"] = mean["logit"] - mean["log_z"] - mean["unigram"]
                    if mean.get("prob", 0.0) > 0:  # known, and not too small for float32
                        values["log_mean_prob"] = math.log(mean["prob"])
                rows.append(
                    TokenGroupRow(
                        step=step,
                        text=reading.text,
                        group=group,
                        mask=mask,
                        positions=positions,
                        n_tokens=n_tokens,
                        mean_logprob=values.get("mean_logprob"),
                        log_mean_prob=values.get("log_mean_prob"),
                        mean_logit=values.get("mean_logit"),
                        log_z=values.get("log_z"),
                        excess=values.get("excess"),
                    )
                )
    return rows


def _by_position(values_BTX: Tensor) -> Tensor:
    """Sums over position 0 and over all others: [2, B, X]."""
    return torch.stack([values_BTX[:, 0], values_BTX[:, 1:].sum(1)]).double()


def tokens_row(
    step: int, reading: Reading, weight_VD: Tensor, initial_VD: Tensor, groups: TokenGroups
) -> TokensRow:
    """Every token's log-probability, and its row of the head's weight, now and at step 0."""
    # Mean over the positions but 0 of log p(j) = z_j - log Z, [V, B].
    log_prob_VB = (weight_VD @ reading.hidden_BTD[:, 1:].mean(1).T).double()
    log_prob_VB -= reading.log_z_BT[:, 1:].double().mean(1)
    absent_VB = torch.ones_like(log_prob_VB, dtype=torch.bool)
    absent_VB.T.scatter_(1, reading.ids_BT, False)
    sequences_V = absent_VB.sum(1)
    masked_V = (log_prob_VB * absent_VB).sum(1) / sequences_V
    vocab = len(groups.counts)  # a model may have rows beyond

    def listed(values_V: Tensor) -> list[float]:
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
