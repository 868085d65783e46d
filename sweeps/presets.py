"""Presets: the trials of a sweep, where the command line does not name others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptcore.config import Scalar, TrialConfig
from gptcore.init_schemes import INIT_SCHEMES

Space = Mapping[str, Sequence[Scalar]]
"""The values of some knobs. Its trials are all combinations; the first knob varies slowest."""


@dataclass(frozen=True)
class Preset:
    """A sweep that has a name: the trials of all its spaces."""

    doc: str
    spaces: tuple[Space, ...]


# "Train Model 5 with weight initialisations": the shape of GPT-2's smallest model, context 256.
MODEL5: Space = {
    "model.n_layer": [12],
    "model.n_head": [12],
    "model.d_model": [768],
    "model.context": [256],
    "optim.lr": [3e-4],
    "train.steps": [500],
}


def trials_of(space: Space) -> list[TrialConfig]:
    """Return every combination of the space's values, in order; a repeated value counts once."""
    values = [dict.fromkeys(space[key]) for key in space]
    return [
        trial_of(dict(zip(space, combination, strict=True)))
        for combination in itertools.product(*values)
    ]


def trial_of(flat: Mapping[str, Scalar]) -> TrialConfig:
    """Return the trial with these knobs.

    Unless it is given, the data seed equals the seed. A seed is then everything that a run draws at
    random, and the spread over seeds contains all of these draws.
    """
    follows = {"corpus.data_seed": flat.get("init.seed", TrialConfig().init.seed)}
    return TrialConfig.from_flat({**follows, **flat})


SEEDS_4, SEEDS_8 = list(range(4)), list(range(8))

PRESETS: dict[str, Preset] = {
    # benchmarks/quick_choice.py shows why the small budget is spent on seeds; see RESULTS.md.
    "quick": Preset(
        "a tiny model, 3 schemes x 8 seeds x 2 subsets: decides most claims, minutes on two cores",
        (
            {
                "init.seed": SEEDS_8,
                "corpus.subset": ["all", "0-0.125"],
                "init.scheme": ["model5", "gpt2", "xavier_normal"],
                "model.n_layer": [4],
                "model.n_head": [2],
                "model.d_model": [32],
                "train.batch_size": [4],
                "train.steps": [100],
            },
        ),
    ),
    "init": Preset(
        "the small model under every scheme, 4 seeds",
        ({"init.seed": SEEDS_4, "init.scheme": list(INIT_SCHEMES)},),
    ),
    "shape": Preset(
        "six shapes of one variance, 4 seeds: does shape matter, or only scale?",
        (
            {
                "init.seed": SEEDS_4,
                "init.scheme": [
                    "normal", "truncated_normal", "uniform", "student_t", "laplace", "rademacher"
                ],
            },
        ),
    ),
    "optimizer": Preset(
        "AdamW, Adam with a large eps, Coupled Adam, SGD, 4 seeds: which move unused tokens' rows?",
        (
            {"init.seed": SEEDS_4, "optim.name": ["adamw", "coupled_adam"]},
            {"init.seed": SEEDS_4, "optim.name": ["adam"], "optim.eps": [1e-3]},
            {"init.seed": SEEDS_4, "optim.name": ["sgd"], "optim.lr": [0.3]},
        ),
    ),
    "corpus-size": Preset(
        "an eighth of the book to all of it, 4 seeds: do rare tokens rise only on a short text?",
        (
            {
                "init.seed": SEEDS_4,
                "corpus.subset": ["0-0.125", "0-0.25", "0-0.5", "all"],
            },
        ),
    ),
    "tying": Preset(
        "head tied and untied, 2 schemes x 4 seeds",
        (
            {
                "init.seed": SEEDS_4,
                "init.scheme": ["model5", "gpt2"],
                "model.tied": [True, False],
            },
        ),
    ),
    "model5": Preset(
        "Model 5 with its own scheme, 4 seeds: needs one GPU",
        ({"init.seed": SEEDS_4, "init.scheme": ["model5"], **MODEL5},),
    ),
    "full": Preset(
        "Model 5, 6 schemes x 8 seeds x 3 subsets: needs a cluster",
        (
            {
                "init.seed": SEEDS_8,
                "corpus.subset": ["all", "0-0.5", "0-0.25"],
                "init.scheme": [
                    "model5", "gpt2", "normal", "xavier_normal", "kaiming_normal", "orthogonal"
                ],
                **MODEL5,
            },
        ),
    ),
}  # fmt: skip
