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

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gptcore.config import InitConfig, check_choice, parameters_of, seed_of
from gptcore.model import GPT, parts_of
from gptcore.records import InitRow


class Place(NamedTuple):
    """Where in the model a weight stands."""

    kind: str  # q k v proj fc mlp_proj, wte wpe head
    fan_in: int  # columns: inputs of a Linear, width of an embedding
    fan_out: int  # rows: outputs of a Linear, entries of an embedding
    layer: int | None  # None outside the blocks
    n_layer: int
    d_model: int
    tied: bool  # whether head and token embedding are one tensor

    @property
    def embeds(self) -> bool:
        return self.kind in ("wte", "wpe")

    @property
    def ends_branch(self) -> bool:
        """Whether its output is added to the residual stream."""
        return self.kind in ("proj", "mlp_proj")


class Draw(NamedTuple):
    """A distribution with mean 0: its name in DRAWS, its standard deviation, its shape."""

    shape: str
    std: float
    parameter: float = math.nan  # of the shapes that have one


ZERO = Draw("constant", 0.0)


def model5(place: Place) -> Draw:
    """Linear N(0, 0.02); embeddings Xavier normal, std sqrt(2 / (entries + width)).

    "Train Model 5 with weight initialisations", experiment A. Tying: the head is a Linear, so the
    token embedding ends at 0.02, not at Xavier's; only the position embedding keeps Xavier.
    """
    return xavier_normal(place, gain=1.0) if place.embeds else Draw("normal", 0.02)


def normal(place: Place, std: float) -> Draw:
    """N(0, std) everywhere, embeddings included. Tying: embedding and head agree."""
    return Draw("normal", std)


def truncated_normal(place: Place, std: float, cut: float) -> Draw:
    """A normal cut at +-`cut` of its own standard deviations, scaled so that `std` is what is left.

    std^2 = sigma^2 (1 - 2 cut phi(cut) / (2 Phi(cut) - 1)), sigma the parent's; the same variance
    as `normal`, without its tails. Tying: embedding and head agree.
    """
    return Draw("truncated_normal", std, cut)


def uniform(place: Place, std: float) -> Draw:
    """U(-a, a) with a = sqrt(3) std: the variance of `normal`, no tails at all.

    Tying: embedding and head agree.
    """
    return Draw("uniform", std)


def student_t(place: Place, std: float, nu: float) -> Draw:
    """Student's t with `nu` degrees of freedom, scaled by std sqrt((nu - 2) / nu).

    The variance of `normal`, heavier tails: excess kurtosis 6 / (nu - 4). For nu <= 4 that is
    infinite, and the std of a single tensor scatters far around `std`: by half at 2.1, a tenth at
    2.5, a twentieth at 3. Tying: embedding and head agree.
    """
    return Draw("student_t", std, nu)


def laplace(place: Place, std: float) -> Draw:
    """Laplace with scale std / sqrt(2): the variance of `normal`, excess kurtosis 3.

    Tying: embedding and head agree.
    """
    return Draw("laplace", std)


def rademacher(place: Place, std: float) -> Draw:
    """+std or -std, each with probability 1/2: the variance of `normal`, excess kurtosis -2.

    Tying: embedding and head agree.
    """
    return Draw("rademacher", std)


def torch_default(place: Place) -> Draw:
    """What PyTorch does unasked: Linear U(+-1 / sqrt(fan_in)), std 1 / sqrt(3 fan_in).

    Linear's is kaiming_uniform_ with a = sqrt(5) (torch.nn.Linear.reset_parameters); its biases,
    which PyTorch draws from the same interval, start at 0 here as under every scheme. Embeddings
    are N(0, 1). Tying: the token embedding ends as the head's Linear, only the position embedding
    keeps N(0, 1).
    """
    return Draw("normal", 1.0) if place.embeds else Draw("uniform", (3 * place.fan_in) ** -0.5)


def xavier_normal(place: Place, gain: float) -> Draw:
    """std gain sqrt(2 / (fan_in + fan_out)), embeddings included.

    Glorot & Bengio 2010. Tying: embedding and head are the same matrix, and so agree.
    """
    return Draw("normal", gain * math.sqrt(2 / (place.fan_in + place.fan_out)))


def xavier_uniform(place: Place, gain: float) -> Draw:
    """The std of xavier_normal, drawn from U(+-gain sqrt(6 / (fan_in + fan_out))).

    Glorot & Bengio 2010. Tying: embedding and head agree.
    """
    return xavier_normal(place, gain)._replace(shape="uniform")


def kaiming_normal(place: Place) -> Draw:
    """std sqrt(2 / fan_in), fan_in the columns of the weight, for embeddings too.

    He et al. 2015. Tying: embedding and head agree on sqrt(2 / d_model).
    """
    return Draw("normal", math.sqrt(2 / place.fan_in))


def kaiming_uniform(place: Place) -> Draw:
    """The std of kaiming_normal, drawn from U(+-sqrt(6 / fan_in)).

    He et al. 2015. Tying: embedding and head agree.
    """
    return kaiming_normal(place)._replace(shape="uniform")


def lecun_normal(place: Place) -> Draw:
    """std sqrt(1 / fan_in), fan_in the columns of the weight, for embeddings too.

    LeCun et al. 1998, *Efficient BackProp*. Tying: embedding and head agree on 1 / sqrt(d_model).
    """
    return Draw("normal", math.sqrt(1 / place.fan_in))


def lecun_uniform(place: Place) -> Draw:
    """The std of lecun_normal, drawn from U(+-sqrt(3 / fan_in)).

    LeCun et al. 1998. Tying: embedding and head agree.
    """
    return lecun_normal(place)._replace(shape="uniform")


def orthogonal(place: Place, gain: float) -> Draw:
    """`gain` times orthonormal rows or columns, whichever are fewer.

    std gain / sqrt(max(fan_in, fan_out)). Saxe et al. 2014. Tying: one matrix with orthonormal
    columns, drawn again for the head.
    """
    return Draw("orthogonal", gain / math.sqrt(max(place.fan_in, place.fan_out)))


def gpt2(place: Place) -> Draw:
    """N(0, 0.02) everywhere; projections into the residual stream 0.02 / sqrt(2 n_layer).

    Radford et al. 2019, section 2.3. Tying: embedding and head agree on 0.02.
    """
    return Draw("normal", 0.02 / math.sqrt(2 * place.n_layer) if place.ends_branch else 0.02)


def per_depth(place: Place) -> Draw:
    """N(0, 0.02); projections into the residual stream 0.02 / sqrt(2 (layer + 1)), layer from 0.

    The later the block, the smaller its branches: torchtitan's `depth_init` (Liang et al. 2024),
    after Zhang et al. 2019, who scale every matrix of a block. Tying: embedding and head agree on
    0.02.
    """
    if place.ends_branch:
        assert place.layer is not None
        return Draw("normal", 0.02 / math.sqrt(2 * (place.layer + 1)))
    return Draw("normal", 0.02)


def small_init(place: Place) -> Draw:
    """std sqrt(2 / (5 d_model)); projections into the residual stream 2 / (n_layer sqrt(d_model)).

    Nguyen & Salazar 2019, section 2.2; the projections by Wang & Komatsuzaki 2021 (GPT-J) and
    Black et al. 2022 (GPT-NeoX). Tying: embedding and head agree.
    """
    if place.ends_branch:
        return Draw("normal", 2 / (place.n_layer * math.sqrt(place.d_model)))
    return Draw("normal", math.sqrt(2 / (5 * place.d_model)))


def t_fixup(place: Place) -> Draw:
    """Xavier normal, with V and everything behind it times 0.67 n_layer^(-1/4).

    Embeddings are N(0, 1 / sqrt(d_model)) times (9 n_layer)^(-1/4). Huang et al. 2020, section 3.2,
    the encoder's factor, since a block here has an encoder's two branches; they also leave out
    LayerNorm, which stays here. Tying: the head keeps the embedding's rule; untied, it is Xavier.
    """
    if place.embeds or (place.kind == "head" and place.tied):
        return Draw("normal", place.d_model**-0.5 * (9 * place.n_layer) ** -0.25)
    behind_v = place.kind not in ("q", "k", "head")
    return xavier_normal(place, gain=0.67 * place.n_layer**-0.25 if behind_v else 1.0)


def deepnet(place: Place) -> Draw:
    """Xavier normal, with V and everything behind it times beta = (8 n_layer)^(-1/4).

    Embeddings, and the head tied or not, are N(0, 1 / sqrt(d_model)), of which the paper says
    nothing. Wang et al. 2022, figure 2, a decoder alone; made for `model.norm deepnet`, which
    scales the residual stream by their alpha.
    """
    if place.embeds or place.kind == "head":
        return Draw("normal", place.d_model**-0.5)
    behind_v = place.kind not in ("q", "k")
    return xavier_normal(place, gain=(8 * place.n_layer) ** -0.25 if behind_v else 1.0)


def mup(place: Place) -> Draw:
    """Hidden weights std sqrt(1 / fan_in); Q and the head 0; embeddings N(0, 1).

    The initial state of Yang et al. 2022, table 8 and appendix D.2, without what is no init: rates
    by width, attention divided by the width of a head, a multiplier on the logits. Tying: one
    tensor cannot be 0 and embed, so both embeddings and the head are N(0, 1 / sqrt(d_model)), at
    which a normalised stream has logits of variance 1 at any width.
    """
    if place.kind == "q" or (place.kind == "head" and not place.tied):
        return ZERO
    if place.embeds and not place.tied:
        return Draw("normal", 1.0)
    return Draw("normal", math.sqrt(1 / place.fan_in))


def zero_residual(place: Place) -> Draw:
    """N(0, 0.02); projections into the residual stream exactly 0: blocks begin as identities.

    Zhang et al. 2019 (Fixup); the effect of Bachlechner et al. 2020 (ReZero), whose zero is a gate.
    Tying: embedding and head agree on 0.02.
    """
    return ZERO if place.ends_branch else Draw("normal", 0.02)


def initialise(model: GPT, config: InitConfig) -> list[InitRow]:
    """Set every parameter of the model; -> what each tensor was drawn from.

    Each draw has a generator of its own, seeded by the tensor's name and `config.seed`, so that
    two schemes differ by their rule alone and a model with more layers begins like one with fewer.
    """
    scheme = INIT_SCHEMES[config.scheme]
    parameters = {name: getattr(config, name) for name in parameters_of(scheme)}
    names = {module: name for name, module in model.named_modules()}
    rows: dict[str, InitRow] = {}

    @torch.no_grad()
    def set_own_parameters(module: nn.Module) -> None:
        for part in parts_of(names[module], module):
            if part.kind == "qkv":  # set through its three parts
                continue
            if part.values.dim() == 1:  # biases, and what a LayerNorm scales by
                part.values.fill_(1.0 if part.kind == "ln_weight" else 0.0)
                draw = ZERO
            else:
                fan_out, fan_in = part.values.shape
                place = Place(
                    kind=part.kind,
                    fan_in=fan_in,
                    fan_out=fan_out,
                    layer=part.layer,
                    n_layer=len(model.blocks),
                    d_model=model.wte.weight.shape[1],
                    tied=model.tied,
                )
                draw = scheme(place, **parameters)
                generator = torch.Generator().manual_seed(seed_of("init", part.name, config.seed))
                fresh = torch.empty_like(part.values, device="cpu")
                DRAWS[draw.shape](fresh, draw, generator)
                part.values.copy_(fresh)
            # A tied head is the embedding: the later visit is the one that stays.
            tensor, kind = (
                ("wte", "wte") if model.tied and part.kind == "head" else (part.name, part.kind)
            )
            rows[tensor] = InitRow(
                tensor=tensor, kind=kind, layer=part.layer, draw=draw.shape, std=draw.std
            )

    model.apply(set_own_parameters)
    return list(rows.values())


def check_init(config: InitConfig) -> None:
    """Raise InputError for an unknown scheme, or a parameter given to one that does not take it."""
    check_choice("init", config, "scheme", INIT_SCHEMES)


def _constant(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    tensor.zero_()


def _normal(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    tensor.normal_(0.0, draw.std, generator=generator)


def _truncated_normal(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    cut = draw.parameter
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    parent = draw.std / math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))
    nn.init.trunc_normal_(
        tensor, std=parent, a=-cut * parent, b=cut * parent, generator=generator
    )  # its bounds are absolute


def _uniform(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    bound = math.sqrt(3) * draw.std
    tensor.uniform_(-bound, bound, generator=generator)


def _student_t(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    nu = draw.parameter
    rng = np.random.default_rng(generator.initial_seed())  # PyTorch's own takes no generator
    scale = draw.std * math.sqrt((nu - 2) / nu)
    tensor.copy_(torch.from_numpy(rng.standard_t(nu, size=tuple(tensor.shape))) * scale)


def _laplace(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    # The difference of two exponentials of rate r has variance 2 / r^2.
    rate = math.sqrt(2) / draw.std
    other = torch.empty_like(tensor).exponential_(rate, generator=generator)
    tensor.exponential_(rate, generator=generator).sub_(other)


def _rademacher(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    tensor.bernoulli_(0.5, generator=generator).mul_(2).sub_(1).mul_(draw.std)


def _orthogonal(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    nn.init.orthogonal_(tensor, gain=draw.std * math.sqrt(max(tensor.shape)), generator=generator)


DRAWS: dict[str, Callable[[Tensor, Draw, torch.Generator], None]] = {
    "constant": _constant,
    "normal": _normal,
    "truncated_normal": _truncated_normal,
    "uniform": _uniform,
    "student_t": _student_t,
    "laplace": _laplace,
    "rademacher": _rademacher,
    "orthogonal": _orthogonal,
}

INIT_SCHEMES: dict[str, Callable[..., Draw]] = {
    "model5": model5,
    "normal": normal,
    "truncated_normal": truncated_normal,
    "uniform": uniform,
    "student_t": student_t,
    "laplace": laplace,
    "rademacher": rademacher,
    "torch_default": torch_default,
    "xavier_normal": xavier_normal,
    "xavier_uniform": xavier_uniform,
    "kaiming_normal": kaiming_normal,
    "kaiming_uniform": kaiming_uniform,
    "lecun_normal": lecun_normal,
    "lecun_uniform": lecun_uniform,
    "orthogonal": orthogonal,
    "gpt2": gpt2,
    "per_depth": per_depth,
    "small_init": small_init,
    "t_fixup": t_fixup,
    "deepnet": deepnet,
    "mup": mup,
    "zero_residual": zero_residual,
}
