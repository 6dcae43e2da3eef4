"""The choice of Hopper kernel and tiles: a function of sizes that always fits the hardware."""

import itertools

import pytest

from fusedmoe.tuning.hopper_tiles import (
    ELEMENT_BYTES,
    MAX_DIRECT_SLOTS,
    DecodeTiles,
    DirectTiles,
    PrefillTiles,
    decode_tiles,
    even_width,
    hopper_tiles,
    sum_passes,
)
from fusedmoe.tuning.tiles import HOPPER_SHARED_MEMORY

# name: experts, picks, hidden and intermediate size
SHAPES = {
    "qwen3_30b": (128, 8, 2048, 768),
    "qwen3.6_35b": (256, 8, 2048, 512),
    "mixtral": (8, 2, 4096, 14336),
    "gpt_oss_120b": (128, 4, 2880, 2880),
    "olmoe": (64, 8, 2048, 1024),
    "scout": (16, 1, 5120, 8192),
    "deepseek_v3": (256, 8, 7168, 2048),
    "tiny": (4, 2, 16, 16),
    "many_picks": (64, 22, 4096, 1024),
    "few_small": (8, 2, 1024, 2816),
}


def shared_bytes(tiles):
    """(up, down) shared memory that the rings and the transposed store take at least."""
    if isinstance(tiles, PrefillTiles):
        stage = (128 + 256) * tiles.depth * ELEMENT_BYTES
        whole = tiles.stages * stage + 2 * 64 * 128 * ELEMENT_BYTES
        return whole, whole
    if isinstance(tiles, DirectTiles):
        row = tiles.depth * ELEMENT_BYTES
        return (
            tiles.up_stages * (2 * tiles.up_rows + 8) * row,
            tiles.down_stages * (tiles.down_rows + 8) * row,
        )
    sizes = []
    for tile, weights in ((tiles.up, 2), (tiles.down, 1)):
        stage = (weights * tile.rows + tiles.block) * tile.depth * ELEMENT_BYTES
        sizes.append(tile.stages * stage + tile.rows * tiles.block * ELEMENT_BYTES)
    return tuple(sizes)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("share", [1, 8])
def test_tiles_fit_and_tokens_only_make_them_larger(name, share):
    E, K, H, I = SHAPES[name]  # noqa: E741
    order = (DirectTiles, DecodeTiles, PrefillTiles)
    kinds, blocks = [], []
    for T in itertools.chain(range(1, 70), (100, 128, 500, 1024, 2048, 8192, 100_000)):
        tiles = hopper_tiles(T, K, E, max(1, E // share), H, I)
        assert max(shared_bytes(tiles)) < HOPPER_SHARED_MEMORY
        kinds.append(order.index(type(tiles)))
        if isinstance(tiles, DecodeTiles):
            assert min(tiles.up.stages, tiles.down.stages) >= 2
            blocks.append(tiles.block)
        if isinstance(tiles, DirectTiles):
            assert T * K <= MAX_DIRECT_SLOTS
            assert tiles.up_valid <= tiles.up_rows
            assert tiles.down_valid << (K - 1).bit_length() <= tiles.down_rows
            assert min(tiles.up_box, tiles.down_box) >= 8
            assert min(tiles.up_stages, tiles.down_stages) >= 3
    assert kinds == sorted(kinds)
    assert blocks == sorted(blocks)


def test_the_kernel_of_each_size():
    E, K, H, I = SHAPES["qwen3_30b"]  # noqa: E741
    kinds = {T: type(hopper_tiles(T, K, E, E, H, I)) for T in (1, 2, 4, 928, 929, 8192)}
    assert kinds == {
        1: DirectTiles,
        2: DirectTiles,
        4: DecodeTiles,
        928: DecodeTiles,
        929: PrefillTiles,
        8192: PrefillTiles,
    }


@pytest.mark.parametrize(
    ("name", "most"), [("qwen3_30b", 58), ("mixtral", 50), ("gpt_oss_120b", 50)]
)
def test_small_experts_stream_a_little_longer(name, most):
    """Reading some of them twice costs less than the beginnings and ends of the other kernel."""
    E, K, H, I = SHAPES[name]  # noqa: E741
    last = most * E // K
    assert isinstance(hopper_tiles(last, K, E, E, H, I), DecodeTiles)
    assert isinstance(hopper_tiles(last + 1, K, E, E, H, I), PrefillTiles)


def test_two_tokens_share_tables_where_experts_that_both_pick_are_long_to_read():
    for name, direct in (("qwen3_30b", True), ("gpt_oss_120b", False), ("mixtral", False)):
        E, K, H, I = SHAPES[name]  # noqa: E741
        assert isinstance(hopper_tiles(2, K, E, E, H, I), DirectTiles) == direct
        assert isinstance(hopper_tiles(1, K, E, E, H, I), DirectTiles)


def test_a_rank_has_tables_for_a_single_token():
    """Of eight picks one has its expert here, and the others' tasks would be nobody's."""
    assert isinstance(hopper_tiles(1, 8, 128, 128, 4096, 1536), DirectTiles)
    assert hopper_tiles(1, 8, 128, 16, 4096, 1536) == decode_tiles(1, 16, 4096, 1536)


@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    [(8, 768, 48), (8, 512, 32), (2, 14336, 32), (4, 2880, 32), (1, 8192, 64)],
)
def test_tasks_come_out_even(rows, columns, width):
    """The widths of one token of five models: no other keeps fewer multiprocessors idle."""
    assert even_width(rows, columns, (16, 32, 48, 64)) == width


@pytest.mark.parametrize(
    ("name", "T", "block", "up", "down"),
    [
        ("qwen3_30b", 4, 8, 64, 128),
        ("qwen3_30b", 64, 16, 64, 256),
        ("qwen3_30b", 256, 32, 64, 256),
        ("gpt_oss_120b", 512, 32, 64, 128),
        ("gpt_oss_120b", 1024, 64, 128, 256),
        ("few_small", 64, 32, 64, 64),
        ("mixtral", 2, 8, 64, 128),
        ("mixtral", 64, 32, 64, 128),
        ("mixtral", 128, 64, 128, 256),
        ("scout", 64, 16, 128, 128),
    ],
)
def test_blocks_have_room_and_wide_tiles_have_work(name, T, block, up, down):
    E, K, H, I = SHAPES[name]  # noqa: E741
    tiles = hopper_tiles(T, K, E, E, H, I)
    assert (tiles.block, tiles.up.rows, tiles.down.rows) == (block, up, down)


def test_two_tokens_of_few_experts_share_weights():
    E, K, H, I = SHAPES["mixtral"]  # noqa: E741
    assert isinstance(hopper_tiles(1, K, E, E, H, I), DirectTiles)
    assert isinstance(hopper_tiles(2, K, E, E, H, I), DecodeTiles)


def test_remote_experts_count_where_they_are():
    """Per expert, a rank that stores an eighth of the experts sees as many slots as before."""
    E, K, H, I = SHAPES["qwen3_30b"]  # noqa: E741
    whole, part = (hopper_tiles(512, K, E, n, H, I) for n in (E, E // 8))
    assert isinstance(whole, DecodeTiles)
    assert isinstance(part, DecodeTiles)
    assert whole.block == part.block


@pytest.mark.parametrize(
    ("H", "passes"), [(2048, (2048, 1)), (4096, (2048, 1)), (2880, (1024, 3)), (5120, (1024, 4))]
)
def test_sums_are_one_pass_where_columns_come_out_even(H, passes):
    assert sum_passes(H) == passes


def test_tasks_are_drawn_where_rings_are_no_longer_than_they_are():
    """Qwen3.6's down has steps of 4 x 128 columns; where a ring of so many would hold little,
    it stays as deep as it can be, and tasks are dealt. Few tasks of the up kernel are dealt."""
    drawn = decode_tiles(512, 256, 2048, 512)
    assert drawn.down.stages == 4
    assert not drawn.down.outlasts(512)
    for R, I in itertools.product((32, 64, 128), (96, 192, 256, 384, 768)):  # noqa: E741
        dealt = I in (96, 192) or (R == 32 and I < 768)
        assert decode_tiles(R, 128, 2048, I).down.outlasts(I) == dealt
    assert decode_tiles(2048, 128, 2880, 2880).draws_up
    assert not decode_tiles(256, 8, 4096, 14336).draws_up


@pytest.mark.parametrize(
    ("T", "I", "up", "down"),
    [
        (2, 96, 32, 128),  # 128 tasks of 256 rows for 132 programs
        (4, 96, 32, 256),
        (8, 96, 32, 256),
        (16, 96, 32, 256),
        (64, 96, 32, 256),  # three tiles of 32, where 64 rows leave half of the second empty
        (8, 192, 32, 256),
        (16, 192, 32, 256),
        (64, 192, 64, 256),
        (4, 256, 32, 256),
        (8, 256, 64, 256),
        (4, 384, 32, 128),
        (6, 384, 32, 256),  # 576 tasks in five rounds; 64 rows make 288 in three
        (8, 384, 64, 256),
        (64, 384, 64, 256),
        (4, 768, 64, 128),
        (64, 768, 64, 256),  # as many rows a program as tiles of 128: the smaller end sooner
    ],
)
def test_few_tasks_of_narrow_experts_come_out_even(T, I, up, down):  # noqa: E741
    tiles = decode_tiles(8 * T, 128, 2048, I)
    assert (tiles.up.rows, tiles.down.rows) == (up, down)
    assert tiles.up.depth == (256 if up == 32 else 128)


@pytest.mark.parametrize(
    ("R", "H", "I", "down"),
    [
        (1, 4096, 1536, 128),  # 32 tasks for 132 programs, but of twelve steps
        (2, 2880, 2880, 128),
        (1, 2048, 768, 64),
        (8, 2048, 768, 64),  # 256 tasks in two rounds
        (16, 2048, 768, 128),
    ],
)
def test_few_tasks_of_down_are_small_where_they_are_short(R, H, I, down):  # noqa: E741
    assert decode_tiles(R, 32, H, I).down.rows == down


@pytest.mark.parametrize(
    ("R", "E", "H", "I", "up"),
    [
        (2, 8, 4096, 14336, 32),  # 896 tasks in seven rounds; 64 rows make 448 in four
        (4, 16, 4096, 6400, 32),
        (2, 32, 6144, 9216, 32),
        (4, 8, 4096, 14336, 64),  # seven rounds: what is left at the end is little
        (24, 128, 2048, 768, 64),  # short tasks: down's first ones fill the gap
        (40, 256, 2048, 512, 64),
    ],
)
def test_few_long_tasks_come_out_even(R, E, H, I, up):  # noqa: E741
    assert decode_tiles(R, E, H, I).up.rows == up
