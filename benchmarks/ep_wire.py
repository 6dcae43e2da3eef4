"""Ranks that share a layer: times of the slowest of them, and what their wire can do."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fusedmoe.bench.report import Percentiles
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.distributed.collectives import gather_vectors
from fusedmoe.distributed.groups import TokenRanks
from fusedmoe.distributed.peer_memory import PeerMemory
from fusedmoe.runner.capture import record_graph

Call = Callable[[], Any]
_LAUNCHING_CYCLES = 400_000  # 0.2 ms
GROUP = 128
"""Columns that share a scale where rows travel in fp8."""


@dataclass(frozen=True)
class Place:
    """The ranks that share a layer, this process among them."""

    group: dist.ProcessGroup
    device: torch.device
    repeats: int

    @property
    def ranks(self) -> int:
        return self.group.size()

    def slowest(self, samples: list[float]) -> Percentiles:
        """Of each sample, in microseconds, the time of the rank that took longest."""
        told = gather_vectors([int(us * 1e3) for us in samples], TokenRanks((self.group,)))
        return Percentiles.of([max(ns) / 1e3 for ns in zip(*told, strict=True)])


def time_call(
    call: Call,
    place: Place,
    rounds: int,
    captured: bool,
    *,
    repeats: int | None = None,
    warm_up: bool = True,
) -> Percentiles:
    """Microseconds of one call, ``rounds`` of them in each sample."""
    on_gpu = place.device.type == "cuda"
    if warm_up:
        call()
    run: Call = lambda: [call() for _ in range(rounds)]  # noqa: E731
    if on_gpu:
        torch.cuda.synchronize()
        dist.barrier(place.group)
        if captured:
            stream = torch.cuda.Stream()
            graph, _ = record_graph(lambda: [call() for _ in range(rounds)] and None, stream)
            run = graph.replay
    samples = []
    for _ in range(repeats or place.repeats):
        dist.barrier(place.group)
        samples.append((_gpu_us(run, place) if on_gpu else _cpu_us(run)) / rounds)
    return place.slowest(samples)


def _gpu_us(run: Call, place: Place) -> float:
    """The GPUs begin together, once all hosts have launched what is timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_LAUNCHING_CYCLES)
    dist.all_reduce(torch.zeros(1, device=place.device), group=place.group)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _cpu_us(run: Call) -> float:
    begin = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - begin) / 1e3


def wire_gbs(place: Place, memory: PeerMemory | None) -> float:
    """GB/s per direction of a rank: a copy of a peer's buffer, or an all-to-all without one."""
    if memory is not None:
        rank, world = place.group.rank(), place.ranks
        size = min(memory.layout.outputs_at, 1 << 28)
        theirs = memory._handle.get_buffer((rank + 1) % world, (size,), torch.uint8, 0)
        here = torch.empty_like(theirs)
        return size / time_call(lambda: here.copy_(theirs), place, 1, True).us / 1e3
    size = 1 << (28 if place.device.type == "cuda" else 20)
    sent = torch.zeros(size, dtype=torch.uint8, device=place.device)
    received = torch.empty_like(sent)
    exchange = functools.partial(dist.all_to_all_single, received, sent, group=place.group)
    remote = size * (place.ranks - 1) / place.ranks
    return remote / time_call(exchange, place, 1, False).us / 1e3


def wire_limit_us(
    ids: torch.Tensor, shape: LayerShape, fmt: str, place: Place, gbs: float
) -> float:
    """One copy of each row to each other rank that needs it, and one sum back."""
    per_rank = -(-shape.num_experts // place.ranks)
    rank = place.group.rank()
    there = [(ids // per_rank == r).any(dim=1) for r in range(place.ranks) if r != rank]
    copies = int(torch.stack(there).sum()) if there else 0
    row = shape.H + -(-shape.H // GROUP) * 4 if fmt == "fp8_block" else 2 * shape.H
    sent = copies * (row + 8 * shape.k + 2 * shape.H)
    return place.slowest([sent / gbs / 1e3]).us
