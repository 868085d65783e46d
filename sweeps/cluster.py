"""Ray, on the cluster where there is one, else on this machine: joined or started, and what its
machines have."""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

# Read by Ray as it is imported or started: a driver imports this file first.
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
import yaml
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private import ray_constants
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray._private.services import find_bootstrap_address
from ray._private.utils import check_version_info
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gptcore.config import InputError, TrialConfig
from gptcore.corpus import read_text
from sweeps.bucket import BUCKET, bucket

ROOT = Path(__file__).resolve().parents[1]

MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
"""For workers: glibc's malloc is to keep the memory of a step for the next one. By itself it gives
it back and maps it anew, most of all from the second arena that the thread which Tune runs a trial
in would get: up to 9,000 page faults and 8% of a step."""

OBJECT_STORE = 100 * 2**20
"""Bytes of memory for it on this machine: nothing large goes through it."""

SECONDS_TO_JOIN = 180.0

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml").expanduser()
"""Where `ray up` leaves the cluster's file on its head."""

# That Ray made itself a token is no news to anyone here, and which trials a machine that died took
# with it is told by SweepProgress, in a line each and without stack traces.
logging.getLogger("ray._private.authentication").setLevel(logging.CRITICAL)
ray._private.worker.print_to_stdstream = lambda *_, **__: None


def start_ray(devices: Collection[str], console: Console) -> None:
    """Join the cluster that RAY_ADDRESS names or `ray start` made here, else start Ray here.

    Raises InputError for a cluster that cannot be joined, or where a trial's `devices` want a GPU
    and there is none.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address := cluster_address():
        check_cluster(address)
        code = {
            "py_modules": [str(ROOT / "gptcore"), str(ROOT / "sweeps")],
            # The other machines' shells do not know of it.
            "env_vars": MALLOC | ({BUCKET: shared} if (shared := bucket()) else {}),
        }
        try:
            ray.init(address=address, runtime_env=code, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            why = str(error).strip().splitlines()[0]
            raise InputError(f"the Ray cluster at {address} cannot be joined: {why}") from error
        await_machines(address, console)
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
            object_store_memory=OBJECT_STORE,
            **quiet,
        )
    check_devices(devices)
    cpus, gpus = (sum(one.get(name, 0) for one in machines()) for name in ("CPU", "GPU"))
    where = f"the cluster at {address}" if address else "this machine"
    working = sum(bool(one.get("CPU")) for one in there())
    more = f" on {len(machines())} machines at most, {working} are there" if addable() else ""
    console.print(f"Ray: {where}, {cpus:.0f} CPUs, {gpus:.0f} GPUs{more}")


def check_devices(devices: Collection[str]) -> None:
    """Raises InputError where a trial's `devices` want a GPU and there is none."""
    if "cuda" in devices and not any(machine.get("GPU") for machine in machines()):
        raise InputError("train.device is cuda, but Ray has no GPU")


def await_machines(address: str, console: Console) -> None:
    """Wait for the first machine to run trials on, where none of a cluster's has joined yet; those
    that it starts for work are there once there is some.

    Raises InputError where none comes.
    """
    deadline = time.monotonic() + SECONDS_TO_JOIN
    if not machines():
        console.print(f"the cluster at {address} has no machine for trials yet: waiting for one")
    while not machines():
        if time.monotonic() > deadline:
            raise InputError(
                f"the cluster at {address} has no machine that trials may run on: "
                "`ray status` on its head says what it waits for"
            )
        time.sleep(1)


def stop_ray() -> None:
    ray.shutdown()


def cluster_address() -> str | None:
    """HOST:PORT of the cluster to join; None where there is none."""
    # As ray.init() itself finds it. address="auto" would join another sweep's own Ray as well, and
    # end with it.
    named = os.environ.get("RAY_ADDRESS")
    if named == "auto":
        named = None
    address = named or find_bootstrap_address(None)
    return None if address == "local" else address


def check_cluster(address: str) -> None:
    """Raises InputError where the cluster cannot be joined, for what keeps us out.

    Ray itself would go on trying for minutes, end the process, or tell it in twenty lines.
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
    wants_token = os.environ.get("RAY_AUTH_MODE") == "token"
    if wants_token and not _has_token():
        raise InputError(
            "RAY_AUTH_MODE is token, but there is none: put the cluster's into ~/.ray/auth_token"
        )
    try:
        with _silent_stderr():
            client = GcsClient(address=address)
            metadata = get_cluster_metadata(client)
    except AuthenticationError as error:
        raise InputError(
            f"the Ray cluster at {address} "
            + ("has another token than ~/.ray/auth_token" if wants_token else "asks for a token")
            + ": put the cluster's there, and set RAY_AUTH_MODE=token"
        ) from error
    except RayError as error:
        raise InputError(f"what answers at {address} is no Ray cluster: {takes}") from error
    if metadata:
        try:
            check_version_info(metadata, "here")
        except RuntimeError as error:
            theirs = f"Ray {metadata['ray_version']} and Python {metadata['python_version']}"
            ours = f"Ray {ray.__version__} and Python {sys.version.split()[0]}"
            raise InputError(
                f"the Ray cluster at {address} runs {theirs}, this command {ours}: "
                "both take the same"
            ) from error


def _has_token() -> bool:
    try:
        return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except AuthenticationError:  # RAY_AUTH_TOKEN_PATH names no file, or an empty one
        return False


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """What Ray's C++ says goes past Python's sys.stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def check_shared(folder: Path, store: str) -> None:
    """Raises InputError where the machines of a cluster share neither a bucket and a tracking
    server nor a folder, in which all of them see what this one puts there."""
    if bucket():
        if cluster_address() and store.startswith("sqlite:"):
            raise InputError(
                "machines that share a bucket alone record their trials on a tracking server: "
                "MLFLOW_TRACKING_URI takes its address"
            )
        return
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if not others:
        return
    marker = folder / f".seen-by-all-{os.getpid()}"
    marker.touch()
    sees = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(_exists)
    asked = {
        node["NodeManagerAddress"]: sees.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(str(marker))
        for node in others
    }
    try:
        blind = [where for where, answer in asked.items() if not ray.get(answer, timeout=120)]
    except RayError as error:
        why = str(error).strip().splitlines()[-1]
        raise InputError(f"a machine of the cluster cannot be asked for {folder}: {why}") from error
    finally:
        marker.unlink()
    if blind:
        raise InputError(
            f"{', '.join(blind)} of the cluster cannot see --runs-dir {folder}: it takes a folder "
            "that all machines share, or GPT_SWEEPS_BUCKET an s3:// address"
        )


def _exists(file: str) -> bool:
    return Path(file).exists()


def texts_for(corpora: Collection[str]) -> dict[str, tuple[str, str]]:
    """The texts that workers elsewhere are to be given, as gptcore.corpus.GIVEN has them; none on
    this machine, where they are read from where they lie."""
    return {name: read_text(name) for name in sorted(corpora)} if cluster_address() else {}


def there() -> list[dict[str, float]]:
    """The resources of each machine that is there; where no Ray runs, of this one as Ray would
    count them."""
    if not ray.is_initialized():
        return [_this_machine()]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@functools.cache
def _this_machine() -> dict[str, float]:
    """Count the resources of this machine as Ray would, once: asking its GPUs takes a while."""
    here = ResourceAndLabelSpec(object_store_memory=OBJECT_STORE)
    here.resolve(is_head=True, node_ip_address="127.0.0.1")
    counted: dict[str, float] = here.to_resource_dict()
    return counted


def addable() -> list[dict[str, float]]:
    """The resources of each machine that the cluster's own file has it start for work, all that
    there may be at a time; none where machines do not come and go."""
    if not cluster_address() or not BOOTSTRAP.exists():
        return []
    file = yaml.safe_load(BOOTSTRAP.read_text())
    kinds = file.get("available_node_types", {})
    if file["provider"]["type"] == "local":
        return []
    return [
        kind["resources"]
        for name, kind in kinds.items()
        if name != file.get("head_node_type")
        for _ in range(kind.get("max_workers", 0))
    ][: file.get("max_workers")]


def machines() -> list[dict[str, float]]:
    """The resources of each machine that trials may run on: of those that may be started, where the
    cluster starts them for work, else of those that are there."""
    return addable() or [machine for machine in there() if machine.get("CPU")]


HEADROOM = 1.1
"""Of memory: what a trial is given over what it was seen to need."""


def needs_of(config: TrialConfig, memory: int = 0, per_gpu: int = 1) -> dict[str, float]:
    """What of a machine's resources a trial takes: one core, its memory in bytes, and a share of a
    GPU where there are some and it may use one.

    No more memory than the largest machine has: where that is not enough, the trial will say so.
    """
    needs = {"CPU": 1.0}
    if config.train.device != "cpu" and any(machine.get("GPU") for machine in machines()):
        needs["GPU"] = 1 / per_gpu
    if memory:
        fitting = [machine for machine in machines() if fit(machine, needs)]
        largest = max((machine.get("memory", 0.0) for machine in fitting), default=math.inf)
        needs["memory"] = min(HEADROOM * memory, largest)
    return needs


def fit(machine: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many trials with these needs a machine takes at a time."""
    return min(int(machine.get(name, 0.0) / need) for name, need in needs.items())


def slots(needs: Mapping[str, float]) -> int:
    """How many trials with these needs all machines take at a time, at least one."""
    return max(1, sum(fit(machine, needs) for machine in machines()))


def hardware(needs: Mapping[str, float]) -> str:
    """Name what trials with these needs run on.

    Of each kind of machine its cores and, where they use one, its GPUs; on this machine, that is
    without a cluster, also the model of its CPU.
    """
    kinds = {
        ", ".join(
            f"{amount:g} {name}"
            for name, amount in sorted(machine.items())
            if name in needs or ("GPU" in needs and name.startswith("accelerator_type:"))
        )
        for machine in machines()
        if fit(machine, needs)
    }
    return "; ".join([*([] if cluster_address() else [cpu_model()]), *sorted(kinds)])


def cpu_model() -> str:
    """Name this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
