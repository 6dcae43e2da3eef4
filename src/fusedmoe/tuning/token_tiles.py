"""How ``quantized_token.cu`` and ``quantized_token_rows.cu`` cut the layer of one token with 4-bit
weights."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

OCTET, TILE_ROWS = 128, 16  # bytes of a row in a step, rows of a tile
PLACE_BYTES = TILE_ROWS * OCTET + 8  # a place of a ring, with its barrier
MOST_OCTETS = 2  # octets of a tile whose x a warp has registers for
WARPS = range(8, 17)
FEWEST_STAGES = 2 * MOST_OCTETS
DIGIT_BYTES = 72  # digits of the columns in 16 bytes, and their unit
# Whole tiles on their way: with more, those of some programs hold up the first ones of others.
MOST_TILES_AHEAD = 4
# Shared memory of a program: at least so much that no two fit a multiprocessor, at most so much
# that the first program of the next launch, of one warp, still fits beside it.
EXCLUSIVE_BYTES, MOST_BYTES = 116 * 1024, 224 * 1024


class TokenShape(NamedTuple):
    """A layer's experts per token and sizes, the matrices in w1 (``shards``), the bytes of a row
    and of its scales in w1 and in w2, and the bytes of a bias' element (0: none)."""

    picks: int
    hidden: int
    intermediate: int
    shards: int
    row_bytes: tuple[int, int]
    scale_bytes: tuple[int, int]
    bias_bytes: int


class TokenCut(NamedTuple):
    """``warps`` of a program that multiply, of which ``up_along`` and ``down_along`` share the
    columns of a tile; ``stages`` of a warp's ring (``whole_rows``: of the program's, of whole
    tiles), for so many ``steps``; a program's ``tiles`` of w1, ``units`` of eight rows of w2 and
    ``sums`` of tiles at most; its bytes of shared memory, and those of all rings.
    """

    warps: int
    up_along: int
    down_along: int
    stages: int
    steps: int
    tiles: int
    units: int
    sums: int
    shared: int
    ring_bytes: int
    whole_rows: bool = False

    @property
    def barriers(self) -> int:
        """The rings' barriers: one tells that a place is full, and in a ring that warps share
        another one that it is empty."""
        return self.stages * (2 if self.whole_rows else self.warps)

    @property
    def threads(self) -> int:
        """Threads of a program: whole tiles are fetched by one more warp."""
        return 32 * (self.warps + self.whole_rows)

    @property
    def at_once(self) -> bool:
        """Whether all weights of a program are on their way from the beginning."""
        return self.stages == self.steps


def _counts(shape: TokenShape, programs: int) -> tuple[int, int] | None:
    """A program's tiles of w1 and units at most; None where features are no whole tiles, or scales
    of eight rows not whole 16 bytes."""
    of_tile = TILE_ROWS // shape.shards
    odd = any(size % 2 for size in shape.scale_bytes)
    if shape.intermediate % of_tile or shape.hidden % 8 or odd:
        return None
    tiles = -(-shape.picks * (shape.intermediate // of_tile) // programs)
    return tiles, -(-(shape.hidden // 8) // programs)


def _fixed_bytes(shape: TokenShape, tiles: int, units: int, sums: int) -> int:
    """Shared memory beside the rings: each row's scales and bias, sums, two barriers, picks."""
    rows = tiles * TILE_ROWS, shape.picks * units * 8
    size = sum(
        n * (scales + shape.bias_bytes) for n, scales in zip(rows, shape.scale_bytes, strict=True)
    )
    return size + 64 * sums + 16 + 8 * shape.picks + 8


@lru_cache(maxsize=1024)
def token_cut(shape: TokenShape, programs: int) -> TokenCut | None:
    """The cut whose warps have the fewest steps in all; None where there is none: rows too long for
    the registers of ``WARPS``, features that are no whole tiles, or no room for a ring."""
    octets = [-(-size // OCTET) for size in shape.row_bytes]
    warps_for = [warps for warps in WARPS if MOST_OCTETS * warps >= max(octets)]
    own_counts = _counts(shape, programs)
    if own_counts is None or not warps_for:
        return None
    tiles, units = own_counts
    counts = tiles, -(-shape.picks // 2) * units

    def along(warps: int, gemm: int) -> tuple[int, int]:
        """Steps of each warp, and how many warps share a tile for that."""
        own, count = octets[gemm], counts[gemm]
        fit = [n for n in range(warps, 0, -1) if warps % n == 0 and MOST_OCTETS * n >= own]
        steps = [-(-count // (warps // n)) * -(-own // n) for n in fit]
        return min(steps), fit[steps.index(min(steps))]

    def all_steps(warps: int) -> int:
        return warps * (along(warps, 0)[0] + along(warps, 1)[0])

    warps = min(reversed(warps_for), key=all_steps)
    (up_steps, up), (down_steps, down) = along(warps, 0), along(warps, 1)
    sums = max(counts[0] * up, counts[1] * down)
    fixed = _fixed_bytes(shape, tiles, units, sums)
    # Warps that share a row may have more octets together than it has.
    up_octets, down_octets = (n * -(-own // n) for n, own in zip((up, down), octets, strict=True))
    fixed += DIGIT_BYTES * 8 * max(up_octets, shape.picks * down_octets) + 16
    steps = up_steps + down_steps
    stages = min(steps, 32, (MOST_BYTES - fixed) // (warps * PLACE_BYTES))
    if stages < min(FEWEST_STAGES, steps):
        return None
    shared = max(EXCLUSIVE_BYTES, fixed + stages * warps * PLACE_BYTES)
    ring = warps * stages * TILE_ROWS * OCTET
    return TokenCut(warps, up, down, stages, steps, tiles, units, sums, shared, ring)


@lru_cache(maxsize=1024)
def token_rows_cut(shape: TokenShape, programs: int) -> TokenCut | None:
    """The cut by whole rows, an octet of columns for each warp; None where there is none."""
    warps, counts = -(-max(shape.row_bytes) // OCTET), _counts(shape, programs)
    if counts is None or warps not in range(1, WARPS.stop):
        return None
    tiles, units = counts
    pairs = -(-shape.picks // 2)
    sums, steps = max(tiles, pairs * units) * warps, tiles + pairs * units
    fixed, place = _fixed_bytes(shape, tiles, units, sums), TILE_ROWS * max(shape.row_bytes)
    stages = min(steps, MOST_TILES_AHEAD, (MOST_BYTES - fixed) // (place + 16))
    if stages < min(2, steps):
        return None
    shared = max(EXCLUSIVE_BYTES, fixed + stages * (place + 16))
    along = warps, warps
    return TokenCut(warps, *along, stages, steps, tiles, units, sums, shared, stages * place, True)
