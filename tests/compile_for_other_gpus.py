"""A program: compiles the Triton experts' kernels for the compute capability in its first argument.

With the arguments of a launch and the tiles that such a GPU is given. It raises where one does not
compile, or takes more shared memory than a program may have there.
"""

import sys
from types import SimpleNamespace

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts import triton_quantized_floating
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct
from fusedmoe.kernels.triton import (
    grouped_gemm,
    grouped_gemm_packed,
    grouped_gemm_quantized,
    grouped_gemm_quantized_w8a8,
)
from fusedmoe.tuning.quantized_tiles import w8a8_tiles
from fusedmoe.tuning.tiles import layer_tiles
from hopper_compiler import SHARED_BYTES, compile_as_launched
from packed_weights import pack

BF16, SILU = torch.bfloat16, MoEActivation.SILU
CAPABILITY = int(sys.argv[1])
CHAINED = CAPABILITY >= 90
SHARED = SHARED_BYTES[CAPABILITY]
PACKED = ("q2_k", "q3_k", "q4_k", "q6_k", "q5_1")
triton_quantized_floating._is_roomy = lambda device: SHARED >= 200 << 10


def launching(kernel, constant=()):
    compile_it = compile_as_launched(
        *(kernel, lambda compiled: None),
        gluon=False,
        ones=True,
        capability=CAPABILITY,
        divisible=lambda name, value: value % 16 == 0,
    )

    def launch(grid, tensors, numbers, constants, num_warps, num_stages=3):
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compile_it(grid, (), tensors, numbers, (*constants, *constant), **options)
        print(kernel.__name__, constants, flush=True)

    return launch


grouped_gemm._launch = launching(grouped_gemm.grouped_gemm_kernel)
for module, kernel in (
    (grouped_gemm_packed, grouped_gemm_packed.packed_gemm_kernel),
    (grouped_gemm_quantized, grouped_gemm_quantized.quantized_gemm_kernel),
    (grouped_gemm_quantized_w8a8, grouped_gemm_quantized_w8a8.w8a8_gemm_kernel),
):
    module._launch = launching(kernel, (CHAINED,))

E, K, H, I = 8, 2, 512, 256  # noqa: E741
FEW, MANY = 64, 4096  # tokens: blocks of 32 slots, and the largest ones
ids = torch.zeros(MANY * K, dtype=torch.int32)
blocks = MoEAlignment(ids, ids[:50], ids[:1])


def quantized(name, T):
    w1, w2 = pack(torch.randn(E, 2 * I, H), name, shards=2), pack(torch.randn(E, H, I), name)
    operands = SimpleNamespace(w1=w1, w2=w2, columns=(w1.format.group.col, w2.format.group.col))
    up, down = triton_quantized_floating.floating_tiles(operands, T, K, False)
    x, act = torch.zeros(MANY, H, dtype=BF16), torch.zeros(MANY * K, I, dtype=BF16)
    module = grouped_gemm_packed if name in PACKED else grouped_gemm_quantized
    for product in (
        QuantizedProduct(x, w1, act, blocks, up, K, None, SILU),
        QuantizedProduct(act, w2, torch.zeros(MANY * K, H), blocks, down, 1),
    ):
        module.launch(product, False, "", None, CHAINED)


for T in (FEW, MANY):
    a, c = torch.zeros(MANY, H, dtype=BF16), torch.zeros(MANY * K, I, dtype=BF16)
    plain = layer_tiles(T, K, E, H, I, BF16, shared_memory=SHARED).gemm1
    b = torch.zeros(E, 2 * I, H, dtype=BF16)
    grouped_gemm.launch(a, b, c, blocks, plain, K, None, device_activation(SILU, None))
    for name in ("int4_g128", "mxfp4", "int8_channel", *PACKED):
        quantized(name, T)
    if CAPABILITY >= 89:
        quantized("nvfp4", T)
        quantized("fp8_channel", T)
    tile = w8a8_tiles(T, K, E, (-1, -1)).gemm1
    w = pack(torch.randn(E, 2 * I, H), "int8_channel", shards=2)
    rows = QuantizedProduct(a.to(torch.int8), w, c, blocks, tile, K, None, SILU)
    grouped_gemm_quantized_w8a8.launch(rows, torch.ones(MANY, 1), None, -1, False)
print("compiled")
