"""Ray: join the cluster where there is one, else start Ray on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from gptcore.config import InputError, TrainConfig
from gptcore.corpus import read_text
from sweeps.execution.faults import Fault
from sweeps.execution.limits import usable_cpus
from sweeps.execution.private_api import (
    CHATTY_LOGGERS,
    check_versions,
    cluster_metadata,
    has_token,
    leave_signals,
    listen_on_loopback,
    silence_workers,
    start_apart,
)
from sweeps.execution.ray_token import MODE, close_to_others, own_token, token_file
from sweeps.execution.resources import (
    OBJECT_STORE,
    autoscaler_machines,
    cluster_address,
    live_machines,
    memory_for_trials,
    schedulable_machines,
)
from tracking.address import BUCKET, StoreAddress, bucket
from tracking.health import GO_ON

ROOT = Path(__file__).resolve().parents[2]

MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
"""Environment of workers, so that glibc's malloc keeps the memory of a step for the next one.

By default it returns the memory and maps it again, most of all in the second arena, which the
thread gets in which Tune runs a trial: up to 9,000 page faults and 8% of a step."""

SECONDS_TO_JOIN = 180.0

LONGEST_BASE = 26
"""Characters in the path of the folder in which Ray's folder is made, which adds 14. The paths of
Ray's sockets are up to 65 characters longer than that, and Linux takes 107."""


PREFIX = "gs-"
"""How the name of Ray's folder begins."""
SECONDS_TO_LOCK = 60.0
"""A driver may not have locked a new folder yet; an older one it has."""


class RayFolder:
    """The folder of Ray's sockets, logs and token. No other user can enter it; it ends with Ray.

    A driver that is killed leaves its folder behind. The next one removes it.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._lock: IO[str] | None = None

    def make(self) -> Path:
        """Make the folder, below TMPDIR where its path is short enough.

        Returns:
            A folder in it, for Ray, which opens its own folder for everyone.

        Raises:
            InputError: there is no folder for it.
        """
        bases = [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
        for base in (Path(one) for one in bases if len(os.fsencode(one)) <= LONGEST_BASE):
            try:
                path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            except OSError:
                continue
            try:
                self._lock = (path / "lock").open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                continue
            self._path = path
            _remove_abandoned(base)
            return path / "r"
        raise InputError(
            f"Ray needs a folder for its sockets, and none of {', '.join(dict.fromkeys(bases))} "
            f"can be used: set TMPDIR to a folder whose path has at most {LONGEST_BASE} characters"
        )

    def remove(self) -> None:
        """Remove the folder, if there is one."""
        if self._path and self._lock:
            shutil.rmtree(self._path, ignore_errors=True)
            self._lock.close()
        self._path = self._lock = None


def _remove_abandoned(base: Path) -> None:
    """Remove folders of this user whose drivers were killed: nobody holds their locks."""
    for folder in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or one that another driver removes
            if time.time() - folder.stat().st_mtime < SECONDS_TO_LOCK:
                continue
            with (folder / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


_ray_folder = RayFolder()
_at_stop = ExitStack()
"""What ends with the Ray that this process has started."""

for chatty in CHATTY_LOGGERS:
    logging.getLogger(chatty).setLevel(logging.CRITICAL)
silence_workers()


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, else start Ray here.

    Raises:
        InputError: the cluster cannot be joined.
        Fault: Ray does not start here in time.
    """
    leave_signals()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address := cluster_address():
        check_cluster(address)
        # The shells of other machines do not have these.
        variables = MALLOC | ({BUCKET: shared} if (shared := bucket()) else {})
        try:
            with _packages() as packages:
                code = {"py_modules": packages, "env_vars": variables}
                ray.init(address=address, runtime_env=code, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            why = str(error).strip().splitlines()[0]
            raise InputError(f"the Ray cluster at {address} cannot be joined: {why}") from error
    else:
        os.environ.update(MALLOC)
        # Workers on this machine import from the checkout itself.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        listen_on_loopback()
        start_apart()
        with contextlib.suppress(InputError):  # this Ray does not use it
            close_to_others(token_file())
        folder = _ray_folder.make()
        _at_stop.enter_context(own_token(folder.parent))
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                num_cpus=usable_cpus(),
                _memory=memory_for_trials(),
                _temp_dir=str(folder),
                **quiet,
            )
        except Exception as error:  # Ray raises no narrower one
            if "timed out during startup" not in str(error):
                raise
            raise Fault(
                "Ray has not started within 30 seconds, as happens on a machine that is very "
                f"busy: {GO_ON}"
            ) from error


def await_ray(trials: Collection[TrainConfig], console: Console) -> None:
    """Wait for the machines of a cluster, and say where trials run.

    Args:
        trials: the training knobs of the trials that will run.
        console: prints where the trials run.

    Raises:
        InputError: a trial needs a GPU, and there is none.
    """
    if address := cluster_address():
        await_machines(address, console)
    check_devices(trials)
    cpus, gpus = (
        sum(one.get(name, 0) for one in schedulable_machines()) for name in ("CPU", "GPU")
    )
    where = f"the cluster at {address}" if address else "this machine"
    working = sum(bool(one.get("CPU")) for one in live_machines())
    more = (
        f" on {len(schedulable_machines())} machines at most, {working} are there"
        if autoscaler_machines()
        else ""
    )
    console.print(f"Ray: {where}, {cpus:.0f} CPUs, {gpus:.0f} GPUs{more}")


@contextmanager
def _packages() -> Iterator[list[str]]:
    """Yield copies of the packages that workers run, without compiled files.

    Ray reads every folder of a package, and those of compiled files may be another account's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder, package) for package in ("gptcore", "tracking", "sweeps")]
        for copy in copies:
            shutil.copytree(ROOT / copy.name, copy, ignore=shutil.ignore_patterns("__pycache__"))
        yield [str(copy) for copy in copies]


def check_devices(trials: Collection[TrainConfig]) -> None:
    """Raise InputError where a trial asks for a GPU and there is none."""
    if any(machine.get("GPU") for machine in schedulable_machines()):
        return
    if any(train.device == "cuda" for train in trials):
        raise InputError("train.device is cuda, but Ray has no GPU")
    if any(train.precision == "tf32" for train in trials):
        raise InputError("train.precision is tf32, but Ray has no GPU: take float32")


def await_machines(address: str, console: Console) -> None:
    """Wait until the cluster has a machine for trials, or may start one.

    Raises:
        InputError: no machine comes in time.
    """
    deadline = time.monotonic() + SECONDS_TO_JOIN
    if not schedulable_machines():
        console.print(f"the cluster at {address} has no machine for trials yet: waiting for one")
    while not schedulable_machines():
        if time.monotonic() > deadline:
            raise InputError(
                f"the cluster at {address} has no machine that trials may run on: "
                "`ray status` on its head says what it waits for"
            )
        time.sleep(1)


def stop_ray() -> None:
    """Leave the cluster, or stop the Ray of this machine."""
    ray.shutdown()
    _at_stop.close()
    _ray_folder.remove()


def check_cluster(address: str) -> None:
    """Check that a cluster can be joined, which Ray itself would try for minutes.

    Raises:
        InputError: says what is in the way: the address, the token or the versions.
    """
    takes = "RAY_ADDRESS takes HOST:PORT, or local for a Ray of its own on this machine"
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise InputError(f"{address!r} is not the address of a Ray cluster: {takes}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise InputError(
            f"the Ray cluster at {address} does not answer ({error}): {takes}"
        ) from error
    wants_token = os.environ.get(MODE) == "token"
    if wants_token:
        close_to_others(token_file())
    if wants_token and not has_token():
        raise InputError(
            "RAY_AUTH_MODE is token, but this account has no token: copy the cluster's token to "
            "~/.ray/auth_token"
        )
    try:
        with _silent_stderr():
            metadata = cluster_metadata(address)
    except AuthenticationError as error:
        raise InputError(
            f"the Ray cluster at {address} "
            + ("has another token than ~/.ray/auth_token" if wants_token else "asks for a token")
            + ": copy the cluster's token to ~/.ray/auth_token, and set RAY_AUTH_MODE=token"
        ) from error
    except RayError as error:
        raise InputError(f"what answers at {address} is not a Ray cluster: {takes}") from error
    if metadata:
        try:
            check_versions(metadata)
        except RuntimeError as error:
            theirs = f"Ray {metadata['ray_version']} and Python {metadata['python_version']}"
            ours = f"Ray {ray.__version__} and Python {sys.version.split()[0]}"
            raise InputError(
                f"the Ray cluster at {address} runs {theirs}, this command {ours}: "
                "install the same versions on both"
            ) from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Inside, drop what is written to stderr, also by Ray's C++, which does not use sys.stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def check_shared(folder: Path, store: StoreAddress) -> None:
    """Check that all machines of the cluster see the runs folder, or share a bucket and a server.

    They also have to see each other's locks of files there, by which no two of them train a trial.

    Raises:
        InputError: they do not.
    """
    if bucket():
        if cluster_address() and store.database:
            raise InputError(
                "machines that share only a bucket record their trials on a tracking server: "
                "MLFLOW_TRACKING_URI takes its address"
            )
        return
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if not others:
        return
    marker = folder / f".seen-by-all-{os.getpid()}"
    try:
        with marker.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            seen = {
                node["NodeManagerAddress"]: ray.remote(num_cpus=0, max_calls=1, max_retries=0)(_see)
                .options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                )
                .remote(str(marker))
                for node in others
            }
            found = {where: ray.get(answer, timeout=120) for where, answer in seen.items()}
    except RayError as error:
        why = str(error).strip().splitlines()[-1]
        raise InputError(f"a machine of the cluster could not check {folder}: {why}") from error
    finally:
        marker.unlink(missing_ok=True)
    if blind := [where for where, what in found.items() if what == "nothing"]:
        raise InputError(
            f"{', '.join(blind)} of the cluster cannot see --runs-dir {folder}: name a folder that "
            "all machines share, or set GPT_SWEEPS_BUCKET to an s3:// address"
        )
    if free := [where for where, what in found.items() if what == "no lock"]:
        raise InputError(
            f"{', '.join(free)} of the cluster cannot see the file locks in --runs-dir {folder}: "
            "name a folder on a file system with locks for all machines, such as NFS 4"
        )


def _see(file: str) -> str:
    """Return what this machine sees of a file that the driver has locked."""
    try:
        with Path(file).open() as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "its lock"
    except FileNotFoundError:
        return "nothing"
    except OSError:  # the file system has no locks at all
        return "no lock"
    return "no lock"


def texts_for(corpora: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return the texts to send to workers; none without a cluster, where workers read them."""
    return {name: read_text(name) for name in sorted(corpora)} if cluster_address() else {}
