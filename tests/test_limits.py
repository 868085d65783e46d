"""What a batch system lets a process use of its machine."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from sweeps.execution import limits, resources


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Return a function that writes the files of this process's cgroups."""

    def write(own, files):
        monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(limits, "OWN_CGROUPS", tmp_path / "own")
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return write


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("own", "files", "cpus", "memory"),
    [
        ("0::/\n", {}, CORES, math.inf),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, CORES, math.inf),
        ("0::/job\n", {"job/cpu.max": "150000 100000", "job/memory.max": "5000"}, 1, 5000),
        ("0::/job\n", {"job/cpu.max": "50000 100000"}, 1, math.inf),
        # The job's own cgroup is free, and the one of the user is not.
        ("0::/user/job\n", {"user/cpu.max": "100000 100000", "user/memory.max": "7000"}, 1, 7000),
        (
            "3:cpuacct,cpu:/job\n4:memory:/job\n0::/\n",
            {
                "cpu/job/cpu.cfs_quota_us": "100000",
                "cpu/job/cpu.cfs_period_us": "100000",
                "memory/job/memory.limit_in_bytes": "9000",
            },
            1,
            9000,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, CORES,
         math.inf),
    ],
    ids=["none", "no limit", "job", "half a core", "above the job", "version 1", "version 1 free"],
)  # fmt: skip
def test_limits_of_a_cgroup_and_of_those_above_it_hold(cgroup, own, files, cpus, memory):
    cgroup(own, files)
    assert limits.usable_cpus() == min(cpus, CORES)
    assert limits.memory_limit()[0] == memory


def test_trials_get_what_a_cgroup_leaves(cgroup):
    cgroup("0::/\n", {})
    assert resources.memory_for_trials() is None
    cgroup("0::/job\n", {"job/memory.max": str(2 * 2**30)})
    assert resources.memory_for_trials() == int(0.8 * 2 * 2**30) - resources.OBJECT_STORE


def test_a_process_with_one_core_counts_one():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from sweeps.execution.resources import live_machines\n"
        "print(live_machines()[0]['CPU'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == 1


def test_a_real_cgroup_limits_what_is_counted(tmp_path):
    """A cgroup as a batch system makes one, where this machine lets a test make one."""
    kinds = {"cpu.cfs_quota_us": "100000"} if Path("/sys/fs/cgroup/cpu").is_dir() else {}
    group = Path("/sys/fs/cgroup", *(["cpu"] if kinds else []), f"gpt-sweeps-{os.getpid()}")
    try:
        group.mkdir()
        (group / ("cpu.cfs_quota_us" if kinds else "cpu.max")).write_text(
            "100000" if kinds else "100000 100000"
        )
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        code = (
            f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
            "from sweeps.execution.limits import usable_cpus\n"
            "print(usable_cpus())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout == "1\n", done.stderr
    finally:
        group.rmdir()
