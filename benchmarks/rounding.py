"""How much of a trial's numbers is rounding?

    python benchmarks/rounding.py [--schemes model5 gpt2 xavier_normal] [--seed 0] [--steps 200]

A default trial of each scheme runs twice. In the second run, one weight of the first block is moved
by one unit in the last place. The difference of the two losses shows how much another order of
additions can change a trial: on another CPU, on a GPU, or in an array under vmap.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from gptcore import experiment
from gptcore.config import InitConfig, TrialConfig
from gptcore.model import GPT
from gptcore.records import InitRow, MemoryRecorder

WEIGHT = "blocks.0.attn.qkv.weight"
initialise = experiment.initialise


def moved(model: GPT, config: InitConfig) -> list[InitRow]:
    """In place of gptcore.init_schemes.initialise."""
    rows = initialise(model, config)
    with torch.no_grad():
        weight = model.get_parameter(WEIGHT)
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    return rows


def losses(config: TrialConfig) -> torch.Tensor:
    recorder = MemoryRecorder()
    experiment.run_trial(config, recorder)
    return torch.tensor([row.loss for row in recorder.rows["training"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=["model5", "gpt2", "xavier_normal"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TrialConfig().train.steps)
    args = parser.parse_args()
    for scheme in args.schemes:
        knobs = {"init.scheme": scheme, "init.seed": args.seed, "train.steps": args.steps}
        config = TrialConfig.from_flat({**knobs, "train.device": "cpu"})
        experiment.initialise = initialise
        whole = losses(config)
        experiment.initialise = moved
        apart = (losses(config) - whole).abs()
        steps = [args.steps * quarter // 4 for quarter in (1, 2, 3, 4)]
        seen = ", ".join(f"{apart[step]:.1e} at step {step}" for step in steps)
        print(f"{scheme}, seed {args.seed}: losses apart by {seen}; {apart.max():.1e} at most")


if __name__ == "__main__":
    main()
