"""Which tiles are worth measuring for one GEMM: those that fit, and of them the likeliest.

The model knows three things: how fast one multiprocessor can draw weights with so many bytes in
flight, how fast it multiplies with tiles of a size, and that the last round of programs may be
nearly empty. It need not be right, only not so wrong that the best tile falls out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fusedmoe.tuning.tiles import (
    HOPPER_MULTIPROCESSORS,
    HOPPER_SHARED_MEMORY,
    TileConfig,
    expected_blocks,
)


class Machine(NamedTuple):
    """Rates per nanosecond: bytes from memory and per multiprocessor, FLOPs per multiprocessor.

    The defaults are an H200's. ``latency`` in nanoseconds, from a load's issue to its data;
    ``setup`` what a program takes beside its loop.
    """

    shared_memory: int = HOPPER_SHARED_MEMORY
    multiprocessors: int = HOPPER_MULTIPROCESSORS
    memory_rate: float = 4400.0
    one_memory_rate: float = 42.0
    one_flops: float = 5200.0
    latency: float = 900.0
    setup: float = 1500.0


H200 = Machine()


class Gemm(NamedTuple):
    """T tokens of K picks over E local experts: [T * K, D] by [E, weight_tiles * N, D]."""

    T: int
    K: int
    E: int
    N: int
    D: int
    weight_tiles: int
    itemsize: int

    @property
    def rows(self) -> int:
        return self.T * self.K

    @property
    def active(self) -> float:
        """Experts that are hit under uniform routing."""
        return self.E * (1.0 - (1.0 - 1.0 / self.E) ** self.rows)


@dataclass(frozen=True)
class TunedLayer:
    """A layer to be tuned: E local experts, K picks, H hidden, I intermediate."""

    K: int
    E: int
    H: int
    I: int  # noqa: E741
    itemsize: int
    form: str

    def gemm(self, stage: str, T: int) -> Gemm:
        if stage == "gemm2":
            return Gemm(T, self.K, self.E, self.H, self.I, 1, self.itemsize)
        shards = 1 if self.form == "plain" else 2
        return Gemm(T, self.K, self.E, self.I, self.H, shards, self.itemsize)


BLOCK_MS = (16, 32, 64, 128, 256)
_BLOCK_NS = (32, 64, 128, 256)
_BLOCK_KS = (32, 64, 128, 256)
_WARPS = (4, 8)
_MAX_STAGES = 8
# fp32 sums that one thread may hold; the rest of its 255 registers are addresses and operands.
_MAX_SUMS = 128
_REGISTERS = 65536
_MOST_ALIKE = 2
_MOST_PER_BLOCK = 8
# What is hidden behind the slower of memory and products is never hidden whole.
_UNHIDDEN = 0.15


def candidates(gemm: Gemm, machine: Machine = H200) -> list[TileConfig]:
    """At most eight tiles for each plausible block_m, the likeliest of each first.

    Of tiles that differ in stages and groups alone there are at most two, so that a wrong model
    still leaves different ones.
    """
    found: list[TileConfig] = []
    for block_m in plausible_blocks(gemm):
        fitting = set(_fitting(gemm, block_m, machine))
        alike: Counter[tuple[int, ...]] = Counter()
        chosen: list[TileConfig] = []
        for tile in sorted(fitting, key=lambda t: (predicted_us(gemm, t, machine), str(t))):
            kind = tile.block_n, tile.block_k, tile.num_warps
            alike[kind] += 1
            if alike[kind] <= _MOST_ALIKE and len(chosen) < _MOST_PER_BLOCK:
                chosen.append(tile)
        found += chosen
    return found


def plausible_blocks(gemm: Gemm) -> list[int]:
    """Heights between a quarter of an expert's rows and four times them, two at least."""
    rows = gemm.rows / gemm.active
    low = min(64.0, rows / 4)
    high = max(32.0, 4 * rows)
    return [block for block in BLOCK_MS if low <= block <= high]


def _fitting(gemm: Gemm, block_m: int, machine: Machine) -> Iterator[TileConfig]:
    wide = gemm.itemsize > 2
    rows_per_expert = gemm.rows / gemm.active / block_m
    for block_n in _BLOCK_NS:
        if block_n >= 2 * gemm.N and block_n > _BLOCK_NS[0]:
            continue
        for block_k in _BLOCK_KS:
            if block_k >= 2 * gemm.D and block_k > _BLOCK_KS[0]:
                continue
            for warps in _WARPS:
                sums = block_m * block_n * gemm.weight_tiles / (warps * 32)
                if sums > (_MAX_SUMS // 2 if wide else _MAX_SUMS):
                    continue
                stage = (block_m + gemm.weight_tiles * block_n) * block_k * gemm.itemsize
                for share in (1, 2, 3):
                    room = machine.shared_memory // share - 2048
                    stages = min(_MAX_STAGES, room // stage + (block_m < 64))
                    if stages < 2:
                        continue
                    for group in group_sizes(rows_per_expert):
                        tile = TileConfig(block_m, block_n, block_k, group, warps, stages)
                        if tile.shared_memory(gemm.itemsize, gemm.weight_tiles) <= (
                            machine.shared_memory
                        ):
                            yield tile


def group_sizes(blocks_per_expert: float) -> tuple[int, ...]:
    """Blocks of rows that go side by side: nothing to share where experts have one block."""
    if blocks_per_expert < 0.6:
        return (1,)
    return (1, 4) if blocks_per_expert < 3.0 else (8, 16, 32)


def predicted_us(gemm: Gemm, tile: TileConfig, machine: Machine = H200) -> float:
    """About how long the GEMM takes with this tile."""
    block_m, block_n = tile.block_m, tile.block_n
    columns = -(-gemm.N // block_n)
    blocks = expected_blocks(gemm.rows, gemm.E, block_m)
    tiles = blocks * columns
    resident = _resident(gemm, tile, machine)
    steps = -(-gemm.D // tile.block_k)
    weight_bytes = gemm.weight_tiles * block_n * tile.block_k * gemm.itemsize
    row_bytes = block_m * tile.block_k * gemm.itemsize
    flying = resident * (tile.num_stages - 1) * (weight_bytes + row_bytes)
    drawn = min(machine.one_memory_rate, flying / machine.latency)
    rate = machine.one_flops * _tensor_share(tile, gemm.weight_tiles)
    flops = 2.0 * block_m * block_n * gemm.weight_tiles * tile.block_k
    # A multiprocessor serves its resident programs in turns.
    step = max((weight_bytes + row_bytes) / drawn, flops / rate) * resident
    rounds = math.ceil(tiles / (resident * machine.multiprocessors))
    full = tiles / (resident * machine.multiprocessors)
    # Short rounds blend into each other; a last one that is nearly empty costs about half.
    spread = 0.5 * (rounds + max(1.0, full))
    on_processors = spread * (steps * step + machine.setup)
    weights = gemm.active * gemm.weight_tiles * gemm.N * gemm.D * gemm.itemsize
    low, high = sorted((on_processors, weights / machine.memory_rate))
    return (high + _UNHIDDEN * low) / 1e3


def _resident(gemm: Gemm, tile: TileConfig, machine: Machine) -> int:
    """Programs that share a multiprocessor."""
    shared = tile.shared_memory(gemm.itemsize, gemm.weight_tiles) + 1024
    threads = 32 * tile.num_warps
    sums = tile.block_m * tile.block_n * gemm.weight_tiles / threads
    registers = min(255.0, sums + 72.0)
    return max(
        1,
        min(
            int(machine.shared_memory // shared),
            int(_REGISTERS // (threads * registers)),
            2048 // threads,
        ),
    )


def _tensor_share(tile: TileConfig, weight_tiles: int) -> float:
    """How much of the product rate tiles of this size reach."""
    width = tile.block_n * weight_tiles
    if tile.block_m < 64:
        return 0.45 * min(1.0, width / 128)
    return min(0.8, 0.35 + 0.1 * math.log2(tile.block_m / 64 * width / 64 + 1.0))
