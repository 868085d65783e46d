"""Which trials train together in one process, as an array: --array auto, off, or how many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch

from gptcore.config import InputError, Scalar, TrialConfig
from gptcore.corpus import GIVEN
from gptcore.experiment import OWN, apart, step_seconds

WORTH = 1.1
"""How much faster a machine has to become with twice the trials on it to be given those."""
MOST = 64
"""Trials of an array that auto goes up to."""
LONG_STEP = 0.1
"""Seconds: an array saves calls, some ten thousandths of a second a step, not arithmetic."""


def check_array(text: str) -> str:
    """The option as it was given. Raises InputError for what it does not take."""
    if text in ("auto", "off") or (text.isdecimal() and int(text) > 0):
        return text
    raise InputError(f"--array takes auto, off or how many trials, at least 1, not {text!r}")


def together(trials: Mapping[str, TrialConfig]) -> list[list[str]]:
    """The keys of trials that can train together, for all trials."""
    groups: dict[tuple[Scalar, ...], list[str]] = {}
    for key, config in trials.items():
        flat = config.to_flat()
        shared = tuple(value for knob, value in flat.items() if knob not in OWN)
        groups.setdefault(shared, []).append(key)
    return list(groups.values())


def check_together(array: str, trials: Mapping[str, TrialConfig]) -> None:
    """Raises InputError where arrays are asked for, and no two trials can be in one."""
    if array in ("auto", "off", "1") or len(trials) < 2:
        return
    if all(len(group) == 1 for group in together(trials)):
        raise InputError(
            f"--array {array}: no two of these trials can train together, for they differ in "
            f"{', '.join(apart(list(trials.values())))}: an array shares all but init and corpus, "
            "and the tokenizer too"
        )


def split(keys: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """The keys in arrays of nearly one length, at most `size`."""
    number = math.ceil(len(keys) / size)
    ends = [len(keys) * i // number for i in range(number + 1)]
    return [tuple(keys[start:end]) for start, end in itertools.pairwise(ends)]


def best_size(params: Mapping[str, Scalar], texts: Mapping[str, tuple[str, str]], most: int) -> int:
    """How many trials of a shape, at most, are to train together on this machine.

    Twice as many each time, while that makes a step of each shorter by more than WORTH.
    """
    GIVEN.update(texts)
    config, size = TrialConfig.from_flat(params), 1
    while 2 * size <= most:
        try:
            now, twice = step_seconds(config, (size, 2 * size))
        except torch.OutOfMemoryError:
            break
        if now / size < WORTH * twice / (2 * size):
            break
        size *= 2
    return size
