"""Tiles of the prefill kernels for quantized weights and 16-bit rows, as pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# From so many slots per expert on, reading and converting all weights is worth it.
_FEWEST, _FEWEST_ALONE, _FEWEST_WITH_MINIMA = 16, 8, 32
# (weight rows, slots, steps in a stage, group), the stages by bits of weights, and the stages with
# outputs in fp32: rows of x, words of weights and outputs have to fit shared memory.
_FEW = (256, 64, 2, 8), {4: 5, 8: 4}, {4: 5, 8: 3}
_SOME = (192, 128, 2, 8), {4: 4, 8: 3}, {4: 3, 8: 2}
_MANY = (128, 256, 1, 8), {4: 5, 8: 4}, {4: 4, 8: 4}


@dataclass(frozen=True, slots=True)
class MixedPrefillTile:
    """``rows`` weight rows by ``slots`` slots: 256 by 64, 192 by 128 or 128 by 256, a warpgroup for
    every 64 rows. A block that is not full multiplies fewer slots: 192 of 256; 64 or 32 of 128; 32
    of 64.

    ``stages`` of ``steps`` times 64 columns in flight; ``group`` blocks of slots are finished
    before the next ones begin.
    """

    rows: int
    slots: int
    steps: int
    group: int
    stages: int

    def __post_init__(self) -> None:
        if (self.rows, self.slots) not in ((256, 64), (192, 128), (128, 256)):
            raise ValueError(
                "tiles are 256 rows by 64 slots, 192 by 128 or 128 by 256, not "
                f"{self.rows} by {self.slots}"
            )
        if self.steps not in (1, 2):
            raise ValueError(f"a stage has one or two steps, not {self.steps}")
        if self.stages < 2 or self.group < 1:
            raise ValueError(f"{self.stages} stages and groups of {self.group} are too few")


class MixedPrefillTiles(NamedTuple):
    """The tiles of a layer's two GEMMs, which share one alignment and so the slots. Blocks of 256
    slots go with ``tails``: tiles of 128 slots for what is left of an expert, if it fits them."""

    gemm1: MixedPrefillTile
    gemm2: MixedPrefillTile
    tails: tuple[MixedPrefillTile, MixedPrefillTile] | None = None

    def check(self) -> None:
        """Raise ValueError where slots do not go together."""
        slots = self.gemm1.slots, self.gemm2.slots
        if slots[0] != slots[1]:
            raise ValueError(f"blocks of {slots[0]} and {slots[1]} slots differ")
        tails = None if self.tails is None else tuple(tile.slots for tile in self.tails)
        if tails != ((128, 128) if slots[0] == 256 else None):
            raise ValueError(f"blocks of {slots[0]} slots do not go with tails of {tails}")


def runs_mixed_prefill(
    R: int, num_experts: int, *, streams: bool = True, minima: bool = False
) -> bool:
    """Whether R slots over ``num_experts`` experts, local or not, are enough for these kernels;
    ``streams``: fewer would be streamed; ``minima``: numbers are scaled and shifted one by one."""
    fewest = _FEWEST_WITH_MINIMA if minima else _FEWEST if streams else _FEWEST_ALONE
    return num_experts * fewest <= R


def mixed_prefill_tiles(
    R: int,
    E: int,
    bits: tuple[float, float],
    *,
    costly: bool = False,
    wide: bool = False,
) -> MixedPrefillTiles:
    """Tiles for R slots over E experts, local or not, and weights w1 and w2 of so many bits.

    Numbers are made once per block, so blocks are as large as the mean number of slots fills, and
    the sooner the more they cost (``costly``). ``wide``: rows of the second GEMM are in fp32.
    """
    if R <= 48 * E:
        return MixedPrefillTiles(*_tiles(_FEW, bits, wide))
    if (96 if costly else 128) * E >= R:
        return MixedPrefillTiles(*_tiles(_SOME, bits, wide))
    return MixedPrefillTiles(*_tiles(_MANY, bits, wide), tails=_tiles(_SOME, bits, wide))


def _tiles(
    shape: tuple[tuple[int, int, int, int], dict[int, int], dict[int, int]],
    bits: tuple[float, float],
    wide: bool,
) -> tuple[MixedPrefillTile, MixedPrefillTile]:
    tile, stages, wide_stages = shape
    first, second = (4 if width < 5 else 8 for width in bits)
    return (
        MixedPrefillTile(*tile, stages[first]),
        MixedPrefillTile(*tile, (wide_stages if wide else stages)[second]),
    )
