"""What a job of Slurm runs on each of its nodes: Ray, with the job's share of the node.

sweeps/clusters/slurm.py, which runs on the first node, starts this on all others by srun.
"""

from __future__ import annotations

import fcntl
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gptcore.config import InputError
from gptcore.units import counted, size
from sweeps.execution.interrupts import descendants
from sweeps.execution.limits import memory_limit, usable_cpus
from tracking.arguments import print_error

SECONDS_TO_START = 120.0
"""How long Ray may take to start on a node: its files may come over a slow network."""
SECONDS_TO_SEE = 10.0
"""How long a node may take to see a file that another one has made."""
JOINED = "has joined Ray"
"""What a node says once it is a part of the cluster."""


@dataclass(frozen=True)
class Share:
    """What a job may use of a node."""

    cpus: int
    gpus: int
    memory: int | None  # bytes; None where nothing limits them

    def __str__(self) -> str:
        memory = f", {size(self.memory)} of memory" if self.memory else ""
        return f"{counted(self.cpus, 'CPU')}, {counted(self.gpus, 'GPU')}{memory}"


def share_of_job(known: Mapping[str, str]) -> Share:
    """Return what the job may use of this node.

    Slurm says it in variables, and enforces it by cgroups and CPU affinity where these are set up.

    Args:
        known: the environment that Slurm gave to a process of the job on this node.
    """
    granted = int(known.get("SLURM_CPUS_ON_NODE") or usable_cpus())
    gpus = known.get("SLURM_GPUS_ON_NODE")
    if gpus is None:
        # Without the variable, Ray would take all GPUs that it finds: those of other jobs, too.
        visible = known.get("CUDA_VISIBLE_DEVICES", "")
        gpus = str(sum(name not in ("", "NoDevFiles", "-1") for name in visible.split(",")))
    megabytes = [
        int(known.get("SLURM_MEM_PER_NODE") or 0),
        int(known.get("SLURM_MEM_PER_CPU") or 0) * granted,
        int(known.get("SLURM_MEM_PER_GPU") or 0) * int(gpus),
    ]
    limits = [memory_limit()[0], *(2.0**20 * one for one in megabytes if one)]
    memory = min(limits)
    return Share(
        cpus=min(granted, usable_cpus()),
        gpus=int(gpus),
        memory=None if math.isinf(memory) else int(memory),
    )


@contextmanager
def ray_on_this_node(share: Share, where: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Inside, Ray runs on this node; afterwards all of its processes and files are gone.

    Args:
        share: what Ray may use.
        where: the options of `ray start` that say where its head is.

    Raises:
        RuntimeError: Ray has not started.
    """
    # Not at the top: a node that is only checked needs no Ray.
    from sweeps.execution.ray_cluster import RayFolder
    from sweeps.execution.resources import MEMORY_SHARE, OBJECT_STORE

    private = RayFolder()
    folder = private.make()
    log, temporary = folder.parent / "ray.log", folder.parent / "t"
    temporary.mkdir(mode=0o700)
    limit = [] if share.memory is None else [
        f"--memory={max(1, int(MEMORY_SHARE * share.memory) - OBJECT_STORE)}"
    ]  # fmt: skip
    # 0 is any free port: jobs of several users may share the node, and Ray's defaults are the same
    # for all of them.
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where,
        f"--num-cpus={share.cpus}", f"--num-gpus={share.gpus}", *limit,
        f"--object-store-memory={OBJECT_STORE}", f"--temp-dir={folder}",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        "--include-log-monitor=false", "--disable-usage-stats",
    ]  # fmt: skip
    try:
        with log.open("w") as opened:
            ray = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened,
                env={**os.environ, "TMPDIR": str(temporary)},
            )  # fmt: skip
        try:
            deadline = time.monotonic() + SECONDS_TO_START
            while not (folder / "ray_current_cluster").exists():
                if ray.poll() is not None or time.monotonic() > deadline:
                    last = (log.read_text().strip().splitlines() or ["it says nothing"])[-1]
                    raise RuntimeError(f"Ray did not start on {node_name()}: {last}")
                time.sleep(0.2)
            yield ray
        finally:
            kill_all(ray)
    finally:
        private.remove()


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it has started, at once."""
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def node_name() -> str:
    """Return Slurm's name of this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def join(head: str) -> int:
    """Run Ray on this node until standard input ends, or Ray does. Return the exit code.

    Args:
        head: HOST:PORT of Ray's head.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    share = share_of_job(os.environ)
    try:
        with ray_on_this_node(share, [f"--address={head}"]) as ray:
            print(f"{node_name()} {JOINED}: {share}", flush=True)
            while ray.poll() is None:
                if select.select([sys.stdin], [], [], 1.0)[0] and not os.read(0, 1):
                    return 0
            print(f"{node_name()} has left Ray", flush=True)
    except (InputError, RuntimeError) as error:
        print_error(error)
    except KeyboardInterrupt:
        pass  # the job is being ended, and Ray has ended here
    return 1


def what_is_wrong(held: Path) -> str:
    """Return what keeps this node from using the runs folder; an empty text for nothing.

    Args:
        held: a file of the runs folder, which the first node has made and holds the lock of.
    """
    deadline = time.monotonic() + SECONDS_TO_SEE
    while not held.exists():
        if time.monotonic() > deadline:
            return f"does not see {held.parent}: --runs-dir takes a folder that all nodes share"
        time.sleep(0.5)
    try:
        with held.open("a") as lock:
            if not takes_lock(lock):
                return ""
    except InputError as error:
        return str(error)
    return NO_LOCKS.format(f"the lock that another node holds of {held} is free there")


NO_LOCKS = (
    "has no file locks that all nodes see ({}): --runs-dir takes a folder of a file system "
    "with locks, such as NFS 4, or Lustre mounted with the option flock"
)


def takes_lock(file: IO[str]) -> bool:
    """Take the lock of a file. Return False where another process has it.

    Raises:
        InputError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(NO_LOCKS.format(f"{file.name}: {error.strerror}")) from error
    return True


if __name__ == "__main__":
    _, what, argument = sys.argv
    if what == "join":
        sys.exit(join(argument))
    print(what_is_wrong(Path(argument)))
