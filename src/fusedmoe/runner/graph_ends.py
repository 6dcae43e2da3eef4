"""A CUDA graph whose copies at its ends go from and to other memory with each launch.

A graph's addresses stay what they were when it was recorded. To copy to them and from them by
operations takes the host longer than the launch itself; a copy that is a node of the graph is sent
to another address by one call of the driver, and by none where that is the address it has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

# CUDA_MEMCPY3D, in words of eight bytes: how many, and where the addresses on the device are.
_WORDS, _SOURCE, _TARGET = 25, 6, 17
_MEMCPY_NODE = 1  # CU_GRAPH_NODE_TYPE_MEMCPY


class CopyEnd:
    """A node that copies, one of whose addresses, ``address``, may be another in each launch."""

    def __init__(self, executable: int, node: int, words: Any, place: int, context: Any) -> None:
        self.address: int = words[place]
        self._words, self._place = words, place
        self._set = _driver().cuGraphExecMemcpyNodeSetParams
        self._arguments = executable, node, ctypes.byref(words), context

    def send_to(self, address: int) -> bool:
        """Whether the launches from now on will copy from, or to, ``address``."""
        self._words[self._place] = address
        moved = self._set(*self._arguments) == 0
        self.address = address if moved else 0
        return moved


class MovableGraph(NamedTuple):
    """A graph that copies in from ``ends``, the first ones, and out to those behind them."""

    graph: Any
    ends: tuple[CopyEnd, ...]
    executable: int
    launched: Callable[[int, int], int]

    def move(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the next launch copies from, and to, the contiguous ``tensors``."""
        for end, tensor in zip(self.ends, tensors, strict=True):
            address = tensor.data_ptr()
            if end.address != address and not end.send_to(address):
                return False
        return True

    def launch(self, device: int, stream: int) -> None:
        """On ``stream``, the current one of ``device``; its random numbers are those recorded.

        Where another device is the current one, or the thread has none yet, torch knows what to do.
        """
        if torch._C._cuda_getDevice() != device or self.launched(self.executable, stream):
            self.graph.replay()


def movable(
    graph: torch.cuda.CUDAGraph, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> MovableGraph | None:
    """``graph`` with its copies out of ``sources`` and into ``targets``; None unless each is there.

    It keeps its nodes (``keep_graph``), and copies each of these tensors exactly once.
    """
    driver = _driver()
    context = ctypes.c_void_p()
    if driver is None or driver.cuCtxGetCurrent(ctypes.byref(context)):
        return None
    out_of: dict[int, CopyEnd] = {}
    into: dict[int, CopyEnd] = {}
    executable = graph.raw_cuda_graph_exec()
    for node in _nodes(graph.raw_cuda_graph()):
        kind, words = ctypes.c_int(), (ctypes.c_uint64 * _WORDS)()
        if driver.cuGraphNodeGetType(node, ctypes.byref(kind)) or kind.value != _MEMCPY_NODE:
            continue
        if driver.cuGraphMemcpyNodeGetParams(node, ctypes.byref(words)):
            return None
        out_of[words[_SOURCE]] = CopyEnd(executable, node, words, _SOURCE, context)
        into[words[_TARGET]] = CopyEnd(executable, node, words, _TARGET, context)
    ends = (
        *[out_of.get(tensor.data_ptr()) for tensor in sources],
        *[into.get(tensor.data_ptr()) for tensor in targets],
    )
    if None in ends:
        return None
    return MovableGraph(graph, ends, executable, driver.cuGraphLaunch)  # type: ignore[arg-type]


def _nodes(graph: int) -> list[int]:
    driver, count = _driver(), ctypes.c_size_t()
    if driver.cuGraphGetNodes(graph, None, ctypes.byref(count)):
        return []
    nodes = (ctypes.c_void_p * count.value)()
    failed = driver.cuGraphGetNodes(graph, nodes, ctypes.byref(count))
    return [] if failed else list(nodes)


@lru_cache
def _driver() -> Any:
    """The driver's functions, None where there are none of NVIDIA's."""
    pointer = ctypes.c_void_p
    arguments = {
        "cuCtxGetCurrent": 1,
        "cuGraphExecMemcpyNodeSetParams": 4,
        "cuGraphGetNodes": 3,
        "cuGraphLaunch": 2,
        "cuGraphMemcpyNodeGetParams": 2,
        "cuGraphNodeGetType": 2,
    }
    try:
        library = ctypes.CDLL("libcuda.so.1")
        for name, number in arguments.items():
            getattr(library, name).argtypes = [pointer] * number
    except (OSError, AttributeError):
        return None
    return library
