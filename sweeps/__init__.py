"""Trials planned, run and tracked: see init_sweep.py."""

import atexit
import contextlib
import gc
import os
import stat
import tempfile
from pathlib import Path

# PyTorch, MLflow and Ray make a million objects that stay to the end. Looking for garbage among
# them is a quarter of the time of their imports, and a second and a half at exit.
gc.set_threshold(100_000)
atexit.register(gc.freeze)

# Ray reads these when it is imported or started.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Ctrl-C is handled by sweeps.execution.interrupts.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Tune's workers need their own environment. Workers that Ray starts early do not have it, and would
# only take up memory.
os.environ.setdefault("RAY_prestart_worker_first_driver", "false")


def _find_home() -> None:
    """Give a user without a home one below the temporary folder, which nobody else can enter.

    Containers and batch systems run commands under user ids that no file knows.
    """
    try:
        Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir(), f"gpt-sweeps-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            home.mkdir(mode=0o700)
        found = home.lstat()
        is_private = stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.getuid()
        if not (stat.S_ISDIR(found.st_mode) and is_private):
            home = Path(tempfile.mkdtemp(prefix="gpt-sweeps-"))
        os.environ["HOME"] = str(home)


_find_home()
