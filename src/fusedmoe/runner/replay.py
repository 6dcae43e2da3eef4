"""Small batches replayed as CUDA graphs, for callers that launch a layer eagerly.

A decode step's layer takes the GPU less time than Python takes to launch it. Called a second time
with as many rows, the launches are captured; from then on they are one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

Function = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@functools.cache
def _graph_pool(device: int, stream: int) -> Any:
    """One memory pool for all graphs of a stream: they run one after the other anyway."""
    return torch.cuda.graph_pool_handle()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Captured(NamedTuple):
    """A graph, the tensor it reads and those it writes."""

    graph: Any
    x: torch.Tensor
    outputs: tuple[torch.Tensor, ...]


class GraphReplay:
    """``function`` of rows x [T, H], replayed where that changes nothing but its launch time.

    A call goes straight to ``function`` for more than ``max_rows`` rows, off CUDA, with gradients,
    inside a capture or a compilation, on the first call with its key, and for good where
    ``can_be_captured`` says no (asked once, when it matters) or a capture failed.

    The key holds the rows, the dtype, the stream and the addresses of ``depends_on``, the tensors
    besides x that ``function`` reads: their values may change, a move is a new key. Outputs are
    copies, so that a later call leaves them alone.
    """

    def __init__(
        self,
        function: Function,
        can_be_captured: Callable[[], bool],
        max_rows: int = 64,
        max_graphs: int = 16,
    ) -> None:
        self.function = function
        self.can_be_captured = can_be_captured
        self.max_rows = max_rows
        self.max_graphs = max_graphs
        self._reset()

    def _reset(self) -> None:
        self._captured: dict[tuple[Any, ...], _Captured | None] = {}
        self._lock = threading.Lock()
        self._given_up = False

    def __getstate__(self) -> dict[str, Any]:
        kept = ("function", "can_be_captured", "max_rows", "max_graphs")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __call__(
        self, x: torch.Tensor, depends_on: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...]:
        if (
            torch.compiler.is_compiling()
            or not x.is_cuda
            or not 0 < x.shape[0] <= self.max_rows
            or self._given_up
            or torch.is_grad_enabled()
            or torch.cuda.is_current_stream_capturing()
        ):
            return self.function(x)
        device = x.get_device()
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in depends_on]
        stream = torch._C._cuda_getCurrentRawStream(device)
        key = (x.shape, x.dtype, device, stream, *addresses)
        with self._lock:
            captured = self._captured.get(key)
            if captured is not None:
                captured.x.copy_(x)
                captured.graph.replay()
                return tuple(output.clone() for output in captured.outputs)
            if key in self._captured:
                self._captured[key] = self._capture(x, _graph_pool(device, stream))
            elif len(self._captured) < self.max_graphs:
                self._captured[key] = None
            return self.function(x)

    def _capture(self, x: torch.Tensor, pool: Any) -> _Captured | None:
        if not self.can_be_captured():
            self._given_up = True
            return None
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            rows = torch.empty_like(x, memory_format=torch.contiguous_format)
            graph = torch.cuda.CUDAGraph()
            stream = _capture_stream(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    outputs = self.function(rows)
                except RuntimeError as error:
                    self._given_up = True
                    logger.warning("not replayed as a CUDA graph: %s", str(error).splitlines()[0])
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    return None
                graph.capture_end()
            torch.cuda.current_stream(x.device).wait_stream(stream)
        return _Captured(graph, rows, outputs)
