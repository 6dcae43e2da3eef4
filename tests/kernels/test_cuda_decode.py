"""The CUDA kernel of few slots per expert, its text compiled for the CPU: every format, odd sizes,
columns shared by warps, slots without an expert, rows that are NaN; what its launcher works out."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
from dataclasses import replace

import pytest
import torch

from cuda_on_cpu import KernelOnCpu
from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.activation import NO_ACTIVATION, device_activation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment, moe_align_block_size
from fusedmoe.kernels.align_pair import PairedOrder, paired_reference
from fusedmoe.kernels.cuda import (
    program,
    quantized_cut,
    quantized_decode,
    quantized_launch,
    quantized_rows,
    quantized_warps,
)
from fusedmoe.kernels.cuda.quantized_launch import Product
from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct, quantized_gemm_reference
from fusedmoe.kernels.hopper_quantized import quantized_decode_reference
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.quantized_checks import unmet_by_stream
from fusedmoe.quantization.formats import dequantize, quantize
from fusedmoe.quantization.formats.lookup import CODECS
from fusedmoe.tuning.cuda_tiles import (
    CudaDecodeTiles,
    CudaLoneTile,
    CudaRowsTile,
    CudaStreamTile,
    CudaWarpsTile,
    cuda_decode_tiles,
    int4_rows_tile,
    table_tile,
)
from fusedmoe.tuning.quantized_tiles import QuantizedTile
from fusedmoe.tuning.tiles import HOPPER_SHARED_MEMORY
from packed_weights import format_of

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles with g++")
SILU, GELU, OAI = MoEActivation.SILU, MoEActivation.GELU, MoEActivation.SWIGLUOAI
RELU2 = MoEActivation.RELU2_NO_MUL
NAN = float("nan")


def lone(along=1, across=4, stages=4, tiles=2):
    return CudaLoneTile(tiles, along, across, stages, 2)


def warps(along=1, across=4, stages=4, tiles=2):
    return CudaWarpsTile(tiles, along, across, stages, 2)


def rows(along=1, across=4, stages=3, tiles=1, ahead=99, slots=8, parts=1):
    return CudaRowsTile(tiles, along, across, stages, 1, ahead, slots, parts)


def block(slots=16, warps=4, stages=3):
    return CudaStreamTile(slots, warps, stages, 1)


@pytest.fixture
def on_cpu(monkeypatch):
    def kernel(sources, defines, threads, shared, cooperative):
        given = sources, sources[-1].removesuffix(".cu"), defines, threads, shared
        return KernelOnCpu(*given, cooperative=cooperative)

    monkeypatch.setattr(quantized_rows, "tile_map", tile_map)
    monkeypatch.setattr(quantized_launch, "_kernel", kernel)
    monkeypatch.setattr(quantized_decode, "tile_map", tile_map)


def tile_map(data, e, features, shards, row, interleaved, box, width=None):
    """As ``cuda_on_cpu.hpp`` reads it."""
    apart = (shards, 1) if interleaved else (1, features)
    strides = [row * rows for rows in (*apart, shards * features)]
    step = quantized_decode.STEP
    numbers = [data, row, features, shards, e, *strides, width or step, box, shards, width is None]
    return struct.pack("12q", *numbers)


def weights(fmt, e, N, D, act):
    resolved = device_activation(act)
    shards = 2 if resolved.gated else 1
    values = torch.randn(e, shards * N, D) / D**0.5
    interleaved = resolved.interleaved
    w = quantize(values, format_of(fmt), shards=shards, interleaved=interleaved)
    return replace(w, scale=before_ones(w.scale))


def before_ones(scale):
    """The same numbers in memory whose next bits are ones: no number, if anyone reads them."""
    flat = scale.contiguous().flatten().view(torch.uint8)
    longer = torch.cat([flat, torch.full((64,), 255, dtype=torch.uint8)])
    return longer[: flat.numel()].view(scale.dtype).view(scale.shape)


def routed(T, K, E, local):
    """Ids with one of no expert and one out of range, and where ``local`` experts are."""
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()
    ids[0, 0] = -1
    ids[-1, -1] = E + 5
    if local is None:
        return ids, None
    expert_map = torch.full((E,), -1, dtype=torch.int32)
    expert_map[torch.randperm(E)[:local]] = torch.arange(local, dtype=torch.int32)
    return ids, expert_map


# Programs make the blocks themselves.
MADE = {"made": True, "bias": True}
# Rows of fifteen bits.
DIGITS = {"bias": True, "tolerance": 3e-5}
# format, activation (None: the second GEMM), T, K, E, D, N, tile, what else
ONE_GEMM = {
    "lone_groups_of_32": ("int4_g32", None, 3, 2, 9, 1024, 80, lone(4, 1, stages=5), {}),
    "lone_zero_points": ("int4_g128_zp", GELU, 3, 2, 4, 896, 40, lone(2, 2), {"bias": True}),
    "lone_short_rows": ("int4_channel_zp", None, 3, 2, 9, 96, 40, lone(), {}),
    "lone_scale_per_row": ("int4_channel", SILU, 2, 2, 9, 416, 40, lone(2, 2), {"local": 5}),
    "lone_bytes": ("int8_g32", SILU, 3, 2, 4, 320, 40, lone(2, 2), {}),
    "lone_mxfp4": ("mxfp4", OAI, 2, 4, 16, 2880, 24, lone(4, 1, stages=5), {"bias": True}),
    "lone_nvfp4": ("nvfp4", SILU, 3, 2, 4, 1056, 40, lone(2, 2), {}),
    "lone_no_gate": ("mxfp8", RELU2, 3, 2, 4, 160, 24, lone(2, 2, tiles=1), {"bias": True}),
    "lone_fp8_blocks": ("fp8_block", SILU, 3, 2, 4, 1040, 200, lone(), {"programs": 1}),
    "warps_zero_points": ("int4_g128_zp", GELU, 9, 2, 4, 896, 40, warps(2, 2), {"bias": True}),
    "warps_of_rows": ("int4_channel_zp", SILU, 9, 2, 4, 416, 40, warps(2, 2), {"bias": True}),
    "warps_bytes": ("int8_g32", SILU, 9, 2, 4, 320, 40, warps(2, 2), {}),
    "warps_mxfp4": ("mxfp4", OAI, 20, 4, 16, 2880, 24, warps(), {"local": 7, "bias": True}),
    "warps_nvfp4": ("nvfp4", SILU, 9, 2, 4, 1056, 40, warps(4, 1), {}),
    "warps_no_gate": ("mxfp8", RELU2, 9, 2, 4, 288, 48, warps(tiles=1), {"bias": True}),
    "warps_fp8_blocks": ("fp8_block", SILU, 9, 2, 4, 1040, 200, warps(2, 2), {}),
    "warps_nf4": ("nf4", SILU, 9, 2, 4, 1088, 40, warps(4, 2), {"bias": True}),
    "warps_nf4_down": ("nf4", None, 9, 2, 4, 320, 72, warps(1, 16, 3), {"local": 3}),
    "warps_iq4_nl": ("iq4_nl", OAI, 20, 4, 16, 1024, 24, warps(2, 2), {"local": 7}),
    "warps_iq4_nl_wide": ("iq4_nl@float32", None, 9, 2, 4, 1088, 40, warps(2, 2), {"bias": True}),
    "warps_few_steps": ("int4_g32", None, 9, 2, 4, 256, 200, warps(), {"programs": 1}),
    "rows_mxfp4": ("mxfp4", OAI, 20, 4, 16, 320, 96, rows(4, 2), {"local": 7, "bias": True}),
    "rows_mxfp4_down": ("mxfp4", None, 20, 4, 16, 320, 96, rows(3, 2, 3, 1, 2), {"bias": True}),
    "rows_swizzled": ("mxfp4", OAI, 20, 4, 16, 512, 96, rows(3, 2), {"local": 7, "bias": True}),
    "rows_few_slots": ("mxfp4", SILU, 5, 4, 12, 640, 96, rows(2, 4), {"bias": True}),
    "rows_few_slots_apart": ("mxfp4", None, 5, 4, 12, 768, 96, rows(3, 2), {"local": 9}),
    "rows_int4": ("int4_g32", SILU, 20, 4, 16, 1024, 96, rows(4, 3), {"bias": True}),
    "rows_int4_apart": ("int4_g32", SILU, 9, 4, 16, 8192, 16, rows(8, 1, 2), {}),
    "rows_int4_ahead": ("int4_g32", None, 20, 4, 16, 256, 128, rows(1, 4, ahead=1), {}),
    "rows_int4_g128": ("int4_g128", SILU, 20, 4, 16, 1024, 96, rows(4, 2, tiles=2), {}),
    "rows_int4_g128_straddling": ("int4_g128", None, 20, 4, 16, 768, 64, rows(4, 2), {}),
    "rows_of_16": ("int4_g128", SILU, 20, 4, 16, 1024, 96, rows(4, 2, tiles=2, slots=16), {}),
    "rows_of_16_apart": ("int4_g32", SILU, 20, 4, 6, 8192, 16, rows(16, 1, slots=16), {}),
    "rows_made": ("int4_g32", SILU, 8, 4, 9, 1024, 96, rows(4, 2), MADE | {"local": 7}),
    "rows_made_down": ("mxfp4", None, 15, 2, 3, 320, 96, rows(3, 2), MADE),
    "rows_of_16_few_items": (
        "int4_g128",
        SILU,
        20,
        4,
        5,
        512,
        24,
        rows(2, 1, slots=16),
        {"programs": 7},
    ),
    "rows_of_16_made": ("int4_g128", SILU, 16, 2, 2, 1024, 96, rows(4, 2, slots=16), MADE),
    "rows_digits": (
        "int4_g128",
        SILU,
        5,
        2,
        9,
        1024,
        96,
        rows(4, 2, tiles=2),
        {"local": 7, "bias": True},
    ),
    "rows_digits_made": ("int4_g128", OAI, 8, 2, 12, 512, 96, rows(2, 4), MADE),
    "rows_digits_down": ("int4_g128", None, 5, 2, 9, 768, 64, rows(1, 2), DIGITS),
    "rows_digits_apart": ("int4_g128", None, 7, 2, 12, 768, 64, rows(2, 2), DIGITS),
    "rows_no_gate": ("mxfp4", RELU2, 20, 4, 16, 512, 96, rows(2, 3), {"bias": True}),
    "rows_lone": ("int4_g32", SILU, 3, 4, 16, 1024, 96, rows(4, 2, slots=1), {"bias": True}),
    "rows_lone_mxfp4": (
        "mxfp4",
        OAI,
        3,
        4,
        16,
        320,
        96,
        rows(4, 2, slots=1),
        {"local": 5, "bias": True},
    ),
    "rows_lone_long": ("mxfp4", OAI, 2, 4, 16, 640, 96, rows(2, 4, slots=1), {"bias": True}),
    "rows_lone_down": ("int4_g32", None, 2, 2, 16, 256, 128, rows(2, 4, slots=1), {"bias": True}),
    "zero_points": ("int4_g128_zp", GELU, 9, 2, 4, 896, 40, block(), {"bias": True}),
    "zero_points_of_rows": (
        "int4_channel_zp",
        SILU,
        9,
        2,
        4,
        416,
        40,
        block(16, 8),
        {"bias": True},
    ),
    "groups_of_128": ("int4_g128", SILU, 40, 2, 4, 640, 72, block(24, 8), {"bias": True}),
    "groups_of_64": ("int4_g64", None, 9, 2, 4, 640, 72, block(), {}),
    "groups_of_32": ("int4_g32", None, 9, 2, 4, 288, 200, block(32), {"programs": 1}),
    "bytes_in_groups": ("int8_g32", SILU, 9, 2, 4, 320, 40, block(16), {}),
    "mxfp4": ("mxfp4", OAI, 20, 4, 16, 2880, 24, block(8, 8), {"local": 7, "bias": True}),
    "nvfp4": ("nvfp4", SILU, 9, 2, 4, 1056, 40, block(), {}),
    "no_gate": ("mxfp8", RELU2, 9, 2, 4, 288, 48, block(), {"bias": True}),
    "fp8_blocks": ("fp8_block", SILU, 9, 2, 4, 1040, 200, block(), {}),
    "fp8_tensor": ("fp8_tensor", None, 9, 2, 4, 272, 48, block(), {"bias": True}),
}


@needs_compiler
@pytest.mark.parametrize("name", ONE_GEMM)
def test_one_gemm(name, on_cpu):
    fmt, act, T, K, E, D, N, cut, more = ONE_GEMM[name]
    torch.manual_seed(0)
    ids, expert_map = routed(T, K, E, more.get("local"))
    e = more.get("local") or E
    w, x = weights(fmt, e, N, D, act), torch.randn(T, D).bfloat16()
    bias = torch.randn(e, w.shape[1]).bfloat16() if more.get("bias") else None
    blocks = of_eight = LoneSlots(ids.flatten(), expert_map)
    if T > 3:
        tables, of_eight = (
            MoEAlignment(
                *moe_align_block_size(
                    ids, slots, E, expert_map, ignore_invalid_experts=True, num_local_experts=e
                )[:3]
            )
            for slots in (cut.slots, 8)
        )
        blocks = blocks if more.get("made") else tables
    out = torch.full((T * K, N), NAN, dtype=torch.float32 if act is None else torch.bfloat16)
    expected = out.clone()
    eight = QuantizedTile(64, 8, 64, 1, 4, 2)
    quantized_gemm_reference(QuantizedProduct(x, w, expected, of_eight, eight, K, bias, act))
    if isinstance(cut, CudaStreamTile):
        x = paired_reference(x, PairedOrder.of(w.format))
    activation = device_activation(act)
    programs, early = more.get("programs", 2), act is None
    launcher = quantized_decode
    if isinstance(cut, (CudaRowsTile, CudaWarpsTile)):
        launcher = quantized_rows if isinstance(cut, CudaRowsTile) else quantized_warps
    launcher.stream(Product(x, w, out, bias, activation, blocks, K, programs, early), cut)
    assert out.isnan().equal(expected.isnan())
    out, expected = out.double().nan_to_num(), expected.double().nan_to_num()
    # Numbers, but for nf4's, scales and zero points are exact: only sums in another order differ.
    tolerance = more.get("tolerance", 2e-3 if fmt == "nf4" else 1e-3 if act else 1e-5)
    assert (out - expected).norm() <= tolerance * expected.norm()


def in_digits(x):
    """Groups of 128 columns as whole numbers of 15 bits, times a power of two of their own."""
    groups = x.double().unflatten(-1, (-1, 128))
    unit = groups.abs().amax(-1, keepdim=True).frexp()[1].double().exp2() * 2.0**-14
    return ((groups / unit).round() * unit).flatten(-2)


@needs_compiler
@pytest.mark.parametrize(
    ("slots", "programs", "rounded"),
    [
        ((1, 4, 2), 1, (0, 1, 2)),
        ((1, 5, 2), 1, ()),
        ((5, 1, 1, 1, 1, 4, 1, 1, 1, 1), 2, (5, 6, 7, 8, 9)),  # of the other program
    ],
)
def test_blocks_of_four_slots_take_rows_in_digits(slots, programs, rounded, on_cpu):
    torch.manual_seed(0)
    D, N = 768, 64
    w = weights("int4_g128", len(slots), N, D, None)
    ids = torch.arange(len(slots), dtype=torch.int32).repeat_interleave(torch.tensor(slots))
    x = (torch.randn(len(ids), D) * torch.logspace(-4, 4, D)[torch.randperm(D)]).bfloat16()
    out = torch.full((len(ids), N), NAN)
    tables = MoEAlignment(*moe_align_block_size(ids[:, None], 8, len(slots))[:3])
    product = Product(x, w, out, None, NO_ACTIVATION, tables, 1, programs)
    quantized_rows.stream(product, rows(2, 2))
    by_digits = torch.isin(ids, torch.tensor(rounded, dtype=torch.int32))[:, None]
    read = torch.where(by_digits, in_digits(x), x.double())
    expected = torch.einsum("rd,rnd->rn", read, dequantize(w, torch.float64)[ids])
    assert torch.all((out - expected).norm(dim=1) <= 1e-6 * expected.norm(dim=1))


LAYERS = {
    "stream": ("int4_g32_zp", 96, CudaDecodeTiles(block(), block())),
    "warps_and_rows": ("int4_g32", 96 + 32, CudaDecodeTiles(warps(), rows(2, 2))),
    "parts_of_rows": (
        "int4_g128",
        512,
        CudaDecodeTiles(rows(4, 2, slots=16), rows(2, 2, slots=16, parts=2)),
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_whose_last_row_is_nan(name, on_cpu):
    fmt, I, tiles = LAYERS[name]  # noqa: E741
    T, K, E, H = 5, 2, 4, 512
    torch.manual_seed(0)
    ids, _ = routed(T, K, E, None)
    w1, w2 = weights(fmt, E, I, H, SILU), weights(fmt, E, H, I, None)
    x, picked = torch.randn(T, H).bfloat16(), torch.rand(T, K)
    found = []
    for last in (x[-1].clone(), NAN):
        x[-1] = last
        outs = torch.empty(2, T, H, dtype=torch.bfloat16)
        for function, out in zip((quantized_decode.decode, None), outs, strict=True):
            act, y = torch.full((T * K, I), NAN).bfloat16(), torch.full((T * K, H), NAN)
            table = MoEAlignment(*moe_align_block_size(ids, tiles.slots, E)[:3])
            given = LayerTensors(x, w1, w2, picked, ids, out, act, y, 2)
            if function is None:
                quantized_decode_reference(given)
            else:
                if tiles.paired:
                    given = given._replace(x=paired_reference(x, PairedOrder.of(w1.format)))
                function(given, table, tiles)
        torch.testing.assert_close(outs[0][:-1], outs[1][:-1], rtol=2e-2, atol=2e-3)
        found.append(outs[0])
    assert found[0][:-1].equal(found[1][:-1])
    assert found[1][-1].isnan().all()


def test_warps_without_a_step_are_refused():
    w, x = weights("int4_g32", 2, 32, 512, None), torch.zeros(1, 512).bfloat16()
    blocks, out = LoneSlots(torch.zeros(1, dtype=torch.int32)), torch.zeros(1, 32)
    with pytest.raises(ValueError, match="4 warps share a row of 2 steps"):
        quantized_decode.stream(Product(x, w, out, None, NO_ACTIVATION, blocks, 1, 1), lone(4, 1))


def test_arguments_and_constants_are_those_of_the_source():
    source = program.source_of("quantized_tasks.cuh")
    fields = re.search(r"struct Arguments \{(.*?)\};", source, re.DOTALL)[1]
    fields = re.sub(r"//.*", "", fields)
    names = [name for line in fields.split(";") for name in re.findall(r"(\w+)\s*(?:,|$)", line)]
    assert names == [name for name, _ in quantized_decode.Arguments._fields_]
    assert ctypes.sizeof(quantized_decode.Arguments) == 256


@pytest.mark.parametrize("steps", [1, 2, 6, 16, 23, 56])
@pytest.mark.parametrize("along", [1, 2, 4])
@pytest.mark.parametrize(("columns", "group", "unit"), [(128, 32, 1), (128, 128, 2), (64, 128, 4)])
def test_spans_of_scales(steps, along, columns, group, unit):
    """Every span's scales fit 32 bytes from a word on, and no span is overwritten in use."""
    if steps < along:
        return
    stride, stages = -(-steps * columns // group), 4
    spans = quantized_cut.spans_of(steps, columns, group, unit, stride, along, stages)
    for i in range(along):
        first, last = i * steps // along, (i + 1) * steps // along
        of_step = []
        for begin in range(first, last, spans.steps):
            end = min(begin + spans.steps, last)
            low, high = begin * columns // group, -(-end * columns // group)
            miss = low * unit % 4 if spans.loose[0] else 0
            assert spans.loose[0] or low * unit % 4 == 0
            # A row may begin inside a word as well.
            miss = max(miss, 4 - unit) if stride * unit % 4 else miss
            assert miss + (high - low) * unit <= spans.pitch <= quantized_cut.SPAN_BYTES + 4
            of_step += [begin] * (end - begin)
        tasks = [(task, begin) for task in range(stages + 1) for begin in of_step]
        for at in range(len(of_step)):
            assert len(set(tasks[at : at + stages])) <= spans.alive


def test_lone_tiles_fill_the_multiprocessors_with_as_few_warps_per_task_as_do():
    tiles = cuda_decode_tiles(8, 128, (1536, 2048), (1024, 384), True, 132)
    assert (tiles.gemm1.along, tiles.gemm2.along) == (4, 2)
    assert cuda_decode_tiles(32, 128, (1536, 2048), (1024, 384), True, 132).gemm1.along == 1


@pytest.mark.parametrize("fmt", ["nf4", "iq4_nl", "iq4_nl@float32"])
@pytest.mark.parametrize(("blocks", "D", "along"), [(128, 2048, 1), (8, 768, 4), (1, 14336, 8)])
def test_entries_of_a_table_leave_room_for_it(fmt, blocks, D, along):
    tile = table_tile(blocks, 2048, D // 2, 132)
    assert (tile.along, tile.across) == (along, 16 // along)
    shared = quantized_cut.cut_of(weights(fmt, 1, 16, D, None), D, tile).shared
    assert 32 * 1024 < shared <= HOPPER_SHARED_MEMORY
    element = format_of(fmt).element
    constants = quantized_warps.table_constants(element)
    entries = [constants[f"TABLE_{i}"] >> 16 * j & 0xFFFF for i in range(8) for j in (0, 1)]
    found = torch.tensor(entries, dtype=torch.uint16).view(torch.bfloat16).double()
    torch.testing.assert_close(
        found / (constants["TABLE_LIFT"] / 2**16),
        torch.tensor(CODECS[element].table, dtype=torch.float64),
        rtol=0 if element == "iq4_nl" else 2**-8,
        atol=0,
    )


def test_programs_have_the_stages_that_fit(on_cpu, monkeypatch):
    found = []
    monkeypatch.setattr(quantized_warps, "launch", lambda *given: found.append(given[1:4]))
    w, x = weights("nf4", 1, 32, 2048, None), torch.zeros(8, 2048).bfloat16()
    tables = MoEAlignment(*moe_align_block_size(torch.zeros(8, 1, dtype=torch.int32), 8, 1)[:3])
    given = x, w, torch.zeros(8, 32), None, NO_ACTIVATION, tables, 1, 1
    quantized_warps.stream(Product(*given), warps(2, 8, stages=5))
    ((constants, threads, shared),) = found
    assert (constants["STAGES"], threads) == (3, 512)
    assert shared <= HOPPER_SHARED_MEMORY


@pytest.mark.parametrize(("R", "slots"), [(64, 8), (768, 8), (1024, 16), (2048, 24), (3072, 32)])
def test_blocks_have_room_for_the_mean_number_of_slots(R, slots):
    tiles = cuda_decode_tiles(R, 128, (1536, 2048), (1024, 384), False, 132)
    assert tiles.slots == slots


def test_short_rows_of_int4_go_to_as_many_warps_side_by_side_as_divide_them():
    def cut(features: int, row_bytes: int) -> tuple[int, int, int]:
        tile = int4_rows_tile(features, 1, row_bytes, row_bytes // 8, 8, True)
        return tile.tiles, tile.along, tile.across

    assert cut(7168, 128) == (1, 1, 14)
    assert cut(2048, 128) == (2, 1, 8)
    assert cut(2048, 384) == (2, 2, 4)


BAD_TILES = [
    *((lone(), {"tiles": 0}), (lone(), {"across": 17}), (lone(), {"stages": 1})),
    *((warps(), {"tiles": 0}), (warps(), {"per_multiprocessor": 0})),
    *((block(), {"slots": 12}), (block(), {"warps": 6}), (block(), {"stages": 1})),
]


def test_stages_are_fewer_where_scales_and_zero_points_leave_no_room():
    w = weights("int4_g32_zp", 1, 128, 4096, None)
    tile = block(24, 16, 4)
    cut = quantized_cut.cut_of(w, 4096, tile)
    assert cut.constants["STAGES"] < tile.stages
    assert cut.shared <= 227 * 1024


@pytest.mark.parametrize(("tile", "change"), BAD_TILES)
def test_tiles_that_the_kernels_do_not_have_are_refused(tile, change):
    with pytest.raises(ValueError, match=str(*change.values())):
        replace(tile, **change)


def test_what_the_kernel_cannot_read_is_named():
    assert unmet_by_stream(weights("mxfp4", 2, 16, 64, None)) is None
    assert "16 columns" in unmet_by_stream(weights("int4_g16", 2, 16, 64, None))
    assert "16 features" in unmet_by_stream(weights("int8_channel", 2, 8, 64, None))
    assert "4-byte words" in unmet_by_stream(weights("mxfp4", 1, 17, 32 * 33, None))


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda", None)
    program.missing_nvrtc.cache_clear()
    assert "cuda-bindings" in program.missing_nvrtc()
    program.missing_nvrtc.cache_clear()
