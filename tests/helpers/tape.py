"""What a GPU would do, on a CPU: record operations and repeat them, or count them."""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

T = TypeVar("T")

WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "bincount", "equal"}
"""Operations whose result the host has to know before it can go on."""

FROM_HOST = {"lift_fresh", "scalar_tensor"}
"""Operations that make a tensor of a number or a list of Python. A GPU would copy it from memory of
the host that is gone when the copy is repeated."""

VIEWS = {"detach", "_unsafe_view", "_reshape_alias", "alias"}


def name_of(operation: Any) -> str:
    return str(operation.overloadpacket).removeprefix("aten.")


def is_view(operation: Any) -> bool:
    return operation.is_view or name_of(operation) in VIEWS


class Tape(TorchDispatchMode):
    """Keeps every operation with the memory that it reads and writes, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}  # with the values of before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if name_of(func) in WAITS:
            raise RuntimeError(f"{func} would wait for the GPU")
        if name_of(func) in FROM_HOST:
            raise RuntimeError(f"{func} would copy from the host")
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [(entry, kwargs.get(entry.name)) for entry in func._schema.arguments]
        for entry, value in given:
            if entry.alias_info and entry.alias_info.is_write:
                for tensor in tree_flatten(value)[0]:
                    if isinstance(tensor, Tensor) and id(tensor) not in self.overwritten:
                        self.overwritten[id(tensor)] = tensor, tensor.detach().clone()
        result = func(*args, **kwargs)
        if not is_view(func):
            self.operations.append((func, args, kwargs, tree_flatten(result)[0]))
        return result

    def undo(self) -> None:
        """Put back what was there before: a graph is recorded without being run."""
        for tensor, values in self.overwritten.values():
            tensor.copy_(values)

    @torch.no_grad()
    def repeat(self) -> None:
        """Run all operations again, on the same memory."""
        for func, args, kwargs, results in self.operations:
            for kept, values in zip(results, tree_flatten(func(*args, **kwargs))[0], strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != values.data_ptr():
                    kept.copy_(values)


class TapeGraphs:
    """Records functions on tapes, in place of CUDA graphs."""

    def __init__(self) -> None:
        self.tried, self.recorded = 0, 0

    def warm_up(self, function: Callable[[], T]) -> T:
        return function()

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        self.tried += 1
        tape = Tape()
        try:
            with tape:
                result = function()
        finally:
            with torch.no_grad():
                tape.undo()
        self.recorded += 1
        return result, tape.repeat


class Count(TorchDispatchMode):
    """Counts the operations that a GPU would be given, without views, and those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not is_view(func):
            self.operations[name_of(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        return sum(self.operations[name] for name in WAITS)
