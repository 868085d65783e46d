"""Ray as a sweep starts or joins it, and what its machines have."""

import json
import subprocess
import sys

import pytest
import yaml

from gptcore.config import InputError, TrialConfig
from helpers.paths import ROOT
from sweeps.execution import resources
from sweeps.execution.ray_cluster import check_cluster, check_shared
from sweeps.execution.resources import fit, needs_of, schedulable_machines, slots
from tracking.address import StoreAddress

SCRIPT = """
import json, sys
import psutil
from rich.console import Console
from gptcore.config import InputError, TrialConfig
from sweeps.execution.ray_cluster import check_cluster, ray, start_ray, stop_ray
from sweeps.execution.resources import needs_of, slots

start_ray(set(), Console(file=sys.stderr))
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
json.dump({**said, "other_version": other_version}, sys.stdout)
stop_ray()
"""


@pytest.fixture(scope="module")
def started():
    """What a Ray of our own said of itself."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_listens_on_loopback_alone(started):
    assert started["listening"]
    assert set(started["listening"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_as_many_trials_run_at_a_time_as_cores_and_memory_suffice_for(started):
    # By cores alone, by cores, by memory, and one where even one is too large.
    assert started["fits"] == [started["cpus"], started["cpus"], 1, 1]


def test_a_cluster_of_another_version_is_told_from_ours(started):
    assert "runs Ray 2.60.0 and Python " in started["other_version"]
    assert "this command Ray 2.0.0 and Python " in started["other_version"]


@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:port", ":6379/x"])
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
