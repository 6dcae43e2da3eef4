"""Tile sizes of the grouped GEMMs, as pure functions of the problem's shape.

What decides is rows per expert. Few: the GEMM reads weights as fast as memory gives them, so tiles
are low, deep and at least two per multiprocessor. Many: it is bound by the tensor cores, so tiles
are large, one per multiprocessor. The measure of fit is shared memory, given as an argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

HOPPER_SHARED_MEMORY = 227 * 1024
HOPPER_MULTIPROCESSORS = 132


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One GEMM's tile: block_m slots by block_n columns of its output, block_k deep per step."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {size}")
        if self.group_m < 1 or self.num_stages < 1 or self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(
                f"group_m {self.group_m} and num_stages {self.num_stages} must be positive, "
                f"num_warps {self.num_warps} a power of two up to 16"
            )

    def shared_memory(self, itemsize: int, weight_tiles: int) -> int:
        """Bytes that the operands in flight take.

        Tiles of 64 rows and more keep one stage longer, since their MMA reads it asynchronously.
        """
        rows = self.block_m + weight_tiles * self.block_n
        return (self.num_stages - (self.block_m < 64)) * rows * self.block_k * itemsize


class LayerTiles(NamedTuple):
    """The tiles of a layer's two GEMMs; they share one alignment, so block_m is the same."""

    gemm1: TileConfig
    gemm2: TileConfig


class _Shape(NamedTuple):
    """A tile before its depth is known: how wide, on how many warps, how many per processor."""

    block_n: int
    block_k: int
    num_warps: int
    per_multiprocessor: int


# block_m -> tile. GEMM1 holds two weight tiles (gate and up) of block_n, GEMM2 one.
# The numbers and rules here were chosen by benchmarks/results/h200/tuning.json.
_GEMM1 = {
    16: _Shape(64, 128, 4, 2),
    32: _Shape(64, 128, 4, 2),
    64: _Shape(64, 64, 4, 2),
    128: _Shape(64, 64, 8, 2),
}
# For GEMM1 where an expert's rows fit one block of 128, and where gate and up are interleaved.
_GEMM1_WIDE = _Shape(128, 64, 8, 1)
_WIDE_ROWS = 110
_GEMM2 = {
    16: _Shape(128, 128, 4, 2),
    32: _Shape(128, 128, 4, 2),
    64: _Shape(128, 64, 4, 2),
    128: _Shape(256, 64, 8, 1),
}
_BATCH_INVARIANT_BLOCK_M = 64
_MAX_STAGES = 6
# A last step that is mostly empty costs less than rows of half the length.
_NEARLY = 1.04
# Narrower tiles read the rows more often, and high ones multiply more slowly. They are chosen where
# the time of the fullest multiprocessor falls to this part: (for low tiles, for high tiles).
_BETTER = (0.85, 0.6)
_NARROWEST = 64  # rows of weights, gate and up together
_MAX_GROUP_M = 32
# Rows of a that one group of blocks reads again for every tile of columns; they must stay in L2.
_GROUP_BYTES = 36 * 2**20


@lru_cache(maxsize=4096)
def expected_blocks(R: int, E: int, block_m: int) -> float:
    """Blocks of slots under uniform routing: one per expert hit, more where experts overflow.

    The mean of ceil(rows / block_m) over the experts, whose rows are about normal around R / E.
    """
    rows, hit = R / E, 1.0 - (1.0 - 1.0 / E) ** R
    if rows >= 8 * block_m:
        return E * (rows / block_m + 0.5)
    spread = math.sqrt(2.0 * max(rows, 1.0))
    overflows = (
        0.5 * math.erfc((more * block_m + 0.5 - rows) / spread)
        for more in range(1, int(rows / block_m) + 3)
    )
    return min(float(R), E * (hit + sum(overflows)))


def slots_are_alone(R: int, E: int) -> bool:
    """Whether R slots are so few that two rarely share one of E experts: each is a block by itself,
    and no table of blocks is made."""
    return R * 4 <= E


def rows_block(R: int, E: int) -> int:
    """The block_m that holds the rows of nearly every expert when tokens choose at random.

    A second block reads the expert's weights again, which costs more than padding does while
    memory bandwidth is the limit.
    """
    rows = R / E
    return 16 if rows <= 10 else 32 if rows <= 22 else 64 if rows <= 56 else 128


def _step(D: int, block_k: int) -> int:
    """``block_k`` where it divides D, nearly at least; else the largest smaller step that does,
    unless it would be under 32."""
    if -(-D // block_k) * block_k <= _NEARLY * D:
        return block_k
    step = block_k
    while step > 32 and D % step:
        step //= 2
    return step if D % step == 0 else min(block_k, max(32, 1 << (D - 1).bit_length()))


def _group_m(blocks_per_expert: float, block_bytes: int) -> int:
    """How many blocks of rows to finish before the next tile of weights.

    One where an expert has one block; a few, so that its blocks share a tile of weights in L2; then
    as many as keep their own rows in L2.
    """
    if blocks_per_expert < 3.0:
        return 1 if blocks_per_expert < 0.6 else 4
    group = _MAX_GROUP_M
    while group > 8 and group * block_bytes > _GROUP_BYTES:
        group //= 2
    return group


def _width(block_n: int, narrowest: int, blocks: float, N: int, better: float) -> int:
    """How wide a tile is: so that, where there are few, no multiprocessor has more columns to work
    through than others.

    With a handful of tiles the time is that of the multiprocessor with the most of them.
    """
    while block_n > 32 and block_n >= 2 * N:
        block_n //= 2
    if blocks * -(-N // block_n) > 2 * HOPPER_MULTIPROCESSORS:
        return block_n

    def columns(width: int) -> int:
        return math.ceil(blocks * -(-N // width) / HOPPER_MULTIPROCESSORS) * width

    best = block_n
    while block_n > narrowest:
        block_n //= 2
        if columns(block_n) <= better * columns(best):
            best = block_n
    return best


def _programs(tiles: float) -> int:
    """How many low tiles share a multiprocessor: two, or three where that leaves fewer places
    empty in the last round."""

    def places(programs: int) -> int:
        return math.ceil(tiles / (programs * HOPPER_MULTIPROCESSORS)) * programs

    return 3 if places(3) < places(2) else 2


def _tile(
    shape: _Shape,
    block_m: int,
    R: int,
    E: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    weight_tiles: int,
    shared_memory: int,
    fixed: bool,
) -> TileConfig:
    itemsize = dtype.itemsize
    block_n, block_k, num_warps, per_multiprocessor = shape
    if itemsize > 2:
        # fp32 is computed without tensor cores, in registers: small tiles.
        block_n, block_k = min(block_n, 64), 32
    block_k = _step(D, block_k)
    blocks = R if slots_are_alone(R, E) else expected_blocks(R, E, block_m)
    if not fixed:
        better = _BETTER[block_m >= 64]
        block_n = _width(block_n, _NARROWEST // weight_tiles, blocks, N, better)
        if block_m < 64:
            per_multiprocessor = _programs(blocks * -(-N // block_n))
    stage = (block_m + weight_tiles * block_n) * block_k * itemsize
    share = (shared_memory + 1024) // per_multiprocessor - 2048
    num_stages = max(2, min(_MAX_STAGES, share // stage + (block_m < 64)))
    group_m = 1 if fixed else _group_m(R / E / block_m, block_m * D * itemsize)
    return TileConfig(block_m, block_n, block_k, group_m, num_warps, num_stages)


@lru_cache(maxsize=4096)
def gemm1_tiles(
    T: int,
    K: int,
    E: int,
    N: int,
    H: int,
    dtype: torch.dtype,
    *,
    weight_tiles: int = 2,
    interleaved: bool = False,
    batch_invariant: bool = False,
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> TileConfig:
    """Tile of the first GEMM, [T * K, H] by [E, weight_tiles * N, H] -> [T * K, N].

    E counts local experts. ``interleaved``: rows of gate and up alternate. ``batch_invariant``: a
    tile that does not depend on T.
    """
    R = T * K
    block_m = _BATCH_INVARIANT_BLOCK_M if batch_invariant else rows_block(R, E)
    wide = block_m == 128 and dtype.itemsize == 2 and (interleaved or R / E < _WIDE_ROWS)
    return _tile(
        _GEMM1_WIDE if wide else _GEMM1[block_m],
        block_m,
        R,
        E,
        N,
        H,
        dtype,
        weight_tiles,
        shared_memory,
        batch_invariant,
    )


@lru_cache(maxsize=4096)
def gemm2_tiles(
    T: int,
    K: int,
    E: int,
    H: int,
    N: int,
    dtype: torch.dtype,
    *,
    batch_invariant: bool = False,
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> TileConfig:
    """Tile of the second GEMM, [T * K, N] by [E, H, N] -> [T * K, H]."""
    R = T * K
    block_m = _BATCH_INVARIANT_BLOCK_M if batch_invariant else rows_block(R, E)
    return _tile(_GEMM2[block_m], block_m, R, E, H, N, dtype, 1, shared_memory, batch_invariant)


def layer_tiles(
    T: int,
    K: int,
    E: int,
    H: int,
    N: int,
    dtype: torch.dtype,
    *,
    gated: bool = True,
    interleaved: bool = False,
    batch_invariant: bool = False,
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> LayerTiles:
    """Both tiles of a layer of E local experts, H hidden, N intermediate, T tokens of K picks."""
    rest: dict[str, Any] = {"batch_invariant": batch_invariant, "shared_memory": shared_memory}
    shards = 2 if gated else 1
    return LayerTiles(
        gemm1_tiles(T, K, E, N, H, dtype, weight_tiles=shards, interleaved=interleaved, **rest),
        gemm2_tiles(T, K, E, H, N, dtype, **rest),
    )
