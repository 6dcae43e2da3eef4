"""The grouped GEMM of fp8 rows and int4 weights against the definition, and its assembly."""

import pytest
import torch
from test_packed_gemm import TOP_K, E, N, assert_right, by_slot, rows_and_ids, weights

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.align import LoneSlots, moe_align_block_size
from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct
from fusedmoe.kernels.grouped_gemm_w4a8 import w4a8_gemm, w4a8_gemm_reference
from fusedmoe.kernels.ids import local_ids
from fusedmoe.kernels.quantize import quantize_rows
from fusedmoe.quantization.activations import fake_quantize
from fusedmoe.quantization.keys import FP8_DYNAMIC_TENSOR, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR
from fusedmoe.tuning.quantized_tiles import QuantizedTile
from quantized_bodies import triton_w4a8
from small_ptx import run_ptx, words_of

NAN = float("nan")
BOTH = pytest.mark.parametrize("function", [triton_w4a8, w4a8_gemm_reference])


def tile_of(depth, slots=16, rows=32):
    return QuantizedTile(rows, slots, depth, 2, 4, 2)


@BOTH
@pytest.mark.parametrize("key", [FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR, FP8_DYNAMIC_TENSOR], ids=str)
@pytest.mark.parametrize(
    ("fmt", "K", "depth"),
    [
        ("int4_g128", 256, 128),
        ("int4_g128", 256, 64),
        ("int4_g64_zp", 192, 64),
        ("int4_channel", 96, 64),
        ("int4_channel_zp", 160, 128),
    ],
)
def test_scales_of_rows_and_groups(function, fmt, K, depth, key):
    w, tile = weights(fmt, K), tile_of(depth)
    x, ids = rows_and_ids(K)
    given = torch.tensor([0.02]) if key.static else None
    a, scale = quantize_rows(x, key, given)
    out = torch.full((ids.numel(), N), NAN)
    blocks = moe_align_block_size(ids, tile.slots, E)
    function(QuantizedProduct(a, w, out, blocks, tile, TOP_K), scale)
    assert_right(out, by_slot(fake_quantize(x, key, given), w, ids))


@BOTH
@pytest.mark.parametrize("activation", [MoEActivation.SILU, MoEActivation.SWIGLUOAI])
def test_shards_biases_and_an_expert_map_without_a_table(function, activation):
    w, tile = weights("int4_g128", 256, activation), tile_of(128, slots=8)
    x, _ = rows_and_ids(256)
    a, scale = quantize_rows(x, FP8_DYNAMIC_TOKEN)
    ids = torch.tensor([[0, 4], [9, -1], [5, 2], [1, 1], [3, -7]], dtype=torch.int32)
    here = torch.tensor([2, -1, 0, -1, 1, 7], dtype=torch.int32)
    bias = torch.randn(E, w.shape[1])
    out = torch.full((ids.numel(), N), NAN)
    blocks = LoneSlots(ids.flatten(), here)
    function(QuantizedProduct(a, w, out, blocks, tile, TOP_K, bias, activation), scale)
    rows = fake_quantize(x, FP8_DYNAMIC_TOKEN)
    expected = by_slot(rows, w, local_ids(ids, E, here), activation, None, bias)
    assert_right(out, expected)


def test_every_nibble_is_an_fp8_number():
    module = pytest.importorskip("fusedmoe.kernels.triton.grouped_gemm_w4a8")
    every = torch.arange(256, dtype=torch.uint8)[torch.randperm(256)]
    for word, four in zip(words_of(every), every.view(-1, 4), strict=True):
        out = run_ptx(module._NIBBLES_ASM.value, [word], 2)
        found = torch.tensor(out, dtype=torch.int64).to(torch.uint32).view(torch.uint8)
        numbers = found.view(torch.float8_e4m3fn).float()
        assert numbers[:4].equal((four & 15) - 8.0)
        assert numbers[4:].equal((four >> 4) - 8.0)


def test_what_does_not_fit_is_named():
    x, ids = rows_and_ids(256)
    a, scale = quantize_rows(x, FP8_DYNAMIC_TOKEN)
    blocks, c = moe_align_block_size(ids, 16, E), torch.zeros(ids.numel(), N)

    def refused(message, fmt="int4_g128", depth=128, a=a, scale=scale):
        product = QuantizedProduct(a, weights(fmt, 256), c, blocks, tile_of(depth), TOP_K)
        with pytest.raises(ValueError, match=message):
            w4a8_gemm(product, scale)

    refused("int8_g32", "int8_g32")
    refused("act_order", "int4_g32_act_order")
    refused("steps of 32", depth=32)
    refused("groups of 128", depth=256)
    refused("float32 with scales", a=x)
    refused(r"\(3, 1\)", scale=scale[:3])
