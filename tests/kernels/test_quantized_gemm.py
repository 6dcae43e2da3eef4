"""The grouped GEMMs on quantized weights, Triton's bodies and the definition, format by format."""

import pytest
import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.align import LoneSlots, moe_align_block_size
from fusedmoe.kernels.column_orders import ordered, unordered
from fusedmoe.kernels.grouped_gemm_quantized import (
    QuantizedProduct,
    quantized_gemm,
    quantized_gemm_reference,
)
from fusedmoe.kernels.grouped_gemm_quantized_w8a8 import w8a8_gemm, w8a8_gemm_reference
from fusedmoe.kernels.ids import local_ids
from fusedmoe.kernels.quantize import quantize_rows
from fusedmoe.kernels.triton.grouped_gemm_quantized import scaling_of
from fusedmoe.quantization.activations import fake_quantize
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP8_DYNAMIC,
    fp8_dynamic_group,
)
from fusedmoe.tuning.quantized_tiles import QuantizedTile
from gemm_oracle import TOP_K, E, assert_right, by_slot, rows_and_ids
from packed_weights import format_of
from quantized_bodies import triton_gemm, triton_w8a8

NAN = float("nan")
N = 40
# Columns and step: whole steps, cut steps, groups longer and shorter than a step.
WEIGHT_ONLY = [
    ("int4_g32", 128, 64),
    ("int4_g32", 96, 64),
    ("int4_g32_zp", 96, 64),
    ("int4_g128", 256, 64),
    ("int4_g128_zp", 256, 128),
    ("int4_channel", 96, 64),
    ("int8_channel", 96, 64),
    ("int8_g32", 96, 32),
    ("mxfp4", 96, 64),
    ("mxfp4", 32, 32),
    ("nvfp4", 96, 64),
    ("nvfp4", 16, 32),
    ("nf4", 192, 128),
    ("nf4", 192, 64),
    ("iq4_nl", 96, 64),
    ("iq4_nl@float32", 96, 64),
    ("mxfp8", 96, 64),
    ("fp8_tensor", 96, 64),
    ("fp8_channel", 96, 64),
    ("fp8_block", 200, 64),
    ("fp8_block_16x64", 200, 64),
]
W8A8 = [
    ("fp8_block", FP8_DYNAMIC_128, 200, 128),
    ("fp8_block_64x64", fp8_dynamic_group(64), 192, 64),
    ("fp8_block_64x64", fp8_dynamic_group(64, "e8m0"), 192, 32),
    ("fp8_channel", FP8_DYNAMIC_TOKEN, 96, 64),
    ("fp8_tensor", FP8_DYNAMIC_TENSOR, 96, 64),
    ("fp8_tensor", FP8_STATIC_TENSOR, 96, 64),
    ("fp8_channel", FP8_STATIC_TENSOR, 96, 64),
    ("int8_channel", INT8_DYNAMIC_TOKEN, 96, 64),
    ("int8_channel", INT8_STATIC_TENSOR, 96, 64),
    ("mxfp8", MXFP8_DYNAMIC, 96, 32),
]


BOTH = pytest.mark.parametrize("function", [triton_gemm, quantized_gemm_reference])
BOTH_W8A8 = pytest.mark.parametrize("function", [triton_w8a8, w8a8_gemm_reference])


def weights(fmt, K, activation=None, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shards = 2 if activation is not None and activation.is_gated else 1
    values = torch.randn(E, shards * N, K, generator=gen) / K**0.5
    return quantize(
        values,
        format_of(fmt),
        shards=shards,
        interleaved=activation is MoEActivation.SWIGLUOAI,
    )


def tile_of(depth, slots=16, rows=32):
    return QuantizedTile(rows, slots, depth, 2, 4, 2)


@BOTH
@pytest.mark.parametrize(("fmt", "K", "depth"), WEIGHT_ONLY)
def test_every_format_is_read(function, fmt, K, depth):
    w, tile = weights(fmt, K), tile_of(depth)
    a, ids = rows_and_ids(K)
    out = torch.full((ids.numel(), N), NAN)
    blocks = moe_align_block_size(ids, tile.slots, E)
    function(QuantizedProduct(a, w, out, blocks, tile, TOP_K))
    assert_right(out, by_slot(a, w, ids))


def test_scales_of_fp4_numbers_always_multiply_these():
    """Packed bf16 arithmetic leaves half of the numbers' exponent to their scales: also where a
    row is one group, whose scale could as well multiply the sum."""
    for fmt, K, depth in (("mxfp4", 32, 32), ("mxfp4", 96, 32), ("nvfp4", 16, 32)):
        assert scaling_of("e2m1", format_named(fmt).group.col, K, tile_of(depth)) == "each"
    assert scaling_of("int4", 32, 32, tile_of(32)) == "end"
    assert scaling_of("int4", 128, 256, tile_of(64)) == "step"
    assert scaling_of("int4", 32, 96, tile_of(64)) == "each"
    assert scaling_of("int4", 128, 256, tile_of(64, slots=128)) == "each"


@BOTH
@pytest.mark.parametrize("fmt", ["int4_g32", "mxfp4", "nvfp4", "fp8_tensor", "fp8_block"])
@pytest.mark.parametrize(
    "activation",
    [
        MoEActivation.SILU,
        MoEActivation.SWIGLUOAI,
        MoEActivation.SWIGLUOAI_UNINTERLEAVE,
        MoEActivation.RELU2_NO_MUL,
    ],
)
def test_shards_and_biases_in_the_epilogue(function, fmt, activation):
    """Gate and up have scales of their own, stacked or interleaved row by row."""
    w, tile = weights(fmt, 128, activation), tile_of(64, slots=8)
    a, ids = rows_and_ids(128, T=7)
    config = ApplyMoEActivationConfig(clamp_limit=0.8)
    bias = torch.randn(E, w.shape[1])
    out = torch.full((ids.numel(), N), NAN)
    blocks = moe_align_block_size(ids, 8, E)
    function(QuantizedProduct(a, w, out, blocks, tile, TOP_K, bias, activation, config))
    assert_right(out, by_slot(a, w, ids, activation, config, bias))


@BOTH
@pytest.mark.parametrize("fmt", ["int4_g32_zp", "mxfp4"])
def test_planes_are_the_same_numbers_in_another_order(function, fmt):
    w, tile = weights(fmt, 96, MoEActivation.SILU), tile_of(64)
    a, ids = rows_and_ids(96)
    blocks = moe_align_block_size(ids, tile.slots, E)
    out = torch.full((ids.numel(), N), NAN)
    halves = ordered(a, "halves")
    product = QuantizedProduct(halves, w, out, blocks, tile, TOP_K, None, MoEActivation.SILU)
    function(product, a_ordered=True, c_order="halves")
    assert_right(unordered(out, "halves"), by_slot(a, w, ids, MoEActivation.SILU))


@BOTH
def test_slots_without_a_table_and_with_an_expert_map(function):
    w, tile = weights("int4_g32", 64), tile_of(64, slots=8)
    a, _ = rows_and_ids(64)
    ids = torch.tensor([[0, 4], [9, -1], [5, 2], [1, 1], [3, -7]], dtype=torch.int32)
    here = torch.tensor([2, -1, 0, -1, 1, 7], dtype=torch.int32)
    out = torch.full((ids.numel(), N), NAN)
    function(QuantizedProduct(a, w, out, LoneSlots(ids.flatten(), here), tile, TOP_K))
    assert_right(out, by_slot(a, w, local_ids(ids, E, here)))


@pytest.mark.parametrize(
    ("fmt", "depth"),
    [("int4_g128_zp", 128), ("int4_g128", 64), ("int8_channel", 64), ("mxfp4", 64)],
)
def test_many_slots_in_a_block(fmt, depth):
    """Scales are multiplied into the numbers then, also where a step has one of them."""
    w, tile = weights(fmt, 256, MoEActivation.SILU), tile_of(depth, slots=128, rows=64)
    a, ids = rows_and_ids(256, T=90)
    out = torch.full((ids.numel(), N), NAN)
    blocks = moe_align_block_size(ids, tile.slots, E)
    triton_gemm(QuantizedProduct(a, w, out, blocks, tile, TOP_K, None, MoEActivation.SILU))
    assert_right(out, by_slot(a, w, ids, MoEActivation.SILU))


@BOTH
def test_fp16_rows(function):
    w, tile = weights("int4_g32", 128), tile_of(64)
    a, ids = rows_and_ids(128, dtype=torch.float16)
    out = torch.full((ids.numel(), N), NAN, dtype=torch.float16)
    blocks = moe_align_block_size(ids, tile.slots, E)
    function(QuantizedProduct(a, w, out, blocks, tile, TOP_K))
    assert_right(out, by_slot(a, w, ids), 3e-3)


def test_a_nan_row_harms_its_own_slots_alone():
    w, tile = weights("mxfp4", 64), tile_of(64)
    a, ids = rows_and_ids(64)
    a[2] = NAN
    out = torch.full((ids.numel(), N), 0.0)
    blocks = moe_align_block_size(ids, tile.slots, E)
    triton_gemm(QuantizedProduct(a, w, out, blocks, tile, TOP_K))
    dead = local_ids(ids, E, None).flatten() < 0
    expected = (torch.arange(10) // TOP_K == 2) & ~dead
    assert torch.equal(out.isnan().any(1), expected)


@BOTH_W8A8
@pytest.mark.parametrize("activation", [None, MoEActivation.SILU, MoEActivation.SWIGLUOAI])
@pytest.mark.parametrize(("fmt", "key", "K", "depth"), W8A8)
def test_both_operands_in_eight_bits(function, fmt, key, K, depth, activation):
    w, tile = weights(fmt, K, activation), tile_of(depth)
    x, ids = rows_and_ids(K)
    given = torch.tensor([0.02]) if key.static else None
    a, scale = quantize_rows(x, key, given)
    bias = torch.randn(E, w.shape[1])
    out = torch.full((ids.numel(), N), NAN)
    blocks = moe_align_block_size(ids, tile.slots, E)
    function(QuantizedProduct(a, w, out, blocks, tile, TOP_K, bias, activation), scale, key)
    assert_right(out, by_slot(fake_quantize(x, key, given), w, ids, activation, None, bias))


def test_shapes_formats_and_groups_that_disagree_are_named():
    w = weights("int4_g32", 64)
    a, ids = rows_and_ids(64)
    blocks, tile = moe_align_block_size(ids, 16, E), tile_of(64)
    c = torch.zeros(ids.numel(), N)

    def refused(message, a=a, w=w, c=c, tile=tile, **rest):
        with pytest.raises(ValueError, match=message):
            quantized_gemm(QuantizedProduct(a, w, c, blocks, tile, TOP_K, **rest))

    refused("does not fit weights", a=a[:, :32])
    refused("dense", a=a[:, ::1].t().contiguous().t())
    refused("asks for weights", c=c[:, :39])
    refused("two shards", c=c[:, :20], activation=MoEActivation.SILU)
    refused("more than", a=a[:2])
    refused("bias", bias=torch.zeros(E, 3))
    by_table = (torch.arange(64, dtype=torch.int32) // 32).expand(E, 1, 64)
    ordered = format_named("int4_g32_act_order")
    refused(
        "group_index must be contiguous",
        w=quantize(torch.randn(E, N, 64), ordered, group_index=by_table),
    )
    with pytest.raises(ValueError, match="power of two"):
        QuantizedTile(48, 16, 64, 1, 4, 2)


def test_pairs_and_scales_that_disagree_are_named():
    w = weights("fp8_block", 256)
    x, ids = rows_and_ids(256)
    a, scale = quantize_rows(x, FP8_DYNAMIC_128)
    blocks, c = moe_align_block_size(ids, 16, E), torch.zeros(ids.numel(), N)

    def refused(message, a=a, scale=scale, w=w, c_scale=None, depth=128, key=FP8_DYNAMIC_128):
        product = QuantizedProduct(a, w, c, blocks, tile_of(depth), TOP_K)
        with pytest.raises(ValueError, match=message):
            w8a8_gemm(product, scale, key, c_scale)

    refused("int8", key=INT8_DYNAMIC_TOKEN)
    refused("steps of 256", depth=256)
    refused("expected", scale=scale[:3])
    refused("expected", a=x)
    refused("on the way in", scale=None)
    refused("on the way in", a=x, scale=None, depth=64)
    refused("tiles of 128", c_scale=torch.zeros(10, 1))
