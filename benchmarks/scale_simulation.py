"""What breaks first at thousands of trials?

    python benchmarks/scale_simulation.py [--trials 100 1000 10000] [--cores 2] [--steps 2]

Runs the real command, but a worker replays the rows of one recorded trial where it would train:
plan, Tune, MLflow, Parquet and report are what a sweep has. The recorded trial leaves 1.7 MB of
Parquet, as one of the quick preset does, and 45 points a step for MLflow's charts: with 30 steps as
many as quick's. A line tells of each phase as it ends, Tune's once for each portion of trials; then
a table.
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
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from benchmarks.analysis_scale import SCHEMES, model_trial
from gptcore.config import TrialConfig, spelling
from gptcore.records import MemoryRecorder, Recorder, TrialResult

ROOT = Path(__file__).resolve().parents[1]
RECORDED, BUSY = "recorded.pickle", "busy"
"""In the runs folder: the trial to replay, and a line for each trial with its worker's seconds."""


@functools.cache
def recorded(file: Path) -> MemoryRecorder:
    with file.open("rb") as stream:
        return pickle.load(stream)


def replay(config: TrialConfig, recorder: Recorder, checkpoint: Path) -> TrialResult:
    """In place of gptcore.experiment.run_trial."""
    made = recorded(checkpoint.parents[1] / RECORDED)
    for rows in made.rows.values():
        recorder.log(rows)
    recorder.close(made.result)
    return made.result


def run_batch(config: dict[str, Any]) -> None:
    """In place of sweeps.trainable.run_batch, which it calls, on a worker."""
    from sweeps import trainable

    trainable.run_trial = replay
    begun = time.perf_counter()
    trainable.run_batch(config)
    with Path(config["runs_dir"], BUSY).open("a") as file:
        file.write(f"{time.perf_counter() - begun}\n")


def peak() -> float:
    """GB that this process held at most. getrusage would count its parent's before exec."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) / 1024**2


def trial(steps: int) -> TrialConfig:
    """The trial to record."""
    return model_trial(**{"model.n_layer": 4, "train.steps": steps, "train.device": "cpu"})


def drive(folder: str, n_trials: int, cores: int, steps: int) -> None:
    """The driver of a sweep, in a process of its own; prints what it found as JSON."""
    import ray

    import sweeps.estimate
    from sweeps import launch, ray_runner, session
    from sweeps.spaces import PRESETS

    seconds: defaultdict[str, float] = defaultdict(float)
    cpu: defaultdict[str, float] = defaultdict(float)
    peaks: dict[str, float] = {}

    def watch(owner: Any, function: str, phase: str) -> None:
        """Have the function, wherever it is called, say how it went."""
        plain = getattr(owner, function)

        def watched(*args: Any, **named: Any) -> Any:
            wall, own = time.perf_counter(), time.process_time()
            try:
                return plain(*args, **named)
            finally:
                wall, own = time.perf_counter() - wall, time.process_time() - own
                seconds[phase] += wall
                cpu[phase] += own
                peaks[phase] = peak()
                so_far = f"{phase} {wall:.1f} s, driver's CPU {own:.1f} s, {peaks[phase]:.3f} GB"
                print(f"{n_trials} trials: {so_far}", file=sys.stderr, flush=True)

        setattr(owner, function, watched)

    watch(launch, "make_plan", "plan")
    watch(session, "read_ledger", "ledger")
    watch(session.Session, "open", "start")
    watch(sweeps.estimate, "estimate", "estimate")
    watch(ray_runner.tune.Tuner, "fit", "Tune and trials")
    watch(ray_runner, "close_runs", "closing runs")
    watch(session, "build_report", "report")
    ray_runner.run_batch = run_batch
    ray.init = functools.partial(ray.init, num_cpus=cores)
    knobs = trial(steps).to_flat().items()
    flags = [word for knob, value in knobs for word in (f"--{knob}", spelling(value))]
    flags += ["--init.scheme", *SCHEMES, "--init.seed", *map(str, range(n_trials // len(SCHEMES)))]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = launch.main("", PRESETS, ["--runs-dir", folder, "--name", "scale", *flags])
    if code:
        raise SystemExit(f"the sweep ended with status {code}")
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peaks": peaks}))


def simulate(n_trials: int, cores: int, steps: int) -> dict[str, str]:
    """One column of the table."""
    from gptcore.experiment import run_trial

    folder = Path(tempfile.mkdtemp())
    try:
        run_trial(trial(steps), recorder := MemoryRecorder())
        (folder / RECORDED).write_bytes(pickle.dumps(recorder))
        call = f"drive({str(folder)!r}, {n_trials}, {cores}, {steps})"
        command = [sys.executable, "-c", f"from benchmarks.scale_simulation import drive; {call}"]
        begun = time.perf_counter()
        ended = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": "local"},
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        whole = time.perf_counter() - begun
        found = json.loads(ended.stdout)
        seconds, cpu, peaks = found["seconds"], found["cpu"], found["peaks"]
        busy = sum(map(float, (folder / BUSY).read_text().split()))
        grown = peaks["closing runs"] - peaks["estimate"]
        return {
            "seconds in all": f"{whole:.0f}",
            **{f"  {phase}": f"{taken:.1f}" for phase, taken in seconds.items()},
            "  all else": f"{whole - sum(seconds.values()):.1f}",
            "seconds a trial": f"{whole / n_trials:.3f}",
            "  in Tune": f"{seconds['Tune and trials'] / n_trials:.3f}",
            "  of a worker": f"{busy / n_trials:.3f}",
            "  of the driver's CPU": f"{cpu['Tune and trials'] / n_trials:.3f}",
            "trials a second": f"{n_trials / whole:.2f}",
            "driver's peak, GB": f"{peaks['closing runs']:.2f}",
            "  growth, kB a trial": f"{grown * 1024**2 / n_trials:.0f}",
            "  with the report, GB": f"{peaks['report']:.2f}",
            "MLflow's database, GB": f"{(folder / 'mlflow.db').stat().st_size / 1e9:.2f}",
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument(
        "--cores", type=int, default=os.cpu_count(), help="that Ray is told of: trials at a time"
    )
    parser.add_argument("--steps", type=int, default=2, help="of the trial that is recorded")
    args = parser.parse_args()
    found: dict[int, dict[str, str]] = {}
    for n_trials in args.trials:
        found[n_trials] = simulate(n_trials, args.cores, args.steps)
        table = Table("trials", *map(str, found))
        for name in found[n_trials]:
            table.add_row(name, *(column[name] for column in found.values()))
        Console().print(table)


if __name__ == "__main__":
    main()
