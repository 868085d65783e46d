"""How the weights start: one short function a scheme.

A scheme says, for the place of a weight in the model, which distribution it is drawn from; drawing
is done in one place for all of them. It is asked once for every weight matrix and embedding, for
Q, K and V each, and its keyword parameters are config keys (`std` is `init.std`). Biases start at
0 and LayerNorms at the identity under every scheme.

Under weight tying the token embedding and the head are one tensor, which `model.apply` visits
twice: as the embedding `wte`, then as the Linear `head`. What stays is what a scheme says of the
head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import nn

from gptcore.config import InitConfig, InputError, seed_of
from gptcore.model import GPT, parts_of
from gptcore.records import InitRow


class Place(NamedTuple):
    """Where in the model a weight stands."""

    kind: str  # q k v proj fc mlp_proj, wte wpe head
    fan_in: int  # columns: inputs of a Linear, width of an embedding
    fan_out: int  # rows: outputs of a Linear, entries of an embedding
    n_layer: int


class Draw(NamedTuple):
    """A distribution with mean 0: its name in DRAWS and its standard deviation."""

    shape: str
    std: float


def model5(place: Place) -> Draw:
    """Linear N(0, 0.02); embeddings Xavier normal, std sqrt(2 / (entries + width)).

    "Train Model 5 with weight initialisations", experiment A. Tying: the head is a Linear, so the
    token embedding ends at 0.02, not at Xavier's; only the position embedding keeps Xavier.
    """
    if place.kind in ("wte", "wpe"):
        return xavier_normal(place)
    return Draw("normal", 0.02)


def gpt2(place: Place) -> Draw:
    """N(0, 0.02) everywhere; projections into the residual stream 0.02 / sqrt(2 n_layer).

    Radford et al. 2019, section 2.3. Tying: embedding and head agree on 0.02.
    """
    if place.kind in ("proj", "mlp_proj"):
        return Draw("normal", 0.02 / math.sqrt(2 * place.n_layer))
    return Draw("normal", 0.02)


def normal(place: Place, std: float) -> Draw:
    """N(0, std) everywhere, embeddings included. Tying: embedding and head agree."""
    return Draw("normal", std)


def xavier_normal(place: Place) -> Draw:
    """std sqrt(2 / (fan_in + fan_out)).

    Glorot & Bengio 2010. Tying: embedding and head are the same matrix, and so agree.
    """
    return Draw("normal", math.sqrt(2 / (place.fan_in + place.fan_out)))


def kaiming_normal(place: Place) -> Draw:
    """std sqrt(2 / fan_in), fan_in the columns of the weight, for embeddings too.

    He et al. 2015. Tying: embedding and head agree on sqrt(2 / d_model).
    """
    return Draw("normal", math.sqrt(2 / place.fan_in))


def orthogonal(place: Place) -> Draw:
    """Orthonormal rows or columns, whichever are fewer; std 1 / sqrt(max(fan_in, fan_out)).

    Saxe et al. 2014. Tying: one matrix with orthonormal columns, drawn again for the head.
    """
    return Draw("orthogonal", 1 / math.sqrt(max(place.fan_in, place.fan_out)))


def initialise(model: GPT, config: InitConfig) -> list[InitRow]:
    """Set every parameter of the model; -> what each tensor was drawn from.

    Each draw has a generator of its own, seeded by the tensor's name and `config.seed`, so that
    two schemes differ by their rule alone and a model with more layers begins like one with fewer.
    """
    scheme = INIT_SCHEMES[config.scheme]
    parameters = {name: getattr(config, name) for name in scheme_parameters(config.scheme)}
    names = {module: name for name, module in model.named_modules()}
    rows: dict[str, InitRow] = {}

    @torch.no_grad()
    def set_own_parameters(module: nn.Module) -> None:
        for part in parts_of(names[module], module):
            if part.kind == "qkv":  # set through its three parts
                continue
            if part.values.dim() == 1:  # biases, and what a LayerNorm scales by
                part.values.fill_(1.0 if part.kind == "ln_weight" else 0.0)
                draw = Draw("constant", 0.0)
            else:
                fan_out, fan_in = part.values.shape
                place = Place(part.kind, fan_in, fan_out, len(model.blocks))
                draw = scheme(place, **parameters)
                generator = torch.Generator().manual_seed(seed_of("init", part.name, config.seed))
                fresh = torch.empty_like(part.values, device="cpu")
                DRAWS[draw.shape](fresh, draw.std, generator)
                part.values.copy_(fresh)
            # The head is the tied embedding: the later visit is the one that stays.
            tensor, kind = ("wte", "wte") if part.kind == "head" else (part.name, part.kind)
            rows[tensor] = InitRow(
                tensor=tensor, kind=kind, layer=part.layer, draw=draw.shape, std=draw.std
            )

    model.apply(set_own_parameters)
    return list(rows.values())


def scheme_parameters(scheme: str) -> list[str]:
    """The names in InitConfig of the parameters that a scheme takes, e.g. ["std"]."""
    return list(inspect.signature(INIT_SCHEMES[scheme]).parameters)[1:]


def check_init(config: InitConfig) -> None:
    """Raise InputError for an unknown scheme, or a parameter given to one that does not take it."""
    if config.scheme not in INIT_SCHEMES:
        raise InputError(
            f"init.scheme {config.scheme!r} is unknown: take {', '.join(INIT_SCHEMES)}"
        )
    given = {
        entry.name
        for entry in fields(config)
        if entry.name not in ("scheme", "seed") and getattr(config, entry.name) != entry.default
    }
    for name in sorted(given - set(scheme_parameters(config.scheme))):
        takers = [scheme for scheme in INIT_SCHEMES if name in scheme_parameters(scheme)]
        raise InputError(
            f"init.scheme {config.scheme} takes no init.{name}: the schemes that do are "
            f"{', '.join(takers)}"
        )


def _normal(tensor: torch.Tensor, std: float, generator: torch.Generator) -> None:
    tensor.normal_(0.0, std, generator=generator)


def _orthogonal(tensor: torch.Tensor, std: float, generator: torch.Generator) -> None:
    nn.init.orthogonal_(tensor, gain=std * math.sqrt(max(tensor.shape)), generator=generator)


DRAWS: dict[str, Callable[[torch.Tensor, float, torch.Generator], None]] = {
    "normal": _normal,
    "orthogonal": _orthogonal,
}

INIT_SCHEMES: dict[str, Callable[..., Draw]] = {
    "model5": model5,
    "gpt2": gpt2,
    "normal": normal,
    "xavier_normal": xavier_normal,
    "kaiming_normal": kaiming_normal,
    "orthogonal": orthogonal,
}
