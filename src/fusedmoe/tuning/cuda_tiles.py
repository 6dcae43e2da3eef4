"""How the kernels of ``kernels/cuda`` cut the two GEMMs of few slots per expert with quantized
weights: ``quantized_lone.cu``, ``quantized_rows.cu``, ``quantized_warps.cu`` or
``quantized_stream.cu``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

STEP = 128  # bytes of a row at a time
WARPS = 4  # of a program whose warps work independently
LONE_STAGES, LONE_PROGRAMS = 3, 3
# Blocks of eight slots, up to an average of EIGHT_MEAN slots per expert.
EIGHT_MEAN, EIGHT_STAGES, EIGHT_PROGRAMS = 6, 4, 4
# The same for numbers that are entries of a table: one program, as each has its own table.
TABLE_WARPS, TABLE_STAGES, TABLE_BYTES = 16, 3, 32 * 1024
TABLE_STEP, TABLE_MEAN = 64, 8
# Whole rows: bytes that one matrix instruction takes of each; warps of a program, and how many such
# pairs of chunks each has registers for, of x for one or two eights of slots; bytes of ring and
# sums, and how many steps are on their way at a time.
ROWS_STEP = 32
ROWS_PAIRS = ((12, (8, 4)), (8, (14, 8)))
ROWS_BYTES, ROWS_AHEAD = 220 * 1024, 2
# int4 by whole rows: pairs of a warp, warps of a program, or of one for rows too long for those.
INT4_PAIRS, INT4_WARPS, INT4_MOST_WARPS = 8, 8, 14
INT4_BYTES = 226 * 1024
# The most slots that are a block each, or that programs by whole rows put into blocks themselves.
MAX_LONE_SLOTS = MOST_MADE = 32
# A launch whose last round of tasks is this full gains nothing by more warps per task.
FULL_ENOUGH = 0.85


def _check_depth(stages: int, programs: int) -> None:
    if stages < 2 or programs < 1:
        raise ValueError(
            f"got {stages} stages in {programs} programs: stages are two at least, programs "
            "positive"
        )


@dataclass(frozen=True, slots=True)
class _OwnRings:
    """``tiles`` times 16 weight rows per warp, ``across`` warps side by side, ``along`` that share
    the columns; ``stages`` steps in a warp's ring; so many programs per multiprocessor."""

    tiles: int
    along: int
    across: int
    stages: int
    per_multiprocessor: int

    def __post_init__(self) -> None:
        warps = self.along * self.across
        if self.tiles < 1 or not 1 <= warps <= 16:
            raise ValueError(
                f"{self.tiles} tiles and {warps} warps: tiles are positive, warps at most 16"
            )
        _check_depth(self.stages, self.per_multiprocessor)


class CudaLoneTile(_OwnRings):
    """One slot by the rows of its warps."""

    __slots__ = ()


class CudaWarpsTile(_OwnRings):
    """Eight slots by the rows of its warps."""

    __slots__ = ()

    @property
    def slots(self) -> int:
        """Of a block."""
        return 8


@dataclass(frozen=True, slots=True)
class CudaRowsTile(_OwnRings):
    """``slots`` slots by whole rows, or by one of ``parts`` of them: ``stages`` are those of a
    program's ring, ``ahead`` of them on their way at a time; every warp has its part of x."""

    ahead: int = 99
    slots: int = 8
    parts: int = 1


@dataclass(frozen=True, slots=True)
class CudaStreamTile:
    """``slots`` slots by 16 weight rows for each of ``warps`` warps, all in step; ``stages`` steps
    in a program's ring; so many programs per multiprocessor."""

    slots: int
    warps: int
    stages: int
    per_multiprocessor: int

    def __post_init__(self) -> None:
        if self.slots not in (8, 16, 24, 32) or self.warps not in (4, 8, 12, 16):
            raise ValueError(
                f"{self.slots} slots and {self.warps} warps: slots are 8, 16, 24 or 32, warps "
                "4, 8, 12 or 16"
            )
        _check_depth(self.stages, self.per_multiprocessor)


class CudaDecodeTiles(NamedTuple):
    """The tiles of a layer's two GEMMs, with the same slots."""

    gemm1: CudaLoneTile | CudaWarpsTile | CudaRowsTile | CudaStreamTile
    gemm2: CudaLoneTile | CudaWarpsTile | CudaRowsTile | CudaStreamTile

    @property
    def slots(self) -> int:
        """Slots of a block; lone slots are one."""
        return 1 if isinstance(self.gemm1, CudaLoneTile) else self.gemm1.slots

    @property
    def made(self) -> int:
        """The most slots of which both kernels make the blocks themselves."""
        if self.slots == 1:
            return MAX_LONE_SLOTS
        return MOST_MADE if {type(one) for one in self} == {CudaRowsTile} else 0

    @property
    def paired(self) -> bool:
        """Whether both GEMMs want their rows in ``PairedOrder``."""
        return isinstance(self.gemm1, CudaStreamTile)


# (the most slots per expert on average, the tile for them)
STREAM_TILES = (
    (10.0, CudaStreamTile(16, 16, 4, 1)),
    (16.0, CudaStreamTile(24, 16, 4, 1)),
    (24.0, CudaStreamTile(32, 12, 4, 1)),
)


@lru_cache(maxsize=4096)
def cuda_decode_tiles(
    R: int,
    e: int,
    rows: tuple[int, int],
    row_bytes: tuple[int, int],
    lone: bool,
    programs: int,
) -> CudaDecodeTiles:
    """Tiles for R slots over e local experts whose two matrices have ``rows`` of ``row_bytes``.
    ``lone``: every slot is a block. ``programs``: the number of multiprocessors."""
    sizes = tuple(zip(rows, row_bytes, strict=True))
    if lone:
        first, second = (_along(R, *size, LONE_PROGRAMS * programs) for size in sizes)
        return CudaDecodeTiles(
            CudaLoneTile(2, first, WARPS // first, LONE_STAGES, LONE_PROGRAMS),
            CudaLoneTile(2, second, WARPS // second, LONE_STAGES, LONE_PROGRAMS),
        )
    if EIGHT_MEAN * e >= R:
        blocks = min(R, e)
        return CudaDecodeTiles(*(eights_tile(blocks, *size, programs) for size in sizes))
    tile = next((tile for most, tile in STREAM_TILES if most * e >= R), STREAM_TILES[-1][1])
    return CudaDecodeTiles(tile, tile)


def eights_tile(blocks: int, rows: int, row_bytes: int, programs: int) -> CudaWarpsTile:
    """The tile for ``blocks`` blocks of eight slots and a matrix of ``rows`` rows of ``row_bytes``;
    ``programs``: the number of multiprocessors."""
    along = _along(blocks, rows, row_bytes, EIGHT_PROGRAMS * programs)
    return CudaWarpsTile(2, along, WARPS // along, EIGHT_STAGES, EIGHT_PROGRAMS)


@lru_cache(maxsize=4096)
def table_tile(blocks: int, rows: int, row_bytes: int, programs: int) -> CudaWarpsTile:
    """``eights_tile`` for a matrix of entries of a table."""
    choices = [n for n in (1, 2, 4, 8) if n == 1 or n * TABLE_STEP <= row_bytes]
    along = _fullest(blocks, rows, choices, TABLE_WARPS, programs)
    return CudaWarpsTile(2, along, TABLE_WARPS // along, TABLE_STAGES, 1)


@lru_cache(maxsize=4096)
def rows_tile(
    features: int, shards: int, row_bytes: int, scale_bytes: int, slots: int, splits: bool
) -> CudaRowsTile | None:
    """The tile for blocks of ``slots`` slots and a matrix of ``features``, each a row per shard of
    ``row_bytes`` and ``scale_bytes``; None where none fits. ``splits``: rows may be read in parts.
    """
    pairs, rest = divmod(row_bytes, ROWS_STEP)
    eights, of_tile = -(-slots // 8), 16 // shards
    if rest or eights > 2:
        return None
    found = [
        (parts, warps, most[eights - 1])
        for parts in ((1, 2, 4) if splits else (1,))
        for warps, most in ROWS_PAIRS
        if pairs <= parts * warps * most[eights - 1]
        and (parts == 1 or (row_bytes % (parts * STEP) == 0 and scale_bytes % 16 == 0))
    ]
    if not found:
        return None
    parts, warps, most_pairs = found[0]
    own, (_, boxes) = pairs // parts, scale_boxes(scale_bytes, parts)

    def beside(along: int) -> int:
        """How many warps can stand side by side; none where scales come not with their warps."""
        fitting = (n for n in range(warps // along, 0, -1) if features % (n * of_tile) == 0)
        apart = along % boxes or (boxes > 1 and scale_bytes // parts % 16)
        return 0 if apart else next(fitting, 0)

    def busy(along: int) -> float:
        """How many warps' worth of products are done at a time."""
        return beside(along) * own / -(-own // along)

    least = -(-own // most_pairs)
    along = max((least, min(least + 1, warps)), key=busy)
    across = beside(along)
    if across == 0:
        return None

    def stages(tiles: int) -> int:
        stage = across * tiles * 16 * (row_bytes + scale_bytes) // parts
        return min(8, (ROWS_BYTES - 1024 * along * across * eights) // stage)

    both = across == 1 and features % (2 * of_tile) == 0 and stages(2) >= 3
    tiles = 2 if both else 1
    return CudaRowsTile(tiles, along, across, stages(tiles), 1, ROWS_AHEAD, slots, parts)


@lru_cache(maxsize=4096)
def int4_rows_tile(
    features: int, shards: int, row_bytes: int, scale_bytes: int, slots: int, splits: bool
) -> CudaRowsTile | None:
    """``rows_tile`` for int4: few warps, with two tiles of rows each where two stages of them fit.
    A row has as few parts as let ``INT4_WARPS`` hold their x, or is read whole by more warps.
    """
    pairs, rest = divmod(row_bytes, ROWS_STEP)
    eights, of_tile = -(-slots // 8), 16 // shards
    if rest or eights > 2:
        return None

    def cut(parts: int, most: int) -> CudaRowsTile | None:
        if parts > 1 and (row_bytes % (parts * STEP) or scale_bytes % 16):
            return None
        along, (_, boxes) = -(-pairs // (parts * INT4_PAIRS)), scale_boxes(scale_bytes, parts)
        if along > most or along % boxes or (boxes > 1 and scale_bytes // parts % 16):
            return None
        shapes = [(2, INT4_WARPS), (1, INT4_WARPS)]
        if along == eights == 1 and features % (INT4_MOST_WARPS * of_tile) == 0:
            shapes.insert(0, (1, INT4_MOST_WARPS))  # short rows: all by more warps
        for tiles, warps in shapes:
            beside = range(max(1, warps // along), 0, -1)
            across = next((n for n in beside if features % (n * tiles * of_tile) == 0), 0)
            room = INT4_BYTES - 1024 * along * across * eights
            stage = across * tiles * 16 * (row_bytes + scale_bytes) // parts
            of_x = 128 * INT4_PAIRS * along * across * eights  # at most
            if across and 2 * stage + of_x <= room:
                stages = min(8, room // stage)
                return CudaRowsTile(tiles, along, across, stages, 1, ROWS_AHEAD, slots, parts)
        return None

    most = INT4_MOST_WARPS if eights == 1 else INT4_WARPS
    cuts = [(parts, INT4_WARPS) for parts in ((1, 2, 4) if splits else (1,))]
    return next(filter(None, (cut(*one) for one in (*cuts, (1, most)))), None)


def scale_boxes(row: int, parts: int) -> tuple[int, int]:
    """Bytes of a row of scales that the copy engine brings at a time, and how many of those boxes a
    part of the row takes; (0, 1): rows come as they lie. Boxes are for rows in ``parts``, and for
    rows of which eight would lie in few banks of shared memory."""
    if parts == 1 and (row % 64 or row < 256):
        return 0, 1
    own = row // parts
    most = max(own + i * own % 16 for i in range(parts))
    boxes = -(-most // 256)
    return -(-most // boxes // 16) * 16, boxes


def _along(blocks: int, rows: int, row_bytes: int, resident: int) -> int:
    """As few warps along a task's columns as fill the ``resident`` programs."""
    choices = [along for along in (1, 2, 4) if along == 1 or along * STEP <= row_bytes]
    return _fullest(blocks, rows, choices, WARPS, resident)


def _fullest(blocks: int, rows: int, choices: list[int], warps: int, resident: int) -> int:
    """The first of ``choices`` whose programs, of so many warps, fill the ``resident`` ones."""

    def fullness(along: int) -> float:
        rounds = blocks * -(-rows // (32 * (warps // along))) / resident
        return rounds / -(-rounds // 1)

    along = next((n for n in choices if fullness(n) >= FULL_ENOUGH), None)
    return along or max(choices, key=lambda n: (fullness(n), n))
