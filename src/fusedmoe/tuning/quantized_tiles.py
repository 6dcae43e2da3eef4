"""Tile sizes of the quantized GEMMs, as pure functions of the problem's shape.

Weight rows are the M side of a tile, slots its N side. Few slots per expert: tiles are low and
several of them share a multiprocessor, so that enough bytes are on their way. Many: tiles are
large, and what a weight costs to convert is spread over more slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

LONGEST_FP8_SUM = 256
FEWEST_PREFILL_MEAN = 16
MOST_LONE_MEAN = 64
SUPERBLOCK_COLUMNS = 256
TILED_SUPERBLOCKS = frozenset({"q2_k", "q3_k", "q6_k"})
"""Those whose columns become numbers in tiles of 32 (``kernels/triton/sixes.py``)."""
SUPERBLOCKS = frozenset({"q4_k", "q5_k"}) | TILED_SUPERBLOCKS
SEXTETS = frozenset({"e3m2", "e2m3"})
MINIMUM_BLOCKS = frozenset({"q4_1", "q5_1"})
LEAST_ORDERED_SLOTS = 64
"""Of a block, for floats of six bits to meet rows in the order of their tiles."""


@dataclass(frozen=True, slots=True)
class QuantizedTile:
    """``rows`` weight rows by ``slots`` slots, ``depth`` columns per step; ``group`` blocks of
    slots are finished before the next rows."""

    rows: int
    slots: int
    depth: int
    group: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, least in (("rows", 16), ("slots", 8), ("depth", 16)):
            size = getattr(self, name)
            if size < least or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least {least}, got {size}")
        if self.group < 1 or self.stages < 1 or self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(
                f"group {self.group} and stages {self.stages} must be positive, warps "
                f"{self.warps} a power of two up to 16"
            )


class QuantizedTiles(NamedTuple):
    """The tiles of a layer's two GEMMs; they share one alignment, so slots are the same."""

    gemm1: QuantizedTile
    gemm2: QuantizedTile


@dataclass(frozen=True, slots=True)
class QuantizedPrefillTiles:
    """Tiles of 128 slots by 256 weight rows, ``stages`` steps of 128 columns in flight; ``group``
    blocks of slots run side by side. ``promoted``, for each GEMM: products of so many steps at a
    time (1 or 2; 0: all) are added to the sums in fp32, where no scale asks for every one.
    ``finely``: int8 rows of act, too, have a scale per 128 columns, not one that a pass over act
    must find; sums of int32 end with every step then. ``box``: rows of act and y that are moved at
    once, 64, or 16 where most blocks are nearly empty."""

    stages: int = 4
    group: int = 16
    promoted: tuple[int, int] = (0, 0)
    finely: bool = False
    box: int = 64


def slots_block(R: int, E: int, most: int) -> int:
    """Slots per block: what nearly every expert's slots fit in when tokens choose at random."""
    mean = R / E
    limits = ((8, 6.0), (16, 12.0), (32, 24.0), (64, 72.0))
    return next((size for size, limit in limits if mean <= limit), most)


@lru_cache(maxsize=4096)
def weight_only_tiles(
    T: int,
    K: int,
    E: int,
    H: int,
    I: int,  # noqa: E741
    bits: int,
    groups: tuple[int, int],
    *,
    batch_invariant: bool = False,
    roomy: bool = True,
) -> QuantizedTiles:
    """Tiles for rows in floating point and weights of ``bits`` bits; ``groups``: columns that share
    a scale in w1 and w2 (-1: all); E counts local experts. Steps of more than 100 KiB: only where
    shared memory is ``roomy`` (200 KiB)."""
    R = T * K
    most = 256 if bits == 4 and roomy else 128
    slots = 64 if batch_invariant else slots_block(R, E, most)
    if slots <= 32:
        # So few blocks that low tiles are needed to occupy every multiprocessor.
        lone = R * 4 <= E and R <= 16
        deep = bits == 4 and 0 < min(groups) < 128 and not lone
        depth = 256 if deep else 128
        stages = 5 if lone else 3 if deep and slots == 32 and not roomy else 4
        tile = QuantizedTile(32 if lone else 64, slots, depth, 1, 2 if lone else 4, stages)
    elif slots == 64:
        tile = QuantizedTile(128, slots, 128, 4, 8, 3)
    else:
        tile = QuantizedTile(128, slots, 64, 8, 8, 3 if bits == 4 else 4)
    return QuantizedTiles(_fit(tile, H, groups[0]), _fit(tile, I, groups[1]))


def packed_tile(tile: QuantizedTile, element: str, *, roomy: bool = True) -> QuantizedTile:
    """For weights that take more instructions than reading them, instead of ``tile`` and with as
    many slots: superblocks are read one per step, floats of six bits in as many columns while slots
    are few, the rest by 128. Steps of many slots are large: only where shared memory is ``roomy``
    (200 KiB) is one more on its way."""
    many, sextets = tile.slots > 64, element in SEXTETS
    if element in SUPERBLOCKS:
        alone = tile.slots == 64 and element not in TILED_SUPERBLOCKS
        depth, stages = SUPERBLOCK_COLUMNS, 1 if alone or (many and not roomy) else 2
    else:
        deep = sextets and tile.slots < LEAST_ORDERED_SLOTS
        depth, stages = (
            SUPERBLOCK_COLUMNS if deep else 128,
            2 if many and not (sextets and roomy) else 3,
        )
    low = sextets or not many
    return replace(
        tile,
        rows=min(tile.rows, 64) if low else 128,
        depth=depth,
        warps=min(tile.warps, 4) if low else 8,
        stages=stages,
    )


@lru_cache(maxsize=4096)
def w8a8_tiles(
    T: int, K: int, E: int, groups: tuple[int, int], *, batch_invariant: bool = False
) -> QuantizedTiles:
    """Tiles for both operands in 8 bits; ``groups``: columns after which some scale changes in
    each GEMM, -1 for none."""
    slots = 64 if batch_invariant else slots_block(T * K, E, 64)
    if slots <= 32:
        tile = QuantizedTile(64, slots, 128, 1, 4, 4)
    else:
        group = 4 if batch_invariant or T * K <= 72 * E else 16
        tile = QuantizedTile(128, slots, 128, group, 4, 4)
    depths = [tile.depth if group == -1 else min(group, tile.depth) for group in groups]
    return QuantizedTiles(*(replace(tile, depth=depth) for depth in depths))


def expected_slots(R: int, num_local: int, num_experts: int) -> int:
    """How many of R slots over ``num_experts`` experts go to the ``num_local`` stored here, if all
    experts are chosen equally often."""
    return max(1, -(-R * num_local // num_experts))


def runs_prefill(R: int, num_experts: int) -> bool:
    """Whether R slots over ``num_experts`` experts, local or not, are enough for the prefill
    kernels with both operands in 8 bits. Blocks of 128 slots may be half empty: as long as reading
    the weights takes longer than the products, it costs nothing."""
    return FEWEST_PREFILL_MEAN * num_experts <= R


def prefill_tiles(
    R: int,
    E: int,
    H: int,
    I: int,  # noqa: E741
    element: str,
) -> QuantizedPrefillTiles:
    """Tiles of the warp-specialised kernels for R slots over E experts.

    Where few experts have two blocks, reading the weights is what takes long: tiles follow each
    other as the weights lie in memory, rows that nobody has are not moved, and int8 needs no pass
    over act (its products may end with every step).

    Tensor cores add fp8 products with 13 bits behind the largest one's first and cut the rest off.
    Simulated over 2048 columns, that costs a relative 0.9e-3 where signs are random, but 3.3e-2
    where they are all the same, as much as rounding the operands: the sum shrinks. Over
    LONGEST_FP8_SUM it is 2e-3, so longer sums are promoted as often.
    """
    promoted = tuple(2 if element == "e4m3" and D > LONGEST_FP8_SUM else 0 for D in (H, I))
    lone = R <= MOST_LONE_MEAN * E
    common = QuantizedPrefillTiles(promoted=(promoted[0], promoted[1]))
    return replace(common, group=1, finely=True, box=16) if lone else common


def _fit(tile: QuantizedTile, D: int, group: int) -> QuantizedTile:
    """The tile with a depth that groups divide or that divides them, no deeper than D needs."""
    depth = tile.depth
    while depth > 32 and depth >= 2 * D:
        depth //= 2
    if group > 0:
        while max(depth, group) % min(depth, group):
            depth //= 2
    return replace(tile, depth=depth)
