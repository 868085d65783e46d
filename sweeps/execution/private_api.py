"""The parts of Ray 2.60.0 that its documentation does not promise, all in one module.

Each has its reason. tests/test_private_api.py fails, with a sentence, when another version changes
one of them.
"""

from __future__ import annotations

import getpass
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._common.utils import get_system_memory
from ray._private import ray_constants, services
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray._private.utils import check_version_info, get_used_memory
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from sweeps.execution.limits import memory_limit

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as TuneTrial

CHATTY_LOGGERS = (
    "ray._private.authentication",
    "ray.train._internal.syncer",
    "ray.tune.analysis.experiment_analysis",
    "ray.tune.execution.tune_controller",
    "ray.tune.tune",
)
"""Loggers of what is no news here.

That Ray made a token for itself; that Tune keeps no files of results, which MLflow and Parquet
have; why a trial failed, which SweepProgress says once; that Tune cannot keep a state of its own,
which nobody reads.
"""


def silence_workers() -> None:
    """Keep Ray from printing which trials a machine that died took with it.

    Reason: SweepProgress says it in one line, without a stack trace.
    """
    ray._private.worker.print_to_stdstream = lambda *_, **__: None


def listen_on_loopback() -> None:
    """Have Ray, started on this machine for itself, listen on 127.0.0.1 alone.

    Reason: on Linux it would listen on every interface. This is the switch by which Ray itself
    does so on Windows and macOS.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False


class _ApartPopen(services.ConsolePopen):
    """A process in a session of its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, start_new_session=True)


def start_apart() -> None:
    """Have Ray, started on this machine for itself, start its processes in sessions of their own.

    Reason: `timeout`, a batch system or a terminal that closes signals all processes of a group.
    Ray's would end first, and the driver would wait for them for a minute, and fail.
    """
    services.ConsolePopen = _ApartPopen  # type: ignore[misc]


def leave_signals() -> None:
    """Keep Ray from handling SIGTERM in the driver.

    Reason: after ray.init, SIGTERM would raise SystemExit, and the exit code would be 15. If the
    exception were raised in code that catches it, the driver would not end at all.
    sweeps.execution.interrupts handles signals instead.
    """
    ray._private.utils.set_sigterm_handler = lambda _: None


def cluster_metadata(address: str) -> Mapping[str, object]:
    """Ask a cluster for its versions of Ray and Python; empty where it does not say.

    Reason: ray.init() would try for minutes, end the process, or say why in twenty lines.

    Raises:
        ray.exceptions.RayError: no cluster answers, or it asks for another token.
    """
    return get_cluster_metadata(GcsClient(address=address)) or {}


def check_versions(metadata: Mapping[str, object]) -> None:
    """Raise RuntimeError where a cluster's versions are not this process's."""
    check_version_info(dict(metadata), "here")


def has_token() -> bool:
    """Return whether this account has a token for Ray's processes.

    Reason: without one, Ray says so only after it has started to connect.
    """
    try:
        return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except AuthenticationError:  # RAY_AUTH_TOKEN_PATH names no file, or an empty one
        return False


def forget_token() -> None:
    """Have Ray read the token anew when it needs one.

    Reason: it keeps the first one that this process has used, also for another Ray.
    """
    AuthenticationTokenLoader.instance().reset_cache()


def resources_here(object_store: int, cpus: int, memory: int | None) -> dict[str, float]:
    """Count the cores, memory in bytes and GPUs of this machine as Ray would.

    Reason: a dry run that measures nothing starts no Ray, and is to count as Ray would.
    """
    here = ResourceAndLabelSpec(num_cpus=cpus, memory=memory, object_store_memory=object_store)
    here.resolve(is_head=True, node_ip_address="127.0.0.1")
    counted: dict[str, float] = here.to_resource_dict()
    return counted


def memory_seen() -> int:
    """Return the bytes of memory that Ray takes this machine, or its container, to have.

    Reason: by this number, Ray's memory monitor kills a worker.
    """
    return int(get_system_memory())


def memory_here() -> tuple[int, int]:
    """Return the free and the total memory that this process may use, in bytes.

    Reason: what Ray takes for used is what its memory monitor goes by.
    """
    total, (limit, used) = memory_seen(), memory_limit()
    if limit < total:
        return max(0, int(limit - used)), int(limit)
    return total - int(get_used_memory()), total


def aws_node_provider() -> type:
    """Return Ray's own provider of machines on AWS.

    Reason: ours checks the cluster's file, makes a security group and rights, and leaves the rest
    to Ray's, which `ray up` finds by this class alone.
    """
    # Not at the top: only who starts a cluster has boto3.
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider: type = AWSNodeProvider
    return provider


def ssh_folder() -> Path:
    """Return the folder in which Ray's commands keep their ssh connections to clusters.

    Reason: Ray makes it in /tmp, and takes what is there, also where another account has made it.
    """
    from ray.autoscaler._private.command_runner import HASH_MAX_LENGTH

    user = hashlib.sha256(getpass.getuser().encode()).hexdigest()
    return Path(f"/tmp/ray_ssh_{user[:HASH_MAX_LENGTH]}")


def error_text(trial: TuneTrial) -> str:
    """Return what Tune knows of a trial's latest error.

    Reason: trial.get_error() reads a copy that has not reached the storage yet.
    """
    return Path(trial.error_file).read_text().rpartition("Failure # ")[2].strip()
