"""What does a GPU make of it? Model 5's step, arrays of small trials, memory and probes.

    python benchmarks/gpu.py [--device cuda] [--sizes 1 4 16 32] [--precisions float32 bf16]

Runs with torch, numpy and tiktoken alone, also on a CPU, and prints tables as RESULTS.md has them.
The share of the product rate: a step's arithmetic is 6 FLOP a token and parameter, but for the
position embedding, and 12 n_layer d_model T a token for attention; the rate is that of one large
product of the same dtype in the same run.
"""

import argparse
import functools
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.vocabulary import use_a_vocabulary
from gptcore.array import DTYPES
from gptcore.config import CorpusConfig, ModelConfig, ProbesConfig, TrainConfig, TrialConfig
from gptcore.experiment import one_thread, run_trial, step_seconds
from gptcore.model import GPT
from gptcore.records import MemoryRecorder

MODEL5 = TrialConfig(
    model=ModelConfig(d_model=768, n_layer=12, n_head=12, context=256),
    corpus=CorpusConfig(name="pydocs"),
)
SMALL = {
    "d64 L6": ModelConfig(d_model=64, n_layer=6, n_head=4, context=64),
    "d128 L6": ModelConfig(d_model=128, n_layer=6, n_head=4, context=64),
}
PRODUCT = {"cuda": 8192, "cpu": 1024}


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the median of ten."""
    n = PRODUCT[device]
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = []
    for _ in range(11):
        synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times[1:])


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_of(device: str, work: Callable[[], list[float]]) -> tuple[list[float], str]:
    """What the work gives, and the GB of the GPU that it held at most."""
    if device != "cuda":
        return work(), ""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return work(), f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"


def model5(device: str, batches: list[int], precisions: list[str]) -> None:
    print(
        "\n| Model 5, tokens a step | precision | ms a step | tokens/s | of the product rate | GB |"
    )
    print("|---|---|---|---|---|---|")
    shape = MODEL5.model
    inner = sum(p.numel() for p in GPT(shape).parameters()) - shape.context * shape.d_model
    for precision in precisions:
        rate = matmul_rate(device, DTYPES[precision][0])
        for batch in batches:
            train = TrainConfig(batch_size=batch, device=device, precision=precision)
            config = replace(MODEL5, train=train)
            try:
                (seconds,), peak = peak_of(device, functools.partial(step_seconds, config, (1,)))
            except torch.OutOfMemoryError:
                print(f"| {batch * shape.context} | {precision} | out of memory | | | |")
                continue
            tokens = batch * shape.context
            flop = tokens * (6 * inner + 12 * shape.n_layer * shape.d_model * shape.context)
            print(
                f"| {tokens} | {precision} | {seconds * 1e3:.1f} | {tokens / seconds:.0f} | "
                f"{flop / seconds / rate:.0%} of {rate / 1e12:.1f} TFLOP/s | {peak} |",
                flush=True,
            )


def arrays(device: str, sizes: list[int], precisions: list[str]) -> None:
    print("\n| shape | precision | trials | ms a step | ms a trial's step | against alone | GB |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in SMALL.items():
        for precision, size in itertools.product(precisions, sizes):
            config = TrialConfig(
                model=shape,
                corpus=CorpusConfig(name="pydocs"),
                train=TrainConfig(device=device, precision=precision),
            )
            try:
                _, peak = peak_of(device, functools.partial(step_seconds, config, (size,)))
                alone, together = step_seconds(config, (1, size))
            except torch.OutOfMemoryError:
                print(f"| {name} | {precision} | {size} | out of memory | | | |")
                continue
            print(
                f"| {name} | {precision} | {size} | {together * 1e3:.2f} | "
                f"{together / size * 1e3:.2f} | {alone * size / together:.2f} | {peak} |",
                flush=True,
            )


def watching(device: str, steps: int) -> None:
    """A trial that records all it does by default, beside one that looks at its first and last step
    alone: the faster of two each."""
    print("\n| shape | ms a step | ms with default probes | share of these |")
    print("|---|---|---|---|")
    for name, shape in SMALL.items():
        config = TrialConfig(
            model=shape,
            corpus=CorpusConfig(name="pydocs"),
            train=TrainConfig(device=device, steps=steps),
        )
        never = ProbesConfig(
            every=steps, text_every=steps, histogram_every=steps, spectrum_every=steps
        )
        times = {
            probes: min(
                run_trial(replace(config, probes=probes), MemoryRecorder()).seconds
                for _ in range(2)
            )
            for probes in (never, config.probes)
        }
        bare, whole = (seconds / (steps + 1) for seconds in times.values())
        print(f"| {name} | {bare * 1e3:.2f} | {whole * 1e3:.2f} | {1 - bare / whole:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--batches", nargs="*", type=int, default=[16, 64])
    parser.add_argument(
        "--precisions", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"]
    )
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    use_a_vocabulary()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread"
    print(f"{name}, torch {torch.__version__}, {date.today()}")
    with one_thread():
        if args.batches:
            model5(args.device, args.batches, args.precisions)
        arrays(args.device, args.sizes, args.precisions)
        watching(args.device, args.steps)


if __name__ == "__main__":
    main()
