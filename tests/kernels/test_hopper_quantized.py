"""What can be known of the streaming kernels without a GPU: their bit tricks, the order in which
they name columns, that they compile, and that their launchers refuse what they cannot read."""

import re
import struct
from pathlib import Path

import pytest
import torch

from fusedmoe.kernels.align import LoneSlots
from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct, quantized_gemm_reference
from fusedmoe.kernels.hopper_quantized import lone_slots, quantized_decode
from fusedmoe.kernels.hopper_w8a8 import unmet_by_pairs, w8a8_decode
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.quantized_checks import unmet_by_weights
from fusedmoe.kernels.row_steps import RowSteps
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    MXFP4_DYNAMIC,
)
from fusedmoe.tuning.cuda_tiles import MAX_LONE_SLOTS, CudaDecodeTiles, CudaStreamTile
from fusedmoe.tuning.quantized_tiles import QuantizedTile
from hopper_compiler import run_program

BODIES = Path(__file__).parents[2] / "src" / "fusedmoe" / "kernels" / "triton"
MASK = 0xFFFFFFFF


def assembly(file, function):
    """The inline PTX of a device function, as a list of statements."""
    source = (BODIES / f"{file}.py").read_text()
    body = source[source.index(f"def {function}(") :]
    text = re.search(r'_(?:asm|elementwise)\(\s*"""?(.*?)"""?,', body, re.DOTALL)[1]
    return [line.strip() for line in text.strip("{} \n").split(";") if line.strip()]


def halves(word, function=None, other=0):
    """bf16 arithmetic on both halves of a word."""
    pairs = [((word >> at) & 0xFFFF, (other >> at) & 0xFFFF) for at in (0, 16)]
    numbers = []
    for x, y in pairs:
        x, y = (torch.tensor([v - (v > 32767) * 65536], dtype=torch.int16) for v in (x, y))
        value = function(x.view(torch.bfloat16), y.view(torch.bfloat16)).to(torch.bfloat16)
        numbers.append(int(value.view(torch.int16)) & 0xFFFF)
    return numbers[0] | numbers[1] << 16


def execute(statements, *words):
    """Run PTX that moves bits: the registers $0, $1, ... it writes, in order. Inputs come last."""
    outputs = max(int(n) for s in statements for n in re.findall(r"^[\w.]+ \$(\d+)", s)) + 1
    registers = {f"${outputs + i}": word for i, word in enumerate(words)}

    def value(operand):
        return registers[operand] if operand in registers else int(operand, 0)

    for statement in statements:
        name, _, rest = statement.partition(" ")
        if name == ".reg":
            continue
        target, *operands = (part.strip() for part in rest.split(","))
        a, *more = (value(operand) for operand in operands)
        if name == "prmt.b32":
            source, selector = a | more[0] << 32, more[1]
            picked = [(source >> 8 * (selector >> 4 * i & 7)) & 0xFF for i in range(4)]
            result = sum(byte << 8 * i for i, byte in enumerate(picked))
        elif name == "lop3.b32":
            assert more[2] == 0xEA
            result = a & more[0] | more[1]
        elif name.startswith("sub.rn.bf16x2"):
            result = halves(a, torch.sub, more[0])
        elif name.startswith("mul.rn.bf16x2"):
            result = halves(a, torch.mul, more[0])
        else:
            b = more[0] if more else 0
            moves = {"shl.b32": a << b, "shr.u32": a >> b, "and.b32": a & b, "mov.b32": a}
            result = moves[name]
        registers[target] = result & MASK
    return [registers[f"${i}"] for i in range(outputs)]


def as_floats(*words):
    """The bf16 halves of words, low half first."""
    return [
        struct.unpack("<f", struct.pack("<I", (word >> at & 0xFFFF) << 16))[0]
        for word in words
        for at in (0, 16)
    ]


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]


@pytest.mark.parametrize("word", [0x76543210, 0xFEDCBA98, 0x1F2E3D4C, 0])
@pytest.mark.parametrize("element", ["int4", "e2m1"])
def test_nibbles_of_four_bytes(word, element):
    """Low nibbles of the four bytes, then high ones."""
    out = as_floats(*execute(assembly("quantized_common", f"{element}_nibbles_bf16"), word))
    nibbles = [word >> 8 * i + up & 15 for up in (0, 4) for i in range(4)]
    if element == "int4":
        assert out == [128.0 + nibble for nibble in nibbles]
    else:
        assert [value * 2.0**126 for value in out] == [E2M1[nibble] for nibble in nibbles]


@pytest.mark.parametrize("first", range(0, 256, 4))
def test_bytes_as_numbers(first):
    """int8 exactly, e4m3 exactly but for NaN."""
    word = sum((first + i) << 8 * i for i in range(4))
    stored = torch.arange(first, first + 4).to(torch.uint8)
    assert as_floats(*execute(assembly("quantized_common", "int8_bf16"), word)) == (
        stored.view(torch.int8).float().tolist()
    )
    expected = stored.view(torch.float8_e4m3fn).float()
    expected = torch.where(expected.isnan(), 480.0 * (1 - 2 * (stored > 127).float()), expected)
    assert as_floats(*execute(assembly("quantized_common", "e4m3_bf16"), word)) == (
        expected.tolist()
    )


COMPILE = """
import torch
from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.activation import NO_ACTIVATION, device_activation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton import hopper_w8a8
from fusedmoe.kernels.triton.hopper_w8a8 import Rows
from fusedmoe.kernels.quantize import QuantizedRows
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.tuning.w8a8_tiles import stream_tiles
from hopper_compiler import compile_as_launched

limit = [113]


def check(compiled):
    assert compiled.metadata.shared <= limit[0] * 1024, compiled.metadata.shared
    assert "wgmma" in compiled.asm["ptx"]


hopper_w8a8._launch_gemm = compile_as_launched(hopper_w8a8.gemm_kernel, check, ones=True)

T, K, E, H, I = 4, 2, 3, 256, 128
ids = torch.zeros(T * K, dtype=torch.int32)
table = MoEAlignment(torch.zeros(16, dtype=torch.int32), ids[:2], ids[:1])
silu, oai = (device_activation(a) for a in (MoEActivation.SILU, MoEActivation.SWIGLUOAI))
x = torch.zeros(T, H, dtype=torch.bfloat16)


def weights(name, act):
    shards = 1 if act is None else 2
    interleaved = act is oai
    width = H if act is None else 2 * I
    values = torch.randn(E, width, H)
    return quantize(values, format_named(name), shards=shards, interleaved=interleaved)


largest = torch.zeros(T * K, dtype=torch.int32)
for name, rounding, act, slots in (
    ("fp8_block", "stored", silu, 64), ("fp8_block", "group", None, 384),
    ("fp8_channel", "stored", oai, 640), ("fp8_channel", "largest", None, 1536),
    ("fp8_tensor", "given", silu, 256), ("int8_channel", "stored", silu, 1536),
    ("int8_channel", "largest", None, 256), ("int8_channel", "given", None, 640),
    ("fp8_block", "stored", oai, 2), ("fp8_block", "group", None, 2),
    ("fp8_block", "group", None, 6), ("int8_channel", "largest", None, 2),
    ("int8_channel", "given", None, 6),
):
    w = weights(name, act)
    out = torch.zeros(T * K, w.shape[1] // w.shards, dtype=torch.bfloat16 if act else torch.float32)
    scale = {"stored": torch.zeros(T, 2 if "block" in name else 1), "group": None,
             "largest": largest, "given": torch.zeros(1)}[rounding]
    rows = Rows(x, scale, K, rounding)
    if rounding == "stored":
        rows = Rows.stored(QuantizedRows(x.to(w.data.dtype), scale), K)
    chosen = stream_tiles(slots, 64, 2048, 768)
    tile = chosen.gemm1 if act else chosen.gemm2
    limit[0] = 113 if tile.programs == 2 else 227
    hopper_w8a8.gemm(
        rows, w, out, None, act or NO_ACTIVATION, table, tile, 132,
        largest=largest if act else None, early=act is None, guess=act is not None)
print("compiled")
"""


def test_the_kernels_compile_for_hopper_and_fit_a_multiprocessor():
    """With the very arguments that a launch would have."""
    run_program(COMPILE)


def layer(fmt, e=3, H=64, I=32, shards=2):  # noqa: E741
    torch.manual_seed(0)
    w1 = quantize(torch.randn(e, shards * I, H), format_named(fmt), shards=shards)
    return w1, quantize(torch.randn(e, H, I), format_named(fmt))


def scratch(T, K, H, I, dtype=torch.float32):  # noqa: E741
    R = T * K
    return {
        "out": torch.zeros(T, H, dtype=torch.bfloat16),
        "act": torch.zeros(R, I, dtype=torch.bfloat16),
        "y": torch.zeros(R, H, dtype=dtype),
    }


def test_the_reference_is_two_products_and_a_weighted_sum():
    w1, w2 = layer("int4_g32")
    T, K = 4, 2
    x = torch.randn(T, 64).bfloat16()
    ids = torch.tensor([[0, 1], [2, -1], [1, 1], [0, 2]], dtype=torch.int32)
    weights, blocks = torch.rand(T, K), LoneSlots(ids.flatten())
    given = scratch(T, K, 64, 32)
    quantized_decode(LayerTensors(x, w1, w2, weights, ids, programs=1, **given), blocks)
    rows = torch.zeros(8, 64)
    tile = QuantizedTile(64, 8, 64, 1, 4, 2)
    quantized_gemm_reference(QuantizedProduct(given["act"], w2, rows, blocks, tile, 1))
    picked = rows.view(T, K, 64) * weights[:, :, None] * (ids >= 0)[:, :, None]
    torch.testing.assert_close(given["out"].float(), picked.sum(1), rtol=1e-2, atol=1e-2)


def test_slots_are_blocks_where_they_are_few_and_mostly_here():
    """Tokens, picks, local experts, all: one token anywhere, several where all experts are."""
    assert lone_slots(1, 8, 128, 128)
    assert lone_slots(4, 8, 128, 128)
    assert lone_slots(1, 8, 16, 128)
    assert not lone_slots(2, 8, 16, 128)
    assert not lone_slots(5, 8, 128, 128)


def test_what_the_kernels_cannot_read_is_named():
    assert unmet_by_weights(*layer("int4_g32")) is None
    assert unmet_by_weights(*layer("nvfp4")) is None
    assert "mxfp6" in unmet_by_weights(*layer("mxfp6_e3m2"))
    assert "int8" in unmet_by_weights(*layer("int8_g32_zp"))
    assert "multiple" in unmet_by_weights(*layer("int4_channel", I=8))
    w1, w2 = layer("fp8_block", H=256, I=128)
    assert unmet_by_pairs((w1, FP8_DYNAMIC_128), (w2, FP8_DYNAMIC_128)) is None
    assert "wants scales" in unmet_by_pairs((w1, FP8_DYNAMIC_TOKEN))
    assert "does not run" in unmet_by_pairs((w1, INT8_DYNAMIC_TOKEN))
    x, ids = torch.zeros(2, 256).bfloat16(), torch.zeros(2, 1, dtype=torch.int32)
    given = scratch(2, 1, 256, 128) | {"programs": 1}
    blocks = LoneSlots(ids.flatten())
    with pytest.raises(ValueError, match="expected"):
        quantized_decode(LayerTensors(x.float(), w1, w2, None, ids, **given), blocks)
    keys, none = (FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_TOKEN), (None, None)
    with pytest.raises(ValueError, match="wants scales"):
        w8a8_decode(LayerTensors(x, w1, w2, None, ids, **given), keys, none)
    many = torch.zeros(MAX_LONE_SLOTS + 1, 1, dtype=torch.int32)
    x = torch.zeros(len(many), 256).bfloat16()
    given |= scratch(len(many), 1, 256, 128)
    call = LayerTensors(x, w1, w2, None, many, **given)
    with pytest.raises(ValueError, match="table"):
        quantized_decode(call, LoneSlots(many.flatten()))


def test_rows_that_cannot_be_rounded_here_are_refused():
    w1, w2 = layer("mxfp4")
    x, ids = torch.zeros(4, 64).bfloat16(), torch.zeros(4, 2, dtype=torch.int32)
    call = LayerTensors(x, w1, w2, torch.ones(4, 2), ids, programs=1, **scratch(4, 2, 64, 32))
    with pytest.raises(ValueError, match="one by one"):
        quantized_decode(call, steps=(RowSteps(), RowSteps(FP8_DYNAMIC_TENSOR)))
    tile = CudaStreamTile(16, 16, 4, 1)
    steps = RowSteps(), RowSteps(MXFP4_DYNAMIC)
    with pytest.raises(ValueError, match="order"):
        quantized_decode(call, tiles=CudaDecodeTiles(tile, tile), steps=steps)


@pytest.mark.parametrize("rows", [None, FP8_DYNAMIC_TOKEN])
def test_weights_and_ids_that_do_not_fit_are_refused(rows):
    """Before a launch: what a kernel would read past a tensor's end, or as other numbers."""
    w1, w2 = layer("int4_g32" if rows is None else "fp8_channel")
    x, ids = torch.zeros(4, 64).bfloat16(), torch.zeros(4, 2, dtype=torch.int32)
    dtype = torch.float32 if rows is None else torch.bfloat16

    def refused(match, first=w1, ids=ids, **change):
        given = scratch(4, 2, 64, 32, dtype) | {"programs": 1} | change
        more = () if rows is None else ((rows, rows), (None, None))
        decode = quantized_decode if rows is None else w8a8_decode
        with pytest.raises(ValueError, match=match):
            decode(LayerTensors(x, first, w2, None, ids, **given), *more)

    fmt = w1.format.name
    refused("does not fit w2", layer(fmt, e=2)[0])
    refused("does not fit w2", layer(fmt, H=32)[0])
    refused("asks for weights", layer(fmt, I=64)[0])
    refused("two shards", layer(fmt, I=64, shards=1)[0])
    refused("int32 or int64", ids=ids.short())
    refused("expert_map", expert_map=torch.zeros(3, dtype=torch.int64))
    refused("bias", w1_bias=torch.zeros(3, 32))
    refused("bias", w2_bias=torch.zeros(64, 3).T)
    refused("multiples of 16 bytes", y=torch.zeros(8 * 64 + 1, dtype=dtype)[1:].view(8, 64))
