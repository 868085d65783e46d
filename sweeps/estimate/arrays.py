"""Which trials can train together as an array. Importing this module does not import Ray."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptcore.config import InputError, Scalar, TrialConfig
from gptcore.experiment import PER_TRIAL_KNOBS, conflicting_knobs


@dataclass(frozen=True)
class Batch:
    """Trials that train together, and what they need of a machine."""

    keys: tuple[str, ...]
    needs: Mapping[str, float]  # as needs_of gives it


def check_array(text: str) -> str:
    """Return the option --array as it was given. Raise InputError for a bad value."""
    if text in ("auto", "off") or re.fullmatch("[1-9][0-9]{0,8}", text):
        return text
    raise InputError(f"--array takes auto, off or how many trials, at least 1, not {text!r}")


def together(trials: Mapping[str, TrialConfig]) -> list[list[str]]:
    """Group the keys of all trials by which can train together."""
    groups: dict[tuple[Scalar, ...], list[str]] = {}
    for key, config in trials.items():
        flat = config.to_flat()
        shared = tuple(value for knob, value in flat.items() if knob not in PER_TRIAL_KNOBS)
        groups.setdefault(shared, []).append(key)
    return list(groups.values())


def check_together(array: str, trials: Mapping[str, TrialConfig]) -> None:
    """Raise InputError where arrays are asked for and no two trials can be in one."""
    if array in ("auto", "off", "1") or len(trials) < 2:
        return
    if all(len(group) == 1 for group in together(trials)):
        raise InputError(
            f"--array {array}: no two of these trials can train together, because they differ in "
            f"{', '.join(conflicting_knobs(list(trials.values())))}: an array shares all but init "
            "and corpus, and the tokenizer too"
        )


def split(keys: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Split keys into arrays of nearly equal length, at most `size`."""
    number = math.ceil(len(keys) / size)
    ends = [len(keys) * i // number for i in range(number + 1)]
    return [tuple(keys[start:end]) for start, end in itertools.pairwise(ends)]
