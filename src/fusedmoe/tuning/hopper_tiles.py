"""Tile choice of the Hopper kernels: pure functions of the sizes, never of a device or of ids."""

from __future__ import annotations

from dataclasses import dataclass

SHARED_BYTES = 227 * 1024  # what one program may have on compute capability 9.0
ELEMENT_BYTES = 2


@dataclass(frozen=True)
class DecodeGemmTile:
    """One streaming GEMM: ``rows`` weight rows x ``depth`` columns per load, ``stages`` in flight.

    The up kernel loads two such tiles per step (gate and up), the down kernel one.
    """

    rows: int
    depth: int
    stages: int
    warps: int = 4


@dataclass(frozen=True)
class DecodeTiles:
    """``block`` slots share one pass over an expert's weights."""

    block: int
    up: DecodeGemmTile
    down: DecodeGemmTile


def decode_tiles(R: int, num_local: int, H: int) -> DecodeTiles:
    """Tiles for R routed slots over ``num_local`` experts."""
    mean = R / num_local
    if mean > 16:
        block = 32 if mean <= 32 else 64
        return DecodeTiles(
            block,
            DecodeGemmTile(128, 128, deepest_ring(128, 2, 128, block), 8),
            DecodeGemmTile(256, 128, deepest_ring(256, 1, 128, block), 8),
        )
    block = 8 if mean <= 8 else 16
    # Half tiles while there are fewer whole ones than multiprocessors.
    rows = 64 if R * -(-H // 128) < 128 else 128
    return DecodeTiles(
        block,
        DecodeGemmTile(64, 128, deepest_ring(64, 2, 128, block)),
        DecodeGemmTile(rows, 128, deepest_ring(rows, 1, 128, block)),
    )


def deepest_ring(rows: int, tiles: int, depth: int, block: int) -> int:
    """How many stages fit a multiprocessor beside the buffer of the transposed store."""
    stage = (tiles * rows + block) * depth * ELEMENT_BYTES
    return (SHARED_BYTES - rows * block * ELEMENT_BYTES - 512) // stage


@dataclass(frozen=True)
class PrefillTiles:
    """Steps of ``depth`` columns, ``stages`` in flight; ``group`` blocks of 128 rows run side by
    side so that they share weights in the L2."""

    depth: int = 64
    stages: int = 4
    group: int = 16


@dataclass(frozen=True)
class VectorTiles:
    """Steps of 16 weight rows x ``depth`` columns (up: twice that), ``stages`` in flight."""

    up_depth: int
    up_stages: int
    down_depth: int
    down_stages: int
    warps: int = 4


def vector_tiles(T: int, K: int, H: int, I: int, share: float = 1.0) -> VectorTiles | None:  # noqa: E741
    """Rings that leave room for the vectors, in ``share`` of a multiprocessor's shared memory.

    None where fewer than 4 stages fit.
    """
    room = int(SHARED_BYTES * share) - 1024
    up, down = 256, 512
    stage = 16 * 512 * ELEMENT_BYTES
    up_stages = (room - T * -(-H // up) * up * ELEMENT_BYTES) // stage
    down_stages = (room - T * K * -(-I // down) * down * ELEMENT_BYTES) // stage
    if min(up_stages, down_stages) < 4:
        return None
    return VectorTiles(up, up_stages, down, down_stages)
