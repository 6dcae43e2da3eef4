"""Tiles as pure functions: they fit, they follow the load, and they can be told to stand still."""

from dataclasses import replace

import pytest
import torch

from fusedmoe.tuning.tiles import HOPPER_SHARED_MEMORY, TileConfig, gemm1_tiles, layer_tiles

SHAPES = [  # K, E, H, I
    (8, 128, 2048, 768),
    (2, 8, 4096, 14336),
    (8, 64, 2048, 1024),
    (4, 128, 2880, 2880),
    (1, 1, 48, 16),
    (6, 512, 7168, 33),
]
TOKENS = [1, 2, 7, 16, 100, 512, 4096, 65536]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shared_memory", [HOPPER_SHARED_MEMORY, 99 * 1024])
def test_operands_fit_in_shared_memory(shape, dtype, gated, shared_memory):
    for T in TOKENS:
        tiles = layer_tiles(T, *shape, dtype, gated=gated, shared_memory=shared_memory)
        assert tiles.gemm1.block_m == tiles.gemm2.block_m
        for tile, weights in zip(tiles, (2 if gated else 1, 1), strict=True):
            assert tile.shared_memory(dtype.itemsize, weights) <= shared_memory


@pytest.mark.parametrize("shape", SHAPES)
def test_more_rows_per_expert_never_make_a_block_lower(shape):
    blocks = [layer_tiles(T, *shape, torch.bfloat16).gemm1.block_m for T in TOKENS]
    assert blocks == sorted(blocks)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_invariant_tiles_do_not_depend_on_tokens(shape, dtype):
    tiles = {layer_tiles(T, *shape, dtype, batch_invariant=True) for T in TOKENS}
    assert len(tiles) == 1


def test_steps_divide_the_depth_where_they_can():
    assert gemm1_tiles(1, 4, 128, 2880, 2880, torch.bfloat16).block_k == 64
    assert gemm1_tiles(1, 8, 128, 768, 2048, torch.bfloat16).block_k == 128
    assert gemm1_tiles(1, 1, 4, 64, 40, torch.bfloat16).block_k == 64


@pytest.mark.parametrize(
    "broken", [{"block_m": 24}, {"block_n": 8}, {"num_warps": 3}, {"group_m": 0}]
)
def test_impossible_tiles_are_refused(broken):
    sound = TileConfig(16, 16, 16, 1, 4, 2)
    with pytest.raises(ValueError, match=r"\d"):
        replace(sound, **broken)
