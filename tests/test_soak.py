"""A soak: hundreds of short trials while something goes wrong every few seconds."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gptcore.config import TrialConfig
from helpers.driving import start, wait_for, workers
from helpers.machines import mounted
from helpers.servers import free_port, start_server
from helpers.store import check_whole
from helpers.trials import TINY, flags
from tracking.address import store_address

TRIALS = 150
FAULTS = 16
BETWEEN_FAULTS = (1.5, 5.0)
"""Seconds from one fault to the next."""

SHORT = {**TINY, "train.steps": 40, "train.checkpoint_seconds": 0.1}

SET_BACK = """
import os, time
if os.path.exists(os.environ["CLOCK_SET_BACK"]):
    right = time.time
    time.time = lambda: right() - 3600
"""
"""Python reads this file in each process that starts: where the flag is there, its clock is an hour
behind. The machine's own clock is not ours to change."""


class Soak:
    """A sweep, and what may happen to it."""

    def __init__(self, folder: Path, seed: int, uri: str | None = None) -> None:
        self.folder, self.dice = folder, random.Random(seed)
        self.runs_dir = folder / "runs"
        self.driver: subprocess.Popen[str] | None = None
        self.done: dict[str, int] = {}
        self.uri, self.server = uri, None
        self.clock = folder / "set back"
        (folder / "python").mkdir()
        (folder / "python" / "sitecustomize.py").write_text(SET_BACK)
        self.environment = {
            "PYTHONPATH": str(folder / "python"), "CLOCK_SET_BACK": str(self.clock)
        }  # fmt: skip
        if uri:
            self.environment |= {
                "MLFLOW_TRACKING_URI": uri,
                "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",  # it asks again twice as often
            }

    @property
    def served(self) -> Path:
        return self.folder / "served"

    def serve(self) -> None:
        self.served.mkdir(exist_ok=True)
        self.server = start_server(self.uri, self.served)

    def begin(self) -> None:
        seeds = ["--init.seed", *map(str, range(TRIALS))]
        more = ["--no-report", "--no-estimate", "--array", "off"]
        self.driver = start(
            "init_sweep.py", self.runs_dir, *flags(TrialConfig.from_flat(SHORT)), *seeds, *more,
            **self.environment,
        )  # fmt: skip

    # What goes wrong.

    def kill_a_worker(self) -> None:
        if alive := workers():
            os.kill(self.dice.choice(alive), signal.SIGKILL)

    def kill_the_driver(self) -> None:
        self.driver.kill()

    def end_the_driver_politely(self) -> None:
        os.killpg(self.driver.pid, self.dice.choice([signal.SIGTERM, signal.SIGHUP]))

    def fill_the_disk(self) -> None:
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as opened:
            try:
                while opened.write(bytes(2**20)):
                    pass
            except OSError:
                pass
        time.sleep(self.dice.uniform(0.2, 2))
        filler.unlink()

    def set_the_clock_back(self) -> None:
        self.clock.touch() if not self.clock.exists() else self.clock.unlink()
        self.driver.kill()  # only a process that starts reads the clock anew

    def move_the_folder(self) -> None:
        self.driver.kill()
        self.driver.communicate()
        wait_for(lambda: not workers(), seconds=120)
        if not self.runs_dir.exists():  # the driver was killed before it had made it
            return
        another = self.folder / f"runs-{self.dice.randrange(10**6)}"
        shutil.move(self.runs_dir, another)
        self.runs_dir = another

    def kill_the_server(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()
        time.sleep(self.dice.uniform(0, 4))
        self.serve()

    def run(self, faults) -> None:
        """Run the sweep to its end, whatever happens."""
        left = FAULTS
        for starts in range(1, 100):
            self.begin()
            while self.driver.poll() is None:
                try:
                    self.driver.communicate(timeout=self.dice.uniform(*BETWEEN_FAULTS))
                except subprocess.TimeoutExpired:
                    if left:
                        left -= 1
                        fault = self.dice.choice(faults)
                        self.done[fault.__name__] = self.done.get(fault.__name__, 0) + 1
                        fault()
            output, _ = self.driver.communicate()
            # A signal that comes while a driver starts ends it as any other process.
            ended = [-number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)]
            if self.driver.returncode == 2:  # it started while the server was away
                assert "does not answer" in output, output
                continue
            assert self.driver.returncode in (0, 1, 130, *ended), output
            # What a signal interrupts may say so; test_sweep.py has the signals at a quiet moment.
            assert self.driver.returncode in (130, *ended) or "Traceback" not in output, output
            wait_for(lambda: not workers(), seconds=120)
            if self.driver.returncode == 0:
                self.done["starts"] = starts
                assert left < FAULTS / 2, "it ended before much could happen to it"
                return
        pytest.fail(f"the sweep did not end: {self.done}")


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "small", "400m") as folder:
        yield folder


def check(soak: Soak, uri: str, database: Path, tmp_path: Path) -> None:
    """Assert one finished run a trial, each point once, and the tables of an undisturbed trial."""
    configs = [TrialConfig.from_flat({**SHORT, "init.seed": seed}) for seed in range(TRIALS)]
    check_whole(uri, database, configs, tmp_path)


@pytest.mark.full
def test_a_sweep_in_a_folder_survives_what_happens_to_it(small_disk, tmp_path, capsys):
    seed = int(os.environ.get("GPT_SWEEPS_SOAK_SEED", time.time()))
    soak = Soak(small_disk, seed)
    try:
        soak.run(
            [
                soak.kill_a_worker, soak.kill_a_worker, soak.kill_the_driver,
                soak.end_the_driver_politely, soak.fill_the_disk, soak.set_the_clock_back,
                soak.move_the_folder,
            ]
        )  # fmt: skip
        uri = store_address(soak.runs_dir).uri
        check(soak, uri, soak.runs_dir / "mlflow.db", tmp_path)
    finally:
        soak.driver.kill()
        with capsys.disabled():
            print(f"\nsoak in a folder, GPT_SWEEPS_SOAK_SEED={seed}: {soak.done}")


@pytest.mark.full
def test_a_sweep_on_a_server_survives_what_happens_to_it(tmp_path, capsys):
    seed = int(os.environ.get("GPT_SWEEPS_SOAK_SEED", time.time()))
    soak = Soak(tmp_path, seed, f"http://127.0.0.1:{free_port()}")
    soak.serve()
    try:
        soak.run(
            [
                soak.kill_a_worker, soak.kill_a_worker, soak.kill_the_driver,
                soak.end_the_driver_politely, soak.kill_the_server, soak.set_the_clock_back,
            ]
        )  # fmt: skip
        check(soak, soak.uri, soak.served / "mlflow.db", tmp_path)
    finally:
        soak.driver.kill()
        os.killpg(soak.server.pid, signal.SIGTERM)
        soak.server.wait()
        with capsys.disabled():
            print(f"\nsoak on a server, GPT_SWEEPS_SOAK_SEED={seed}: {soak.done}")
