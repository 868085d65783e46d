"""How long does a report of many trials take, and how much memory does it need?

    python benchmarks/analysis_scale.py [--trials 200 2000 10000] [--history 50]

Runs one real trial (7 layers, 50 recorded steps) and makes a store with N copies of it, each under
another scheme, seed and subset. Rows of the store are copied, Parquet files are linked.

Then it measures the seconds of reading, of the statistics, and of a complete report, each in a new
process. At the end it compares reading the same numbers of 50 runs from Parquet and through
MLflow's get_metric_history.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

from gptcore.config import Scalar, TrialConfig

if TYPE_CHECKING:  # MLflow takes seconds to import, and is measured with the rest
    from tracking.store import Store

SCHEMES = ["model5", "gpt2", "normal", "xavier_normal"]
SUBSETS = ["all", "0-0.5"]


def model_trial(**knobs: Scalar) -> TrialConfig:
    """Return the trial that is copied, with some knobs changed."""
    return TrialConfig.from_flat(
        {
            "model.n_layer": 7, "model.n_head": 2, "model.d_model": 16, "model.context": 16,
            "train.steps": 50, "train.batch_size": 4, "corpus.name": "pydocs", "probes.every": 1,
            "probes.text_every": 1, **knobs,
        }
    )  # fmt: skip


def schemes_and_subsets(n_trials: int) -> dict[str, TrialConfig]:
    """Return trials of four schemes and two subsets, under keys that are counters."""
    combinations = itertools.product(range(n_trials), SUBSETS, SCHEMES)
    return {
        f"{i:012x}": model_trial(
            **{"init.scheme": scheme, "init.seed": seed, "corpus.subset": subset}
        )
        for i, (seed, subset, scheme) in zip(range(n_trials), combinations, strict=False)
    }


def store_in(folder: Path) -> Store:
    """Return the store of a runs folder."""
    from tracking.address import store_address
    from tracking.store import Store

    return Store(store_address(folder))


def make_store(folder: Path, trials: Mapping[str, TrialConfig], n_history: int) -> None:
    """Make a runs folder with a finished sweep `scale` of some trials.

    Args:
        folder: the runs folder.
        trials: by key.
        n_history: only so many trials get the history of their metrics, which no report reads.
    """
    from analysis.claims import digest
    from gptcore.experiment import run_trial
    from tracking.job import Job
    from tracking.recorder import MlflowRecorder, make_run
    from tracking.sweep_run import RecordedPlan, SweepRun

    store = store_in(folder)
    store.open()
    experiment_id = store.open_experiment("scale", folder)
    config = model_trial()
    job = Job("first", "first", config.to_flat(), {"sweep": "scale"})
    first = MlflowRecorder(store, make_run(store, experiment_id, job), job)
    run_trial(config, first)
    with sqlite3.connect(folder / "mlflow.db") as database:
        columns = {
            table: [row[1] for row in database.execute(f"pragma table_info({table})")]
            for table in ("runs", "params", "tags", "latest_metrics", "metrics")
        }
        for i, key in enumerate(trials):
            run_id = f"{i:032x}"
            artifacts = folder / "artifacts" / run_id / "artifacts"
            for table, names in columns.items():
                if table == "metrics" and i >= n_history:
                    continue
                changed = {
                    "run_uuid": f"'{run_id}'",
                    "artifact_uri": f"'{artifacts.as_uri()}'",
                    "name": f"'trial {key}'",
                }
                if table == "tags":
                    changed["value"] = f"case key when 'trial_key' then '{key}' else value end"
                selected = ", ".join(changed.get(name, name) for name in names)
                database.execute(
                    f"insert into {table} ({', '.join(names)}) select {selected} from {table} "
                    "where run_uuid = ?",
                    (first.run_id,),
                )
            artifacts.mkdir(parents=True)
            for file in (folder / "artifacts" / first.run_id / "artifacts").glob("*.parquet"):
                (artifacts / file.name).hardlink_to(file)
        for table in reversed(columns):
            database.execute(f"delete from {table} where run_uuid = ?", (first.run_id,))
    plan = {
        "sweep": "scale", "tags": {}, "notes": [], "command": "", "claims_digest": digest(),
        "trials": {key: {"params": config.to_flat()} for key, config in trials.items()},
    }  # fmt: skip
    SweepRun(store, experiment_id, RecordedPlan.from_json(plan), launched=1).end("FINISHED")


def time_phases(folder: Path) -> dict[str, float]:
    """Measure the seconds of reading a sweep, and of its statistics and verdicts."""
    from analysis.findings import find
    from analysis.frames import frames_of_runs, with_scheme
    from analysis.runs import read_sweeps
    from analysis.sweep_verdicts import measured

    start = time.perf_counter()
    sweep = read_sweeps(store_in(folder), ["scale"], None, Path("unused"))
    read = time.perf_counter()
    sweep = replace(sweep, trials=with_scheme(sweep.trials))
    find(sweep, frames_of_runs(sweep), measured(sweep))
    return {"reading": read - start, "statistics": time.perf_counter() - read}


def time_report(folder: Path) -> dict[str, float]:
    """Measure the seconds of a complete report, and the peak memory of this process in GB."""
    from analysis.report import build_report

    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        build_report(store_in(folder), ["scale"], Path(out), Path(out))
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"report": seconds, "peak GB": peak}


def time_history(folder: Path, n_history: int) -> tuple[float, float]:
    """Measure the seconds of reading the QKV stds of some runs.

    Returns:
        The seconds from Parquet, and through MLflow's get_metric_history.
    """
    import polars as pl

    store = store_in(folder)
    runs = sorted(store.trial_runs().items())[:n_history]
    start = time.perf_counter()
    files = [run.info.artifact_uri.removeprefix("file://") + "/weights.parquet" for _, run in runs]
    rows = pl.scan_parquet(files).filter(kind="qkv").select("layer", "step", "std").collect()
    parquet = time.perf_counter() - start
    start = time.perf_counter()
    points = [
        point
        for _, run in runs
        for layer in range(7)
        for point in store.client.get_metric_history(run.info.run_id, f"qkv_std/layer_{layer:02d}")
    ]
    assert len(points) == rows.height
    return parquet, time.perf_counter() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[200, 2000, 10_000])
    parser.add_argument("--history", type=int, default=50)
    # What a new process is to measure, and the runs folder.
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time:
        what, folder = args.time
        print(json.dumps({"phases": time_phases, "report": time_report}[what](Path(folder))))
        return
    for n_trials in args.trials:
        folder = Path(tempfile.mkdtemp())
        try:
            make_store(folder, schemes_and_subsets(n_trials), args.history)
            found = {}
            for what in ("phases", "report"):
                timed = subprocess.run(
                    [sys.executable, __file__, "--time", what, str(folder)],
                    check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                found |= json.loads(timed.stdout)
            line = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
            each = 1000 * found["report"] / n_trials
            print(f"{n_trials:6d} trials: {line}; {each:.1f} ms for each trial", flush=True)
            if n_trials == args.trials[0]:
                parquet, history = time_history(folder, args.history)
                print(
                    f"QKV stds of {args.history} runs: Parquet {parquet:.2f} s, "
                    f"get_metric_history {history:.1f} s: {history / parquet:.0f} times as long"
                )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
