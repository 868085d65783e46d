"""How fast is a training step, with everything that it records by default, compared with others?

    python benchmarks/step.py [--shapes d64 d128 model5] [--rounds 8] [--device cpu]
                                 [--precision float32] [--profile]

One of the others is a plain step: the same model, all logits at once, cross_entropy, and an AdamW
that loops over the parameters. If transformers is installed, GPT2LMHeadModel with AdamW is another.
Our side is run_trial. Its recorder measures the time between two calls. In each call, the others do
one step each, so noise of the machine affects all of them. A round is ten of our steps, one of them
with probes. Ratios are computed within a round.

The floor is the time of the head's three matrix products on one thread, at the rate of products of
1024 x 1024 in the same rounds. Needs only torch, numpy and tiktoken.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F

from benchmarks.vocabulary import use_a_vocabulary
from gptcore.array import DTYPES
from gptcore.config import CorpusConfig, ModelConfig, TrainConfig, TrialConfig
from gptcore.experiment import device_of, one_thread, run_trial
from gptcore.init_schemes import initialise
from gptcore.model import GPT
from gptcore.records import Row, TrainingRow, TrialResult

SHAPES = {
    "d64": TrialConfig(model=ModelConfig(d_model=64, n_layer=4, n_head=4, context=64)),
    "d128": TrialConfig(model=ModelConfig(d_model=128, n_layer=6, n_head=4, context=64)),
    "model5": TrialConfig(
        model=ModelConfig(d_model=768, n_layer=12, n_head=12, context=256),
        train=TrainConfig(batch_size=2),
    ),
}
ROUND = 10
"""Steps: the shortest cadence of a probe."""
GEMM = 1024


class Interleaved:
    """A recorder that measures the time of each step, and runs the others in between."""

    def __init__(self, others: dict[str, Callable[[], None]], clock: Callable[[], float]) -> None:
        self.others, self.clock = others, clock
        self.times: dict[str, list[float]] = {"ours": [], **{name: [] for name in others}}
        self.resumed = clock()

    def log(self, rows: Sequence[Row]) -> None:
        if not any(isinstance(row, TrainingRow) for row in rows):
            return
        # On a GPU, all steps of a round are reported at its end, one after another.
        self.times["ours"].append(self.clock() - self.resumed)
        for name, step in self.others.items():
            start = self.clock()
            step()
            self.times[name].append(self.clock() - start)
        self.resumed = self.clock()

    def close(self, result: TrialResult) -> None:
        pass


def plain_step(config: TrialConfig, device: torch.device) -> Callable[[], None]:
    """The same model as anyone would train it."""
    model = GPT(config.model)
    initialise(model, config.init)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, foreach=False)
    ids = random_ids(config, device)

    def step() -> None:
        logits = model.head(model(ids[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def hugging_face_step(config: TrialConfig, device: torch.device) -> Callable[[], None]:
    """GPT2LMHeadModel of the same shape, as its documentation trains it. Raises ImportError."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = config.model
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size, n_positions=shape.context, n_embd=shape.d_model,
            n_layer=shape.n_layer, n_head=shape.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, use_cache=False,
        )
    ).to(device)  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr)
    ids = random_ids(config, device)[:, 1:]

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def gemm_step(device: torch.device) -> Callable[[], None]:
    a, b = torch.randn(2, GEMM, GEMM, device=device)
    return lambda: torch.mm(a, b)


def random_ids(config: TrialConfig, device: torch.device) -> torch.Tensor:
    shape = config.model
    draws = torch.rand(config.train.batch_size, shape.context + 1)
    return ((shape.vocab_size**draws).long() - 1).to(device)  # by Zipf's law


def measure(name: str, config: TrialConfig, rounds: int) -> None:
    device = device_of(config)
    others = {"plain": plain_step(config, device), "gemm": gemm_step(device)}
    try:
        others["hugging_face"] = hugging_face_step(config, device)
    except ImportError:
        print("transformers is not installed: GPT2LMHeadModel is left out", file=sys.stderr)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with one_thread():
        for step in others.values():
            step()
        recorder = Interleaved(others, clock)
        # A round to get warm, and one for the last step, which has no update.
        steps = (rounds + 2) * ROUND
        run_trial(replace(config, train=replace(config.train, steps=steps)), recorder)
    of_round = {
        side: [statistics.fmean(times[end - ROUND : end]) for end in range(2 * ROUND, steps, ROUND)]
        for side, times in recorder.times.items()
    }
    ours, gemm = of_round.pop("ours"), of_round.pop("gemm")
    tokens = config.train.batch_size * config.model.context
    shape = config.model
    print(
        f"\n{name}: d_model {shape.d_model}, {shape.n_layer} layers, {config.train.batch_size} x "
        f"{shape.context} tokens, {device}, {config.train.precision}, torch {torch.__version__}, "
        f"one thread, {len(ours)} rounds of {ROUND} steps"
    )
    for side, times in {"ours": ours, **of_round}.items():
        median = statistics.median(times)
        line = f"  {side:13s} {median * 1e3:9.1f} ms a step {tokens / median:9.0f} tokens/s"
        if side != "ours":
            line += f"   ours is {spread(times, ours)} times as fast"
        print(line)
    better = [min(both) for both in zip(*of_round.values(), strict=True)]
    print(f"  against the better of them in each round: {spread(better, ours)}")
    products = 3 * tokens * shape.vocab_size * shape.d_model / GEMM**3
    floor = [products * one for one in gemm]
    rate = 2 * GEMM**3 / statistics.median(gemm) / 1e9
    print(
        f"  floor: the head's products at {rate:.0f} GFLOP/s, {statistics.median(floor) * 1e3:.1f} "
        f"ms; ours takes {spread(ours, floor)} times that",
        flush=True,
    )


def spread(above: Sequence[float], below: Sequence[float]) -> str:
    """The ratios of pairs: `2.61 (2.55 to 2.70)`, their median, least and largest."""
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def profile(name: str, config: TrialConfig) -> None:
    """Where the time of our steps goes, by PyTorch's own profiler."""
    from gptcore.records import MemoryRecorder

    config = replace(config, train=replace(config.train, steps=2 * ROUND - 1))
    with torch.profiler.profile() as found:
        run_trial(config, MemoryRecorder())
    print(f"\n{name}, {2 * ROUND} steps with their beginning and end:")
    by = f"self_{'cuda' if device_of(config).type == 'cuda' else 'cpu'}_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=48))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--precision", default="float32", choices=list(DTYPES), help="ours; the others stay as is"
    )
    parser.add_argument("--profile", action="store_true", help="show where our time goes instead")
    args = parser.parse_args()
    use_a_vocabulary()
    for name in args.shapes:
        config = replace(
            SHAPES[name],
            corpus=CorpusConfig(name="pydocs"),
            train=replace(SHAPES[name].train, device=args.device, precision=args.precision),
        )
        if args.profile:
            profile(name, config)
        else:
            measure(name, config, args.rounds)


if __name__ == "__main__":
    main()
