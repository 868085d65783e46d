"""Measurements of shapes, kept in RUNS_DIR/measurements for later sweeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.jsonable import from_json
from gptcore.config import TrialConfig
from gptcore.files import write_atomically
from sweeps.estimate.cost import Cost


@dataclass(frozen=True)
class Measurement:
    """How trials of a shape run fastest, and what that takes."""

    array: int  # trials that train together, at most
    per_gpu: int  # arrays on one GPU; 1 without a GPU
    begins: float  # seconds until the first step of the first trials
    cost: Cost  # of one array
    date: str
    took: float  # seconds of measuring, with the start of the workers
    cut_short: bool = False  # the budget of measuring was spent before all was tried
    commit: str = ""  # of the checkout, as sweeps.plan.git_commit returns it


@dataclass(frozen=True)
class Measurable:
    """What was measured. A measurement holds for exactly the same again, and nothing else."""

    shape: TrialConfig
    hardware: str  # as sweeps.execution.resources.hardware names it
    array: str  # as --array takes it
    versions: str  # as sweeps.plan.versions returns them


def write_measurement(found: Measurement, of: Measurable, runs_dir: Path) -> None:
    """Write a measurement to its file, in place of an earlier one.

    Raises:
        OSError: the file cannot be written.
    """
    measurement = asdict(found)
    whole = {**_as_dict(of), "measurement": measurement, "digest": _digest(measurement)}
    text = json.dumps(whole, indent=1)
    write_atomically(file_of(of, runs_dir), lambda file: file.write_text(text))


def read_measurement(of: Measurable, runs_dir: Path) -> Measurement | None:
    """Read the last measurement; None where there is none, or where its file was changed.

    The file may have come with a copied runs folder, and hold anything.
    """
    try:
        whole = json.loads(file_of(of, runs_dir).read_text())
        found = whole["measurement"]
        if whole["digest"] != _digest(found):
            return None
        measurement = from_json(Measurement, found)
        numbers = [measurement.begins, measurement.took, *vars(measurement.cost).values()]
        is_possible = min(measurement.array, measurement.per_gpu) >= 1 and min(numbers) >= 0
        return measurement if is_possible else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def file_of(of: Measurable, runs_dir: Path) -> Path:
    """Return the file of a measurement.

    Each has a file of its own, so that drivers that measure at the same time lose nothing.
    """
    return runs_dir / "measurements" / f"{_digest(_as_dict(of))}.json"


def _digest(of: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def _as_dict(of: Measurable) -> dict[str, object]:
    return {
        "shape": of.shape.to_flat(),
        "hardware": of.hardware,
        "array": of.array,
        "versions": of.versions,
    }
