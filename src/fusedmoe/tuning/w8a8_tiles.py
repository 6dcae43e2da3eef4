"""Tiles of the kernels that stream 8-bit weights to rows of 8 bits on Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class StreamTile:
    """Two times ``valid`` weight rows, in room for ``rows``, by ``slots`` slots.

    A stage holds ``depth`` steps of 128 columns, 1 or 2, and ``stages`` are in flight; ``span``
    steps of the slots' rows are brought to shared memory at once. ``programs`` per multiprocessor;
    they take tasks as they get ready for them, or (``dealt``) every so manyth.
    """

    rows: int
    valid: int
    slots: int
    depth: int
    span: int
    stages: int
    programs: int
    dealt: bool = False

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
    """Tiles for R slots over E local experts."""
    mean = R / E
    slots = 8 if mean <= 6 else 16 if mean <= 12 else 32 if mean <= 24 else 64
    depth, stages = (2, 3) if slots <= 16 else (1, 5)
    tile = StreamTile(128, 64, slots, depth, 8 if slots == 8 else 2, stages, 2)
    return StreamTiles(tile, tile)
