"""What can be known of the 8-bit prefill kernels without a GPU: the order of their tiles, where
their scales lie, what their launcher refuses, and that they compile without spilling a sum."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.align import MoEAlignment, moe_align_block_size
from fusedmoe.kernels.grouped_gemm_quantized import weight_addresses
from fusedmoe.kernels.hopper_fp8_prefill import fp8_prefill, unmet_by_prefill
from fusedmoe.kernels.hopper_prefill import prefill_rows
from fusedmoe.kernels.quantize import quantize_rows_reference
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
)
from fusedmoe.tuning.quantized_tiles import QuantizedPrefillTiles

SOURCE = Path(__file__).parents[2] / "src"
ROWS, STEP = 128, 128


class OnTensors:
    """Gluon's arithmetic on numbers and tensors; a pointer is a (tensor, offset) pair."""

    @staticmethod
    def minimum(x, y):
        return torch.as_tensor(x).clamp(max=y)

    @staticmethod
    def maximum(x, y):
        return torch.as_tensor(x).clamp(min=y)

    @staticmethod
    def load(pointer):
        return pointer.tensor.reshape(-1)[pointer.offset]


class Pointer:
    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset

    def __add__(self, more):
        return Pointer(self.tensor, self.offset + more)


class Number(int):
    def to(self, dtype):
        return self


def device_function(name):
    """The body of a device function, to be run on tensors."""
    from fusedmoe.kernels.triton import hopper_fp8_prefill_common

    function = getattr(hopper_fp8_prefill_common, name).fn
    names = {"gl": type("gl", (OnTensors,), {"int64": torch.int64})}
    return types.FunctionType(function.__code__, function.__globals__ | names)


@pytest.mark.parametrize(("blocks", "TILES", "GROUP"), [(1, 3, 16), (35, 6, 16), (16, 1, 16)])
def test_every_tile_has_one_task(blocks, TILES, GROUP):
    place = device_function("place")
    experts = Pointer(torch.arange(blocks) // 3)
    found = [
        tuple(int(n) for n in place(task, blocks, experts, 4, TILES, GROUP))
        for task in range(blocks * TILES)
    ]
    assert {(block, tile) for block, tile, _ in found} == {
        (block, tile) for block in range(blocks) for tile in range(TILES)
    }
    assert all(expert == min(block // 3, 3) for block, _, expert in found)
    assert len({block for block, _, _ in found[: GROUP * TILES]}) == min(GROUP, blocks)


def weights(fmt, E, N, D, shards=1, interleaved=False):
    values = torch.randn(E, N, D)
    return quantize(values, format_named(fmt), shards=shards, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fmt", ["fp8_block", "fp8_channel", "fp8_tensor", "int8_channel"])
@pytest.mark.parametrize("I", [256, 208])
def test_scales_lie_where_the_kernels_read_them(fmt, interleaved, I):  # noqa: E741
    """data * scale, found as ``scale_row`` finds it, is what the weights dequantize to."""
    w = weights(fmt, 2, 2 * I, 384, shards=2, interleaved=interleaved)
    exact = w.dequantize(torch.float32)
    scale_row = device_function("scale_row")
    scales = (Pointer(w.scale), *weight_addresses(w)[4:])
    columns = torch.arange(384) // STEP if fmt == "fp8_block" else torch.zeros(384).long()
    feature = torch.arange(I)
    for expert in range(2):
        for shard in range(2):
            at = scale_row(scales, Number(expert), shard, feature, I).offset
            scale = w.scale.reshape(-1)[at[:, None] + columns]
            rows = feature * 2 + shard if interleaved else shard * I + feature
            found = w.data[expert, rows].float() * scale
            torch.testing.assert_close(found, exact[expert, rows])
    past = scale_row(scales, Number(0), 0, torch.tensor(I + 5), I).offset
    assert past == scale_row(scales, Number(0), 0, torch.tensor(I - 1), I).offset


def as_the_kernels_do(x, w1, w2, topk_ids, tables, programs=7):
    """up_kernel and down_kernel of block fp8 with silu, tile by tile and step by step: (y [P, H],
    position [R])."""
    place, scale_row = device_function("place"), device_function("scale_row")
    (e, H, I), (T, K) = w2.shape, topk_ids.shape  # noqa: E741
    R, P = T * K, prefill_rows(T * K, e)
    blocks, experts = int(tables.num_tokens_post_pad) // ROWS, Pointer(tables.expert_ids)
    q, q_scale = quantize_rows_reference(x, FP8_DYNAMIC_128)
    act = torch.full((P, I), float("nan"))
    act_scale = torch.full((-(-I // STEP), P), float("nan"))
    y, position = torch.full((P, H), float("nan")), torch.full((R,), -1)

    def sums(w, expert, shard, column, WIDTH, rows, row_scales):
        n = torch.arange(column, min(column + 128, WIDTH))
        pointer = scale_row(
            (Pointer(w.scale), *weight_addresses(w)[4:]), Number(expert), shard,
            torch.tensor(column), WIDTH,
        )  # fmt: skip
        total = torch.zeros(ROWS, len(n))
        for k in range(0, w.shape[2], STEP):
            tile = w.data[expert, shard * WIDTH + n, k : k + STEP].float()
            scale = OnTensors.load(pointer + k // STEP)
            part = rows[:, k : k + STEP] @ tile.T
            total += part * (row_scales(k // STEP) * scale)[:, None]
        return total

    TILES = -(-I // 128)
    for program in range(programs):
        for task in range(program, blocks * TILES, programs):
            block, tile, expert = (int(n) for n in place(task, blocks, experts, e, TILES, 16))
            places = slice(block * ROWS, (block + 1) * ROWS)
            slots = tables.sorted_ids[places].long()
            live = (slots >= 0) & (slots < R)
            token = torch.where(live, slots, 0) // K
            position[slots[live]] = torch.arange(P)[places][live]
            rows = q[token].float() * live[:, None]
            gate, up = (
                sums(w1, expert, s, tile * 128, I, rows, lambda k, t=token: q_scale[t, k])
                for s in (0, 1)
            )
            value = torch.nn.functional.silu(gate) * up
            rounded, act_scale[tile, places] = (
                part.squeeze(1) if part.shape[1] == 1 else part.float()
                for part in quantize_rows_reference(value, FP8_DYNAMIC_128)
            )
            act[places, tile * 128 : tile * 128 + 128] = rounded
    TILES = -(-H // 256)
    for program in range(programs):
        for task in range(program, blocks * TILES, programs):
            block, tile, expert = (int(n) for n in place(task, blocks, experts, e, TILES, 16))
            places = slice(block * ROWS, (block + 1) * ROWS)
            for column in (tile * 256, tile * 256 + 128):
                if column < H:
                    y[places, column : column + 128] = sums(
                        w2, expert, 0, column, H, act[places], lambda k, p=places: act_scale[k, p]
                    )
    return y, position


def layer(fmt, e=3, H=384, I=208, shards=2):  # noqa: E741
    return weights(fmt, e, shards * I, H, shards=shards), weights(fmt, e, H, I)


def scratch(T, K, e, H, I):  # noqa: E741
    P = prefill_rows(T * K, e)
    return {
        "out": torch.zeros(T, H, dtype=torch.bfloat16),
        "act": torch.zeros(P, I, dtype=torch.bfloat16),
        "y": torch.zeros(P, H, dtype=torch.bfloat16),
    }


def test_tiles_and_gathers_add_up_to_the_definition():
    torch.manual_seed(0)
    T, K, H, I = 150, 2, 384, 208  # noqa: E741
    w1, w2 = layer("fp8_block", H=H, I=I)
    x = torch.randn(T, H).bfloat16()
    ids = torch.randint(-1, 4, (T, K), dtype=torch.int32)
    picked = torch.rand(T, K)
    given = scratch(T, K, 3, H, I)
    keys = FP8_DYNAMIC_128, FP8_DYNAMIC_128
    fp8_prefill(x, w1, w2, keys, (None, None), picked, ids, programs=7, **given)
    alignment = moe_align_block_size(
        ids, ROWS, 3, pad_sorted_ids=True, ignore_invalid_experts=True, num_local_experts=3
    )
    y, position = as_the_kernels_do(x, w1, w2, ids, MoEAlignment(*alignment[:3]))
    live = (ids >= 0) & (ids < 3)
    assert ((position >= 0).view(T, K) == live).all()
    rows = torch.where(live[:, :, None], y[position.clamp(min=0)].view(T, K, H), 0.0)
    expected = (rows * picked[:, :, None]).sum(1)
    error = (given["out"].float() - expected).norm() / expected.norm()
    assert error < 5e-3


COMPILE = """
import re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton import hopper_fp8_prefill as module
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN)
from fusedmoe.tuning.quantized_tiles import QuantizedPrefillTiles

TYPES = {torch.int8: "i8", torch.int32: "i32", torch.float32: "fp32", torch.bfloat16: "bf16",
         torch.float8_e4m3fn: "fp8e4nv"}
SPILL = 32


def compile_as_launched(kernel):
    def launch(programs, matrices, tensors, numbers, constants, **options):
        signature, values, attributes = {}, {}, {}
        names = iter(enumerate(kernel.arg_names))
        for value in (*matrices, *tensors, *numbers):
            index, name = next(names)
            if value is None:
                signature[name], values[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, (int, float)):
                signature[name] = "i32" if isinstance(value, int) else "fp32"
            else:
                kind, shape = TYPES[value.base.dtype], list(value.block_shape)
                signature[name] = f"tensordesc<{kind}{shape},{value.layout!r}>"
        for value in constants:
            index, name = next(names)
            signature[name], values[(index,)] = "constexpr", value
        assert next(names, None) is None
        source = GluonASTSource(kernel, signature, values, attributes)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options=options | {"launch_pdl": True})
        assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
        assert "wgmma" in compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            used = subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name],
                capture_output=True, text=True, check=True).stdout
        spilled = int(re.search(r"STACK:(\\d+)", used)[1])
        assert spilled <= SPILL, (kernel.__name__, constants, spilled)

    return launch


module._launch_up = compile_as_launched(module.up_kernel)
module._launch_down = compile_as_launched(module.down_kernel)
module._launch_sum = lambda *arguments: None

T, K, E, P = 4, 2, 3, 384
ids = torch.zeros(T * K, dtype=torch.int32)
table = MoEAlignment(torch.zeros(P, dtype=torch.int32), ids[:3], ids[:1])
plain, promoted = QuantizedPrefillTiles(), QuantizedPrefillTiles(promoted=(True, True))


def run(name, key, tiles=plain, act=MoEActivation.SILU, bias=False, H=2048, I=768):
    act = device_activation(act)
    shards = 2 if act.gated else 1
    w1 = quantize(torch.zeros(E, shards * I, H), format_named(name), shards=shards,
                  interleaved=act.interleaved)
    w2 = quantize(torch.zeros(E, H, I), format_named(name))
    biases = (None, None)
    if bias:
        biases = torch.zeros(E, shards * I).bfloat16(), torch.zeros(E, H).bfloat16()
    scales = (torch.ones(1),) * 2 if key.static else (None, None)
    x, out = torch.zeros(T, H).bfloat16(), torch.zeros(T, H).bfloat16()
    module.prefill(x, w1, w2, (key, key), scales, None, ids.view(T, K), out,
                   torch.zeros(P, I).bfloat16(), torch.zeros(P, H).bfloat16(), act, biases, None,
                   table, tiles, 132)


run("fp8_block", FP8_DYNAMIC_128)
run("fp8_block", FP8_DYNAMIC_128_UE8M0, act=MoEActivation.SWIGLUOAI, bias=True, H=272, I=208)
run("fp8_block", FP8_DYNAMIC_128, act=MoEActivation.RELU2_NO_MUL, bias=True)
run("fp8_channel", FP8_DYNAMIC_TOKEN, promoted)
SPILL = 128
run("fp8_channel", FP8_DYNAMIC_TOKEN)
run("int8_channel", INT8_DYNAMIC_TOKEN, bias=True)
run("fp8_tensor", FP8_STATIC_TENSOR)
print("compiled")
"""


def test_the_kernels_compile_for_hopper_and_keep_their_sums_in_registers():
    """With the very arguments that a launch would have. A few words of stack hold what is read
    once per tile; without scales in the loop, a part of some epilogues."""
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.6."):
        pytest.skip("written for the Gluon of Triton 3.6")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]


def test_what_the_kernels_cannot_multiply_is_named():
    both = FP8_DYNAMIC_128, FP8_DYNAMIC_128
    assert unmet_by_prefill(*layer("fp8_block"), both) is None
    assert unmet_by_prefill(*layer("int8_channel"), (INT8_DYNAMIC_TOKEN,) * 2) is None
    assert "wants scales per row" in unmet_by_prefill(*layer("fp8_block"), (FP8_DYNAMIC_TOKEN,) * 2)
    assert "does not run" in unmet_by_prefill(*layer("int4_g128", I=256), both)
    assert "in time" in unmet_by_prefill(*layer("fp8_tensor"), (FP8_DYNAMIC_TENSOR,) * 2)
    w1, w2 = layer("fp8_block")
    x, ids = torch.zeros(4, 384).bfloat16(), torch.zeros(4, 2, dtype=torch.int32)
    given = scratch(4, 2, 3, 384, 208) | {"programs": 1}
    call = (x, w1, w2, both, (None, None), None, ids)
    with pytest.raises(ValueError, match="expected"):
        fp8_prefill(*call, **given | {"act": given["act"][1:]})
    with pytest.raises(ValueError, match="contiguous"):
        fp8_prefill(*call, **given | {"y": given["y"].T.contiguous().T})
    with pytest.raises(ValueError, match="shards"):
        fp8_prefill(*call, activation=MoEActivation.RELU2_NO_MUL, **given)
    with pytest.raises(ValueError, match="cannot know"):
        fp8_prefill(x, *layer("fp8_tensor"), (FP8_DYNAMIC_TENSOR,) * 2, *call[4:], **given)


def test_tiles_say_what_is_promoted():
    from fusedmoe.tuning.quantized_tiles import prefill_tiles

    assert prefill_tiles(7168, 256, "e4m3") == QuantizedPrefillTiles(promoted=(True, False))
    assert prefill_tiles(7168, 18432, "int8") == QuantizedPrefillTiles()
