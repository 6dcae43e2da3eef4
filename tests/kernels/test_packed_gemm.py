"""The grouped GEMM on superblocks, floats of six bits and act-order, against the definition."""

from dataclasses import replace

import pytest
import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.align import LoneSlots, moe_align_block_size
from fusedmoe.kernels.column_orders import REPEATS, order_for, ordered, unordered
from fusedmoe.kernels.grouped_gemm_quantized import (
    QuantizedProduct,
    quantized_gemm,
    quantized_gemm_reference,
)
from fusedmoe.kernels.ids import local_ids
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.formats.superblocks import CODECS
from fusedmoe.tuning.quantized_tiles import QuantizedTile, packed_tile
from gemm_oracle import TOP_K, E, assert_right, by_slot, rows_and_ids
from packed_weights import pack
from quantized_bodies import triton_gemm

NAN = float("nan")
N = 24
# Columns: whole steps, cut steps.
FORMATS = [
    *((kind, 512) for kind in CODECS),
    ("q6_k", 768),  # rows of no whole number of 16 bytes
    ("q2_k", 768),
    *((kind, K) for kind in ("q4_1", "q5_1") for K in (32, 160)),
    ("mxfp6_e3m2", 96),
    ("mxfp6_e2m3", 288),
    ("int4_g32_act_order", 96),
    ("int4_g64_zp_act_order", 192),
    ("int8_g32_act_order", 96),
    ("int8_g32_zp_act_order", 160),
]
TILED = ["q2_k", "q3_k", "q6_k"]
ONE_OF_EACH = ["q2_k", "q3_k", "q4_k", "q6_k", "q5_1", "mxfp6_e3m2", "int4_g32_act_order"]
BOTH = pytest.mark.parametrize("function", [triton_gemm, quantized_gemm_reference])


def weights(fmt, K, activation=None, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shards = 2 if activation is not None and activation.is_gated else 1
    values = torch.randn(E, shards * N, K, generator=gen) / K**0.5
    return pack(values, fmt, shards=shards, interleaved=activation is MoEActivation.SWIGLUOAI)


def tile_for(fmt, slots=16, rows=32):
    return packed_tile(QuantizedTile(rows, slots, 64, 2, 4, 2), format_named(fmt).element)


@BOTH
@pytest.mark.parametrize(("fmt", "K"), FORMATS)
def test_every_format_is_read(function, fmt, K):
    w, tile = weights(fmt, K), tile_for(fmt)
    a, ids = rows_and_ids(K)
    out = torch.full((ids.numel(), N), NAN)
    blocks = moe_align_block_size(ids, tile.slots, E)
    function(QuantizedProduct(a, w, out, blocks, tile, TOP_K))
    assert_right(out, by_slot(a, w, ids))


@BOTH
@pytest.mark.parametrize("fmt", ONE_OF_EACH)
@pytest.mark.parametrize(
    "activation",
    [MoEActivation.SILU, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL],
)
def test_shards_and_biases_in_the_epilogue(function, fmt, activation):
    """Gate and up have scales, and act-order groups, of their own, stacked or row by row."""
    w, tile = weights(fmt, 256, activation), tile_for(fmt, slots=8)
    a, ids = rows_and_ids(256, T=7)
    config = ApplyMoEActivationConfig(clamp_limit=0.8)
    bias = torch.randn(E, w.shape[1])
    out = torch.full((ids.numel(), N), NAN)
    blocks = moe_align_block_size(ids, 8, E)
    function(QuantizedProduct(a, w, out, blocks, tile, TOP_K, bias, activation, config))
    assert_right(out, by_slot(a, w, ids, activation, config, bias))


@BOTH
@pytest.mark.parametrize("fmt", ONE_OF_EACH)
def test_slots_without_a_table_an_expert_map_and_fp16(function, fmt):
    w, tile = weights(fmt, 256), tile_for(fmt, slots=8)
    a, _ = rows_and_ids(256, dtype=torch.float16)
    ids = torch.tensor([[0, 4], [9, -1], [5, 2], [1, 1], [3, -7]], dtype=torch.int32)
    here = torch.tensor([2, -1, 0, -1, 1, 7], dtype=torch.int32)
    out = torch.full((ids.numel(), N), NAN, dtype=torch.float16)
    function(QuantizedProduct(a, w, out, LoneSlots(ids.flatten(), here), tile, TOP_K))
    assert_right(out, by_slot(a, w, local_ids(ids, E, here)), 3e-3)


@BOTH
@pytest.mark.parametrize("fmt", [*TILED, "q4_1", "q5_1", "mxfp6_e3m2", "mxfp6_e2m3"])
@pytest.mark.parametrize("slots", [16, 64])
def test_rows_in_the_order_in_which_they_are_met(function, fmt, slots):
    w, tile = weights(fmt, 768), replace(tile_for(fmt, slots), depth=256 if fmt in TILED else 128)
    a, ids = rows_and_ids(768, T=20)
    out = torch.full((ids.numel(), N), NAN)
    a_ordered, blocks = ordered(a, order_for(w.format, 768)), moe_align_block_size(ids, slots, E)
    product = QuantizedProduct(a_ordered, w, out, blocks, tile, TOP_K)
    function(product, a_ordered=True, c_order="halves")
    assert_right(unordered(out, "halves"), by_slot(a, w, ids))


@BOTH
@pytest.mark.parametrize(
    ("order", "fmt"),
    [("units", "mxfp6_e3m2"), ("blocks", "q5_1"), *(("sixes", fmt) for fmt in TILED)],
)
def test_columns_are_written_in_the_order_that_the_next_product_wants(function, order, fmt):
    width = 2 * REPEATS[order]
    wide = torch.randn(E, width, 256) / 16
    w, tile = pack(wide, "q4_k"), tile_for("q4_k")
    assert order_for(format_named(fmt), width) == order
    assert order_for(format_named(fmt), width + 32) == ""
    a, ids = rows_and_ids(256)
    blocks = moe_align_block_size(ids, tile.slots, E)
    straight, out = torch.full((2, ids.numel(), width), NAN)
    product = QuantizedProduct(a, w, straight, blocks, tile, TOP_K)
    function(product)
    function(product._replace(c=out), c_order=order)
    assert torch.equal(unordered(out, order).nan_to_num(), straight.nan_to_num())


def test_the_order_of_a_superblock_is_as_its_bytes_say():
    """Of a word of q6_k's nibbles: two low ones, two 64 columns on; then those 32 columns on."""
    tiles = ordered(torch.arange(512)[None], "sixes").view(2, 8, 32)
    assert tiles[0, :, 0].tolist() == [0, 2, 64, 66, 32, 34, 96, 98]
    assert tiles[0, 0, :6].tolist() == [0, 1, 4, 5, 8, 9]
    assert tiles[:, 0, 16].tolist() == [128, 384]
    assert ordered(torch.arange(128)[None], "units").view(8, 16)[1, :4].tolist() == [2, 3, 18, 19]
    tiles = ordered(torch.arange(128)[None], "blocks").view(4, 32)
    assert tiles[:, 0].tolist() == [0, 2, 16, 18]
    assert tiles[1, 6:10].tolist() == [14, 15, 34, 35]


@pytest.mark.parametrize("fmt", ["q4_k", "int4_g32_act_order"])
def test_features_are_written_where_a_table_says(fmt):
    w, tile = weights(fmt, 256, MoEActivation.SILU), tile_for(fmt)
    a, ids = rows_and_ids(256)
    places = torch.stack([torch.randperm(N) for _ in range(E)]).int()
    expected = by_slot(a, w, ids, MoEActivation.SILU)
    for slot, expert in enumerate(local_ids(ids, E, None).flatten().tolist()):
        expected[slot, places[expert].long()] = expected[slot].clone()
    blocks = moe_align_block_size(ids, tile.slots, E)
    for function in (triton_gemm, quantized_gemm):
        out = torch.full((ids.numel(), N), NAN)
        product = QuantizedProduct(a, w, out, blocks, tile, TOP_K, None, MoEActivation.SILU)
        function(product, c_places=places)
        assert_right(out, expected)
    with pytest.raises(ValueError, match=r"c_places \(3, 23\)"):
        quantized_gemm(product, c_places=places[:, 1:].contiguous())


@pytest.mark.parametrize("fmt", ONE_OF_EACH)
def test_a_nan_row_harms_its_own_slots_alone_also_among_many(fmt):
    w, tile = weights(fmt, 256, MoEActivation.SILU), tile_for(fmt, slots=64, rows=64)
    a, ids = rows_and_ids(256, T=70)
    out, dirty = torch.full((2, ids.numel(), N), NAN)
    blocks = moe_align_block_size(ids, tile.slots, E)
    product = QuantizedProduct(a, w, out, blocks, tile, TOP_K, None, MoEActivation.SILU)
    triton_gemm(product)
    assert_right(out, by_slot(a, w, ids, MoEActivation.SILU))
    a[2] = NAN
    triton_gemm(product._replace(c=dirty))
    others = torch.arange(ids.numel()) // TOP_K != 2
    assert torch.equal(dirty[others].nan_to_num(), out[others].nan_to_num())
    assert dirty[~others].isnan().all()


def test_groups_out_of_range_read_nothing_outside():
    """The functional form cannot look at a table on a GPU: such groups count as the last."""
    w, tile = weights("int4_g32_act_order", 96), tile_for("int4_g32_act_order")
    a, ids = rows_and_ids(96)
    blocks = moe_align_block_size(ids, tile.slots, E)
    expected, out = torch.full((2, ids.numel(), N), NAN)
    w.group_index[:, :, :50] = 2
    triton_gemm(QuantizedProduct(a, w, expected, blocks, tile, TOP_K))
    w.group_index[:, :, :40] = 2**31 - 1
    w.group_index[:, :, 40:50] = -(2**31)
    triton_gemm(QuantizedProduct(a, w, out, blocks, tile, TOP_K))
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_what_the_kernel_cannot_read_is_named():
    a, ids = rows_and_ids(256)
    blocks, c = moe_align_block_size(ids, 16, E), torch.zeros(ids.numel(), N)

    def refused(message, fmt="q4_k", tile=None, w=None, a=a):
        weight, tile = w or weights(fmt, 256), tile or tile_for(fmt)
        with pytest.raises(ValueError, match=message):
            quantized_gemm(QuantizedProduct(a, weight, c, blocks, tile, TOP_K))

    refused("steps of 128 columns do not fit q4_k", tile=QuantizedTile(32, 16, 128, 1, 4, 2))
    refused("steps of 32 columns", "mxfp6_e2m3", tile=QuantizedTile(32, 16, 32, 1, 4, 2))
    refused("does not fit weights", a=a[:, :128])
    ordered = weights("int4_g32_act_order", 256)
    none = replace(ordered, scale=ordered.scale[..., :0].contiguous())
    refused("no groups to belong to", "int4_g32_act_order", w=none)
