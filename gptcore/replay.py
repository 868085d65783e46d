"""Repeat a function on fixed memory. On a GPU, the function becomes one CUDA graph.

A training step of a small model has hundreds of operations. Python needs longer to start one of
them than the GPU needs to compute it. CUDA can record the operations of a function in a graph, and
then repeat all of them by one call, on the same memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch

T = TypeVar("T")


class Graphs(Protocol):
    """A way to record functions, for all functions that work on one array."""

    def warm_up(self, function: Callable[[], T]) -> T:
        """Run the function once before it is recorded, so that it can do its setup."""

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record the function without running it.

        Returns:
            The result of the function, and a function that repeats it. After each repetition, the
            tensors of the result have new values.
        """


class CudaGraphs:
    """Records functions in CUDA graphs. The graphs share memory, so only one may run at a time."""

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def warm_up(self, function: Callable[[], T]) -> T:
        """Run the function on a stream that is not the default stream, as PyTorch requires."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record the function in a graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = function()
        return result, graph.replay


GRAPHS: dict[str, Callable[[], Graphs]] = {"cuda": CudaGraphs}
"""The way to record functions, by type of device. On other devices, functions are not recorded."""


def graphs_for(device: torch.device) -> Graphs | None:
    """Return a new recorder of functions for a device. None if functions are not recorded there."""
    make = GRAPHS.get(device.type)
    return make() if make else None


WARM_UP_CALLS = 3
"""Calls of a function before it is recorded. They are part of the training, not extra work."""


def replayed(
    function: Callable[[], T], graphs: Graphs | None, warm_up_calls: int = WARM_UP_CALLS
) -> Callable[[], T]:
    """Return a function that is recorded after some calls, and then repeated.

    The function has to read and write the same memory in every call. It must not wait for the GPU.
    Its Python code runs only until it is recorded. Tensors that it returns are overwritten by the
    next call.

    Args:
        function: the function to record. Without `graphs`, it is returned unchanged.
        graphs: records the function.
        warm_up_calls: the number of calls before the function is recorded.
    """
    return _Replayed(function, graphs, warm_up_calls) if graphs else function


class _Replayed(Generic[T]):
    def __init__(self, function: Callable[[], T], graphs: Graphs, warm_up_calls: int) -> None:
        self.function, self.warm_up_calls = function, warm_up_calls
        self.graphs: Graphs | None = graphs  # None once recording has failed
        self.recorded: tuple[T, Callable[[], None]] | None = None

    def __call__(self) -> T:
        if self.graphs is None:
            return self.function()
        if self.warm_up_calls > 0:
            self.warm_up_calls -= 1
            return self.graphs.warm_up(self.function)
        if self.recorded is None:
            try:
                self.recorded = self.graphs.record(self.function)
            except RuntimeError as error:  # an old driver, or no memory
                logging.getLogger(__name__).warning(
                    "Training is slower than it could be, because its steps cannot be recorded in "
                    "a CUDA graph: %s",
                    str(error).partition("\n")[0],
                )
                self.graphs = None
                return self.function()
        result, repeat = self.recorded
        repeat()
        return result
