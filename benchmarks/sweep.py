"""How long is a sweep from the command to the report, compared with the usual ways?

    python benchmarks/sweep.py [--steps 200] [--sides ours bf16 stock loop]

All sides run the trials of the default sweep on the CPU, one side after the other, each in a new
folder:

- `ours`: `python sweeps/init_sweep.py`;
- `bf16`: the same with --train.precision bf16-head;
- `stock`: the same trials, written as in the documentation of the libraries: Ray Tune with a
  function, GPT2LMHeadModel with AdamW, and MLflowLoggerCallback. Every ten steps it records the std
  of the weights, and the log-softmax of token groups from all logits;
- `loop`: the function of `stock` for one trial after another, with one thread for each core,
  without Ray and MLflow.

Needs the project and transformers (pip install transformers).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from gptcore.config import TrialConfig
from sweeps.plan import make_plan
from sweeps.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
EVERY = 10
"""Steps between two looks."""


def trials(steps: int) -> list[dict[str, Any]]:
    """The default sweep's trials, by dotted keys, on the text that it finds here."""
    plan = make_plan("quick", "quick", PRESETS["quick"].spaces)
    return [{**config.to_flat(), "train.steps": steps} for config in plan.trials.values()]


def train_the_usual_way(flat: dict[str, Any], report: Callable[[dict[str, float]], object]) -> None:
    """Run one trial, written as in the documentation of the libraries."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from gptcore.experiment import check_trial
    from gptcore.token_groups import token_groups

    config = TrialConfig.from_flat(flat)
    corpus = check_trial(config)
    groups = token_groups(corpus.counts(), config.corpus.data_seed, corpus.tokenizer).ids
    shape = config.model
    torch.manual_seed(config.init.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size, n_positions=shape.context, n_embd=shape.d_model,
            n_layer=shape.n_layer, n_head=shape.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=0.0)
    for step in range(config.train.steps + 1):
        windows = torch.from_numpy(
            corpus.batch(step, batch_size=config.train.batch_size, seed=config.corpus.data_seed)
        )
        ids, targets = windows[:, :-1], windows[:, 1:]
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        if step % EVERY == 0:
            seen = {"loss": loss.item()}
            with torch.no_grad():
                for layer, block in enumerate(model.transformer.h):
                    for kind, part in zip("qkv", block.attn.c_attn.weight.chunk(3, 1), strict=True):
                        seen[f"std.{kind}.{layer}"] = part.std().item()
                log_prob = logits.log_softmax(-1).mean((0, 1))
                for group, members in groups.items():
                    seen[f"log_prob.{group}"] = log_prob[torch.from_numpy(members)].mean().item()
            report(seen)
        optimizer.step()
        optimizer.zero_grad()


def stock(steps: int, folder: Path) -> None:
    """Run all trials by Ray Tune, and record them by MLflow's callback."""
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    def trainable(config: dict[str, Any]) -> None:
        train_the_usual_way(config["trial"], tune.report)

    found = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"trial": tune.grid_search(trials(steps))},
        run_config=tune.RunConfig(
            storage_path=str(folder / "ray"),
            callbacks=[
                MLflowLoggerCallback(
                    tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", experiment_name="stock"
                )
            ],
        ),
    ).fit()
    if found.errors:
        raise found.errors[0]


def loop(steps: int, folder: Path) -> None:
    """Run all trials, one after the other."""
    rows: list[dict[str, float]] = []
    for flat in trials(steps):
        train_the_usual_way(flat, rows.append)


def seconds_of(side: str, steps: int) -> float:
    """Measure one side as a command of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "sweeps" / "init_sweep.py"), "--runs-dir", folder]
        command += ["--train.steps", str(steps), "--train.device", "cpu"]
        if side == "bf16":
            command += ["--train.precision", "bf16-head"]
        if side in ("stock", "loop"):
            command = [sys.executable, __file__, "--side", side, "--folder", folder]
            command += ["--steps", str(steps)]
        start = time.perf_counter()
        with (Path(folder) / "output").open("w") as output:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **PRIVATE}
            )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{side}: {(Path(folder) / 'output').read_text()[-2000:]}")
    return seconds


PRIVATE = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=TrialConfig().train.steps)
    sides = ("ours", "bf16", "stock", "loop")
    parser.add_argument("--sides", nargs="+", default=list(sides), choices=sides)
    parser.add_argument("--side", choices=("stock", "loop"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        {"stock": stock, "loop": loop}[args.side](args.steps, args.folder)
        return
    print(f"{len(trials(args.steps))} trials of {args.steps} steps, {os.cpu_count()} cores")
    took: dict[str, float] = {}
    for side in args.sides:
        took[side] = seconds_of(side, args.steps)
        against = f", ours {took[side] / took['ours']:.2f} times as fast" if "ours" in took else ""
        print(f"  {side:6s} {took[side]:7.1f} s{against}", flush=True)


if __name__ == "__main__":
    main()
