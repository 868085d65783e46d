"""Which share of a training step do the probes take by default?

    python benchmarks/watching.py [--d-model 64] [--n-layer 6] [--batch-size 8] [--seconds 60]

Needs only torch, numpy and tiktoken. The tokens are drawn by Zipf's law. Each round measures one
training step without probes, and one run of every probe, so noise of the machine affects both. The
share of a probe is its median time, divided by its cadence and by the median time of a step. The
time of a probe that runs only at the first and the last step is spread over the default trial.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from gptcore.array import ModelArray
from gptcore.config import (
    CorpusConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    ProbesConfig,
    TrainConfig,
)
from gptcore.experiment import one_thread
from gptcore.init_schemes import initialise
from gptcore.looks import Looks, OnTheWay, Packed
from gptcore.model import GPT
from gptcore.probes import PROBES, subjects_of
from gptcore.replay import WARM_UP_CALLS, graphs_for
from gptcore.steps import Steps
from gptcore.token_groups import TokenGroups
from gptcore.weights import values_of


@dataclass(frozen=True)
class Watched:
    """What probes need of a trial besides its model."""

    initial: Mapping[str, torch.Tensor]
    fixed_texts: Mapping[str, torch.Tensor]
    groups: TokenGroups


def random_groups(rng: np.random.Generator, vocab_size: int) -> TokenGroups:
    """Groups of the sizes that Gulliver's Travels has."""
    sizes = {"common_100": 100, "rare_100": 100, "never_100": 100, "never_used": 40478,
             "singletons": 3402, "count_2_3": 2659, "count_4_15": 2736, "count_16_63": 744,
             "count_64_255": 176, "count_256_up": 62}  # fmt: skip
    ids = {name: np.sort(rng.permutation(vocab_size)[:size]) for name, size in sizes.items()}
    return TokenGroups(ids, np.ones(vocab_size, dtype=np.int64), np.zeros(vocab_size))


def random_ids(sequences: int, shape: ModelConfig) -> torch.Tensor:
    """Token ids by Zipf's law, [sequences, context + 1]."""
    return (shape.vocab_size ** torch.rand(sequences, shape.context + 1)).long() - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    shape = ModelConfig(d_model=args.d_model, n_layer=args.n_layer, context=args.context)
    model = GPT(shape)
    initialise(model, InitConfig())
    model.to(args.device)
    layers = range(shape.n_layer)
    trial = Watched(
        initial=values_of(model, layers),
        fixed_texts={
            text: random_ids(CorpusConfig().windows, shape).to(args.device)
            for text in ("probe", "held_out")
        },
        groups=random_groups(np.random.default_rng(0), shape.vocab_size),
    )
    graphs = graphs_for(torch.device(args.device))
    optim = OptimConfig()
    array = ModelArray([model], optim, capturable=graphs is not None)
    steps = Steps(array, optim.clip, (args.batch_size, shape.context + 1), 1, graphs)
    looks = Looks(subjects_of(array, [trial], layers), steps, graphs)

    def clock() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def read(found: Sequence[Packed]) -> None:
        """Bring what was measured to the host, and make rows of it."""
        values = OnTheWay([packed.values_KX for packed in found]).arrived()
        for packed, values_KX in zip(found, values, strict=True):
            list(packed.rows(0, 0, values_KX[0]))

    cadences = {
        name: getattr(ProbesConfig(), probe.cadence) if probe.cadence else TrainConfig().steps // 2
        for name, probe in PROBES.items()
    }
    cadences["updates"] = ProbesConfig().every
    times: dict[str, list[float]] = {"step": [], **{name: [] for name in cadences}}
    end = time.perf_counter() + args.seconds
    with one_thread():
        while time.perf_counter() < end or len(times["step"]) < 2 * WARM_UP_CALLS:
            windows = random_ids(args.batch_size, shape).numpy()
            start = clock()
            steps.load([[windows]], [optim.lr])
            steps.gradients()
            steps.stats_M3K.tolist()
            until_update = clock() - start
            for name in PROBES:
                # Whatever reads the fixed texts is due together with them, and shares the reading.
                shared = ["fixed_texts"] if name == "tokens" else []
                start = clock()
                read(looks.before_update([*shared, name], [0]))
                times[name].append(clock() - start - sum(times[each][-1] for each in shared))
            start = clock()
            looks.remember([0])
            copying = clock() - start
            start = clock()
            steps.update()
            times["step"].append(until_update + clock() - start)
            start = clock()
            read(looks.after_update([0]))
            times["updates"].append(copying + clock() - start)

    step = statistics.median(times["step"][WARM_UP_CALLS + 1 :])
    print(
        f"d{args.d_model} L{args.n_layer}, {args.batch_size} x {args.context} tokens, {args.device}"
    )
    print(f"step          {step * 1e3:8.2f} ms, median of {len(times['step'])}")
    total = 0.0
    for name, every in cadences.items():
        median = statistics.median(times[name][WARM_UP_CALLS + 1 :])
        share = median / every / step
        total += share
        print(f"{name:13s} {median * 1e3:8.2f} ms every {every:3d} steps: {share:6.2%} of a step")
    print(f"all that is recorded by default: {total:.2%} of a step")


if __name__ == "__main__":
    main()
