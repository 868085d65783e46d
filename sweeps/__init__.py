"""Trials planned, run and tracked: see init_sweep.py."""

import atexit
import gc

# PyTorch, MLflow and Ray make a million objects that stay to the end. Looking for garbage among
# them is a quarter of the time of their imports, and a second and a half at exit.
gc.set_threshold(100_000)
atexit.register(gc.freeze)
