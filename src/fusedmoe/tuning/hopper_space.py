"""Which tiles the Hopper kernels have at all, and which of them are worth measuring for a batch.

Pure functions of the sizes. T tokens, K picks, E local experts, H hidden, I intermediate.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

from fusedmoe.tuning.hopper_tiles import (
    MAX_DIRECT_PICKS,
    UP_WIDTHS,
    DecodeTiles,
    DirectTiles,
    HopperTiles,
    PrefillTiles,
    decode_tiles,
    decode_tiles_of,
    direct_tiles,
    direct_tiles_of,
    down_widths,
    drawn,
    may_be_direct,
)

BLOCKS = (8, 16, 32, 64)
UP_ROWS = (32, 64, 128)
DOWN_ROWS = (64, 128, 256)
GROUPS = (8, 16, 32, 64)
# Slots per expert between which both the streaming and the other kernel are worth a try.
LEAST_PREFILL_MEAN, MOST_DECODE_MEAN = 16, 128


@lru_cache(maxsize=64)
def hopper_space(K: int, H: int, I: int) -> frozenset[HopperTiles]:  # noqa: E741
    """All tiles that fit a layer of these sizes, whatever the batch: what a table may name."""
    found: set[HopperTiles] = {PrefillTiles(group=group) for group in GROUPS}
    found |= {tiles for block in BLOCKS for tiles in _streaming(block, H, I)}
    if K <= MAX_DIRECT_PICKS:
        widths = itertools.product(UP_WIDTHS, down_widths(K))
        found |= {direct_tiles_of(up, down, K, H, I) for up, down in widths}
    return frozenset(found)


def serves(tiles: HopperTiles, T: int, K: int, E: int) -> bool:
    """Whether these tiles are worth a try for T tokens; the kernel without tables takes no more
    than it can."""
    if isinstance(tiles, DirectTiles):
        return may_be_direct(T, K)
    mean = T * K / E
    if isinstance(tiles, PrefillTiles):
        return mean >= LEAST_PREFILL_MEAN
    return mean <= MOST_DECODE_MEAN


def hopper_candidates(T: int, K: int, E: int, H: int, I: int) -> list[HopperTiles]:  # noqa: E741
    """Tiles worth measuring for T tokens."""
    found: list[HopperTiles] = []
    if may_be_direct(T, K):
        own = direct_tiles(T, K, H, I)
        ups = [direct_tiles_of(up, own.down_valid, K, H, I) for up in UP_WIDTHS]
        downs = [direct_tiles_of(own.up_valid, down, K, H, I) for down in down_widths(K)]
        found += [own, *ups, *downs]
    wanted = decode_tiles(T * K, E, H, I).block
    near = [block for block in BLOCKS if wanted // 2 <= block <= 2 * wanted]
    found += [tiles for block in near for tiles in _streaming(block, H, I)]
    found += [PrefillTiles(group=group) for group in GROUPS]
    return [tiles for tiles in dict.fromkeys(found) if serves(tiles, T, K, E)]


def _streaming(block: int, H: int, I: int) -> list[DecodeTiles]:  # noqa: E741
    """All sizes of tiles, their tasks dealt and drawn."""
    found: dict[DecodeTiles, None] = {}
    for up, down in itertools.product(UP_ROWS, DOWN_ROWS):
        for draws_down in (True, False):
            tiles = drawn(decode_tiles_of(block, up, down), 1, H, I, draws_down=draws_down)
            for draws_up in (False, True):
                found[DecodeTiles(tiles.block, tiles.up, tiles.down, draws_up)] = None
    return list(found)
