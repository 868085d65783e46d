"""A sweep's trials on Ray Tune."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from gptcore.config import TrialConfig
from helpers.paths import ROOT
from helpers.store import runs_of
from helpers.trials import TINY, flags
from sweeps.execution import runner
from sweeps.execution.interrupts import Interrupts
from sweeps.execution.progress import SweepProgress, TrialOutcomes
from tracking.address import StoreAddress, store_address

IN_PORTIONS = """
import sys
from sweeps.execution import runner
from sweeps.execution.interrupts import Interrupts
from sweeps.init_sweep import main
runner.TRIALS_PER_TUNER_RUN, runner.ROUNDS_PER_SLOT = 2, 1
sys.exit(main())
"""


@pytest.mark.full
def test_many_trials_are_tunes_a_portion_at_a_time(tmp_path):
    """Whatever the portion, the sweep is one."""
    done = subprocess.run(
        [sys.executable, "-c", IN_PORTIONS, "--runs-dir", str(tmp_path), "--no-report",
         "--no-estimate", *flags(TrialConfig.from_flat(TINY)), "--array", "off",
         "--init.seed", "0", "1", "2", "3", "4"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5 of 5 finished, 0 running, 0 failed\n" in done.stdout
    assert "Traceback" not in done.stderr
    assert len([folder for folder in (tmp_path / "ray").iterdir() if folder.is_dir()]) == 3
    runs = runs_of(store_address(tmp_path).uri).values()
    assert [run.info.status for run in runs] == ["FINISHED"] * 5


def test_a_polite_end_while_runs_are_ended_waits_until_they_are(monkeypatch):
    """Ray's own handler of SIGTERM would exit in the middle."""
    ended = []

    def end_runs(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        ended.append(True)

    monkeypatch.setattr(runner, "close_runs", end_runs)
    interrupts = Interrupts()
    context = SimpleNamespace(
        store=SimpleNamespace(address=StoreAddress("sqlite:///a.db")),
        recording=SimpleNamespace(experiment_id="1", owner=None),
        console=Console(quiet=True),
        interrupts=interrupts,
    )
    outcomes = TrialOutcomes({"a": 1}, trials=1)
    progress = SweepProgress(context.console, outcomes)
    with (
        interrupts.handled(),
        pytest.raises(KeyboardInterrupt),
        runner._ending_runs([], outcomes, progress, context),
    ):
        assert not ended
    assert ended
