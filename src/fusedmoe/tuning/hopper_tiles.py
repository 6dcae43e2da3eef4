"""Which Hopper kernel, and its tiles: pure functions of the sizes, never of a device or of ids.

T tokens, K picks, R = T * K slots, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fusedmoe.tuning.tiles import HOPPER_MULTIPROCESSORS, HOPPER_SHARED_MEMORY

ELEMENT_BYTES = 2
LEAST_RING_BYTES = 128 * 1024  # of weights on their way to a multiprocessor
MAX_DEALT_ROUNDS = 10
LONG_ROWS = 4096  # columns of weights: so many that a task of 64 of them is long
MOST_NARROW = 384  # columns of act: so few that it tells how even the tasks are
MOST_SHORT = 1024  # columns of act: so few that a task of down is a matter of its rows


@dataclass(frozen=True)
class DecodeGemmTile:
    """One streaming GEMM: ``rows`` weight rows x ``depth`` columns per load, ``stages`` in flight.

    The up kernel loads two such tiles per step (gate and up), the down kernel one.
    """

    rows: int
    depth: int
    stages: int
    warps: int = 4

    def outlasts(self, columns: int) -> bool:
        """Whether the ring holds more than one task of so many columns."""
        return self.stages > -(-columns // self.depth)


@dataclass(frozen=True)
class DecodeTiles:
    """``block`` slots share one pass over an expert's weights; ``draws_up``: the up kernel's
    programs draw their tasks, as those of the down kernel do unless its ring outlasts a task."""

    block: int
    up: DecodeGemmTile
    down: DecodeGemmTile
    draws_up: bool = False


def decode_tiles(R: int, num_local: int, H: int, I: int) -> DecodeTiles:  # noqa: E741
    """Tiles for R routed slots over ``num_local`` experts.

    A block that overflows reads its expert's weights twice, a roomy one costs little: it has room
    for nearly three standard deviations above the mean. Of the tiles' sizes those finish first
    whose tasks come out even over the programs and which do not read token rows too often.
    """
    mean = R / num_local
    wanted = mean + 2.8 * mean**0.5  # 16 for a mean of 8
    block = next((block for block in (8, 16, 32) if wanted <= block), 64)
    blocks = min(R, num_local)
    if mean < 3:
        return _tiles_of_few(block, blocks, H, I)

    def cost(width: int, rows: int, weight_rows: int) -> float:
        rounds = -(-num_local * -(-width // rows) // HOPPER_MULTIPROCESSORS)
        # Measured: token rows cost nothing up to a quarter of the weight rows, short loads do.
        short = 0.06 if weight_rows == 64 else 0.0
        return rounds * rows * (1 + short + 0.7 * max(0.0, block / weight_rows - 0.25))

    # Of equals the smaller, whose last round ends sooner, but where its tasks are long.
    sizes = (128, 64) if H > LONG_ROWS else (64, 128)
    up = min(sizes, key=lambda rows: cost(I, rows, 2 * rows))
    if block <= 16 and I <= MOST_NARROW:
        up = 32 if I <= 96 and 0 < I % 64 <= 32 else 64  # half of a tile of 64 would be empty
    # Of equals the largest, but where it has one round of tasks: a block more would make it two.
    one_round = num_local * -(-H // 256) <= HOPPER_MULTIPROCESSORS
    down = (128, 256, 64) if one_round else (256, 128, 64)
    tiles = decode_tiles_of(block, up, min(down, key=lambda rows: cost(H, rows, rows)))
    return drawn(tiles, blocks, H, I)


def _tiles_of_few(block: int, blocks: int, H: int, I: int) -> DecodeTiles:  # noqa: E741
    """Tiles where hardly a block is full. Down's tasks of up to three steps are as large as can be,
    but where that leaves programs without one; those of few tokens, or that bring little, are
    dealt. Then up's are small: all of down waits for the last of them. Half as many rows as usual
    make two rounds of down's tasks end sooner where these take few steps."""
    few = 2 * blocks * -(-I // 64) <= 3 * HOPPER_MULTIPROCESSORS
    little = 256 * I * ELEMENT_BYTES < LEAST_RING_BYTES
    large = decode_tiles_of(block, 32 if few or little or _uneven(blocks, H, I) else 64, 256)
    if large.down.stages >= -(-I // 128) + few and blocks * -(-H // 256) >= HOPPER_MULTIPROCESSORS:
        return drawn(large, blocks, H, I, draws_down=not (few or little))
    short = I <= MOST_SHORT and blocks * -(-H // 64) <= 2 * HOPPER_MULTIPROCESSORS
    down = 64 if short else 128
    return drawn(decode_tiles_of(block, large.up.rows, down), blocks, H, I)


def _uneven(blocks: int, H: int, I: int) -> bool:  # noqa: E741
    """Whether tasks of 64 rows of gate and of up, three for each program, or four where one takes
    long, leave so many without a last one that tasks of 32 end sooner. Elsewhere down's first
    tasks fill the gap."""
    rounds = -(-blocks * -(-I // 64) // HOPPER_MULTIPROCESSORS)
    half_rounds = -(-blocks * -(-I // 32) // HOPPER_MULTIPROCESSORS)
    narrow = 128 * I * ELEMENT_BYTES < LEAST_RING_BYTES
    most = 3 if narrow else 4 if H >= LONG_ROWS else 0
    return rounds <= most and half_rounds < 2 * rounds


def drawn(
    tiles: DecodeTiles,
    blocks: int,
    H: int,
    I: int,  # noqa: E741
    draws_down: bool = True,
) -> DecodeTiles:
    """Rings no longer than a task, so that tasks can be drawn, but where too little of the weights
    would be on its way. The up kernel's tasks are drawn where they are many: there programs come
    so far apart that few read the same rows, elsewhere a task more at the end costs more."""

    def within(tile: DecodeGemmTile, columns: int, count: int) -> DecodeGemmTile:
        steps = -(-columns // tile.depth)
        enough = steps * tile.depth * tile.rows * count * ELEMENT_BYTES >= LEAST_RING_BYTES
        return replace(tile, stages=min(tile.stages, steps)) if enough else tile

    rounds = blocks * -(-I // tiles.up.rows) / HOPPER_MULTIPROCESSORS
    up, down = within(tiles.up, H, 2), within(tiles.down, I, 1) if draws_down else tiles.down
    return DecodeTiles(tiles.block, up, down, rounds > MAX_DEALT_ROUNDS)


def decode_tiles_of(block: int, up_rows: int, down_rows: int) -> DecodeTiles:
    """Rings as deep as a multiprocessor holds, for tiles of so many weight rows. Steps of half as
    many are twice as long: a step takes half a microsecond whatever it brings."""

    def ring(rows: int, count: int, warps: int) -> DecodeGemmTile:
        depth = 256 if rows == 32 else 128
        return DecodeGemmTile(rows, depth, deepest_ring(rows, count, block, depth), warps)

    return DecodeTiles(
        block,
        ring(up_rows, 2, 8 if up_rows == 128 else 4),
        ring(down_rows, 1, 8 if down_rows == 256 else 4),
    )


def deepest_ring(rows: int, tiles: int, block: int, depth: int = 128) -> int:
    """How many stages of ``depth`` columns fit beside the buffer of the transposed store."""
    stage = (tiles * rows + block) * depth * ELEMENT_BYTES
    return (HOPPER_SHARED_MEMORY - rows * block * ELEMENT_BYTES - 512) // stage


@dataclass(frozen=True)
class PrefillTiles:
    """Steps of ``depth`` columns, ``stages`` in flight. An expert's blocks of 128 rows run side by
    side, ``group`` at most (a power of two), so that they share weights in the L2."""

    depth: int = 64
    stages: int = 4
    group: int = 32


COUNTER_SLOTS = 128  # of padding behind the prefill kernel's table of slots: it counts tasks there

SUM_COLUMNS = 1024  # of one pass of a program of the prefill kernel's sum
MOST_SUM_COLUMNS = 4096


def sum_passes(H: int) -> tuple[int, int]:
    """(columns of a pass, passes) of one program of the sum: at once where they come out even,
    otherwise so that it finds the rows of a token once, in few registers."""
    if H % (2 * SUM_COLUMNS) == 0:
        return 2 * SUM_COLUMNS, 1
    return SUM_COLUMNS, min(MOST_SUM_COLUMNS // SUM_COLUMNS, -(-H // SUM_COLUMNS))


@dataclass(frozen=True)
class DirectTiles:
    """Steps of ``depth`` columns, ``stages`` in flight.

    A task's tile has ``up_rows`` rows each of gate and of up, ``up_valid`` of them loaded, in boxes
    of ``up_box``; and ``down_rows``, shared out among the picks of a token, ``down_valid`` of each
    pick loaded, in boxes of ``down_box``.
    """

    up_rows: int
    up_valid: int
    up_stages: int
    down_rows: int
    down_valid: int
    down_stages: int
    depth: int = 128

    @property
    def up_box(self) -> int:
        return self.up_valid & -self.up_valid

    @property
    def down_box(self) -> int:
        return self.down_valid & -self.down_valid


MAX_PICKS = 64  # of a token: the sums at the end of a layer hold a piece of each in registers
MAX_DIRECT_SLOTS = 32
MAX_DIRECT_TOKENS = 8
MAX_DIRECT_PICKS = 16


def are_direct(T: int, K: int, num_experts: int) -> bool:
    """Whether T tokens of K picks need no tables: one, or two that rarely share an expert."""
    alone = T == 1 or (T == 2 and num_experts >= 16 * K)
    return alone and may_be_direct(T, K)


def may_be_direct(T: int, K: int) -> bool:
    """Whether the kernel without tables takes T tokens of K picks at all."""
    return T <= MAX_DIRECT_TOKENS and T * K <= MAX_DIRECT_SLOTS and K <= MAX_DIRECT_PICKS


def _stages(rows: int, slots: int, columns: int) -> int:
    """Steps of so many weight rows and slots in 16 bits, however many columns they have."""
    return (HOPPER_SHARED_MEMORY - 2048) // ((rows + slots) * DirectTiles.depth * ELEMENT_BYTES)


def direct_tiles(
    T: int,
    K: int,
    H: int,
    I: int,  # noqa: E741
    stages: Callable[[int, int, int], int] = _stages,
) -> DirectTiles:
    """Tiles for T tokens of K picks. ``stages`` of a ring, by the weight rows and slots of a step
    and the columns of a row."""
    up = even_width(T * K, I, UP_WIDTHS)
    return direct_tiles_of(up, even_width(T, H, down_widths(K)), K, H, I, stages)


UP_WIDTHS = (16, 32, 48, 64)


def down_widths(K: int) -> tuple[int, ...]:
    """Rows of weights that a task of down may load of each pick."""
    return tuple(range(8, 128 // _padded_picks(K) + 1, 8))


def direct_tiles_of(
    up: int,
    down: int,
    K: int,
    H: int,
    I: int,  # noqa: E741
    stages: Callable[[int, int, int], int] = _stages,
) -> DirectTiles:
    """Tiles that load so many rows of weights at a time, with rings as deep as ``stages`` says."""
    picks = _padded_picks(K)
    up_rows = 32 if up <= 32 else 64
    down_rows = max(64, (1 << (down - 1).bit_length()) * picks)
    up_stages, down_stages = stages(2 * up_rows, 8, H), stages(down_rows, max(8, picks), I)
    return DirectTiles(up_rows, up, up_stages, down_rows, down, down_stages)


def _padded_picks(K: int) -> int:
    return 1 << (K - 1).bit_length()


def even_width(rows: int, columns: int, widths: tuple[int, ...]) -> int:
    """The width whose tasks, ``columns`` cut into tiles for each of ``rows``, finish first when
    they go round robin over the programs; of equals the one that loads in the largest boxes."""

    def cost(width: int) -> tuple[int, int, int]:
        rounds = -(-rows * -(-columns // width) // HOPPER_MULTIPROCESSORS)
        return rounds * width, -(width & -width), -width

    return min(widths, key=cost)


HopperTiles = DirectTiles | DecodeTiles | PrefillTiles

# With so many slots per expert, few experts have more than the largest block holds; and where one
# is small, reading some twice costs less than the other kernel's beginnings and ends.
MAX_DECODE_MEAN, MAX_DECODE_MEAN_OF_SMALL = 50, 58
SMALL_EXPERT = 8 << 20  # elements
# Of weights read twice by two tokens that share experts: the time that tables take.
MOST_READ_TWICE = 2400 << 10


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

    One token needs no tables, nor do two that rarely share an expert, where all experts are here:
    on a rank most slots have none, and tasks that are dealt without tables leave most programs
    without one. Few slots per expert stream weights; many are bound by the products.
    ``batch_invariant`` leaves out the first kernel, which rounds less often than the other two;
    those agree to the bit.
    """
    expert, mean = 3 * H * I, T * K / num_experts
    twice = 0.0 if T == 1 else expert * K * K / num_experts
    whole = num_local == num_experts and twice <= MOST_READ_TWICE
    if whole and are_direct(T, K, num_experts) and not batch_invariant:
        return direct_tiles(T, K, H, I)
    if mean > (MAX_DECODE_MEAN_OF_SMALL if expert <= SMALL_EXPERT else MAX_DECODE_MEAN):
        return PrefillTiles()
    return decode_tiles(max(1, round(mean * num_local)), num_local, H, I)
