"""Tiles as pure functions: they fit, they follow the load, and they can be told to stand still."""

from dataclasses import replace

import pytest
import torch

from fusedmoe.tuning.tiles import (
    HOPPER_SHARED_MEMORY,
    TileConfig,
    expected_blocks,
    gemm1_tiles,
    gemm2_tiles,
    layer_tiles,
)

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
    assert gemm1_tiles(1, 8, 128, 768, 2048, torch.bfloat16).block_k == 128
    assert gemm1_tiles(1, 8, 128, 768, 2048 + 64, torch.bfloat16).block_k == 128
    assert gemm1_tiles(1, 8, 128, 768, 64 * 7, torch.bfloat16).block_k == 64
    assert gemm1_tiles(1, 1, 4, 64, 40, torch.bfloat16).block_k == 64


@pytest.mark.parametrize(("T", "width"), [(1, 64), (2, 32), (3, 64), (4, 64), (64, 64)])
def test_few_tiles_are_as_wide_as_leaves_no_multiprocessor_behind(T, width):
    """132 of them: 96 tiles of 64 columns go in one turn, 192 in two, which 384 halves undercut."""
    assert gemm1_tiles(T, 8, 128, 768, 2048, torch.bfloat16).block_n == width


def test_three_programs_share_a_multiprocessor_where_two_would_need_another_round():
    """384 tiles are 1.5 rounds of 264 places, and one of 396."""
    shallow = gemm1_tiles(4, 8, 128, 768, 2048, torch.bfloat16)
    deep = gemm1_tiles(64, 8, 128, 768, 2048, torch.bfloat16)
    assert (shallow.num_stages, deep.num_stages) == (3, 4)


@pytest.mark.parametrize(
    ("R", "E", "block_m"),
    [(16, 8, 16), (64, 128, 16), (512, 8, 64), (1218, 8, 128), (4096, 64, 64), (8192, 16, 16)],
)
def test_blocks_are_counted_as_random_routing_makes_them(R, E, block_m):
    generator = torch.Generator().manual_seed(0)
    counts = [
        torch.randint(0, E, (R,), generator=generator).bincount(minlength=E) for _ in range(100)
    ]
    mean = sum(((c + block_m - 1) // block_m).sum().item() for c in counts) / len(counts)
    assert expected_blocks(R, E, block_m) == pytest.approx(mean, rel=0.02)


def test_two_blocks_per_expert_are_not_cut_narrower():
    """152 rows take two blocks of 128, so that 256 tiles of 256 columns are two even rounds."""
    assert gemm2_tiles(609, 2, 8, 4096, 14336, torch.bfloat16).block_n == 256


def test_blocks_are_wide_where_an_expert_has_one():
    assert gemm1_tiles(256, 2, 8, 14336, 4096, torch.bfloat16).block_n == 128
    assert gemm1_tiles(1024, 2, 8, 14336, 4096, torch.bfloat16).block_n == 64
    assert gemm1_tiles(1024, 2, 8, 14336, 4096, torch.bfloat16, interleaved=True).block_n == 128


@pytest.mark.parametrize(
    "broken", [{"block_m": 24}, {"block_n": 8}, {"num_warps": 3}, {"group_m": 0}]
)
def test_impossible_tiles_are_refused(broken):
    sound = TileConfig(16, 16, 16, 1, 4, 2)
    with pytest.raises(ValueError, match=r"\d"):
        replace(sound, **broken)
