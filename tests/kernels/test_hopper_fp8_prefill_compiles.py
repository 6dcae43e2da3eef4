"""The 8-bit prefill kernels compile for Hopper without a GPU, and keep their sums in registers."""

from hopper_compiler import run_program

COMPILE = """
import torch
import triton
from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.peer_layout import PeerLayout, PeerSums, PeerView
from fusedmoe.kernels.triton import hopper_fp8_prefill as module
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN, INT8_STATIC_TENSOR)
from fusedmoe.tuning.hopper_tiles import COUNTER_SLOTS
from fusedmoe.tuning.quantized_tiles import QuantizedPrefillTiles
from hopper_compiler import barriers_reused, compile_as_launched, stack_bytes



def check(compiled):
    assert "wgmma" in compiled.asm["ptx"]
    # What is measured is the code of 3.6; ptxas of later releases keeps some words more there.
    most = 48 if triton.__version__.startswith("3.6.") else 128
    assert stack_bytes(compiled) <= most, (compiled.name, stack_bytes(compiled))
    assert not barriers_reused(compiled), (compiled.name, barriers_reused(compiled))


module._launch_up = compile_as_launched(module.up_kernel, check)
module._launch_round = module.sum_rows = lambda *arguments: None

T, K, E, P = 4, 2, 3, 384
ids = torch.zeros(T * K, dtype=torch.int32)
table = MoEAlignment(torch.zeros(P + COUNTER_SLOTS, dtype=torch.int32), ids[:3], ids[:1])
plain, promoted = QuantizedPrefillTiles(), QuantizedPrefillTiles(promoted=(1, 1))
pairs = QuantizedPrefillTiles(promoted=(2, 2))
lone = QuantizedPrefillTiles(group=1, promoted=(2, 2), finely=True, box=16)


def pushed_by(compiled):
    check(compiled)
    # Of a peer's rows 16 bytes at once.
    assert ("st.global.v4" in compiled.asm["ptx"]) == ("%bases_ptr:" in compiled.asm["ttgir"])


module._launch_down = compile_as_launched(module.down_kernel, pushed_by)


def taker(H):
    layout = PeerLayout(2, 2, H, K, torch.bfloat16)
    words = torch.zeros(layout.nbytes, dtype=torch.uint8)
    view = PeerView(layout, 0, torch.zeros(2, dtype=torch.int64), words, ids, ids)
    return PeerSums.make(view, 2, takes_picks=True)


def run(name, key, tiles=plain, act=MoEActivation.SILU, bias=False, H=2048, I=768, pushed=False):
    shards = 2 if act.is_gated else 1
    w1 = quantize(torch.zeros(E, shards * I, H), format_named(name), shards=shards,
                  interleaved=act is MoEActivation.SWIGLUOAI)
    w2 = quantize(torch.zeros(E, H, I), format_named(name))
    biases = (None, None)
    if bias:
        biases = torch.zeros(E, shards * I).bfloat16(), torch.zeros(E, H).bfloat16()
    scales = (torch.ones(1),) * 2 if key.static else (None, None)
    x, out = torch.zeros(T, H).bfloat16(), torch.zeros(T, H).bfloat16()
    out = taker(H) if pushed else out
    rows = torch.zeros(P, I).bfloat16(), torch.zeros(P, H).bfloat16()
    layer = LayerTensors(x, w1, w2, None, ids.view(T, K), out, *rows, 132, act, None, *biases)
    module.prefill(layer, (key, key), scales, table, tiles)
    assert not pushed or (out.sent and out.pushed)


run("fp8_block", FP8_DYNAMIC_128)
run("fp8_block", FP8_DYNAMIC_128_UE8M0, act=MoEActivation.SWIGLUOAI, bias=True, H=272, I=208)
run("fp8_block", FP8_DYNAMIC_128, act=MoEActivation.RELU2_NO_MUL, bias=True)
run("fp8_channel", FP8_DYNAMIC_TOKEN, pairs)
run("fp8_channel", FP8_DYNAMIC_TOKEN, pairs, act=MoEActivation.SWIGLUOAI, bias=True, H=2880, I=2880)
run("fp8_tensor", FP8_STATIC_TENSOR, promoted)
run("int8_channel", INT8_DYNAMIC_TOKEN, bias=True)
run("int8_channel", INT8_STATIC_TENSOR, act=MoEActivation.SWIGLUOAI, bias=True)
run("fp8_tensor", FP8_STATIC_TENSOR)
run("fp8_channel", FP8_DYNAMIC_TOKEN, lone)
run("fp8_block", FP8_DYNAMIC_128, lone)
run("int8_channel", INT8_DYNAMIC_TOKEN, QuantizedPrefillTiles(group=1, finely=True, box=16))
run("fp8_block", FP8_DYNAMIC_128, pushed=True)
run("fp8_block", FP8_DYNAMIC_128, bias=True, H=272, I=208, pushed=True)
run("fp8_channel", FP8_DYNAMIC_TOKEN, pairs, bias=True, pushed=True)
run("int8_channel", INT8_DYNAMIC_TOKEN, bias=True, pushed=True)
print("compiled")
"""


def test_every_variant_compiles_and_keeps_its_sums_in_registers():
    """With the very arguments that a launch would have. A few words of stack hold what is read
    once per tile. No barrier's memory is anything else: where the number of a drawn task lay there,
    tiles were missing when other processes used the GPU, too."""
    run_program(COMPILE)
