"""What interrupts a sweep, in a process of its own; test_sweep.py and test_faults.py: real ones."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers.paths import ROOT

HEAD = """
import os, signal, subprocess
from sweeps.execution.interrupts import Interrupts

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
interrupts = Interrupts()

def press():
    os.kill(os.getpid(), signal.SIGINT)
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-uc", HEAD + code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    "between", ["", "    with interrupts.calling(lambda: print('first')):\n        press()\n"]
)
def test_a_second_press_leaves_at_once_with_all_that_was_started(between):
    code, said, told = run(
        "with interrupts.handled():\n"
        "    print(subprocess.Popen(['sleep', '60']).pid)\n"
        + (between or "    try:\n        press()\n    except KeyboardInterrupt: print('first')\n")
        + "    press()\n    print('never')\n"
    )
    assert (code, said[1:], told) == (
        130,
        ["first"],
        "stopped at once: run the same command again to continue\n",
    )
    stat = subprocess.run(["ps", "-o", "stat=", said[0]], capture_output=True, text=True)
    assert stat.stdout.strip()[:1] in ("", "Z")


def test_a_press_that_was_swallowed_is_raised_again_before_trials_run():
    code, said, _ = run(
        "try:\n"
        "    with interrupts.handled():\n"
        "        try:\n            press()\n        except KeyboardInterrupt: print('swallowed')\n"
        "        with interrupts.calling(print):\n            print('never')\n"
        "except KeyboardInterrupt: print('raised')\n"
    )
    assert (code, said) == (0, ["swallowed", "raised"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_what_a_batch_system_or_a_closed_terminal_sends_is_like_ctrl_c(name):
    code, said, _ = run(
        "with interrupts.handled():\n"
        "    with interrupts.calling(lambda: print('first')):\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        print('goes on to its end')\n"
        f"print(signal.getsignal(signal.{name}) == signal.SIG_DFL)\n"
    )
    assert (code, said) == (0, ["first", "goes on to its end", "True"])


def test_a_signal_during_an_import_waits_for_its_end():
    """An exception during an import could leave a lock of the import held."""
    code, said, _ = run(
        "try:\n"
        "    with interrupts.handled():\n"
        "        with interrupts.postponed():\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "            print('imported')\n"
        "        print('never')\n"
        "except KeyboardInterrupt: print('raised', interrupts.has_come)\n"
    )
    assert (code, said) == (0, ["imported", "raised True"])


def test_a_warning_that_is_repeated_does_not_end_the_process():
    """Slurm sends SIGUSR1 to every process of a step, and `kill` may send it twice."""
    code, said, _ = run(
        "with interrupts.handled():\n"
        "    with interrupts.calling(lambda: print('first')):\n"
        "        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR1):\n"
        "            os.kill(os.getpid(), number)\n"
        "        print('saved')\n"
    )
    assert (code, said) == (0, ["first", "saved"])


def test_nohup_keeps_a_sweep_from_being_stopped_by_its_terminal():
    code, said, _ = run(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with interrupts.handled():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('goes on')\n"
    )
    assert (code, said) == (0, ["goes on"])


def test_nothing_is_written_to_a_terminal_that_is_gone():
    """Each attempt would raise an error, and the runs would stay open."""
    parent, terminal = os.openpty()
    code = (
        "import pathlib\n"
        "try:\n"
        "    with interrupts.handled():\n"
        "        print('signals are handled', flush=True)\n"
        "        signal.pause()\n"
        "except KeyboardInterrupt: pass\n"
        "print('to a terminal that is gone', flush=True)\n"
        "pathlib.Path(os.environ['SAVED']).touch()\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "saved")
        process = subprocess.Popen(
            [sys.executable, "-uc", HEAD + code], cwd=ROOT, env={**os.environ, "SAVED": str(saved)},
            stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        )  # fmt: skip
        os.close(terminal)
        shown = b""
        while b"signals are handled" not in shown:
            shown += os.read(parent, 100)
        os.close(parent)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 0, shown
        assert saved.exists()
