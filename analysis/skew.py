"""Guard a t-test of a mean against skewed numbers.

Student's t-test assumes normal numbers. On skewed numbers its p-values are too small. This is worst
for small p-values: for 8 seeds and p = 0.001, errors are ten times as frequent. A few seeds do not
show how skewed their distribution is, so no test can detect it. This module therefore assumes that
numbers are skewed: `guarded` returns the p-value that holds for lognormal numbers. Always assumed
are the numbers exp(z / 2) for a normal z, with a skewness of 1.75. If a test shows skewness, the
numbers exp(z) are assumed, with a skewness of 6.2. The error rate is over all samples of such
numbers, not only over samples that look skewed. For normal numbers, for heavier tails and for less
skewed numbers, the guarded p-value is too large, which is safe.

A claim can be wrong in two directions, so its p-value counts twice. But numbers are skewed to one
side. On that side, errors are as frequent as ERRORS says. On the other side, errors are rarer than
Student's p-value says. `guarded` therefore returns half of the sum of both p-values.
"""

from __future__ import annotations

import numpy as np

SIZES = (2, 3, 4, 5, 6, 8, 12, 20, 40, 100)
"""The numbers of units for which ERRORS has a row."""
NOMINAL = tuple(10.0 ** (-half / 2) for half in range(1, 11))
"""The one-sided p-values of Student's test for which ERRORS has a column."""
ASSUMED, SEEN = 0.5, 1.0
"""The standard deviation of the logarithm of numbers: always, and if skewness is seen."""
# fmt: off
ERRORS = {ASSUMED: (
    (0.419, 0.179, 0.0617, 0.0198, 0.00624, 0.00195, 0.000622, 0.0002, 6.04e-05, 1.76e-05),  # 2
    (0.405, 0.193, 0.0825, 0.0306, 0.0103, 0.00333, 0.00105, 0.00033, 0.000104, 3.13e-05),  # 3
    (0.395, 0.191, 0.0898, 0.0383, 0.0147, 0.00517, 0.00173, 0.000567, 0.000187, 5.81e-05),  # 4
    (0.388, 0.187, 0.0914, 0.0422, 0.0179, 0.00702, 0.00257, 0.000893, 0.000299, 9.75e-05),  # 5
    (0.382, 0.182, 0.0907, 0.0437, 0.0199, 0.00843, 0.00336, 0.00123, 0.00043, 0.000147),  # 6
    (0.374, 0.175, 0.0874, 0.0437, 0.0213, 0.00999, 0.00443, 0.00187, 0.000768, 0.000295),  # 8
    (0.365, 0.164, 0.0809, 0.0411, 0.0209, 0.0105, 0.00519, 0.00248, 0.00115, 0.000518),  # 12
    (0.354, 0.151, 0.0717, 0.0357, 0.0182, 0.00937, 0.00483, 0.00251, 0.00124, 0.000626),  # 20
    (0.343, 0.137, 0.0606, 0.0285, 0.014, 0.00698, 0.00351, 0.00182, 0.000933, 0.000484),  # 40
    (0.333, 0.124, 0.0502, 0.0216, 0.00964, 0.00443, 0.00209, 0.00101, 0.000477, 0.000222),  # 100
), SEEN: (
    (0.53, 0.296, 0.123, 0.0418, 0.0133, 0.00418, 0.0013, 0.000422, 0.000139, 5e-05),  # 2
    (0.509, 0.317, 0.181, 0.0886, 0.0363, 0.0132, 0.00441, 0.00143, 0.000455, 0.00016),  # 3
    (0.494, 0.311, 0.195, 0.113, 0.0587, 0.0271, 0.0111, 0.00417, 0.00144, 0.000487),  # 4
    (0.481, 0.302, 0.195, 0.122, 0.0708, 0.0381, 0.0186, 0.00827, 0.00341, 0.00129),  # 5
    (0.472, 0.293, 0.192, 0.124, 0.0765, 0.0447, 0.0246, 0.0125, 0.00587, 0.00256),  # 6
    (0.458, 0.279, 0.183, 0.121, 0.079, 0.0504, 0.031, 0.0183, 0.0103, 0.00547),  # 8
    (0.439, 0.257, 0.166, 0.111, 0.0744, 0.0498, 0.033, 0.0215, 0.0138, 0.0086),  # 12
    (0.417, 0.232, 0.144, 0.0935, 0.0623, 0.0423, 0.0288, 0.0196, 0.0134, 0.00909),  # 20
    (0.393, 0.201, 0.117, 0.0717, 0.046, 0.0301, 0.0201, 0.0135, 0.00919, 0.00637),  # 40
    (0.369, 0.169, 0.0879, 0.049, 0.0284, 0.0169, 0.0104, 0.00649, 0.00417, 0.00276),  # 100
)}
# fmt: on
"""The true error rate of Student's test at each p-value of NOMINAL (benchmarks/skew_guard.py)."""

_STEPS = -np.log10(NOMINAL)
_RARITY = {sd: -np.log10(errors) for sd, errors in ERRORS.items()}


def guarded(p: float, df: float, sd: float = ASSUMED) -> float:
    """Return half of the p-value of a two-sided t-test on numbers that may be skewed.

    The logarithms of ERRORS are interpolated over p, and over 1 / n for n units. Below the smallest
    p-value of the table they are extrapolated.

    Args:
        p: the one-sided p-value of Student's test.
        df: the degrees of freedom of the test.
        sd: ASSUMED or SEEN.
    """
    if p >= NOMINAL[0]:
        return p
    rarity = -np.log10(max(p, 1e-300))
    step = min(int(np.searchsorted(_STEPS, rarity)), len(_STEPS) - 1)
    share = (rarity - _STEPS[step - 1]) / (_STEPS[step] - _STEPS[step - 1])
    table = _RARITY[sd]
    by_size = table[:, step - 1] + share * (table[:, step] - table[:, step - 1])
    # Infinitely many units are normal again, by the central limit theorem.
    units = np.array([0.0, *(1 / np.array(SIZES[::-1]))])
    found = np.interp(1 / (df + 1), units, [rarity, *by_size[::-1]])
    heavier = float(10.0 ** -min(rarity, found))
    return (heavier + p) / 2
