"""What breaks first at thousands of trials?

    python benchmarks/scale_simulation.py [--trials 100 1000 10000] [--cores 2]

Runs the real command, but a worker replays the rows of one recorded trial where it would train:
plan, Tune, MLflow, Parquet and report are what a sweep has. That trial leaves 1.7 MB of Parquet, as
one of the quick preset does, and 132 points for MLflow's charts, a tenth. A line tells of each
phase as it ends, Tune's once for each portion of trials; then a table.
"""

import argparse
import contextlib
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from benchmarks.analysis_scale import SCHEMES, model_trial
from gptcore.config import spelling
from gptcore.experiment import Trial
from gptcore.records import MemoryRecorder

ROOT = Path(__file__).resolve().parents[1]
TRIAL = model_trial(**{"model.n_layer": 4, "train.steps": 2, "train.device": "cpu"})
RECORDED, BUSY = "recorded.pickle", "busy"
"""In the runs folder: the trial to replay, and a line for each trial with its worker's seconds."""


@functools.cache
def recorded(file: Path) -> MemoryRecorder:
    return pickle.loads(file.read_bytes())


def replay(trials: Sequence[Trial], texts: Any) -> None:
    """In place of gptcore.experiment.run_trials."""
    for trial in trials:
        whole = recorded(trial.file.parents[1] / RECORDED)
        for rows in whole.rows.values():
            trial.recorder.log(rows)
        trial.recorder.close(whole.result)


def run_batch(config: dict[str, Any], **given: Any) -> None:
    """In place of sweeps.execution.trainable.run_batch, which it calls, on a worker."""
    from sweeps.execution import trainable

    trainable.run_trials = replay
    begun = time.perf_counter()
    trainable.run_batch(config, **given)
    with Path(config["recording"].runs_dir, BUSY).open("a") as file:
        file.write(f"{time.perf_counter() - begun}\n")


def drive(folder: str, n_trials: int, cores: int) -> None:
    """The driver of a sweep, in a process of its own; prints as JSON, by phase, seconds, seconds of
    its CPU, and GB that it had held at most by then."""
    import ray

    import sweeps.estimate.estimate
    from gptcore.units import peak_memory
    from sweeps import launch, session
    from sweeps.execution import runner
    from sweeps.presets import PRESETS

    seconds: defaultdict[str, float] = defaultdict(float)
    cpu: defaultdict[str, float] = defaultdict(float)
    peak: dict[str, float] = {}

    def watch(owner: Any, function: str, phase: str) -> None:
        plain = getattr(owner, function)

        def watched(*args: Any, **named: Any) -> Any:
            wall, own = time.perf_counter(), time.process_time()
            result = plain(*args, **named)
            wall, own = time.perf_counter() - wall, time.process_time() - own
            seconds[phase] += wall
            cpu[phase] += own
            peak[phase] = peak_memory() / 1e9
            line = f"{phase} {wall:.1f} s, driver's CPU {own:.1f} s, {peak[phase]:.3f} GB"
            print(f"{n_trials} trials: {line}", file=sys.stderr, flush=True)
            return result

        setattr(owner, function, watched)

    watch(launch, "make_plan", "plan")
    watch(session, "read_ledger", "ledger")
    watch(session.Session, "open", "start")
    watch(sweeps.estimate.estimate, "estimate", "estimate")
    watch(runner.tune.Tuner, "fit", "Tune and trials")
    watch(runner, "close_runs", "closing runs")
    watch(session, "build_report", "report")
    runner.run_batch = run_batch
    ray.init = functools.partial(ray.init, num_cpus=cores)
    knobs = TRIAL.to_flat().items()
    flags = [word for knob, value in knobs for word in (f"--{knob}", spelling(value))]
    flags += ["--array", "off", "--init.scheme", *SCHEMES]
    flags += ["--init.seed", *map(str, range(n_trials // len(SCHEMES)))]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = launch.main("", PRESETS, ["--runs-dir", folder, "--name", "scale", *flags])
    if code:
        raise SystemExit(f"the sweep ended with status {code}")
    print(json.dumps([seconds, cpu, peak]))


def simulate(n_trials: int, cores: int) -> dict[str, str]:
    """One column of the table."""
    from gptcore.experiment import run_trial

    folder = Path(tempfile.mkdtemp())
    try:
        run_trial(TRIAL, recorder := MemoryRecorder())
        (folder / RECORDED).write_bytes(pickle.dumps(recorder))
        call = f"drive({str(folder)!r}, {n_trials}, {cores})"
        command = [sys.executable, "-c", f"from benchmarks.scale_simulation import drive; {call}"]
        env = {**os.environ, "RAY_ADDRESS": "local"}
        begun = time.perf_counter()
        ended = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE)
        whole = time.perf_counter() - begun
        seconds, cpu, peak = json.loads(ended.stdout)
        busy = sum(map(float, (folder / BUSY).read_text().split()))
        grown = peak["closing runs"] - peak["estimate"]
        return {
            "seconds in all": f"{whole:.0f}",
            **{f"  {phase}": f"{taken:.1f}" for phase, taken in seconds.items()},
            "  all else": f"{whole - sum(seconds.values()):.1f}",
            "seconds a trial": f"{whole / n_trials:.3f}",
            "  in Tune": f"{seconds['Tune and trials'] / n_trials:.3f}",
            "  of a worker": f"{busy / n_trials:.3f}",
            "  of the driver's CPU": f"{cpu['Tune and trials'] / n_trials:.3f}",
            "trials a second": f"{n_trials / whole:.2f}",
            "driver's peak, GB": f"{peak['closing runs']:.2f}",
            "  growth, kB a trial": f"{grown * 1e6 / n_trials:.0f}",
            "  with the report, GB": f"{peak['report']:.2f}",
            "MLflow's database, GB": f"{(folder / 'mlflow.db').stat().st_size / 1e9:.2f}",
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument(
        "--cores",
        type=int,
        default=os.cpu_count(),
        help="cores of the simulated machine, which is the number of trials at a time",
    )
    args = parser.parse_args()
    found: dict[int, dict[str, str]] = {}
    for n_trials in args.trials:
        found[n_trials] = simulate(n_trials, args.cores)
        table = Table("trials", *map(str, found))
        for name in found[n_trials]:
            table.add_row(name, *(column[name] for column in found.values()))
        Console().print(table)


if __name__ == "__main__":
    main()
