"""Recording launches as a CUDA graph, so that a recording that fails leaves nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Outputs = TypeVar("Outputs")
PoolId = Any  # opaque; torch annotates it differently from version to version

# Graphs of failed captures, kept alive: the allocator of pinned memory still asks them which
# streams they record.
_failed: list[Any] = []


def record_graph(
    work: Callable[[], Outputs],
    stream: torch.cuda.Stream,
    pool: PoolId | None = None,
    *,
    keep: bool = False,
) -> tuple[Any, Outputs]:
    """The CUDA graph of what ``work`` launches on ``stream``, and what ``work`` returned.

    ``pool`` is a ``torch.cuda.graph_pool_handle()`` that a living graph keeps (``held_pool``); None
    makes one for this graph. ``keep``: its nodes can be looked at, and changed between launches.
    Other threads may go on allocating meanwhile. Whatever ``work`` raises
    passes through, and RuntimeError comes where no graph can hold what it did; memory and random
    numbers of the device are then as before, but ``pool`` cannot be used again.
    """
    graph = torch.cuda.CUDAGraph(keep_graph=keep)
    pool = pool or torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outputs = work()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                _end(graph, stream, pool)
            raise
        _end(graph, stream, pool)
        if keep:
            graph.instantiate()
    return graph, outputs


def held_pool(stream: torch.cuda.Stream) -> tuple[PoolId, Any]:
    """A pool's handle, and the graph that keeps it: a pool that no graph uses cannot be reused."""
    pool = torch.cuda.graph_pool_handle()
    keeper, _ = record_graph(lambda: torch.zeros(1, device=stream.device), stream, pool)
    return pool, keeper


def _end(graph: Any, stream: torch.cuda.Stream, pool: PoolId) -> None:
    """End the capture; where that fails, also do what ``capture_end`` then leaves undone.

    The allocator would go on sending the stream's requests to ``pool``, and the generator would
    refuse to draw until another capture ends well.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        _failed.append(graph)
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
        torch.cuda.synchronize(stream.device)
        other = torch.cuda.CUDAGraph()
        other.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=stream.device)
        other.capture_end()
        raise
