"""Small batches replayed as CUDA graphs, for callers that launch a layer eagerly.

The layer of a decode step or of a short prompt takes the GPU less time than Python takes to launch
it. Called a second time with as many rows, the launches are captured; from then on they are one.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fusedmoe.runner.capture import PoolId, held_pool, record_graph
from fusedmoe.runner.graph_ends import MovableGraph, movable

logger = logging.getLogger(__name__)

Function = Callable[..., tuple[torch.Tensor, ...]]

# So many rows pass through a layer of Qwen3-30B's sizes in 0.3 ms, and Python launches it in 0.45.
MAX_REPLAYED_ROWS = 256
# Calls that are remembered until a second one like them comes.
_MAX_SEEN = 64

# All graphs replayed on a stream share memory, as they run one after the other, and are captured on
# the same other one. Keys: device and stream; values: a pool and the graph that keeps it.
_one_capture_at_a_time = threading.Lock()
_pools: dict[tuple[torch.device, int], tuple[PoolId, Any]] = {}


@functools.cache
def _capture_stream(device: torch.device, replay_stream: int) -> torch.cuda.Stream:
    """For nothing but captures.

    cuBLAS keeps scratch memory for each stream, which torch.compile frees before it captures a
    graph; what was allocated in a capture stays in the pool.
    """
    return torch.cuda.Stream(device)


class _Captured(NamedTuple):
    """A graph, the tensors it copies its input from and its output to.

    ``moved``: it can copy from and to others; not so if it draws random numbers, for which torch
    has to launch it.
    """

    graph: Any
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    moved: MovableGraph | None

    def launch(
        self, inputs: tuple[torch.Tensor, ...], device: int, stream: int
    ) -> tuple[torch.Tensor, ...] | None:
        """New outputs of ``inputs``; None where the driver would not have it."""
        if self.moved is None:
            for own, given in zip(self.inputs, inputs, strict=True):
                own.copy_(given)
            self.graph.replay()
            return tuple([output.clone() for output in self.outputs])
        # Copies of inputs that are not contiguous live until the launch.
        rows = [one if one.is_contiguous() else one.contiguous() for one in inputs]
        outputs = tuple([torch.empty_like(output) for output in self.outputs])
        if not self.moved.move((*rows, *outputs)):
            return None
        self.moved.launch(device, stream)
        return outputs


class GraphReplay:
    """``function`` of tensors of T rows, replayed where that changes nothing but its launch time.

    T are all dimensions of the first input but its last one, multiplied.

    A call goes straight to ``function`` for more than ``max_rows`` rows, off CUDA, for a subclass
    of tensors, with gradients, inside a capture or a compilation, on the first call with its key,
    and for good where ``can_be_captured`` says no (asked once, when it matters) or a capture
    failed.

    The key holds the inputs' shapes and dtypes, the stream and the addresses of ``depends_on``, the
    tensors besides the inputs that ``function`` reads: their values may change, a move is a new
    key. Inputs may lie elsewhere in each call, and outputs are new tensors.

    ``max_graphs`` are kept, and of those with T rows or more at most ``2 * max_rows / T``: that
    bounds their memory, and prompts of many lengths leave room for decode steps.
    """

    def __init__(
        self,
        function: Function,
        can_be_captured: Callable[[], bool],
        max_rows: int = MAX_REPLAYED_ROWS,
        max_graphs: int = 16,
    ) -> None:
        self.function = function
        self.can_be_captured = can_be_captured
        self.max_rows = max_rows
        self.max_graphs = max_graphs
        self._reset()

    def _reset(self) -> None:
        self._seen: dict[tuple[Any, ...], None] = {}  # in the order in which they came
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._lock = threading.Lock()
        self._given_up = False

    def __getstate__(self) -> dict[str, Any]:
        kept = ("function", "can_be_captured", "max_rows", "max_graphs")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __call__(
        self, inputs: tuple[torch.Tensor, ...], depends_on: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...]:
        x = inputs[0]
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or self._given_up
            or not x.is_cuda
            or type(x) is not torch.Tensor
            or not 0 < x.numel() <= self.max_rows * x.shape[-1]
            or torch.cuda.is_current_stream_capturing()
        ):
            return self.function(*inputs)
        device = x.get_device()
        stream = torch._C._cuda_getCurrentRawStream(device)
        key = (
            device,
            stream,
            *[(tensor.shape, tensor.dtype) for tensor in inputs],
            *[0 if tensor is None else tensor.data_ptr() for tensor in depends_on],
        )
        with self._lock:
            captured = self._captured.get(key)
            if captured is not None:
                outputs = captured.launch(inputs, device, stream)
                if outputs is not None:
                    return outputs
                self._give_up("the driver sends its copies nowhere else")
            elif key not in self._seen:
                self._seen[key] = None
                if len(self._seen) > _MAX_SEEN:
                    del self._seen[next(iter(self._seen))]
            elif self._has_room(_rows(x)):
                captured = self._capture(inputs, stream)
                if captured is not None:
                    self._captured[key] = captured
                    del self._seen[key]
            return self.function(*inputs)

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        logger.warning("not replayed as a CUDA graph: %s", reason)

    def _has_room(self, rows: int) -> bool:
        as_large = sum(_rows(one.inputs[0]) >= rows for one in self._captured.values())
        return len(self._captured) < self.max_graphs and as_large < 2 * self.max_rows // rows

    def _capture(self, inputs: tuple[torch.Tensor, ...], replay_stream: int) -> _Captured | None:
        if not self.can_be_captured():
            self._given_up = True
            return None
        # Tensors made in inference mode could not be written to outside of it.
        with _one_capture_at_a_time, torch.inference_mode(False), torch.no_grad():
            own = tuple(_contiguous(tensor) for tensor in inputs)
            device = inputs[0].device
            numbers = torch.cuda.default_generators[device.index]
            drawn = numbers.get_offset()
            # The copies may have other strides than the inputs: a kernel that is loaded for them
            # during the capture would end it.
            outputs = tuple(torch.empty_like(one) for one in self._copying(own, None))
            draws = numbers.get_offset() != drawn
            stream = _capture_stream(device, replay_stream)
            stream.wait_stream(torch.cuda.current_stream(device))
            place = device, replay_stream
            if place not in _pools:
                _pools[place] = held_pool(stream)
            try:
                graph, _ = record_graph(
                    lambda: self._copying(own, outputs), stream, _pools[place][0], keep=True
                )
            except RuntimeError as error:
                del _pools[place]
                self._give_up(str(error).splitlines()[0])
                return None
            torch.cuda.current_stream(device).wait_stream(stream)
        return _Captured(graph, own, outputs, None if draws else movable(graph, own, outputs))

    def _copying(
        self, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, ...]:
        """``function`` of copies of ``inputs``; its results are copied to ``outputs``."""
        results = self.function(*[_contiguous(tensor) for tensor in inputs])
        for output, result in zip(outputs or (), results, strict=outputs is not None):
            output.copy_(result)
        return results


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)


def _rows(tensor: torch.Tensor) -> int:
    return tensor.numel() // tensor.shape[-1]
