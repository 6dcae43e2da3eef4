"""The prefill kernels for quantized weights compile for Hopper without a GPU, keep their sums in
registers, and their products are not done one after the other."""

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
COMPILE = """
import re, subprocess, sys, tempfile
from dataclasses import replace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton import hopper_mixed_prefill as module
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.tuning.mixed_tiles import mixed_prefill_tiles

TYPES = {torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.float32: "fp32",
         torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}
TOOLS, SPILL = triton.knobs.nvidia, 0


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
                if name in ("stride_x", "stride_se") and value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
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
        with tempfile.NamedTemporaryFile(suffix=".ptx") as ptx:
            ptx.write(compiled.asm["ptx"].encode())
            ptx.flush()
            told = subprocess.run(
                [TOOLS.ptxas.path, "--gpu-name=sm_90a", "-v", "-o", "/dev/null", ptx.name],
                capture_output=True, text=True, check=True)
        told = told.stdout + told.stderr
        assert "serialized" not in told, told
        assert int(re.search(r"(\\d+) bytes spill stores", told)[1]) <= SPILL, told

    return launch


module._launch_up = compile_as_launched(module.up_kernel)
module._launch_down = compile_as_launched(module.down_kernel)
module.sum_rows = lambda *arguments: None

T, K, E, P = 4, 2, 3, 768
ids = torch.zeros(T * K, dtype=torch.int32)
table = MoEAlignment(torch.zeros(P, dtype=torch.int32), ids[:3], ids[:1])


def run(name, many, act=MoEActivation.SILU, bias=False, H=2048, I=768, **fields):
    act, fmt = device_activation(act), format_named(name)
    shards = 2 if act.gated else 1
    w1 = quantize(torch.zeros(E, shards * I, H), fmt, shards=shards, interleaved=act.interleaved)
    w2 = quantize(torch.zeros(E, H, I), fmt)
    biases = (None, None)
    if bias:
        biases = torch.zeros(E, shards * I).bfloat16(), torch.zeros(E, H).bfloat16()
    x, out = torch.zeros(T, H).bfloat16(), torch.zeros(T, H).bfloat16()
    tiles = mixed_prefill_tiles(1000 if many else 1, 1, (fmt.bits, fmt.bits))
    tiles = type(tiles)(*(replace(tile, **fields) for tile in tiles))
    module.prefill(x, w1, w2, None, ids.view(T, K), out, torch.zeros(P, I).bfloat16(),
                   torch.zeros(P, H).bfloat16(), act, *biases, None, table, tiles, 132)


run("int4_g128", True)
run("mxfp4", True, MoEActivation.SWIGLUOAI, True, 576, 320)
run("mxfp4", False, MoEActivation.SWIGLUOAI, True, 576, 320)
run("int4_g32_zp", False, H=544, I=288)
run("nvfp4", True, MoEActivation.RELU2_NO_MUL, True)
run("int8_channel", False)
run("fp8_block", True)
SPILL = 32
run("mxfp4", False, MoEActivation.SWIGLUOAI, True, 576, 320, ahead=True)
print("compiled")
"""


def test_every_variant_compiles_and_keeps_its_sums_in_registers():
    """With the very arguments that a launch would have."""
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.6."):
        pytest.skip("written for the Gluon of Triton 3.6")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "PYTHONPATH": str(SOURCE)},
        timeout=300,
    )
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]
