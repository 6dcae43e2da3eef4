"""The CUDA kernel of few slots per expert, its text compiled for the CPU: every format, odd sizes,
columns shared by warps, slots without an expert, rows that are NaN; what its launcher works out."""

from __future__ import annotations

import ctypes
import re
import shutil
from dataclasses import replace

import pytest
import torch

from cuda_on_cpu import KernelOnCpu
from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment, moe_align_block_size
from fusedmoe.kernels.cuda import program, quantized_decode
from fusedmoe.kernels.grouped_gemm_quantized import quantized_gemm_reference, weight_addresses
from fusedmoe.kernels.hopper_quantized import quantized_decode_reference, unmet_by_stream
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.tuning.cuda_tiles import CudaDecodeTile, CudaDecodeTiles, cuda_decode_tiles
from fusedmoe.tuning.quantized_tiles import QuantizedTile

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles with g++")
SILU, GELU, OAI = MoEActivation.SILU, MoEActivation.GELU, MoEActivation.SWIGLUOAI
RELU2 = MoEActivation.RELU2_NO_MUL
NAN = float("nan")


def tile(along=1, across=4, slots=8, stages=4, tiles=2, step=64):
    return CudaDecodeTile(tiles, slots, along, across, step, stages, 2)


@pytest.fixture
def on_cpu(monkeypatch):
    def kernel(defines, threads, shared):
        given = quantized_decode.SOURCES, quantized_decode.ENTRY, defines, threads, shared
        return KernelOnCpu(*given)

    monkeypatch.setattr(quantized_decode, "_kernel", kernel)


def weights(fmt, e, N, D, act):
    resolved = None if act is None else device_activation(act)
    shards = 2 if resolved and resolved.gated else 1
    values = torch.randn(e, shards * N, D) / D**0.5
    interleaved = bool(resolved and resolved.interleaved)
    w = quantize(values, format_named(fmt), shards=shards, interleaved=interleaved)
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


# format, activation (None: the second GEMM), T, K, E, D, N, tile, what else
ONE_GEMM = {
    "groups_of_32_split": ("int4_g32", None, 3, 2, 9, 1024, 80, tile(4, 1, stages=5), {}),
    "zero_points": ("int4_g128_zp", GELU, 9, 2, 4, 896, 40, tile(2, 2), {"bias": True}),
    "zero_points_of_rows": ("int4_channel_zp", SILU, 9, 2, 4, 416, 40, tile(2, 2), {"bias": True}),
    "zero_points_of_short_rows": ("int4_channel_zp", None, 3, 2, 9, 96, 40, tile(), {}),
    "one_scale_per_row": ("int4_channel", SILU, 2, 2, 9, 416, 40, tile(2, 2), {"local": 5}),
    "bytes_in_groups": ("int8_g32", SILU, 9, 2, 4, 320, 40, tile(2, 2), {}),
    "scales_inside_words": ("mxfp4", OAI, 2, 4, 16, 2880, 24, tile(4, 1, stages=5), {"bias": True}),
    "groups_of_16": ("nvfp4", SILU, 9, 2, 4, 1056, 40, tile(2, 2), {}),
    "no_gate": ("mxfp8", RELU2, 9, 2, 4, 288, 48, tile(), {"bias": True}),
    "blocks": ("fp8_block", SILU, 9, 2, 4, 1040, 200, tile(2, 2), {}),
    "tensor": ("fp8_tensor", None, 9, 2, 4, 272, 48, tile(), {"bias": True}),
    "many_slots": ("mxfp4", OAI, 60, 2, 4, 576, 48, tile(slots=32), {"local": 3, "bias": True}),
    "lines_split": ("mxfp8", SILU, 9, 2, 4, 160, 24, tile(2, 2, tiles=1, step=128), {}),
    "steps_of_a_line": ("int4_g128", None, 9, 2, 4, 1024, 48, tile(tiles=1, step=128), {}),
    "few_steps": ("int4_g32", None, 9, 2, 4, 256, 200, tile(), {"programs": 1}),
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
    blocks = LoneSlots(ids.flatten(), expert_map)
    if T > 3:
        blocks = MoEAlignment(
            *moe_align_block_size(
                ids, cut.slots, E, expert_map, ignore_invalid_experts=True, num_local_experts=e
            )[:3]
        )
    out = torch.full((T * K, N), NAN, dtype=torch.float32 if act is None else torch.bfloat16)
    expected = out.clone()
    reference = QuantizedTile(64, cut.slots, 64, 1, 4, 2)
    quantized_gemm_reference(x, w, expected, blocks, reference, top_k=K, bias=bias, activation=act)
    quantized_decode.stream(
        x, w, out, bias, None if act is None else device_activation(act), blocks,
        weight_addresses(w), K, cut, more.get("programs", 2), early=act is None,
    )  # fmt: skip
    assert out.isnan().equal(expected.isnan())
    out, expected = out.double().nan_to_num(), expected.double().nan_to_num()
    # Scales, weights and zero points are exact: only sums in another order differ.
    assert (out - expected).norm() <= (1e-3 if act else 1e-5) * expected.norm()


@needs_compiler
def test_a_layer_whose_last_row_is_nan(on_cpu):
    T, K, E, H, I = 5, 2, 4, 512, 96  # noqa: E741
    torch.manual_seed(0)
    ids, _ = routed(T, K, E, None)
    w1, w2 = weights("int4_g32_zp", E, I, H, SILU), weights("int4_g32_zp", E, H, I, None)
    x, picked = torch.randn(T, H).bfloat16(), torch.rand(T, K)
    tiles = CudaDecodeTiles(tile(2, 2), tile())
    found = []
    for last in (x[-1].clone(), NAN):
        x[-1] = last
        outs = torch.empty(2, T, H, dtype=torch.bfloat16)
        for function, out in zip((quantized_decode.decode, None), outs, strict=True):
            act, y = torch.full((T * K, I), NAN).bfloat16(), torch.full((T * K, H), NAN)
            table = MoEAlignment(*moe_align_block_size(ids, 8, E)[:3])
            given = x, w1, w2, picked, ids, out, act, y
            if function is None:
                quantized_decode_reference(*given, table, tiles=tiles, programs=2)
            else:
                silu, addresses = (
                    device_activation(SILU),
                    (weight_addresses(w1), weight_addresses(w2)),
                )
                function(*given, silu, None, None, None, table, addresses, tiles, 2)
        torch.testing.assert_close(outs[0][:-1], outs[1][:-1], rtol=2e-2, atol=2e-3)
        found.append(outs[0])
    assert found[0][:-1].equal(found[1][:-1])
    assert found[1][-1].isnan().all()


def test_warps_without_a_step_are_refused():
    w, x = weights("int4_g32", 2, 32, 256, None), torch.zeros(1, 256).bfloat16()
    blocks, out = LoneSlots(torch.zeros(1, dtype=torch.int32)), torch.zeros(1, 32)
    with pytest.raises(ValueError, match="4 warps share a row of 2 steps"):
        quantized_decode.stream(
            x, w, out, None, None, blocks, weight_addresses(w), 1, tile(4, 1), 1, early=False
        )


def test_arguments_and_constants_are_those_of_the_source():
    source = program.source_of("quantized_tasks.cuh")
    fields = re.search(r"struct Arguments \{(.*?)\};", source, re.DOTALL)[1]
    fields = re.sub(r"//.*", "", fields)
    names = [name for line in fields.split(";") for name in re.findall(r"(\w+)\s*(?:,|$)", line)]
    assert names == [name for name, _ in quantized_decode.Arguments._fields_]
    assert ctypes.sizeof(quantized_decode.Arguments) == 13 * 8 + 7 * 4 + 4


@pytest.mark.parametrize("steps", [1, 2, 6, 16, 23, 56])
@pytest.mark.parametrize("along", [1, 2, 4])
@pytest.mark.parametrize(("columns", "group", "unit"), [(128, 32, 1), (128, 128, 2), (64, 128, 4)])
def test_spans_of_scales(steps, along, columns, group, unit):
    """Every span's scales fit 32 bytes from a word on, and no span is overwritten in use."""
    if steps < along:
        return
    stride, stages = -(-steps * columns // group), 4
    spans = quantized_decode.spans_of(steps, columns, group, unit, stride, along, stages)
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
            assert miss + (high - low) * unit <= quantized_decode.SPAN_BYTES
            of_step += [begin] * (end - begin)
        tasks = [(task, begin) for task in range(stages + 1) for begin in of_step]
        for at in range(len(of_step)):
            assert len(set(tasks[at : at + stages])) <= spans.alive


def test_tiles_fill_the_multiprocessors_with_as_few_warps_per_task_as_do():
    def along(R, e, rows, row_bytes, lone=False):
        tiles = cuda_decode_tiles(R, e, rows, row_bytes, lone, 132)
        return tiles.gemm1.along, tiles.gemm2.along, tiles.gemm1.slots

    assert along(8, 128, (1536, 2048), (1024, 384), True) == (4, 2, 8)
    assert along(64, 128, (1536, 2048), (1024, 384)) == (2, 1, 8)
    assert along(512, 128, (1536, 2048), (1024, 384)) == (1, 1, 8)
    assert along(128, 8, (28672, 4096), (2048, 7168))[2] == 32
    assert along(90, 8, (28672, 4096), (2048, 7168))[2] == 16


BAD_TILES = {"slots": 12, "tiles": 0, "across": 17, "step": 256, "stages": 1}
BAD_TILES |= {"per_multiprocessor": 0}


@pytest.mark.parametrize(("name", "size"), BAD_TILES.items())
def test_tiles_that_the_kernel_does_not_have_are_refused(name, size):
    with pytest.raises(ValueError, match=str(size)):
        replace(tile(), **{name: size})


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
