"""Ray as a sweep starts it."""

import subprocess
import sys

import pytest

from conftest import ROOT

LISTENING = """
import sys
import psutil
from rich.console import Console
from sweeps.ray_runner import start_ray, stop_ray
import ray

start_ray({"cpu"}, Console(file=sys.stderr))
ray.get(ray.remote(lambda: 1).remote())
me = psutil.Process()
for process in [me, *me.children(recursive=True)]:
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            print(connection.laddr.ip)
stop_ray()
"""


@pytest.mark.slow
def test_a_ray_of_our_own_listens_on_loopback_alone():
    found = subprocess.run(
        [sys.executable, "-c", LISTENING], cwd=ROOT, capture_output=True, text=True, check=True
    )
    addresses = set(found.stdout.split())
    assert addresses
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
