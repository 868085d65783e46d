"""One trial as the driver hands it to a worker. Importing this module does not import MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gptcore.config import Scalar


@dataclass(frozen=True)
class Job:
    """One trial as a worker is given it."""

    key: str
    name: str  # for readers, such as `model5, seed 0`; no code reads it
    params: Mapping[str, Scalar]  # every knob by its dotted key
    tags: Mapping[str, str]  # what the driver knows and the run is to keep
    scheme: str = ""  # the scheme of the trial, as named in the report
    colour: str = ""  # of its lines in charts, such as `#0072B2`; if empty, MLflow chooses

    def with_tags(self, **tags: str) -> Job:
        """Return the job with more tags."""
        return replace(self, tags={**self.tags, **tags})
