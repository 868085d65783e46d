"""Trials on Ray: its machines, its workers, and what goes wrong there."""

import os

# Ray reads these as it is imported or started: this file comes before all that import it here.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Ctrl-C is ours to hear: see sweeps.execution.interrupts.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# The workers that Ray starts beforehand have not the environment that Tune wants for its own: they
# would only stand in the way of those.
os.environ.setdefault("RAY_prestart_worker_first_driver", "false")
