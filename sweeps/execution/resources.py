"""What the machines of a cluster, or this one, have, and how many trials they take at a time."""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import ray
import yaml

from gptcore.config import TrialConfig
from sweeps.execution.limits import memory_limit, usable_cpus
from sweeps.execution.private_api import memory_seen, resources_here

Resources = Mapping[str, float]
"""By Ray's name of a resource (CPU, GPU, memory in bytes) how much of it there is or is needed."""

OBJECT_STORE = 100 * 2**20
"""Bytes of memory for Ray's object store on this machine: no large object goes through it."""

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml").expanduser()
"""Where `ray up` leaves the cluster's file on its head."""

MEMORY_SHARE = 0.8
"""The share of a cgroup's memory that trials may take; the rest is for the driver and for Ray."""

HEADROOM = 1.1
"""What a trial is given of memory, as a multiple of what it was measured to need."""


def cluster_address() -> str | None:
    """Return what RAY_ADDRESS names, the cluster to join; None for a Ray of our own.

    Ray itself would also join what a file in /tmp/ray names. Every account can write that file, and
    what a cluster answers is unpickled here.
    """
    named = os.environ.get("RAY_ADDRESS")
    return None if named in (None, "", "local") else named


def live_machines() -> list[dict[str, float]]:
    """Return the resources of each machine that runs now; without Ray, those of this machine."""
    if not ray.is_initialized():
        return [_this_machine()]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@functools.cache
def _this_machine() -> dict[str, float]:
    """Count the resources of this machine as Ray would, once: asking its GPUs takes a while."""
    return resources_here(OBJECT_STORE, usable_cpus(), memory_for_trials())


def memory_for_trials() -> int | None:
    """Return the bytes that trials may take where a cgroup limits them; else Ray decides."""
    limit, _ = memory_limit()
    if limit >= memory_seen():
        return None
    return max(1, int(MEMORY_SHARE * limit) - OBJECT_STORE)


def autoscaler_machines() -> list[dict[str, float]]:
    """Return the resources of each machine that the cluster's autoscaler may start.

    That is as many as its file allows at a time. The list is empty for a cluster whose machines do
    not come and go.
    """
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


def schedulable_machines() -> list[dict[str, float]]:
    """Return the resources of each machine that trials may run on.

    That is the machines that the autoscaler may start, or else those that run now and have a CPU.
    """
    return autoscaler_machines() or [machine for machine in live_machines() if machine.get("CPU")]


def needs_of(config: TrialConfig, memory: int = 0, per_gpu: int = 1) -> dict[str, float]:
    """Return what a trial takes of a machine: a core, memory, perhaps a share of a GPU.

    Args:
        config: of the trial.
        memory: bytes that it was measured to need; 0 reserves none. No more is reserved than the
            largest machine has: if that is too little, the trial itself fails and says so.
        per_gpu: how many trials share a GPU.
    """
    needs = {"CPU": 1.0}
    if config.train.device != "cpu" and any(
        machine.get("GPU") for machine in schedulable_machines()
    ):
        needs["GPU"] = 1 / per_gpu
    if memory:
        fitting = [machine for machine in schedulable_machines() if fit(machine, needs)]
        largest = max((machine.get("memory", 0.0) for machine in fitting), default=math.inf)
        needs["memory"] = min(HEADROOM * memory, largest)
    return needs


def fit(machine: Resources, needs: Resources) -> int:
    """Return how many trials with these needs a machine runs at a time."""
    return min(int(machine.get(name, 0.0) / need) for name, need in needs.items())


def slots(needs: Resources) -> int:
    """Return how many trials with these needs all machines run at a time, at least one."""
    return max(1, sum(fit(machine, needs) for machine in schedulable_machines()))


def hardware(needs: Resources) -> str:
    """Name the hardware that trials with these needs run on.

    That is the cores and, for trials that use one, the GPUs of each kind of machine; without a
    cluster also the model of this machine's CPU.
    """
    kinds = {
        ", ".join(
            f"{amount:g} {name}"
            for name, amount in sorted(machine.items())
            if name in needs or ("GPU" in needs and name.startswith("accelerator_type:"))
        )
        for machine in schedulable_machines()
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
