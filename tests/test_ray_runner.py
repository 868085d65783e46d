"""Ray as a sweep starts it."""

import json
import subprocess
import sys

import pytest

from analysis.runs import tracking_uri
from conftest import ROOT, TINY, flags, runs_of
from gptcore.config import TrialConfig

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


IN_PORTIONS = """
import sys
from sweeps import launch, ray_runner, spaces
ray_runner.PORTION, ray_runner.ROUNDS = 2, 1
sys.exit(launch.main("many", spaces.PRESETS))
"""


def test_many_trials_are_tunes_a_portion_at_a_time(tmp_path):
    """Whatever the portion, the sweep is one."""
    done = subprocess.run(
        [sys.executable, "-c", IN_PORTIONS, "--runs-dir", str(tmp_path), "--no-report",
         *flags(TrialConfig.from_flat(TINY)), "--init.seed", "0", "1", "2", "3", "4"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5 of 5 finished, 0 running, 0 failed\n" in done.stdout
    assert "Traceback" not in done.stderr
    assert len([folder for folder in (tmp_path / "ray").iterdir() if folder.is_dir()]) == 3
    runs = runs_of(tracking_uri(tmp_path)).values()
    assert [run.info.status for run in runs] == ["FINISHED"] * 5
