"""How often does a t-test err on skewed numbers? Computes the table of analysis/skew.py.

    python benchmarks/skew_guard.py

Takes some minutes. The numbers are lognormal: exp(sd z) for a normal z and each sd of the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy import stats

if __name__ == "__main__":
    # Import from the root of the checkout, also where a package of that name is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.skew import ERRORS, NOMINAL, SIZES

SAMPLES = {12: 8_000_000, 40: 3_000_000, 100: 1_000_000}
"""The number of samples to draw, by the largest number of units for which it holds."""
AT_ONCE = 200_000


def error_rates(n: int, sd: float, rng: np.random.Generator) -> list[float]:
    """Return how often Student's test wrongly finds the mean too low, for each p-value of NOMINAL.

    Args:
        n: the number of units in a sample.
        sd: the standard deviation of the logarithm of a number.
        rng: the source of random numbers.
    """
    critical = stats.t.isf(NOMINAL, n - 1)
    samples = next(count for most, count in SAMPLES.items() if n <= most)
    errors = np.zeros(len(NOMINAL))
    for _ in range(samples // AT_ONCE):
        units = np.exp(sd * rng.standard_normal((AT_ONCE, n))) - np.exp(sd**2 / 2)
        t = units.mean(1) / (units.std(1, ddof=1) / np.sqrt(n))
        errors += (t[:, None] < -critical).sum(0)
    return (errors / samples).tolist()


def main() -> int:
    """Print the rows of the table. Return the exit code."""
    rng = np.random.default_rng(7)
    for sd in ERRORS:
        print(f"{sd}:")
        for n in SIZES:
            row = ", ".join(f"{rate:.3g}" for rate in error_rates(n, sd, rng))
            print(f"    ({row}),  # {n}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
