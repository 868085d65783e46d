"""How fast are arrays and Model 5 on a GPU, compared with the floor and with the strongest peers?

    python benchmarks/gpu.py [--seconds 280] [--only arrays peers ...] [--profile] [--quick]

Prints the Markdown tables of RESULTS.md, and names the tables for which there was no time. Needs
only torch, numpy and tiktoken, and also runs on a CPU. `--quick` checks with tiny models that
everything runs. The peers are:

- GPT2LMHeadModel of Hugging Face, or a plain GPT in PyTorch if transformers is not installed, both
  eager and under torch.compile(mode="reduce-overhead"), with a fused AdamW;
- the same GPT in JAX, vmap over models and lax.scan over steps (benchmarks/jax_peer.py).

Our time is the median of gptcore's step_seconds. The time of a peer in PyTorch is the median of 20
steps after 5 warm-up steps. Both wait for the GPU after each step. The time of JAX is the median of
five loops of ten steps, with one wait after each loop. All clip the gradient at 1. JAX draws the
batch within the step. For the others, the batch is already on the device.

The floor of a step is the larger of two times, at rates that are measured in the same run:

- at the rate of a large copy, the time to move the weights, the gradients and Adam's two moments
  once each, and the logits twice;
- at the rate of a large matrix product, the time of the arithmetic: per token, 6 FLOP for each
  parameter without the position embedding, and 12 n_layer d_model T for attention.

This is one file because its tables are comparable only within one run of one process.
"""

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.vocabulary import use_a_vocabulary
from gptcore.config import (
    VOCAB_SIZES,
    CorpusConfig,
    ModelConfig,
    OptimConfig,
    ProbesConfig,
    TrainConfig,
    TrialConfig,
)
from gptcore.experiment import one_thread, run_trial, step_seconds
from gptcore.model import GPT
from gptcore.precision import DTYPES, products
from gptcore.records import MemoryRecorder

PRODUCTS = {
    "float32": ("float32", "float32"),
    "tf32": ("tf32", "tf32"),
    "bf16-head": ("bf16", "float32"),
    "bf16": ("bf16", "bf16"),
}
"""The kind of product in the head and in the trunk, for each `train.precision`."""

PEER_PRECISIONS = ("float32", "tf32", "bf16")
"""What the peers can do too. Model 5 is measured in these as well."""

WARM_UP, STEPS = 5, 20

HEADER = (
    "side", "shape", "tokens", "precision", "trials", "ms a step", "ms a trial's step", "tokens/s",
    "floor, ms", "times the floor", "GB",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The sizes of the models and arrays that are measured."""

    small: dict[str, ModelConfig]  # the shapes of arrays, by name
    batch_size: int = 8  # of these
    model5: ModelConfig
    model5_tokens: tuple[int, ...]  # in a step, in order of importance
    sizes: tuple[int, ...]  # models in an array
    steps: int  # of a small trial that is watched
    model5_steps: int
    tokenizer: str
    product: int  # rows of the square matrices of a large product
    copied: int  # bytes of a large copy


FULL = Scale(
    small={
        "d64 L6": ModelConfig(d_model=64, n_layer=6, n_head=4, context=64),
        "d128 L6": ModelConfig(d_model=128, n_layer=6, n_head=4, context=64),
    },
    model5=ModelConfig(d_model=768, n_layer=12, n_head=12, context=256),
    model5_tokens=(4096, 2048, 16384),
    sizes=(1, 4, 16, 32, 64),
    steps=200,
    model5_steps=100,
    tokenizer="gpt2",
    product=8192,
    copied=1 << 30,
)
_BYTES = VOCAB_SIZES["bytes"]
QUICK = Scale(
    small={
        "d16 L1": ModelConfig(d_model=16, n_layer=1, n_head=2, context=16, vocab_size=_BYTES),
    },
    batch_size=2,
    model5=ModelConfig(d_model=32, n_layer=1, n_head=2, context=16, vocab_size=_BYTES),
    model5_tokens=(32, 64),
    sizes=(1, 2),
    steps=10,
    model5_steps=10,
    tokenizer="bytes",
    product=256,
    copied=1 << 22,
)


@dataclass(frozen=True)
class Rates:
    """The best that the device does, measured in this run."""

    bytes_per_second: float
    flops: dict[str, float]  # per second, by kind of product

    def floor(self, config: TrialConfig, size: int) -> float:
        """Return the least time of a step of an array, in seconds."""
        shape = config.model
        with torch.device("meta"):
            parameters = sum(values.numel() for values in GPT(shape).parameters())
        tokens = config.train.batch_size * shape.context
        table, positions = shape.vocab_size * shape.d_model, shape.context * shape.d_model
        attention = 12 * shape.n_layer * shape.d_model * shape.context
        head, trunk = PRODUCTS[config.train.precision]
        arithmetic = tokens * (
            6 * table / self.flops[head]
            + (6 * (parameters - table - positions) + attention) / self.flops[trunk]
        )
        logits = tokens * shape.vocab_size * (2 if head == "bf16" else 4)
        moving = (4 * 4 * parameters + 2 * logits) / self.bytes_per_second
        return size * max(arithmetic, moving)


@dataclass
class Run:
    """One run of the benchmark."""

    scale: Scale
    device: str
    precisions: Sequence[str]
    deadline: float
    rates: Rates
    quick: bool
    jax_seconds: float = math.inf
    """The most seconds that the peer in JAX may take. Most of them are for compiling."""
    seconds: dict[tuple[str, str, int, str, int], float] = field(default_factory=dict)
    """The seconds of a step, by side, shape, tokens, precision and trials."""
    left_out: list[str] = field(default_factory=list)

    def small(self, name: str, precision: str) -> TrialConfig:
        """Return a trial of one of the small shapes."""
        return self._trial(self.scale.small[name], self.scale.batch_size, precision)

    def model5(self, tokens: int, precision: str) -> TrialConfig:
        """Return a trial of Model 5 with so many tokens in a step."""
        shape = self.scale.model5
        return self._trial(shape, tokens // shape.context, precision)

    def _trial(self, shape: ModelConfig, batch_size: int, precision: str) -> TrialConfig:
        return TrialConfig(
            model=shape,
            corpus=CorpusConfig(name="pydocs", tokenizer=self.scale.tokenizer),
            optim=OptimConfig(clip=1.0),
            train=TrainConfig(batch_size=batch_size, device=self.device, precision=precision),
        )

    def peer_precisions(self) -> list[str]:
        return [precision for precision in self.precisions if precision in PEER_PRECISIONS]

    def row(
        self, names: Sequence[object], work: Callable[[], Sequence[str]], needs: float = 0
    ) -> None:
        """Print one row of a table: names, and the cells that the work gives.

        A row that fails says why, and a row for which there is no time is noted as left out.

        Args:
            needs: seconds that the row takes on a GPU.
        """
        if time.perf_counter() + (0 if self.quick else needs) > self.deadline:
            self.left_out.append(" ".join(map(str, names)))
            return
        try:
            cells = work()
        except Exception as error:  # a row of its own must not end the run
            cells = [reason(error)]
        print_row([*names, *cells])
        free_memory()

    def measured(
        self,
        side: str,
        shape: str,
        config: TrialConfig,
        trials: int,
        measure: Callable[[], tuple[float, float]],
        needs: float = 0,
    ) -> None:
        """Print the row of an array, as HEADER has it.

        Args:
            side: whose program it is.
            measure: returns the seconds of a step and the largest memory, in bytes.
            needs: see row.
        """
        tokens = config.train.batch_size * config.model.context
        names = (side, shape, tokens, config.train.precision, trials)

        def cells() -> list[str]:
            seconds, memory = measure()
            self.seconds[names] = seconds
            floor = self.rates.floor(config, trials)
            return [
                f"{seconds * 1e3:.2f}",
                f"{seconds / trials * 1e3:.3f}",
                f"{tokens * trials / seconds:.0f}",
                f"{floor * 1e3:.3f}",
                f"{seconds / floor:.1f}",
                f"{memory / 1e9:.2f}" if memory else "",
            ]

        self.row(names, cells, needs)


def print_row(cells: Sequence[object]) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_header(title: str, cells: Sequence[str]) -> None:
    print(f"\n### {title}\n")
    print_row(cells)
    print("|" + "---|" * len(cells), flush=True)


def reason(error: BaseException) -> str:
    """Say in one line why something could not be measured."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "RESOURCE_EXHAUSTED" in text:
        return "out of memory"
    first = next((line for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:120].replace("|", "/")


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # CUDA itself has failed, as the row has said
            torch.cuda.empty_cache()


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(device: str, step: Callable[[], object], warm_up: int, steps: int) -> float:
    """Measure the median time of a step, waiting for the device after each."""
    times = []
    for _ in range(warm_up + steps):
        synchronise(device)
        start = time.perf_counter()
        step()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def with_peak(device: str, measure: Callable[[], float]) -> tuple[float, float]:
    """Run a measurement. Return its result and its peak GPU memory, 0 on a CPU."""
    if device != "cuda":
        return measure(), 0.0
    torch.cuda.reset_peak_memory_stats()
    return measure(), torch.cuda.max_memory_allocated()


def measure_rates(device: str, scale: Scale) -> Rates:
    """Measure the rates of a large copy and of large products, and print them."""
    source = torch.zeros(scale.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(device, functools.partial(target.copy_, source), 3, 10)
    bandwidth, flops = 2 * scale.copied / seconds, {}
    del source, target
    for kind in PEER_PRECISIONS:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        n = scale.product
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        product = functools.partial(torch.mm, a, b)
        with products(kind):
            flops[kind] = 2 * n**3 / median_seconds(device, product, 3, 10)
    print_header("Rates", ["a large copy, TB/s", *(f"{kind} product, TFLOP/s" for kind in flops)])
    print_row([f"{rate / 1e12:.3g}" for rate in (bandwidth, *flops.values())])
    free_memory()
    return Rates(bandwidth, flops)


def ours(config: TrialConfig, size: int) -> tuple[float, float]:
    """Measure a step of an array of ours: seconds, and bytes of memory."""
    return with_peak(config.train.device, lambda: step_seconds(config, (size,))[0])


def arrays(run: Run) -> None:
    """Measure our arrays of small models."""
    print_header("Arrays", HEADER)
    for shape, precision, size in itertools.product(
        run.scale.small, run.precisions, run.scale.sizes
    ):
        config = run.small(shape, precision)
        run.measured("ours", shape, config, size, functools.partial(ours, config, size), needs=3)


def model5(run: Run) -> None:
    """Measure Model 5, one model."""
    print_header("Model 5", HEADER)
    for tokens, precision in itertools.product(run.scale.model5_tokens, run.peer_precisions()):
        config = run.model5(tokens, precision)
        run.measured("ours", "Model 5", config, 1, functools.partial(ours, config, 1), needs=8)


def watching(run: Run) -> None:
    """Measure trials with all default probes against trials that measure the first and last step
    only: the faster of two runs each, and one run of Model 5, which takes longer."""
    print_header("Watching", ["shape", "ms a step", "with the default probes", "share of these"])
    for shape in [*run.scale.small, "Model 5"]:
        if shape == "Model 5":
            config = run.model5(min(run.scale.model5_tokens), "float32")
            steps, rounds = run.scale.model5_steps, 1
        else:
            config, steps, rounds = run.small(shape, "float32"), run.scale.steps, 2
        config = replace(config, train=replace(config.train, steps=steps))
        run.row([shape], functools.partial(watched, config, rounds), needs=20)


def watched(config: TrialConfig, rounds: int) -> list[str]:
    """Measure one trial with its probes and without."""
    steps = config.train.steps
    cadences = [entry.name for entry in fields(ProbesConfig) if entry.name.endswith("every")]
    bare = replace(config, probes=ProbesConfig(**dict.fromkeys(cadences, steps)))
    # The first trial of a shape pays for what is loaded once.
    run_trial(replace(config, train=replace(config.train, steps=1)), MemoryRecorder())
    times: dict[str, list[float]] = {"bare": [], "watched": []}
    for _ in range(rounds):
        for name, each in (("bare", bare), ("watched", config)):
            times[name].append(run_trial(each, MemoryRecorder()).seconds / (steps + 1))
    least, most = min(times["bare"]), min(times["watched"])
    return [f"{least * 1e3:.2f}", f"{most * 1e3:.2f}", f"{1 - least / most:.1%}"]


class PlainLoss(nn.Module):
    """The GPT of gptcore with the loss that anyone would write."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.gpt = GPT(shape)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = self.gpt.head(self.gpt(ids_BT))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class HuggingFaceLoss(nn.Module):
    """GPT2LMHeadModel of the same shape and GELU, and the same loss."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.gpt = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=shape.vocab_size, n_positions=shape.context, n_embd=shape.d_model,
                n_layer=shape.n_layer, n_head=shape.n_head, activation_function="gelu",
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
                bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = self.gpt(input_ids=ids_BT).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def peer_model() -> tuple[str, type[nn.Module]]:
    """Choose the peer in PyTorch, by what is installed."""
    if importlib.util.find_spec("transformers"):
        return "Hugging Face", HuggingFaceLoss
    return "plain PyTorch", PlainLoss


def peer_seconds(kind: type[nn.Module], config: TrialConfig, compiled: bool) -> float:
    """Measure the median time of one training step of a peer in PyTorch."""
    device, precision = config.train.device, config.train.precision
    with torch.device(device):  # on a GPU, initial values take no time there
        model = kind(config.model)
        ids = torch.randint(
            config.model.vocab_size, (config.train.batch_size, config.model.context + 1)
        )
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
        weight_decay=optim.weight_decay, fused=True,
    )  # fmt: skip
    forward = model
    if compiled:
        torch.compiler.reset()  # what was compiled for the row before, with its memory
        forward = torch.compile(model, mode="reduce-overhead", dynamic=False)

    ids_BT, targets_BT = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(ids_BT, targets_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()

    with one_thread(), products(precision):
        return median_seconds(device, step, WARM_UP, STEPS)


def peer_row(run: Run, shape: str, config: TrialConfig, compiled: bool, needs: float) -> None:
    name, kind = peer_model()
    run.measured(
        f"{name}, {'compiled' if compiled else 'eager'}", shape, config, 1,
        lambda: with_peak(run.device, lambda: peer_seconds(kind, config, compiled)), needs,
    )  # fmt: skip


def peers(run: Run) -> None:
    """Measure the peer in PyTorch, eager."""
    print_header("Peers in PyTorch, eager", HEADER)
    for shape, precision in itertools.product(run.scale.small, run.peer_precisions()):
        peer_row(run, shape, run.small(shape, precision), False, needs=2)
    for tokens, precision in itertools.product(run.scale.model5_tokens, run.peer_precisions()):
        peer_row(run, "Model 5", run.model5(tokens, precision), False, needs=8)


def compiled(run: Run) -> None:
    """Measure the peer in PyTorch, compiled. This comes last, because compiling takes long."""
    print_header("Peers in PyTorch, torch.compile(mode='reduce-overhead')", HEADER)
    # Only the two extreme precisions, because every row is compiled again.
    ends = [precision for precision in ("bf16", "float32") if precision in run.precisions]
    for precision in ends[:1] if run.quick else ends:
        for shape in run.scale.small:
            peer_row(run, shape, run.small(shape, precision), True, needs=20)
        config = run.model5(run.scale.model5_tokens[0], precision)
        peer_row(run, "Model 5", config, True, needs=40)
    torch.compiler.reset()
    free_memory()


class JaxProcess:
    """The peer in JAX, which runs in a process of its own: two programs do not always agree on the
    libraries of CUDA, and memory of the GPU that JAX holds is free again when it ends."""

    def __init__(self, device: str, until: float) -> None:
        """Start the process, which is killed if it still works on an answer at the time `until`."""
        self.until = until
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("jax_peer.py"))],
            env={
                **os.environ,
                "JAX_PLATFORMS": device,
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )

    def measure(self, config: TrialConfig, size: int) -> tuple[float, float]:
        """Measure a step of an array: seconds, and bytes of memory."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(self.until - time.perf_counter(), self.process.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and has said why
                print(json.dumps({"size": size, **config.to_flat()}), file=self.process.stdin)
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise RuntimeError(f"the process of JAX ended: {self.last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["seconds"], answer["bytes"]

    def last_words(self) -> str:
        """Return the last line that the process wrote to stderr."""
        self.stderr.seek(0)
        lines = self.stderr.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.stderr.close()


def jax(run: Run) -> None:
    """Measure arrays of the peer in JAX."""
    if not importlib.util.find_spec("jax"):
        print("\nJAX is not installed: the peer in JAX is left out")
        return
    print_header("Peer in JAX: vmap over models, scan over steps", HEADER)
    # The smallest and the largest first, because there may be no time for all.
    sizes = sorted(run.scale.sizes, key=lambda size: (size not in (1, 32), size))
    precisions = sorted(run.peer_precisions(), key=lambda precision: precision == "tf32")
    end = min(run.deadline, time.perf_counter() + run.jax_seconds)
    process = JaxProcess(run.device, end + 20)
    limited = replace(run, deadline=end)  # shares what was found and left out
    try:
        for size, precision, shape in itertools.product(sizes, precisions, run.scale.small):
            config = run.small(shape, precision)
            measure = functools.partial(process.measure, config, size)
            limited.measured("JAX", shape, config, size, measure, needs=15)
    finally:
        process.close()


def profile(run: Run) -> None:
    """Show which kernels take the time of our steps: some 20 steps, by torch.profiler."""
    of_device = {"cuda": torch.autograd.DeviceType.CUDA, "cpu": torch.autograd.DeviceType.CPU}
    unit = "kernel" if run.device == "cuda" else "operation"
    shape = next(iter(run.scale.small))
    array = 32 if 32 in run.scale.sizes else max(run.scale.sizes)
    cases = [
        (f"{shape}, {size} trials, {precision}", run.small(shape, precision), size)
        for size, precision in itertools.product((1, array), ("float32", "bf16"))
    ]
    tokens = min(run.scale.model5_tokens)
    cases.append((f"Model 5, {tokens} tokens, bf16", run.model5(tokens, "bf16"), 1))
    for name, config, size in cases:
        if time.perf_counter() > run.deadline:
            run.left_out.append(f"profile of {name}")
            continue
        try:
            with torch.profiler.profile() as found:
                for _ in range(4):  # each times some five steps
                    step_seconds(config, (size,))
        except Exception as error:  # the other profiles may succeed
            print(f"\nprofile of {name}: {reason(error)}")
            continue
        print_header(f"Profile: {name}", [unit, "calls", "ms", "share"])
        # On a GPU also the operations have a time, which is that of their kernels once more.
        events = [
            (
                getattr(event, f"self_{'device' if run.device == 'cuda' else 'cpu'}_time_total"),
                event,
            )
            for event in found.key_averages()
            if event.device_type == of_device[run.device]
        ]
        total = sum(microseconds for microseconds, _ in events)
        for microseconds, event in sorted(events, key=lambda pair: -pair[0])[:12]:
            share = f"{microseconds / total:.1%}"
            kernel = event.key[:70].replace("|", "/")
            print_row([f"`{kernel}`", event.count, f"{microseconds / 1e3:.2f}", share])
        free_memory()


def compare(run: Run) -> None:
    """Print the time of one trial's step by side, and how much faster ours is than the best peer.

    A peer without arrays trains one model after another, so its time is that of one model.
    """
    sides = dict.fromkeys(side for side, *_ in run.seconds)
    peers = [side for side in sides if side != "ours"]
    if "ours" not in sides:
        return
    columns = [f"{side}, ms" for side in ("ours", *peers)]
    names = ["shape", "tokens", "precision", "trials"]
    print_header("One trial's step", [*names, *columns, "ours is faster by"])
    for (side, shape, tokens, precision, trials), seconds in run.seconds.items():
        if side != "ours":
            continue
        one = {}
        for peer in peers:
            size = trials if peer == "JAX" else 1
            of_peer = run.seconds.get((peer, shape, tokens, precision, size))
            if of_peer:
                one[peer] = of_peer / size
        best = f"{min(one.values()) / (seconds / trials):.2f}" if one else ""
        cells = [f"{one[peer] * 1e3:.3f}" if peer in one else "" for peer in peers]
        print_row([shape, tokens, precision, trials, f"{seconds / trials * 1e3:.3f}", *cells, best])


SECTIONS: dict[str, Callable[[Run], None]] = {
    "arrays": arrays,
    "model5": model5,
    "peers": peers,
    "jax": jax,
    "watching": watching,
    "compiled": compiled,
}
"""The tables in order of importance. If time is short, the last ones are left out."""


def versions(device: str) -> str:
    """Describe the machine and the libraries in one line."""
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    words = [machine, f"{os.cpu_count()} cores", f"Python {platform.python_version()}"]
    words.append(f"torch {torch.__version__}")
    for name in ("transformers", "jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            words.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([*words, str(date.today())])


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), help="by default all")
    parser.add_argument("--sizes", nargs="+", type=int, help="models in an array")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=280, help="start nothing after this time")
    parser.add_argument("--jax-seconds", type=float, default=70, help="the part of it for JAX")
    parser.add_argument("--profile", action="store_true", help="show the kernels of our steps too")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    args = parser.parse_args(arguments)
    scale = QUICK if args.quick else FULL
    if args.device == "cpu":  # a large product would take minutes
        scale = replace(scale, product=min(scale.product, 1024), copied=min(scale.copied, 1 << 26))
    if args.sizes:
        scale = replace(scale, sizes=tuple(args.sizes))
    if scale.tokenizer == "gpt2":
        use_a_vocabulary()
    print(versions(args.device))
    if args.quick:
        print("Tiny models, also under the name of Model 5: these times say nothing of real ones.")
    with one_thread():
        rates = measure_rates(args.device, scale)
    run = Run(
        scale=scale,
        device=args.device,
        precisions=args.precisions
        or [name for name in DTYPES if name != "tf32" or args.device == "cuda"],
        deadline=start + args.seconds,
        rates=rates,
        quick=args.quick,
        jax_seconds=args.jax_seconds,
    )
    if "peers" in args.only or "compiled" in args.only:
        print(f"\nThe peer in PyTorch: {peer_model()[0]}")
    chosen = {name: section for name, section in SECTIONS.items() if name in args.only}
    if args.profile:
        chosen = {"profile": profile, **chosen}
    for name, section in chosen.items():
        if time.perf_counter() > run.deadline:
            run.left_out.append(f"all of {name}")
            continue
        begun = time.perf_counter()
        try:
            section(run)
        except Exception as error:  # the other sections may succeed
            print(f"\n{name} failed: {reason(error)}", flush=True)
        print(f"\n{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    compare(run)
    if run.left_out:
        print("\nLeft out for lack of time, which `--only` and `--seconds` can give:\n")
        print("\n".join(f"- {name}" for name in run.left_out))
    print(f"\nall: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
