"""Which tiles stream 8-bit weights: enough of them for every multiprocessor, few of their rows
empty, slots with room."""

from dataclasses import replace

import pytest

from fusedmoe.tuning.tiles import HOPPER_MULTIPROCESSORS
from fusedmoe.tuning.w8a8_tiles import StreamTile, direct_stream_tiles, stream_tiles

SHAPES = [(128, 2048, 768), (8, 4096, 14336), (256, 4096, 2048), (384, 7168, 256), (64, 2048, 1408)]


@pytest.mark.parametrize("R", [1, 8, 16, 64, 512, 1024, 3000])
@pytest.mark.parametrize(("E", "H", "I"), SHAPES)
def test_tiles_fit_the_problem(R, E, H, I):  # noqa: E741
    first, second = stream_tiles(R, E, H, I)
    assert first.slots == second.slots >= R / E or first.slots == 32
    for tile, features in ((first, I), (second, H / 2)):
        assert tile.span % tile.depth == 0
        assert tile.valid <= tile.rows // 2
        assert tile.valid % tile.box == 0
        empty = -(-features // tile.valid) * tile.valid - features
        assert empty <= features / 3 or tile.valid <= 64
        if tile.rows == 256:
            assert min(R, E) * features / tile.valid >= 2 * HOPPER_MULTIPROCESSORS


def test_a_few_slots_occupy_more_multiprocessors():
    """Of 132: 96 tiles and 128; a single slot has no more than 23 tiles of 128 rows of w2."""
    first, second = stream_tiles(8, 128, 2048, 768)
    assert (first.valid, second.valid, second.programs) == (32, 64, 1)
    first, second = stream_tiles(1, 32, 2880, 2880)
    assert (first.valid, second.valid, second.programs) == (32, 32, 1)


BAD_TILES = [("rows", 96), ("slots", 4), ("valid", 80), ("valid", 24), ("valid", 0), ("depth", 3)]
BAD_TILES += [("span", 1), ("stages", 0), ("programs", 0)]


@pytest.mark.parametrize(("name", "size"), BAD_TILES)
def test_tiles_that_do_not_fit_themselves_are_refused(name, size):
    """They would be loaded past the shared memory that a stage has."""
    with pytest.raises(ValueError, match=str(size)):
        replace(StreamTile(128, 64, 8, 2, 8, 3, 2), **{name: size})


@pytest.mark.parametrize(
    ("T", "ranks", "direct"),
    [(1, 1, True), (1, 4, True), (1, 8, False), (2, 1, True), (2, 2, False)],
)
def test_a_rank_of_many_streams_a_single_token_too(T, ranks, direct):
    """Tasks that are dealt to slots whose experts are elsewhere are nobody's."""
    tiles = direct_stream_tiles(T, 8, 256, 256 // ranks, 7168, 2048)
    assert (tiles is not None) == direct
