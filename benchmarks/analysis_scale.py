"""How long does a report of many trials take, and how much memory?

    python benchmarks/analysis_scale.py [--trials 200 2000 10000] [--history 50]

Makes one real trial (7 layers, 50 recorded steps), and a store in which it stands N times, each
time as another scheme, seed and subset: rows of the store are copied, Parquet files are linked.
Then it times reading, statistics and the whole report in seconds, each in a process of its own, and
last the same frame of 50 runs through MLflow's own get_metric_history, as a ratio.
"""

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

sys.path[0] = str(Path(__file__).resolve().parents[1])

from gptcore.config import Scalar, TrialConfig

SCHEMES = ["model5", "gpt2", "normal", "xavier_normal"]
SUBSETS = ["all", "0-0.5"]


def model_trial(**knobs: Scalar) -> TrialConfig:
    """The trial that every other one is a copy of, but for some knobs."""
    return TrialConfig.from_flat(
        {
            "model.n_layer": 7, "model.n_head": 2, "model.d_model": 16, "model.context": 16,
            "train.steps": 50, "train.batch_size": 4, "corpus.name": "pydocs", "probes.every": 1,
            "probes.text_every": 1, **knobs,
        }
    )  # fmt: skip


def schemes_and_subsets(n_trials: int) -> dict[str, TrialConfig]:
    """Trials of four schemes and two subsets, by keys that say only which is which."""
    combinations = itertools.product(range(n_trials), SUBSETS, SCHEMES)
    return {
        f"{i:012x}": model_trial(
            **{"init.scheme": scheme, "init.seed": seed, "corpus.subset": subset}
        )
        for i, (seed, subset, scheme) in zip(range(n_trials), combinations, strict=False)
    }


def make_store(folder: Path, trials: Mapping[str, TrialConfig], n_history: int) -> str:
    """A runs folder with a finished sweep `scale` of these trials; -> the store's address.

    Only the first `n_history` have the history of their metrics, which no report reads.
    """
    from analysis.claims import digest
    from analysis.runs import connect, tracking_uri
    from gptcore.experiment import run_trial
    from tracking.recorder import MlflowRecorder, SweepRun, open_experiment

    uri = tracking_uri(folder)
    client = connect(uri)
    experiment_id = open_experiment(client, "scale", folder)
    config = model_trial()
    tags = {"sweep": "scale"}
    first = MlflowRecorder(uri, experiment_id, "first", "first", config.to_flat(), tags)
    run_trial(config, first)
    with sqlite3.connect(folder / "mlflow.db") as store:
        columns = {
            table: [row[1] for row in store.execute(f"pragma table_info({table})")]
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
                store.execute(
                    f"insert into {table} ({', '.join(names)}) select {selected} from {table} "
                    "where run_uuid = ?",
                    (first.run_id,),
                )
            artifacts.mkdir(parents=True)
            for file in (folder / "artifacts" / first.run_id / "artifacts").glob("*.parquet"):
                (artifacts / file.name).hardlink_to(file)
        for table in reversed(columns):
            store.execute(f"delete from {table} where run_uuid = ?", (first.run_id,))
    plan = {
        "sweep": "scale", "tags": {}, "notes": [], "command": "", "claims_digest": digest(),
        "trials": {key: {"params": config.to_flat()} for key, config in trials.items()},
    }  # fmt: skip
    SweepRun(client, experiment_id, plan, launched=1).end("FINISHED")
    return uri


def time_phases(uri: str) -> dict[str, float]:
    """Seconds of reading and of the statistics, verdicts among them."""
    from analysis.findings import find, frames_of_runs, with_scheme
    from analysis.runs import read_sweeps

    start = time.perf_counter()
    sweep = read_sweeps(uri, ["scale"], None, Path("unused"))
    read = time.perf_counter()
    sweep = replace(sweep, trials=with_scheme(sweep.trials))
    find(sweep, frames_of_runs(sweep))
    return {"reading": read - start, "statistics": time.perf_counter() - read}


def time_report(uri: str) -> dict[str, float]:
    """Seconds of the whole report, and the peak of this process' memory in GB."""
    from analysis.report import build_report

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build_report(uri, ["scale"], Path(folder), Path(folder))
        whole = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"whole report": whole, "peak GB": peak}


def history_ratio(uri: str, n_history: int) -> tuple[float, float]:
    """Seconds to read the QKV stds of some runs from Parquet, and through get_metric_history."""
    import polars as pl

    from analysis.runs import connect, trial_runs

    client = connect(uri)
    runs = sorted(trial_runs(client).items())[:n_history]
    start = time.perf_counter()
    files = [run.info.artifact_uri.removeprefix("file://") + "/weights.parquet" for _, run in runs]
    rows = pl.scan_parquet(files).filter(kind="qkv").select("layer", "step", "std").collect()
    parquet = time.perf_counter() - start
    start = time.perf_counter()
    points = [
        point
        for _, run in runs
        for layer in range(7)
        for point in client.get_metric_history(run.info.run_id, f"qkv_std/layer_{layer:02d}")
    ]
    assert len(points) == rows.height
    return parquet, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[200, 2000, 10_000])
    parser.add_argument("--history", type=int, default=50)
    parser.add_argument(
        "--time", nargs=2, help=argparse.SUPPRESS
    )  # of one process: what, and where
    args = parser.parse_args()
    if args.time:
        what, uri = args.time
        print(json.dumps({"phases": time_phases, "report": time_report}[what](uri)))
        return
    for n_trials in args.trials:
        folder = Path(tempfile.mkdtemp())
        try:
            uri = make_store(folder, schemes_and_subsets(n_trials), args.history)
            found = {}
            for what in ("phases", "report"):
                timed = subprocess.run(
                    [sys.executable, __file__, "--time", what, uri],
                    check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                found |= json.loads(timed.stdout)
            line = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
            each = 1000 * found["whole report"] / n_trials
            print(f"{n_trials:6d} trials: {line}; {each:.1f} ms a trial", flush=True)
            if n_trials == args.trials[0]:
                parquet, history = history_ratio(uri, args.history)
                print(
                    f"QKV stds of {args.history} runs: Parquet {parquet:.2f} s, "
                    f"get_metric_history {history:.1f} s: {history / parquet:.0f} times as long"
                )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
