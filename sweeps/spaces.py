"""Presets: which trials a sweep is made of before the command line has its say."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptcore.config import Scalar, TrialConfig

# Values of a knob; a sweep is the product over all knobs. The first knob varies slowest.
Space = Mapping[str, Sequence[Scalar]]


@dataclass(frozen=True)
class Preset:
    doc: str
    space: Space
    trials_per_gpu: int


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
    """Every combination of the space's values, in order; a value given twice counts once."""
    values = [dict.fromkeys(space[key]) for key in space]
    return [
        TrialConfig.from_flat(dict(zip(space, combination, strict=True)))
        for combination in itertools.product(*values)
    ]


PRESETS: dict[str, Preset] = {
    "quick": Preset(
        "a small model, 3 schemes x 2 seeds x 2 subsets: minutes on two cores",
        {
            "init.seed": [0, 1],
            "corpus.subset": ["all", "0-0.25"],
            "init.scheme": ["model5", "gpt2", "xavier_normal"],
        },
        trials_per_gpu=4,
    ),
    "model5": Preset(
        "the source's model and scheme, 4 seeds: one GPU",
        {"init.seed": [0, 1, 2, 3], "init.scheme": ["model5"], **MODEL5},
        trials_per_gpu=1,
    ),
    "full": Preset(
        "the source's model, 6 schemes x 8 seeds x 3 subsets: a cluster",
        {
            "init.seed": [0, 1, 2, 3, 4, 5, 6, 7],
            "corpus.subset": ["all", "0-0.5", "0-0.25"],
            "init.scheme": [
                "model5",
                "gpt2",
                "normal",
                "xavier_normal",
                "kaiming_normal",
                "orthogonal",
            ],
            **MODEL5,
        },
        trials_per_gpu=1,
    ),
}
