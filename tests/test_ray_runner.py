"""A sweep's trials on Ray Tune."""

import subprocess
import sys

import pytest

from analysis.runs import tracking_uri
from conftest import ROOT, TINY, flags, runs_of
from gptcore.config import TrialConfig

pytestmark = pytest.mark.slow

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
