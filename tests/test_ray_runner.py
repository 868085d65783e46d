"""Ray as a sweep starts it."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import psutil, ray
from rich.console import Console
from gptcore.config import TrialConfig
from sweeps.ray_runner import needs_of, slots, start_ray, stop_ray

start_ray({"cpu"}, Console(file=sys.stderr))
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
    share: slots(needs_of(TrialConfig(), 4, int(share * has["memory"])))
    for share in (0.0, 0.001, 0.6, 5.0)
}
json.dump({"listening": listening, "fits": list(fits.values()), "cpus": has["CPU"]}, sys.stdout)
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
