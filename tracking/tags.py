"""The tags of runs: what a run needs to be read, and what is said of one that lacks it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from mlflow.entities import Run

from tracking.untrusted import NAME_TAKES, is_run_id, is_sweep_name, one_line

TrialStatus = Literal["finished", "diverged", "failed", "pruned", "stopped", "running", "missing"]
"""What became of a trial: the tag of its run, or `missing` where there is no run."""
STATUSES: tuple[str, ...] = get_args(TrialStatus)
NEEDED: Mapping[str, Sequence[str]] = {
    "trial": ("trial_key", "trial_status"),
    "sweep": ("sweep", "launched"),
}
"""By the kind of a run, the tags without which it cannot be read."""


def known_runs(runs: Iterable[Run]) -> list[Run]:
    """Leave out runs whose id is none of MLflow's. Make the tags fit to be shown that are."""
    known = [run for run in runs if is_run_id(run.info.run_id)]
    for tags in (run.data.tags for run in known):
        if "reason" in tags:
            tags["reason"] = one_line(tags["reason"])
        if not is_sweep_name(tags.get("sweep", "x")):
            tags["sweep"] = tags["sweep"].encode("unicode_escape").decode()  # no name either
    return known


def lacking_tags(run: Run, kind: str) -> list[str]:
    """List the tags of NEEDED that a run does not have, or that cannot be read."""
    return [tag for tag in NEEDED[kind] if not _is_readable(tag, run.data.tags.get(tag))]


def _is_readable(tag: str, value: str | None) -> bool:
    """Return whether a tag is there, and a number if it has to be one."""
    if tag == "trial_status":
        return value in STATUSES
    if tag == "sweep":
        return value is not None and is_sweep_name(value)
    if value is None or tag != "launched":
        return value is not None
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def say_incomplete(run: Run) -> str:
    """Say which tags a run lacks, and what to do."""
    lacking = lacking_tags(run, run.data.tags["kind"])
    name = one_line(run.info.run_name or run.data.tags["kind"])
    said = (
        f"run {run.info.run_id} ({name}) has no usable tag {' and '.join(lacking)}, so it is left "
        "out: set the tag in MLflow, or run the sweep again, which makes a new run"
    )
    if "sweep" in lacking and (given := run.data.tags.get("sweep")) is not None:
        said += f" (sweep is {given[:100]}: it takes {NAME_TAKES})"
    return said
