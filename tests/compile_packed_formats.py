"""A program: compiles the kernels of packed formats for Hopper with the arguments of a launch.

Prints a line for each, and raises where one takes more shared memory than a multiprocessor has,
spills its sums, or flushes subnormal numbers (the floats of six bits start as such).
"""

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct
from fusedmoe.kernels.triton import (
    gather_columns,
    grouped_gemm_packed,
    grouped_gemm_quantized,
    grouped_gemm_w4a8,
    round_rows,
)
from fusedmoe.tuning.quantized_tiles import QuantizedTile, packed_tile
from hopper_compiler import compile_as_launched, stack_bytes
from packed_weights import pack

BF16 = torch.bfloat16


def check(compiled):
    assert "ftz" not in compiled.asm["ptx"]
    assert stack_bytes(compiled) <= 64, (compiled.name, stack_bytes(compiled))


def launching(kernel):
    compile_it = compile_as_launched(
        kernel, check, gluon=False, ones=True, divisible=lambda name, value: value % 16 == 0
    )

    def launch(grid, tensors, numbers, constants, num_warps, num_stages=3):
        compile_it(
            grid,
            (),
            tensors,
            numbers,
            (*constants, True),
            num_warps=num_warps,
            num_stages=num_stages,
        )
        print(kernel.__name__, constants, flush=True)

    return launch


for module, kernel in (
    (grouped_gemm_packed, grouped_gemm_packed.packed_gemm_kernel),
    (grouped_gemm_quantized, grouped_gemm_quantized.quantized_gemm_kernel),
    (grouped_gemm_w4a8, grouped_gemm_w4a8.w4a8_gemm_kernel),
    (round_rows, round_rows.round_rows_kernel),
    (gather_columns, gather_columns.gather_columns_kernel),
):
    module._launch = launching(kernel)

E, T, K, D, N = 2, 200, 2, 768, 64
ids = torch.zeros(T * K, dtype=torch.int32)
FEW, SOME, MANY = (
    QuantizedTile(32, 8, 128, 1, 2, 5),
    QuantizedTile(64, 16, 128, 1, 4, 4),
    QuantizedTile(128, 128, 64, 8, 8, 4),
)


def product_of(name, tile, dtype, act):
    shards, interleaved = 2 if act.is_gated else 1, act is MoEActivation.SWIGLUOAI
    w = pack(torch.randn(E, N * shards, D), name, shards=shards, interleaved=interleaved)
    blocks = LoneSlots(ids, None) if tile.slots == 8 else MoEAlignment(ids, ids[:50], ids[:1])
    a, c = torch.zeros(T, D, dtype=dtype), torch.zeros(T * K, N, dtype=dtype)
    return QuantizedProduct(a, w, c, blocks, tile, K, None, act)


def packed(name, tile, dtype=BF16, act=MoEActivation.SILU, orders=(False, "", None)):
    product = product_of(name, tile, dtype, act)
    product = product._replace(tile=packed_tile(tile, product.w.format.element))
    grouped_gemm_packed.launch(product, *orders, dtype == BF16)


for name in ("q2_k", "q3_k"):
    for dtype in (BF16, torch.float16):
        packed(name, FEW, dtype)
        packed(name, SOME, dtype, MoEActivation.SWIGLUOAI)
        packed(name, MANY, dtype, orders=(True, "sixes", None))
for name in ("q4_1", "q5_1"):
    packed(name, FEW, torch.float16)
    packed(name, SOME, act=MoEActivation.SWIGLUOAI)
    packed(name, MANY, orders=(True, "blocks", None))
packed("q4_k", FEW)
packed("q4_k", MANY)
packed("q5_k", SOME, act=MoEActivation.SWIGLUOAI)
packed("q6_k", SOME)
packed("q6_k", MANY, orders=(True, "sixes", None))
packed("q6_k", FEW, torch.float16)
packed("mxfp6_e3m2", FEW)
packed("mxfp6_e3m2", MANY, orders=(True, "units", None))
packed("mxfp6_e2m3", SOME, torch.float16, MoEActivation.RELU2_NO_MUL)
packed("int4_g32_zp_act_order", SOME)
packed("int8_g32_act_order", FEW, orders=(False, "", torch.zeros(E, N, dtype=torch.int32)))
for name in ("nf4", "iq4_nl", "iq4_nl@float32"):
    product = product_of(name, SOME, BF16, MoEActivation.SILU)
    grouped_gemm_quantized.launch(product, False, "halves", None, True)
for name, tile in (("int4_g128", SOME), ("int4_channel_zp", QuantizedTile(128, 64, 128, 4, 4, 4))):
    product = product_of(name, tile, BF16, MoEActivation.SILU)
    product = product._replace(a=product.a.to(torch.float8_e4m3fn))
    grouped_gemm_w4a8.launch(product, torch.ones(T, 1), True)
x = torch.zeros(T, D, dtype=BF16)
for element, group, e8m0 in (("e4m3", 0, False), ("e2m1", 16, False), ("e3m2", 32, True)):
    round_rows.launch(x, x, None, element, group, e8m0, "halves")
order = torch.zeros(E, D, dtype=torch.int32)
for orders, position in ((("", ""), None), (("halves", "lanes"), ids)):
    gather_columns.launch(x, order, torch.zeros(T * K, D, dtype=BF16), ids, None, orders, position)
print("compiled")
