"""What of this machine this process may use: a batch system gives a job a share of a node."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows control groups: their limits hold for all processes in them."""
OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Count the cores that this process may use: its CPU affinity, and the quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [cores or 1, *_cpu_quotas()]
    return max(1, math.floor(min(quotas)))


def memory_limit() -> tuple[float, float]:
    """Return the bytes of memory that the cgroup of this process may use, and those in use.

    Without a limit, the first is infinite.
    """
    limits = [(math.inf, 0.0)]
    for folder in _cgroup_folders("memory"):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            if (most := _read(folder / limit)).isdecimal():
                limits.append((float(most), float(_read(folder / used) or 0)))
    return min(limits)


def _cpu_quotas() -> Iterator[float]:
    """Yield the number of cores that each cgroup of this process may keep busy."""
    for folder in _cgroup_folders("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")  # "max 100000" without one
        if not quota:  # version 1, where a quota of -1 is none
            quota = _read(folder / "cpu.cfs_quota_us")
            period = _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) / int(period)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of the cgroups of this process, each below the next.

    Args:
        controller: what limits are wanted of: version 1 has a tree of cgroups for each.
    """
    for line in _read(OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        own = root / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
