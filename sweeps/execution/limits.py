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


def memory_limit() -> float:
    """Return the bytes of memory that the cgroup of this process may use; infinite without one."""
    limits = [math.inf]
    for folder in _own_folders("memory"):
        texts = [_read(folder / name) for name in ("memory.max", "memory.limit_in_bytes")]
        limits += [float(text) for text in texts if text.isdecimal()]
    return min(limits)


def _cpu_quotas() -> Iterator[float]:
    """Yield the number of cores that each cgroup of this process may keep busy."""
    for folder in _own_folders("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")  # "max 100000" without one
        if not quota:  # version 1, where a quota of -1 is none
            quota = _read(folder / "cpu.cfs_quota_us")
            period = _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) / int(period)


def _own_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of the cgroups of this process, each below the next.

    Args:
        controller: what limits are wanted of: version 1 has a tree of cgroups for each.
    """
    for line in _read(OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # In a container, the tree that is shown may begin at the cgroup itself.
        root = CGROUPS / controllers if controllers else CGROUPS
        own = root / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
