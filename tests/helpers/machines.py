"""The machines of a cluster that a test makes up."""

from collections.abc import Mapping

import pytest

from sweeps.estimate import packing
from sweeps.execution import resources


def set_machines(monkeypatch: pytest.MonkeyPatch, *machines: Mapping[str, float]) -> None:
    """Have trials run on these machines alone."""
    for module in (resources, packing):
        monkeypatch.setattr(module, "schedulable_machines", lambda: list(machines))
