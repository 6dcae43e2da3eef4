"""Tiles of the quantized GEMMs: what every choice must keep, over many shapes."""

import pytest

from fusedmoe.tuning.quantized_tiles import (
    QuantizedTile,
    packed_tile,
    w8a8_tiles,
    weight_only_tiles,
)

SHAPES = [(128, 8, 2048, 768), (8, 2, 4096, 14336), (128, 4, 2880, 2880), (384, 8, 7168, 256)]
TOKENS = [1, 2, 8, 16, 33, 64, 128, 1024, 8192, 50000]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("groups", [(-1, -1), (32, 32), (128, 128), (128, 64), (16, 16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_steps_and_groups_fit(shape, T, groups, bits):
    E, K, H, I = shape  # noqa: E741
    tiles = weight_only_tiles(T, K, E, H, I, bits, groups)
    assert tiles.gemm1.slots == tiles.gemm2.slots
    for tile, group in zip(tiles, groups, strict=True):
        assert group == -1 or max(group, tile.depth) % min(group, tile.depth) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("groups", [(-1, -1), (32, 32), (128, 128), (128, 64)])
def test_a_step_never_crosses_a_scale(shape, T, groups):
    tiles = w8a8_tiles(T, shape[1], shape[0], groups)
    assert tiles.gemm1.slots == tiles.gemm2.slots
    assert all(g == -1 or g % tile.depth == 0 for tile, g in zip(tiles, groups, strict=True))


def test_batch_invariant_tiles_do_not_follow_the_number_of_tokens():
    sizes = (2048, 768, 4)
    for function, rest in ((weight_only_tiles, sizes), (w8a8_tiles, ())):
        found = {function(T, 8, 128, *rest, (128, 128), batch_invariant=True) for T in TOKENS}
        assert len(found) == 1


def test_more_rows_per_expert_never_make_smaller_blocks():
    slots = [weight_only_tiles(T, 8, 128, 2048, 768, 4, (128, 128)).gemm1.slots for T in TOKENS]
    assert slots == sorted(slots)


@pytest.mark.parametrize(
    "numbers",
    [(8, 16, 64, 1, 4, 2), (64, 4, 64, 1, 4, 2), (64, 16, 64, 0, 4, 2), (64, 16, 64, 1, 3, 2)],
)
def test_impossible_tiles_are_refused(numbers):
    with pytest.raises(ValueError, match=r"power of two|positive"):
        QuantizedTile(*numbers)


@pytest.mark.parametrize("element", ["q2_k", "q4_k", "q6_k", "q5_1", "e3m2"])
def test_steps_of_packed_weights_fit_the_shared_memory_of_smaller_gpus(element):
    for slots in (8, 64, 128):
        tile = packed_tile(QuantizedTile(128, slots, 64, 8, 8, 4), element, roomy=False)
        rows = slots * tile.depth * 2
        ahead = tile.stages if tile.stages > 1 else 0
        assert ahead * (rows + tile.rows * tile.depth) <= 100 << 10


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [(-1, -1), (32, 32), (128, 128)])
def test_steps_of_other_weights_do_too(bits, groups):
    for T in (*TOKENS, 192, 256, 384):
        tiles = weight_only_tiles(T, 8, 128, 2048, 768, bits, groups, roomy=False)
        for tile in tiles:
            one = tile.depth * (2 * tile.slots + tile.rows * bits // 8)
            assert tile.stages * one <= 99 << 10, (T, tile)
