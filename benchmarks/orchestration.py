"""What does a sweep cost in addition to its trials?

    python benchmarks/orchestration.py [--finished 2000] [--quick 24]

The first part measures the command on a finished sweep of many trials: once when the report has to
be built, and once when it is up to date. The second part runs trials of the preset quick. It
compares the time of the sweep with the sum of the times of trials over the cores, and with the
estimate of the sweep. scale_simulation.py measures many trials that do almost nothing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.analysis_scale import make_store, model_trial
from gptcore.config import TrialConfig, spelling
from gptcore.experiment import check_trial

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, config: TrialConfig, seeds: int, *more: str) -> tuple[float, float]:
    """Return the seconds of the command, and the peak memory of the driver in GB."""
    flat = config.to_flat()
    if config.corpus.name == TrialConfig().corpus.name:
        del flat["corpus.name"]  # then it may have a stand-in
    flags = [word for knob, value in flat.items() for word in (f"--{knob}", spelling(value))]
    command = [sys.executable, str(ROOT / "sweeps" / "init_sweep.py"), "--runs-dir", str(folder)]
    command += ["--name", "scale", *flags, "--init.seed", *map(str, range(seeds)), *more]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"the sweep ended with status {status}")
    return seconds, usage.ru_maxrss / 1024**2


def time_to_go_on(n_trials: int) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        config = model_trial()
        digest = check_trial(config).digest
        trials = {
            one.key(digest): one
            for one in (model_trial(**{"init.seed": seed}) for seed in range(n_trials))
        }
        make_store(folder, trials, 0)
        for label, more in (
            ("without a report", ["--no-report"]),
            ("with its report", []),
            ("with a report that is up to date", []),
        ):
            seconds, peak = run(folder, config, n_trials, *more)
            print(
                f"{n_trials} finished trials, {label}: {seconds:.1f} s, {peak:.2f} GB", flush=True
            )
    finally:
        shutil.rmtree(folder)


def quick_trials(n_trials: int) -> None:
    from tracking.address import store_address
    from tracking.store import Store

    folder = Path(tempfile.mkdtemp())
    try:
        seconds, _ = run(folder, TrialConfig(), n_trials, "--no-report")
        store = Store(store_address(folder))
        own = sum(float(run.data.tags["seconds"]) for run in store.trial_runs().values())
        (sweep,) = store.runs("sweep")
        estimated, took = (
            float(sweep.data.tags[tag]) for tag in ("estimated_seconds", "took_seconds")
        )
        ideal = own / (os.cpu_count() or 1)
        print(
            f"{n_trials} quick trials: {ideal:.0f} s of their own on all cores, {took:.0f} s from "
            f"the first one's start ({ideal / took:.0%}), {seconds:.0f} s in all "
            f"({ideal / seconds:.0%}); estimated {estimated:.0f} s ({estimated / took - 1:+.0%})",
            flush=True,
        )
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finished", type=int, default=2000)
    parser.add_argument("--quick", type=int, default=24)
    args = parser.parse_args()
    if args.finished:
        time_to_go_on(args.finished)
    if args.quick:
        quick_trials(args.quick)


if __name__ == "__main__":
    main()
