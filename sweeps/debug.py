"""Run one trial in this process, without Ray or a store: `breakpoint()` works, one line per step.

Its rows are those that a sweep records, as Parquet files in a folder.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gptcore.checkpoint import checkpoint_file
from gptcore.config import TrialConfig
from gptcore.experiment import run_trial
from gptcore.files import write_atomically
from gptcore.records import (
    InitRow,
    MemoryRecorder,
    Row,
    TokenGroupRow,
    TrainingRow,
    TrialResult,
    WeightRow,
    is_primary,
)
from tracking.tables import write_tables
from tracking.untrusted import check_no_link


def debug_trial(config: TrialConfig, key: str, runs_dir: Path, console: Console) -> TrialResult:
    """Run one trial, and write its tables, config and result to RUNS_DIR/debug/KEY."""
    folder = runs_dir / "debug" / key
    check_no_link(folder, runs_dir)
    console.print(f"trial {key} in this process, rows to {folder}")
    recorder = ConsoleRecorder(config, console)
    file = checkpoint_file(runs_dir, key)
    if file.exists():
        console.print(f"continuing from {file}; its steps are printed again:", soft_wrap=True)
    result = run_trial(config, recorder, file)
    write_tables(recorder.rows, folder)
    trial = {"key": key, "params": config.to_flat(), "result": asdict(result)}
    write_atomically(
        folder / "trial.json", lambda file: file.write_text(json.dumps(trial, indent=1))
    )
    console.print(
        f"{result.status} after {result.steps} steps, {result.seconds:.1f} s, "
        f"{result.tokens_per_second:.0f} tokens/s {result.reason}".rstrip()
    )
    console.print(f"tables: {folder}/*.parquet", soft_wrap=True)
    return result


class ConsoleRecorder(MemoryRecorder):
    """Keeps the rows and prints them as they come."""

    def __init__(self, config: TrialConfig, console: Console) -> None:
        super().__init__()
        self.config, self.console = config, console

    def log(self, rows: Sequence[Row]) -> None:
        super().log(rows)
        logprobs = {
            row.group: row.mean_logprob
            for row in rows
            if isinstance(row, TokenGroupRow) and is_primary(row)
        }
        for row in rows:
            if isinstance(row, TrainingRow):
                if row.step == 0:
                    self._print_untrained(logprobs)
                groups = "".join(
                    f"  {group} {value:.2f}"
                    for group, value in logprobs.items()
                    if value is not None
                )
                line = f"step {row.step:4d}  loss {row.loss:.4f}  grad_norm {row.grad_norm:.4f}"
                self.console.print(line + groups, soft_wrap=True)

    def _print_untrained(self, logprobs: dict[str, float | None]) -> None:
        """Print the measured and the expected std of weights, and log-probs before training."""
        drawn_from: defaultdict[str, set[float]] = defaultdict(set)
        for row in self.rows["init"]:
            assert isinstance(row, InitRow)
            drawn_from[row.kind].add(row.std)
        measured: defaultdict[str, list[WeightRow]] = defaultdict(list)
        for row in self.rows["weights"]:
            assert isinstance(row, WeightRow)
            measured[row.kind].append(row)
        table = Table("kind", "tensors", "std expected", "std measured", "max |w|")
        for kind, stds in drawn_from.items():
            rows = measured[kind]
            spread = [row.std for row in rows]
            table.add_row(
                kind,
                str(len(rows)),
                " ".join(f"{std:.5f}" for std in sorted(stds)),
                f"{min(spread):.5f}" + (f" .. {max(spread):.5f}" if len(rows) > 1 else ""),
                f"{max(row.max_abs for row in rows):.5f}",
            )
        self.console.print(table)
        model = self.config.model
        (std,) = drawn_from["wte" if model.tied else "head"]
        level = -(math.log(model.vocab_size) + model.d_model * std**2 / 2)
        untrained = ", ".join(
            f"{group} {'too few tokens' if value is None else format(value, '.3f')}"
            for group, value in logprobs.items()
        )
        self.console.print(
            f"untrained log-prob: {untrained}; -(ln V + d std^2 / 2) = {level:.3f}", soft_wrap=True
        )
