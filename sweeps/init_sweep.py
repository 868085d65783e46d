"""Sweep GPT trials over initialisation, seed and corpus subset, and report which claims hold.

python sweeps/init_sweep.py
python sweeps/init_sweep.py --init.scheme model5 gpt2 --init.seed 0 1 2 --train.steps 100
python sweeps/init_sweep.py --debug --init.scheme model5
"""

import functools
import sys
from pathlib import Path

if __name__ == "__main__":
    # Import from the root of the checkout, also where a package of that name is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sweeps import launch
from sweeps.presets import PRESETS

main = functools.partial(launch.main, __doc__, PRESETS)

if __name__ == "__main__":
    sys.exit(main())
