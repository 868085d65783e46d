"""The machines of a cluster, and the small disk, that a test makes up."""

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from sweeps.estimate import packing
from sweeps.execution import resources


def set_machines(monkeypatch: pytest.MonkeyPatch, *machines: Mapping[str, float]) -> None:
    """Have trials run on these machines alone."""
    for module in (resources, packing):
        monkeypatch.setattr(module, "schedulable_machines", lambda: list(machines))


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """Inside, a new folder is a file system of its own, of a size such as `96m`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or error
        pytest.skip(f"a small file system cannot be mounted here: {why}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
