"""Tiles of the prefill kernels for quantized weights and 16-bit rows, as pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# Rows of x and words of weights of one step, and the output on its way, have to fit.
_STAGES = {(256, 4): 7, (256, 8): 5, (128, 4): 5, (128, 8): 4}


@dataclass(frozen=True, slots=True)
class MixedPrefillTile:
    """``rows`` weight rows by ``slots`` slots: 256 by 128 or 128 by 256. ``stages`` steps of 64
    columns in flight; ``group`` blocks of slots are finished before the next ones begin. ``ahead``:
    256 rows are prepared while the step before is multiplied, as 128 always are."""

    rows: int
    slots: int
    stages: int
    group: int
    ahead: bool = False

    def __post_init__(self) -> None:
        if (self.rows, self.slots) not in ((256, 128), (128, 256)):
            raise ValueError(
                f"tiles are 256 rows by 128 slots or 128 by 256, not {self.rows} by {self.slots}"
            )
        if self.ahead and self.rows == 128:
            raise ValueError("128 rows are prepared ahead anyway")
        if self.stages < 2 or self.group < 1:
            raise ValueError(f"{self.stages} stages and groups of {self.group} are too few")


class MixedPrefillTiles(NamedTuple):
    """Of a layer's two GEMMs; they share one alignment, so slots are the same."""

    gemm1: MixedPrefillTile
    gemm2: MixedPrefillTile


def mixed_prefill_tiles(R: int, E: int, bits: tuple[float, float]) -> MixedPrefillTiles:
    """Tiles for R slots over E experts, local or not, and weights w1 and w2 of so many bits.

    Numbers are made once per block: blocks of 256 slots need half as many, unless they would be
    half empty.
    """
    rows = 256 if R <= 128 * E else 128
    group = 16 if rows == 256 else 8
    first, second = (
        MixedPrefillTile(rows, 384 - rows, _STAGES[rows, 4 if width <= 4 else 8], group)
        for width in bits
    )
    return MixedPrefillTiles(first, second)
