"""Tiles of the kernels that stream 8-bit weights to rows of 8 bits on Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

MULTIPROCESSORS = 132


@dataclass(frozen=True, slots=True)
class StreamTile:
    """Two times ``valid`` weight rows, in room for ``rows``, by ``slots`` slots.

    A stage holds ``depth`` steps of 128 columns, 1 or 2, and ``stages`` are in flight; ``span``
    steps of the slots' rows are brought to shared memory at once. ``programs`` per multiprocessor.
    ``roles``: warps of their own fill the ring and bring the rows.
    """

    rows: int
    valid: int
    slots: int
    depth: int
    span: int
    stages: int
    programs: int
    roles: bool = False

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
    """Of a layer's two GEMMs; slots are the same."""

    gemm1: StreamTile
    gemm2: StreamTile


@lru_cache(maxsize=4096)
def stream_tiles(R: int, E: int, H: int, I: int) -> StreamTiles:  # noqa: E741
    """Tiles for R slots over E local experts, as measured on an H200.

    Tiles of 256 rows, one ring on a multiprocessor, where there are two of them for each; of 128
    rows and two rings otherwise, and wherever a quarter of the larger would be empty. A token or
    two have tiles of 64 rows, so that every multiprocessor has one.
    """
    mean = R / E
    slots = 8 if mean <= 6 else 16 if mean <= 12 else 32
    blocks = min(R, E)
    return StreamTiles(_tile(slots, blocks, I, 1), _tile(slots, blocks, H, 2))


def _tile(slots: int, blocks: int, features: int, halves: int) -> StreamTile:
    """``halves``: parts of a tile that are features of their own (2), or gate and up of one (1)."""
    if slots == 32:
        return StreamTile(128, 64, slots, 1, 4, 5, 2)
    span = 8 if slots == 8 else 2
    tiles = blocks * -(-features // (64 * halves))
    if tiles <= MULTIPROCESSORS and halves == 1:
        return StreamTile(128, 32, slots, 2, span, 3, 2)
    if tiles <= MULTIPROCESSORS:
        return StreamTile(128, 64, slots, 2, span, 3, 1)
    wide = 128 * halves
    mostly_full = 3 * wide * -(-features // wide) <= 4 * features
    if mostly_full and tiles >= 4 * MULTIPROCESSORS:
        return StreamTile(256, 128, slots, 2, 8, 3, 1)
    return StreamTile(128, 64, slots, 2, span, 3, 2)
