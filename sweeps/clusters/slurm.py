"""A job of Slurm that runs a sweep: `sbatch sweeps/clusters/slurm.sh [flags of init_sweep.py]`.

This runs on the job's first node, as its batch script. It starts Ray on all nodes and the tracking
server here, and then the same command as anywhere else. All of it ends with the job.

When a job is cancelled or preempted, Slurm sends SIGTERM to all of its processes at once. The
driver needs Ray and the tracking server to stop cleanly. So this process blocks the signal, as do
those that it starts, and asks the driver to stop.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

# All of these are light. An import that starts threads, before this process has blocked the
# signals, would have the threads take them.
from gptcore.config import InputError
from sweeps.clusters.slurm_job import (
    END,
    ROOT,
    WARNING,
    Job,
    Stopped,
    await_server,
    check_nodes,
    first_address,
    folder_of_job,
    head_of_ray,
    ray_on_other_nodes,
    say,
    this_job,
    tracking_server,
)
from tracking.arguments import check_writable, print_error
from tracking.health import GO_ON

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Ray notices after about 5 seconds, not after a minute, that a node is gone.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    # A node that cannot reach the first one for this long ends its trials, which run elsewhere.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "30",
}
"""The environment of all processes of the job."""


def main() -> int:
    """Run the job. Return its exit code: the driver's, or 2 for bad input."""
    flags = sys.argv[1:]
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {WARNING, END})
        job = this_job(flags)
        code, last = run_job(job, flags)
    except InputError as error:
        print_error(error)
        return 2
    except RuntimeError as error:
        print_error(error)
        return 1
    except Stopped:
        print("the job has ended before the sweep began: more --time may help", file=sys.stderr)
        return 130
    # Another signal may have come meanwhile: a job that was cancelled is not to begin again.
    if code == 130 and last == WARNING and not signal.sigtimedwait({END}, 0):
        requeue(job)
    return code


def run_job(job: Job, flags: Sequence[str]) -> tuple[int, int | None]:
    """Run the sweep with all that it needs.

    Returns:
        The driver's exit code, and the last signal that Slurm has sent; None for none.

    Raises:
        InputError: something is wrong with the nodes or the runs folder; no trial has begun.
        RuntimeError: Ray or the tracking server has not started.
        Stopped: Slurm has sent a signal before the driver was there.
    """
    check_writable(job.runs_dir)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # Ray has many files open
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):  # those of another cluster
        os.environ.pop(name, None)
    say(f"job {job.number} on {', '.join(job.nodes)}")
    with ExitStack() as ending:
        private = ending.enter_context(folder_of_job(job))
        os.environ.update(ENVIRONMENT, RAY_AUTH_TOKEN_PATH=str(private / "token"))
        if not job.others:  # nothing of a job of one node is for other machines
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        check_nodes(job, private / "lock")
        host = first_address(job)
        server = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            server = ending.enter_context(tracking_server(job, host, private / "password"))
        head = ending.enter_context(head_of_ray(host))
        if job.others:
            ending.enter_context(ray_on_other_nodes(job, head))
        if server:
            await_server(job, server)
        driver = [sys.executable, str(ROOT / "sweeps" / "init_sweep.py"), *flags]
        return drive(driver, {**os.environ, "RAY_ADDRESS": head})


def drive(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int | None]:
    """Run the driver, and pass on what Slurm sends. Return as `run_job` does."""
    last = None
    with subprocess.Popen(command, env=environment) as driver:
        while driver.poll() is None:
            if not (received := signal.sigtimedwait({WARNING, END}, 0.5)):
                continue
            if last is None:  # a second one would have it stop without saving
                driver.send_signal(signal.SIGINT)
            last = END if last == END else received.si_signo
    code = driver.returncode
    return (128 - code if code < 0 else code), last


def requeue(job: Job) -> None:
    """Have Slurm run this job again, from the checkpoints; say so where it does not."""
    asked = ["scontrol", "requeue", job.number]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode == 0:
        say(f"job {job.number} goes on when Slurm starts it again")
    else:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        say(f"job {job.number} is not started again ({why}): {GO_ON}")


if __name__ == "__main__":
    sys.exit(main())
