"""Tile choice of the Hopper kernels: pure functions of the sizes, never of a device or of ids."""

from __future__ import annotations

from dataclasses import dataclass


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
        return DecodeTiles(block, DecodeGemmTile(128, 64, 3, 8), DecodeGemmTile(256, 64, 3, 8))
    # Half tiles while there are fewer whole ones than multiprocessors.
    half = R * -(-H // 128) < 128
    down = DecodeGemmTile(64, 128, 12) if half else DecodeGemmTile(128, 128, 6)
    return DecodeTiles(8 if mean <= 8 else 16, DecodeGemmTile(64, 128, 6), down)
