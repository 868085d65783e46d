"""Initialisation schemes, one short function each, and the code that draws the weights.

A scheme returns, for the place of a weight in the model, the distribution of its initial values. It
is called once for every weight matrix and embedding, and for Q, K and V separately. Its keyword
parameters are config keys: `std` is `init.std`. Under every scheme biases are 0, and LayerNorms the
identity.

With tying, the token embedding and the head are one tensor, which `model.apply` visits twice: first
as the embedding `wte`, then as the Linear `head`. The second draw replaces the first, so that the
rule for the head counts. If a docstring does not mention tying, both have the same rule. If it
gives a std without a distribution, the distribution is normal.
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
    """The place of a weight in the model."""

    kind: str  # q k v proj fc mlp_proj, wte wpe head
    fan_in: int  # columns: the inputs of a Linear, the width of an embedding
    fan_out: int  # rows: the outputs of a Linear, the entries of an embedding
    layer: int | None  # None outside the blocks
    n_layer: int
    d_model: int
    tied: bool  # whether the head and the token embedding are one tensor

    @property
    def embeds(self) -> bool:
        """Whether this is the token or the position embedding."""
        return self.kind in ("wte", "wpe")

    @property
    def ends_branch(self) -> bool:
        """Whether the output of this weight is added to the residual stream."""
        return self.kind in ("proj", "mlp_proj")


class Draw(NamedTuple):
    """A distribution with mean 0."""

    shape: str  # a name in DRAWS
    std: float
    parameter: float = math.nan  # `cut` of truncated_normal, `nu` of student_t


ZERO = Draw("constant", 0.0)


def model5(place: Place) -> Draw:
    """Linear: std 0.02. Embeddings: Xavier normal, std sqrt(2 / (entries + width)).

    "Train Model 5 with weight initialisations", experiment A. Tying: the head is a Linear, so the
    token embedding gets 0.02, and only the position embedding is Xavier normal.
    """
    return xavier_normal(place, gain=1.0) if place.embeds else Draw("normal", 0.02)


def normal(place: Place, std: float) -> Draw:
    """Every weight: normal with `std`."""
    return Draw("normal", std)


def truncated_normal(place: Place, std: float, cut: float) -> Draw:
    """Every weight: normal, cut at +-`cut` of its own stds; `std` is the std after the cut.

    With sigma the std before the cut: std^2 = sigma^2 (1 - 2 cut phi(cut) / (2 Phi(cut) - 1)). It
    has the variance of `normal`, but not its tails.
    """
    return Draw("truncated_normal", std, cut)


def uniform(place: Place, std: float) -> Draw:
    """Every weight: uniform in +-sqrt(3) std, with the variance of `normal`, and no tails."""
    return Draw("uniform", std)


def student_t(place: Place, std: float, nu: float) -> Draw:
    """Every weight: Student's t with `nu` degrees of freedom, times std sqrt((nu - 2) / nu).

    It has the variance of `normal`, and heavier tails: the excess kurtosis is 6 / (nu - 4). For
    nu <= 4 that is infinite, and the std of a single tensor varies around `std`: by 50 % at nu 2.1,
    by 10 % at 2.5, by 5 % at 3.
    """
    return Draw("student_t", std, nu)


def laplace(place: Place, std: float) -> Draw:
    """Every weight: Laplace with scale std / sqrt(2), so that the excess kurtosis is 3."""
    return Draw("laplace", std)


def rademacher(place: Place, std: float) -> Draw:
    """Every weight: +std or -std with equal probability, so that the excess kurtosis is -2."""
    return Draw("rademacher", std)


def torch_default(place: Place) -> Draw:
    """The defaults of PyTorch. Linear: uniform in +-1 / sqrt(fan_in). Embeddings: std 1.

    For a Linear that is kaiming_uniform_ with a = sqrt(5) (torch.nn.Linear.reset_parameters), whose
    std is 1 / sqrt(3 fan_in). PyTorch draws its biases from the same interval; here they are 0, as
    under every scheme. Tying: the token embedding gets the rule of a Linear, and only the position
    embedding has std 1.
    """
    return Draw("normal", 1.0) if place.embeds else Draw("uniform", (3 * place.fan_in) ** -0.5)


def xavier_normal(place: Place, gain: float) -> Draw:
    """Every weight: normal with std gain sqrt(2 / (fan_in + fan_out)).

    Glorot & Bengio 2010.
    """
    return Draw("normal", gain * math.sqrt(2 / (place.fan_in + place.fan_out)))


def xavier_uniform(place: Place, gain: float) -> Draw:
    """Every weight: uniform in +-gain sqrt(6 / (fan_in + fan_out)), the std of xavier_normal.

    Glorot & Bengio 2010.
    """
    return xavier_normal(place, gain)._replace(shape="uniform")


def kaiming_normal(place: Place) -> Draw:
    """Every weight: normal with std sqrt(2 / fan_in), where fan_in is the number of columns.

    He et al. 2015.
    """
    return Draw("normal", math.sqrt(2 / place.fan_in))


def kaiming_uniform(place: Place) -> Draw:
    """Every weight: uniform in +-sqrt(6 / fan_in), the std of kaiming_normal.

    He et al. 2015.
    """
    return kaiming_normal(place)._replace(shape="uniform")


def lecun_normal(place: Place) -> Draw:
    """Every weight: normal with std sqrt(1 / fan_in), where fan_in is the number of columns.

    LeCun et al. 1998, *Efficient BackProp*.
    """
    return Draw("normal", math.sqrt(1 / place.fan_in))


def lecun_uniform(place: Place) -> Draw:
    """Every weight: uniform in +-sqrt(3 / fan_in), the std of lecun_normal.

    LeCun et al. 1998.
    """
    return lecun_normal(place)._replace(shape="uniform")


def orthogonal(place: Place, gain: float) -> Draw:
    """Every weight: `gain` times a random matrix with orthonormal rows or columns.

    The rows are orthonormal if there are fewer rows than columns, else the columns. The std is
    gain / sqrt(max(fan_in, fan_out)). Saxe et al. 2014.
    """
    return Draw("orthogonal", gain / math.sqrt(max(place.fan_in, place.fan_out)))


def gpt2(place: Place) -> Draw:
    """Std 0.02; projections into the residual stream 0.02 / sqrt(2 n_layer).

    Radford et al. 2019, section 2.3.
    """
    return Draw("normal", 0.02 / math.sqrt(2 * place.n_layer) if place.ends_branch else 0.02)


def per_depth(place: Place) -> Draw:
    """Std 0.02; projections into the residual stream 0.02 / sqrt(2 (layer + 1)), layer from 0.

    Later blocks have smaller branches. This is `depth_init` of torchtitan (Liang et al. 2024),
    after Zhang et al. 2019, who scale every matrix of a block.
    """
    if place.ends_branch:
        assert place.layer is not None
        return Draw("normal", 0.02 / math.sqrt(2 * (place.layer + 1)))
    return Draw("normal", 0.02)


def small_init(place: Place) -> Draw:
    """Std sqrt(2 / (5 d_model)); projections into the residual stream 2 / (n_layer sqrt(d_model)).

    Nguyen & Salazar 2019, section 2.2. The rule for the projections is that of Wang & Komatsuzaki
    2021 (GPT-J) and Black et al. 2022 (GPT-NeoX).
    """
    if place.ends_branch:
        return Draw("normal", 2 / (place.n_layer * math.sqrt(place.d_model)))
    return Draw("normal", math.sqrt(2 / (5 * place.d_model)))


def t_fixup(place: Place) -> Draw:
    """Xavier normal; all weights of a block except Q and K are scaled by 0.67 n_layer^(-1/4).

    Embeddings: std 1 / sqrt(d_model), scaled by (9 n_layer)^(-1/4). Huang et al. 2020, section 3.2.
    The factor is that of their encoder, because a block here has two branches, like an encoder's.
    They also remove LayerNorm, which is kept here. Tying: the head has the rule of the embedding;
    an untied head is Xavier normal.
    """
    if place.embeds or (place.kind == "head" and place.tied):
        return Draw("normal", place.d_model**-0.5 * (9 * place.n_layer) ** -0.25)
    scaled = place.kind not in ("q", "k", "head")
    return xavier_normal(place, gain=0.67 * place.n_layer**-0.25 if scaled else 1.0)


def deepnet(place: Place) -> Draw:
    """Xavier normal; all weights of a block except Q and K are scaled by beta = (8 n_layer)^(-1/4).

    Wang et al. 2022, figure 2, the values for a model that has only a decoder. It is made for
    `model.norm deepnet`, which scales the residual stream by their alpha. Embeddings and the head,
    tied or not, have std 1 / sqrt(d_model); the paper gives no rule for them.
    """
    if place.embeds or place.kind == "head":
        return Draw("normal", place.d_model**-0.5)
    scaled = place.kind not in ("q", "k")
    return xavier_normal(place, gain=(8 * place.n_layer) ** -0.25 if scaled else 1.0)


def mup(place: Place) -> Draw:
    """Hidden weights: std sqrt(1 / fan_in). Q and the head: 0. Embeddings: std 1.

    Yang et al. 2022, table 8 and appendix D.2. Left out is what is not initialisation: learning
    rates by width, attention divided by the width of a head, and a multiplier on the logits. Tying:
    a token embedding cannot be 0, so embeddings and head have std 1 / sqrt(d_model). Normalised
    hidden states then give logits of variance 1 at any width.
    """
    if place.kind == "q" or (place.kind == "head" and not place.tied):
        return ZERO
    if place.embeds and not place.tied:
        return Draw("normal", 1.0)
    return Draw("normal", math.sqrt(1 / place.fan_in))


def zero_residual(place: Place) -> Draw:
    """Std 0.02; projections into the residual stream are 0, so that each block is the identity.

    Zhang et al. 2019 (Fixup). Bachlechner et al. 2020 (ReZero) have the same effect by a gate that
    is 0.
    """
    return ZERO if place.ends_branch else Draw("normal", 0.02)


def initialise(model: GPT, config: InitConfig) -> list[InitRow]:
    """Set every parameter of the model.

    Each tensor is drawn with a separate generator, seeded by its name and `config.seed`. So two
    schemes differ in their rules only, and the first layers do not depend on the number of layers.

    Returns:
        The distribution of each tensor.
    """
    scheme = INIT_SCHEMES[config.scheme]
    parameters = {name: getattr(config, name) for name in parameters_of(scheme)}
    names = {module: name for name, module in model.named_modules()}
    rows: dict[str, InitRow] = {}

    @torch.no_grad()
    def set_own_parameters(module: nn.Module) -> None:
        for part in parts_of(names[module], module):
            if part.kind == "qkv":  # set by way of q, k and v
                continue
            if part.values.dim() == 1:  # biases, and the weights of LayerNorms
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
            # A tied head is the token embedding: this row replaces the one of the embedding.
            tensor, kind = (
                ("wte", "wte") if model.tied and part.kind == "head" else (part.name, part.kind)
            )
            rows[tensor] = InitRow(
                tensor=tensor, kind=kind, layer=part.layer, draw=draw.shape, std=draw.std
            )

    model.apply(set_own_parameters)
    return list(rows.values())


def check_init(config: InitConfig) -> None:
    """Raise InputError for an unknown scheme, or a parameter that the scheme does not take."""
    check_choice("init", config, "scheme", INIT_SCHEMES)


def _constant(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    tensor.zero_()


def _normal(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    tensor.normal_(0.0, draw.std, generator=generator)


def _truncated_normal(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    cut = draw.parameter
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    sigma = draw.std / math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))
    nn.init.trunc_normal_(
        tensor, std=sigma, a=-cut * sigma, b=cut * sigma, generator=generator
    )  # a and b are values, not numbers of sigmas


def _uniform(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    bound = math.sqrt(3) * draw.std
    tensor.uniform_(-bound, bound, generator=generator)


def _student_t(tensor: Tensor, draw: Draw, generator: torch.Generator) -> None:
    nu = draw.parameter
    rng = np.random.default_rng(generator.initial_seed())  # PyTorch's StudentT takes no generator
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
