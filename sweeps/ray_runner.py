"""Trials on Ray Tune: on the cluster where there is one, else on the cores of this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

# Read by Ray as it is imported or started.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Ctrl-C is ours to hear: see sweeps.interrupts.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# The workers that Ray starts beforehand have not the environment that Tune wants for its own: they
# would only stand in the way of those.
os.environ.setdefault("RAY_prestart_worker_first_driver", "false")

import ray
from ray import tune
from ray._private import ray_constants
from ray._private.services import find_bootstrap_address

from gptcore.config import InputError, TrialConfig
from sweeps.faults import Fault, saying_when_away
from sweeps.interrupts import on_interrupt
from sweeps.progress import Ended, SweepProgress, key_of
from sweeps.tracking import close_runs, wait_no_longer
from sweeps.trainable import run_batch

if TYPE_CHECKING:
    from sweeps.study import Suggestions

RETRIES = 2
"""How often a trial whose worker dies goes on with another one. What a trial itself breaks on is
not tried again."""

ROOT = Path(__file__).resolve().parents[1]

MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
"""For workers: glibc's malloc is to keep the memory of a step for the next one. By itself it gives
it back and maps it anew, most of all from the second arena that the thread which Tune runs a trial
in would get: up to 9,000 page faults and 8% of a step."""

# That Ray made itself a token is no news to anyone here; that Tune keeps no files of results is
# so because MLflow and Parquet have them; why a trial failed is told once, by SweepProgress; that
# Tune cannot keep a state of its own loses nothing, for nobody reads it.
for chatty in (
    "ray._private.authentication",
    "ray.train._internal.syncer",
    "ray.tune.analysis.experiment_analysis",
    "ray.tune.execution.tune_controller",
    "ray.tune.tune",
):
    logging.getLogger(chatty).setLevel(logging.CRITICAL)


def start_ray(devices: set[str], console: Console) -> None:
    """Join the cluster that RAY_ADDRESS names or `ray start` made here, else start Ray here.

    Raises InputError for a cluster that does not answer, or where a trial's `devices` want a GPU
    and there is none.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    # As ray.init() itself finds it. address="auto" would join another sweep's own Ray as well, and
    # end with it.
    address = os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None)
    if address and address != "local":
        code = {
            "py_modules": [str(ROOT / "gptcore"), str(ROOT / "sweeps")],
            "env_vars": MALLOC,
        }
        try:
            # Ray itself would go on trying for minutes.
            host, _, port = address.rpartition("//")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address=address, runtime_env=code, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise InputError(
                f"the Ray cluster at {address} does not answer ({why}): RAY_ADDRESS takes "
                "HOST:PORT, or local for a Ray of its own on this machine"
            ) from error
    else:
        os.environ.update(MALLOC)
        # Workers on this machine import from the checkout itself.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        # What Ray knows a machine of its own by on Windows and macOS: it then listens on loopback
        # alone. Here it would on every interface.
        ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=100 * 2**20,  # nothing large goes through it
            **quiet,
        )
        address = None
    where = f"the cluster at {address}" if address else "this machine"
    cpus, gpus = (ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU"))
    if "cuda" in devices and not gpus:
        raise InputError("train.device is cuda, but Ray has no GPU")
    console.print(f"Ray: {where}, {cpus:.0f} CPUs, {gpus:.0f} GPUs")


def stop_ray() -> None:
    ray.shutdown()


PORTION, ROUNDS = 500, 20
"""So many trials are Tune's at a time, or as many as fill every slot so many times: it keeps 70 kB
of each, finished or not, and goes through all of them again and again."""

HEADROOM = 1.1
"""Of memory: what a trial is given over what it was seen to need."""


def needs_of(config: TrialConfig, trials_per_gpu: int, memory: int = 0) -> dict[str, float]:
    """What of a node's resources a trial takes: one core, its memory in bytes, and a share of a GPU
    where there are some and it may use one.

    No more memory than the largest node has: where that is not enough, the trial will say so.
    """
    needs = {"CPU": 1.0}
    if memory:
        largest = max(node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"])
        needs["memory"] = min(HEADROOM * memory, largest)
    if ray.cluster_resources().get("GPU") and config.train.device != "cpu":
        needs["GPU"] = 1 / trials_per_gpu
    return needs


def slots(needs: Mapping[str, float]) -> int:
    """How many trials with these needs the nodes take at a time, at least one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = [min(int(node.get(name, 0.0) / need) for name, need in needs.items()) for node in nodes]
    return max(1, sum(fit))


def run_on_ray(
    jobs: Sequence[Mapping[str, Any]],
    store: Mapping[str, str],
    needs: Mapping[str, Mapping[str, float]],
    runs_dir: Path,
    console: Console,
    search: Suggestions | None = None,
) -> bool:
    """Run trials; -> whether stopped.

    A job is a trial as sweeps.trainable takes it; `needs` are those of each, by its key, as
    needs_of. A search adds its jobs as it suggests them. Afterwards no job's MLflow run is RUNNING:
    one that failed has its reason, one that was pruned or that Ctrl-C stopped is KILLED. Raises
    Fault for what ended the sweep before its trials did.
    """
    steps = {job["key"]: job["params"]["train.steps"] for job in jobs}
    progress = SweepProgress(console, steps, trials=search.left if search else len(jobs))
    progress.errors = search.errors if search else []
    # Whoever ends the driver politely ends it as Ctrl-C does; Ray itself would only print and die.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))

    def tune_trials(space: dict[str, Any] | None) -> None:
        tune.Tuner(
            tune.with_resources(
                run_batch, lambda config: tune.PlacementGroupFactory([dict(needs[key_of(config)])])
            ),
            param_space=space,
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                trial_name_creator=lambda trial: key_of(trial.config),
                trial_dirname_creator=lambda trial: key_of(trial.config),
                search_alg=search,
                num_samples=search.left if search else 1,
            ),
            run_config=tune.RunConfig(
                name=f"{time.time():.3f}",
                storage_path=str(runs_dir / "ray"),
                stop=search.prunes if search else None,
                callbacks=[progress],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                verbose=0,
            ),
        ).fit()

    with progress, saying_when_away(store["uri"], console.print):
        stopped = True
        try:
            with on_interrupt(progress.interrupt):
                if search:
                    tune_trials(None)
                else:
                    kinds = {str(needs[job["key"]]): job for job in jobs}.values()
                    most = max(PORTION, ROUNDS * max(slots(needs[job["key"]]) for job in kinds))
                    job_of = {job["key"]: dict(job) for job in jobs}
                    for start in range(0, len(jobs), most):
                        portion = [job["key"] for job in jobs[start : start + most]]
                        tune_trials(
                            {
                                "store": dict(store),
                                "runs_dir": str(runs_dir),
                                # Tune copies its whole space for every trial of it.
                                "key": tune.grid_search(portion),
                                "batch": tune.sample_from(lambda config: [job_of[config["key"]]]),
                            }
                        )
            stopped = False
        except Ended:
            pass
        finally:
            if stopped:
                stop_ray()  # a trial that is being stopped may still write
            if progress.fault:
                wait_no_longer()  # a store that does not answer has been waited for
            close_runs(store, jobs, progress.failed, progress.retried, progress.pruned)
    if progress.fault:
        raise Fault(progress.fault)
    return stopped
