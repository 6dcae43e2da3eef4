"""The prefill kernels for quantized weights compile for Hopper without a GPU, keep their sums in
registers, and their products are not done one after the other."""

from hopper_compiler import run_program

COMPILE = """
import re
import torch
from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.hopper_mixed_prefill import wide_rows
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.triton import hopper_mixed_prefill as module
from fusedmoe.tuning.hopper_tiles import COUNTER_SLOTS
from fusedmoe.tuning.mixed_tiles import mixed_prefill_tiles
from hopper_compiler import compile_as_launched, ptxas
from packed_weights import format_of, pack

SPILL = 32  # a few words, never a sum: those are kilobytes


def check(compiled):
    told = ptxas(compiled)
    assert "serialized" not in told, told
    assert int(re.search(r"(\\d+) bytes spill stores", told)[1]) <= SPILL, told


def divisible(name, value):
    return name in ("stride_x", "stride_se") and value % 16 == 0


module._launch_up = compile_as_launched(module.up_kernel, check, divisible=divisible)
module._launch_down = compile_as_launched(module.down_kernel, check, divisible=divisible)
module.sum_rows = lambda *arguments: None
shares_of = module.shares_of

T, K, E, P = 4, 2, 3, 768
ids = torch.zeros(T * K, dtype=torch.int32)
table = MoEAlignment(torch.zeros(P + COUNTER_SLOTS, dtype=torch.int32), ids[:3], ids[:1])


def run(name, mean, act=MoEActivation.SILU, bias=False, H=2048, I=768, shares=("all", "large")):
    module.shares_of = lambda tiles: {
        share: both for share, both in shares_of(tiles).items() if share in shares}
    fmt, shards = format_of(name), 2 if act.is_gated else 1
    interleaved = act is MoEActivation.SWIGLUOAI
    w1 = pack(torch.zeros(E, shards * I, H), name, shards=shards, interleaved=interleaved)
    w2 = pack(torch.zeros(E, H, I), name)
    biases = (None, None)
    if bias:
        biases = torch.zeros(E, shards * I).bfloat16(), torch.zeros(E, H).bfloat16()
    x, out = torch.zeros(T, H).bfloat16(), torch.zeros(T, H).bfloat16()
    wide = wide_rows(fmt)
    tiles = mixed_prefill_tiles(mean, 1, (fmt.bits, fmt.bits), wide=wide)
    y = torch.zeros(P, H, dtype=torch.float32 if wide else torch.bfloat16)
    rows = torch.zeros(P, I).bfloat16(), y
    layer = LayerTensors(x, w1, w2, None, ids.view(T, K), out, *rows, 132, act, None, *biases)
    module.prefill(layer, table, tiles)


run("mxfp4", 32, MoEActivation.SWIGLUOAI, True, 576, 320)
run("mxfp4", 256, MoEActivation.SWIGLUOAI, True, 576, 320, ("large", "tails"))
run("int4_g128", 256)
run("nvfp4", 32, MoEActivation.RELU2_NO_MUL, True)
run("int8_channel", 32)
run("nf4", 256)
run("iq4_nl", 32)
run("iq4_nl@float32", 256)
run("q4_k", 256)
run("q5_k", 32)
run("mxfp6_e2m3", 128, MoEActivation.SWIGLUOAI, True, 576, 320)
run("fp8_block", 128)
run("int4_g32_zp", 128, H=544, I=288)
print("compiled")
"""

ALIGN = """
from triton.compiler import ASTSource
from fusedmoe.kernels.triton.align_tails import place_tails_kernel
from fusedmoe.kernels.triton.superblock_scales import superblock_scales_kernel
from hopper_compiler import build

constants = {"LARGE": 256, "SMALL": 128, "CHUNK": 256, "BLOCK_G": 128, "BLOCK_B": 8}
constants |= {"CHAINED": True}
for mapped in (True, False):
    constants |= {} if mapped else {"map_ptr": None}
    types = {name: "*i32" if name.endswith("_ptr") else "i32"
             for name in place_tails_kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    build(ASTSource(place_tails_kernel, types, constants), num_warps=8)
types = {"data_ptr": "*u8", "scale_ptr": "*fp32", "term_ptr": "*fp32", "superblocks": "i32"}
constants = {"NBYTES": 144, "BLOCKS": 128, "CHAINED": True}
types |= dict.fromkeys(constants, "constexpr")
build(ASTSource(superblock_scales_kernel, types, constants), num_warps=4)
print("compiled")
"""


def test_what_is_launched_before_compiles():
    run_program(ALIGN, gluon=False)


def test_every_variant_compiles_and_keeps_its_sums_in_registers():
    """With the very arguments that a launch would have."""
    run_program(COMPILE)
