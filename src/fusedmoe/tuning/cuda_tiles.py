"""How ``kernels/cuda/quantized_decode.cu`` cuts the two GEMMs of few slots per expert."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

WARPS = 4
# A launch whose last round of tasks is so full wants no more warps per task.
FULL_ENOUGH = 0.85
# (slots of a block, the most slots per expert on average)
SLOTS = ((8, 6.0), (16, 12.0), (32, 24.0))


@dataclass(frozen=True, slots=True)
class CudaDecodeTile:
    """``tiles`` of 16 weight rows and ``slots`` slots per warp, ``across`` warps side by side,
    ``along`` that share the columns; ``step`` bytes of a row at a time, ``stages`` of them in a
    warp's ring; so many programs per multiprocessor."""

    tiles: int
    slots: int
    along: int
    across: int
    step: int
    stages: int
    per_multiprocessor: int

    def __post_init__(self) -> None:
        warps = self.along * self.across
        if self.tiles < 1 or self.slots < 8 or self.slots % 8 or not 1 <= warps <= 16:
            raise ValueError(
                f"{self.tiles} tiles, {self.slots} slots and {warps} warps: tiles are positive, "
                "slots a multiple of 8, warps at most 16"
            )
        if self.step not in (64, 128) or self.stages < 2 or self.per_multiprocessor < 1:
            raise ValueError(
                f"got {self.stages} steps of {self.step} bytes in {self.per_multiprocessor} "
                "programs: steps are of 64 or 128, two at least, programs positive"
            )


class CudaDecodeTiles(NamedTuple):
    """Of a layer's two GEMMs; slots are the same."""

    gemm1: CudaDecodeTile
    gemm2: CudaDecodeTile


@lru_cache(maxsize=4096)
def cuda_decode_tiles(
    R: int,
    e: int,
    rows: tuple[int, int],
    row_bytes: tuple[int, int],
    lone: bool,
    programs: int,
) -> CudaDecodeTiles:
    """For R slots over e local experts whose two matrices have so many rows of so many bytes;
    ``lone``: every slot is a block. ``programs``: the number of multiprocessors."""
    slots = next((size for size, most in SLOTS if most * e >= R), SLOTS[-1][0])
    blocks = R if lone else min(R, e)
    return CudaDecodeTiles(
        *(
            _tile(blocks, slots, N, row, lone, programs)
            for N, row in zip(rows, row_bytes, strict=True)
        )
    )


def _tile(
    blocks: int, slots: int, rows: int, row_bytes: int, lone: bool, programs: int
) -> CudaDecodeTile:
    """As few warps per task as fill the multiprocessors, two steps for each at least."""
    resident = {8: 4, 16: 3, 32: 2}[slots]
    step = 64

    def fullness(along: int) -> float:
        tasks = blocks * -(-rows // (32 * (WARPS // along)))
        rounds = tasks / (programs * resident)
        return rounds / -(-rounds // 1)

    choices = [along for along in (1, 2, 4) if along == 1 or along * 2 * step <= row_bytes]
    along = next((n for n in choices if fullness(n) >= FULL_ENOUGH), None)
    if along is None:
        along = max(choices, key=lambda n: (fullness(n), n))
    return CudaDecodeTile(2, slots, along, WARPS // along, step, 5 if lone else 4, resident)
