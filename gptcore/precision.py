"""The precision of matrix products, `train.precision`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptcore.config import InputError, TrainConfig

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32),
    "bf16-head": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
"""The dtypes of each `train.precision`: of the products in the head, and of those in the trunk. A
product to which a bias is added rounds the sum to bfloat16 too, except under vmap."""


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Compute products of float32 as `train.precision` says, while the context lasts.

    With tf32, a GPU rounds the factors of such a product to the 10 bits of TensorFloat-32, and sums
    in float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_precision(train: TrainConfig, device: torch.device) -> None:
    """Raise InputError where the device does not have the precision of a trial."""
    if device.type != "cuda":
        if train.precision == "tf32":
            raise InputError(f"train.precision is tf32, which a CPU does not have: {INSTEAD}")
        return
    # TensorFloat-32 and bfloat16 came with the same GPUs: NVIDIA's Ampere, capability 8.0.
    if train.precision != "float32" and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(
            f"train.precision is {train.precision}, which {torch.cuda.get_device_name(device)} is "
            f"too old for: {INSTEAD}"
        )


INSTEAD = "take float32, or a GPU with NVIDIA's compute capability 8.0 (Ampere) or newer"
