"""Ray as a sweep starts or joins it, and what its machines have."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile

import pytest
import yaml

from gptcore.config import InputError, TrialConfig
from helpers.paths import ROOT
from sweeps.execution import ray_cluster, resources
from sweeps.execution.ray_cluster import (
    LONGEST_BASE,
    PREFIX,
    RayFolder,
    _see,
    check_cluster,
    check_shared,
)
from sweeps.execution.resources import fit, needs_of, schedulable_machines, slots
from tracking.address import StoreAddress

SCRIPT = """
import json, os, stat, sys
from pathlib import Path
import psutil
from rich.console import Console
from gptcore.config import InputError, TrialConfig
from sweeps.execution.ray_cluster import await_ray, check_cluster, ray, start_ray, stop_ray
from sweeps.execution.resources import needs_of, slots

start_ray()
await_ray(set(), Console(file=sys.stderr))
ray.get(ray.remote(lambda: 1).remote())
me = psutil.Process()
listening = [
    connection.laddr.ip
    for process in [me, *me.children(recursive=True)]
    for connection in process.net_connections("inet")
    if connection.status == psutil.CONN_LISTEN
]
has = ray.cluster_resources()
fits = {
    share: slots(needs_of(TrialConfig(), int(share * has["memory"])))
    for share in (0.0, 0.001, 0.6, 5.0)
}
address = ray.get_runtime_context().gcs_address
check_cluster(address)
ray.__version__ = "2.0.0"
try:
    check_cluster(address)
except InputError as error:
    other_version = str(error)
said = {"listening": listening, "fits": list(fits.values()), "cpus": has["CPU"]}
said["other_version"] = other_version
# `ray_process_reaper` and the like may come and go.
daemons = [one for one in me.children() if "gcs_server" in one.name() or "raylet" in one.name()]
said["own_group"] = [os.getpgid(one.pid) == os.getpgid(0) for one in daemons]
folder = Path(ray._private.worker._global_node.get_temp_dir_path())
said["folder"], said["mode"] = str(folder), stat.S_IMODE(folder.parent.stat().st_mode)
stop_ray()
said["left"] = folder.parent.exists()
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What a Ray of our own said of itself, on a machine whose TMPDIR has a long path."""
    long = tmp_path_factory.mktemp("as_long_as_a_batch_system_makes_the_folder_of_a_job")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TMPDIR": str(long)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_listens_on_loopback_alone(started):
    assert started["listening"]
    assert set(started["listening"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_a_signal_to_all_processes_of_the_sweep_does_not_reach_rays(started):
    """Else they would end first, and the driver would wait for them for a minute."""
    assert started["own_group"] == [False, False]


def test_its_folder_is_short_private_and_gone_afterwards(started):
    assert len(started["folder"]) <= LONGEST_BASE + 14
    assert started["mode"] == 0o700
    assert started["left"] is False


def test_a_folder_whose_driver_was_killed_is_removed_and_one_in_use_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "LONGEST_BASE", 200)
    monkeypatch.setattr(ray_cluster, "SECONDS_TO_LOCK", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    in_use = RayFolder()
    used = in_use.make().parent
    abandoned = tmp_path / f"{PREFIX}abandoned"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    (tmp_path / "another").mkdir()
    new = RayFolder()
    made = new.make().parent
    assert sorted(tmp_path.iterdir()) == sorted([used, made, tmp_path / "another"])
    new.remove()
    in_use.remove()
    assert [folder.name for folder in tmp_path.iterdir()] == ["another"]


def test_without_any_folder_for_its_sockets_the_way_out_is_named(monkeypatch):
    def refuse(**_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError, match=r"set TMPDIR to a folder whose path has at most 26 char"):
        RayFolder().make()


def test_as_many_trials_run_at_a_time_as_cores_and_memory_suffice_for(started):
    # By cores alone, by cores, by memory, and one where even one is too large.
    assert started["fits"] == [started["cpus"], started["cpus"], 1, 1]


SLOW = """
from sweeps.execution import faults, ray_cluster

def init(**_):
    raise Exception("The current node timed out during startup. This could happen because")

ray_cluster.ray.init = init
try:
    ray_cluster.start_ray()
except faults.Fault as fault:
    print(fault)
finally:
    ray_cluster.stop_ray()
"""


def test_a_ray_that_does_not_start_in_time_is_one_sentence():
    """As on a machine where many processes wait for each core."""
    command = [sys.executable, "-c", SLOW]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.startswith("Ray has not started within 30 seconds, ")
    assert said.endswith(": run the same command again to continue\n")


def test_a_cluster_of_another_version_is_told_from_ours(started):
    assert "runs Ray 2.60.0 and Python " in started["other_version"]
    assert "this command Ray 2.0.0 and Python " in started["other_version"]


@pytest.mark.parametrize("address", ["auto", "head", "ray://head:10001", "head:port", ":6379/x"])
def test_what_is_no_address_of_a_cluster_is_refused(address):
    with pytest.raises(InputError, match="is not the address of a Ray cluster: RAY_ADDRESS takes"):
        check_cluster(address)


def test_a_cluster_that_is_not_there_is_refused_at_once():
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1 does not answer"):
        check_cluster("127.0.0.1:1")


@pytest.fixture
def scaling(tmp_path, monkeypatch):
    """A cluster that starts machines for work, and has none as yet."""
    file = tmp_path / "ray_bootstrap_config.yaml"
    types = {
        "head": {"max_workers": 0, "resources": {"CPU": 0}},
        "worker": {
            "max_workers": 3,
            "resources": {"CPU": 4, "GPU": 1, "memory": 8 * 2**30},
        },
        "large": {
            "max_workers": 8,
            "resources": {"CPU": 16, "GPU": 4, "memory": 64 * 2**30},
        },
    }
    file.write_text(
        yaml.safe_dump(
            {
                "provider": {"type": "aws"},
                "max_workers": 4,
                "head_node_type": "head",
                "available_node_types": types,
            },
            sort_keys=False,
        )
    )
    monkeypatch.setattr(resources, "BOOTSTRAP", file)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")


def test_machines_that_a_cluster_will_start_count_before_they_are_there(scaling):
    assert [machine["GPU"] for machine in schedulable_machines()] == [1, 1, 1, 4]
    alone = needs_of(TrialConfig())
    assert alone == {"CPU": 1.0, "GPU": 1.0}
    assert slots(alone) == 7
    shared = needs_of(TrialConfig(), memory=2**30, per_gpu=4)
    assert shared == {"CPU": 1.0, "GPU": 0.25, "memory": pytest.approx(1.1 * 2**30)}
    assert [fit(machine, shared) for machine in schedulable_machines()] == [4, 4, 4, 16]


def test_no_trial_is_given_more_memory_than_the_largest_machine_has(scaling):
    assert needs_of(TrialConfig(), memory=2**40)["memory"] == 64 * 2**30


def test_a_machine_without_a_core_for_trials_is_none_for_them(monkeypatch):
    """The head of machines that one has, whatever GPU it has."""
    head = {"GPU": 1.0, "memory": 2.0**40}
    monkeypatch.setattr(
        resources,
        "live_machines",
        lambda: [head, {"CPU": 2.0, "memory": 2.0**30}, {"CPU": 8.0}],
    )
    assert needs_of(TrialConfig(), memory=2**35) == {"CPU": 1.0, "memory": 2.0**30}
    assert slots({"CPU": 1.0}) == 10


def test_machines_that_share_a_bucket_alone_need_a_tracking_server(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.setenv("GPT_SWEEPS_BUCKET", "s3://lab/gpt-sweeps")
    check_shared(tmp_path, StoreAddress("http://10.0.0.5:5000"))
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI takes its address"):
        check_shared(tmp_path, StoreAddress("sqlite:////home/me/runs/mlflow.db"))


def test_what_a_machine_sees_of_a_locked_file(tmp_path):
    file = tmp_path / "marker"
    assert _see(str(file)) == "nothing"
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert _see(str(file)) == "its lock"
    assert _see(str(file)) == "no lock"
