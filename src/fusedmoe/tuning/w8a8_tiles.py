"""Tiles of the kernels that stream 8-bit weights to rows of 8 bits on Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from fusedmoe.tuning.hopper_tiles import DirectTiles, are_direct, direct_tiles
from fusedmoe.tuning.tiles import HOPPER_MULTIPROCESSORS, HOPPER_SHARED_MEMORY

STEP = 128  # columns of a product, bytes of a row
MAX_DIRECT_STEPS = 64
LEAST_SHARE_OF_A_TOKEN = 4  # one of so many experts is here


@dataclass(frozen=True, slots=True)
class StreamTile:
    """Two times ``valid`` weight rows, in room for ``rows``, by ``slots`` slots.

    A stage holds ``depth`` steps of 128 columns, 1 or 2, and ``stages`` are in flight; ``span``
    steps of the slots' rows are brought to shared memory at once. ``programs`` per multiprocessor.
    """

    rows: int
    valid: int
    slots: int
    depth: int
    span: int
    stages: int
    programs: int

    def __post_init__(self) -> None:
        for name, least in (("rows", 64), ("slots", 8), ("span", 1)):
            size = getattr(self, name)
            if size < least or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least {least}, got {size}")
        if not 0 < 2 * self.valid <= self.rows or self.valid % 16:
            raise ValueError(f"two times {self.valid} rows, whole 16, do not fit {self.rows}")
        if self.depth not in (1, 2) or self.span % self.depth:
            raise ValueError(f"a span of {self.span} steps is not of whole stages of {self.depth}")
        if self.stages < 1 or self.programs < 1:
            raise ValueError(f"stages {self.stages} and programs {self.programs} must be positive")

    @property
    def warps(self) -> int:
        return min(8, self.rows // 16)

    @property
    def box(self) -> int:
        """Rows that one load brings: the largest power of two that ``valid`` is a multiple of."""
        return self.valid & -self.valid


class StreamTiles(NamedTuple):
    """The tiles of a layer's two GEMMs, with the same slots."""

    gemm1: StreamTile
    gemm2: StreamTile


@lru_cache(maxsize=4096)
def stream_tiles(R: int, E: int, H: int, I: int) -> StreamTiles:  # noqa: E741
    """Tiles for R slots over E local experts, as measured on an H200.

    Tiles of 256 rows, one ring on a multiprocessor, where there are two of them for each; of 128
    rows and two rings otherwise, and wherever a quarter of the larger would be empty. Where every
    multiprocessor has one tile at most, one deep ring is faster than two; of 64 rows for GEMM1, and
    for GEMM2 where those of 128 would be for a quarter of the multiprocessors.
    """
    mean = R / E
    slots = 8 if mean <= 6 else 16 if mean <= 12 else 32
    blocks = min(R, E)
    return StreamTiles(_tile(slots, blocks, I, 1), _tile(slots, blocks, H, 2))


def _tile(slots: int, blocks: int, features: int, halves: int) -> StreamTile:
    """``halves``: parts of a tile that are features of their own (2), or gate and up of one (1)."""
    tiles = blocks * -(-features // (64 * halves))
    wide = 128 * halves
    mostly_full = 3 * wide * -(-features // wide) <= 4 * features
    large = mostly_full and tiles >= 4 * HOPPER_MULTIPROCESSORS
    if slots == 32:
        rows, programs = (256, 1) if large else (128, 2)
        return StreamTile(rows, rows // 2, slots, 1, 4, 5, programs)
    span = 8 if slots == 8 else 2
    if tiles <= HOPPER_MULTIPROCESSORS // (4 if halves == 2 else 1):
        return StreamTile(64, 32, slots, 2, span, 8, 1)
    if tiles <= HOPPER_MULTIPROCESSORS:
        return StreamTile(128, 64, slots, 2, span, 5, 1)
    if large:
        return StreamTile(256, 128, slots, 2, 8, 3, 1)
    return StreamTile(128, 64, slots, 2, span, 3, 2)


def direct_stream_tiles(
    T: int,
    K: int,
    num_experts: int,
    num_local: int,
    H: int,
    I: int,  # noqa: E741
) -> DirectTiles | None:
    """Tiles for one token of K picks, or two that rarely share an expert.

    None where there are more tokens, where rows are so long that shared memory cannot hold all of
    their steps, and where most slots are of experts on other ranks: those have tasks, too.
    """
    if not are_direct(T, K, num_experts) or max(H, I) > STEP * MAX_DIRECT_STEPS:
        return None
    if num_local * (LEAST_SHARE_OF_A_TOKEN if T == 1 else 1) < num_experts:
        return None
    return direct_tiles(T, K, H, I, _direct_stages)


def _direct_stages(rows: int, slots: int, columns: int) -> int:
    """Stages of a ring beside the rows' steps, all scales, and what the epilogue exchanges."""
    steps = -(-columns // STEP)
    padded = 1 << (steps - 1).bit_length()
    other = padded * (slots * (STEP + 4) + rows * 4) + rows * slots * 4 + 4096
    return (HOPPER_SHARED_MEMORY - other) // (rows * STEP)
