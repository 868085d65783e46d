"""Ctrl-C in a process of its own; in real sweeps: test_sweep.py and test_faults.py."""

import subprocess
import sys

import pytest

from helpers.paths import ROOT

HEAD = """
import os, signal, subprocess
from sweeps.execution.interrupts import CtrlC

ctrl_c = CtrlC()

def press():
    os.kill(os.getpid(), signal.SIGINT)
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-uc", HEAD + code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    "between", ["", "    with ctrl_c.calling(lambda: print('first')):\n        press()\n"]
)
def test_a_second_press_leaves_at_once_with_all_that_was_started(between):
    code, said, told = run(
        "with ctrl_c.handled():\n"
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
        "    with ctrl_c.handled():\n"
        "        try:\n            press()\n        except KeyboardInterrupt: print('swallowed')\n"
        "        with ctrl_c.calling(print):\n            print('never')\n"
        "except KeyboardInterrupt: print('raised')\n"
    )
    assert (code, said) == (0, ["swallowed", "raised"])
