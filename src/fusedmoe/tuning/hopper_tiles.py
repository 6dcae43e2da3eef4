"""Which Hopper kernel, and its tiles: pure functions of the sizes, never of a device or of ids.

T tokens, K picks, R = T * K slots, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARED_BYTES = 227 * 1024  # what one program may have on compute capability 9.0
ELEMENT_BYTES = 2
TYPICAL_PROGRAMS = 128  # about one per multiprocessor


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


def decode_tiles(R: int, num_local: int, H: int, I: int) -> DecodeTiles:  # noqa: E741
    """Tiles for R routed slots over ``num_local`` experts."""
    mean = R / num_local
    block = 8 if mean <= 8 else 16 if mean <= 16 else 32 if mean <= 32 else 64
    active = min(R, num_local)
    # Wide tiles read the token rows half as often; they need tasks enough for a few rounds.
    if active * -(-I // 128) >= 3 * TYPICAL_PROGRAMS:
        return wide_tiles(block)
    half = active * -(-H // 128) < TYPICAL_PROGRAMS
    return narrow_tiles(block, 64 if half else 128)


def wide_tiles(block: int) -> DecodeTiles:
    return DecodeTiles(
        block,
        DecodeGemmTile(128, 128, deepest_ring(128, 2, 128, block), 8),
        DecodeGemmTile(256, 128, deepest_ring(256, 1, 128, block), 8),
    )


def narrow_tiles(block: int, down_rows: int = 128, share: float = 1.0) -> DecodeTiles:
    return DecodeTiles(
        block,
        DecodeGemmTile(64, 128, deepest_ring(64, 2, 128, block, share)),
        DecodeGemmTile(down_rows, 128, deepest_ring(down_rows, 1, 128, block, share)),
    )


def deepest_ring(rows: int, tiles: int, depth: int, block: int, share: float = 1.0) -> int:
    """How many stages fit, beside the buffer of the transposed store, in ``share`` of a
    multiprocessor's shared memory."""
    stage = (tiles * rows + block) * depth * ELEMENT_BYTES
    return (int(SHARED_BYTES * share) - rows * block * ELEMENT_BYTES - 512) // stage


@dataclass(frozen=True)
class PrefillTiles:
    """Steps of ``depth`` columns, ``stages`` in flight; ``group`` blocks of 128 rows run side by
    side so that they share weights in the L2."""

    depth: int = 64
    stages: int = 4
    group: int = 16


@dataclass(frozen=True)
class DirectTiles:
    """Steps of ``depth`` columns, ``stages`` in flight: ``up_rows`` of gate and of up, and
    ``down_rows`` shared out among the picks of a token. ``shared``: the rings of both launches fit
    one multiprocessor together."""

    up_rows: int
    up_stages: int
    down_rows: int
    down_stages: int
    shared: bool
    depth: int = 128


MAX_DIRECT_SLOTS = 32
MAX_DIRECT_TOKENS = 8
MAX_DIRECT_PICKS = 16
HOPPER_PROGRAMS = 132  # one per multiprocessor of an H100 or H200


def direct_tiles(
    T: int,
    K: int,
    H: int,
    I: int,  # noqa: E741
    *,
    shared: bool | None = None,
) -> DirectTiles:
    """Tiles for T tokens of K picks. Low tiles, in rings that share a multiprocessor, where whole
    ones would leave the last round of programs emptier; ``shared`` forces the latter."""
    low, whole = (-(-T * K * -(-I // rows) // HOPPER_PROGRAMS) * rows for rows in (32, 64))
    up_rows = 32 if low < whole else 64
    if shared is None:
        shared = low < whole
    depth, picks = 128, 1 << (K - 1).bit_length()
    room = SHARED_BYTES // (2 if shared else 1) - 2048
    # Whole tiles where they are enough to keep every multiprocessor busy.
    down = 128 if T * -(-H // (128 // picks)) >= 120 else max(64, 8 * picks)
    row = depth * ELEMENT_BYTES
    return DirectTiles(
        up_rows,
        room // ((2 * up_rows + 8) * row),
        down,
        room // ((down + max(8, picks)) * row),
        shared,
        depth,
    )


HopperTiles = DirectTiles | DecodeTiles | PrefillTiles

# Beyond so many slots per expert the products take longer than reading the weights.
MAX_DECODE_MEAN = 64


def hopper_tiles(
    T: int,
    K: int,
    num_experts: int,
    num_local: int,
    H: int,
    I: int,  # noqa: E741
    *,
    batch_invariant: bool = False,
) -> HopperTiles:
    """The kernel for T tokens routed over ``num_experts``, ``num_local`` of them stored here.

    One token needs no tables, nor do two that rarely share an expert; few slots per expert stream
    weights; many are bound by the products. ``batch_invariant`` leaves out the first, which rounds
    less often than the other two; those agree to the bit.
    """
    R = T * K
    alone = T == 1 or (T == 2 and num_experts >= 8 * K)
    if alone and not batch_invariant and R <= MAX_DIRECT_SLOTS and K <= MAX_DIRECT_PICKS:
        return direct_tiles(T, K, H, I)
    mean = R / num_experts
    if mean > MAX_DECODE_MEAN:
        return PrefillTiles()
    return decode_tiles(max(1, round(mean * num_local)), num_local, H, I)
