"""Our formats against the packages that others use for them: torchao and compressed-tensors.

These packages are in the test extra; that they are missing is an error, not a reason to skip.
"""

from __future__ import annotations

import pytest
import torch

from fusedmoe.quantization.formats import (
    MXFP4,
    MXFP8,
    NVFP4,
    quantize,
    swizzle_scales,
    unswizzle_scales,
)
from fusedmoe.quantization.formats.int4 import pack_nibbles, unpack_nibbles
from fusedmoe.quantization.formats.minifloat import E2M1, E2M3, E3M2

KINDS = {"f4": E2M1, "f6_e3m2": E3M2, "f6_e2m3": E2M3}


@pytest.mark.parametrize("kind", KINDS)
def test_small_floats(kind):
    from torchao.prototype.mx_formats import kernels

    ours = KINDS[kind]
    encode = getattr(kernels, f"f32_to_{kind}_unpacked")
    decode = getattr(kernels, f"{kind}_unpacked_to_f32")
    codes = torch.arange(1 << ours.bits, dtype=torch.uint8)
    assert torch.equal(ours.decode(codes), decode(codes))
    steps = torch.arange(-1200, 1201) / 32  # every value, every tie, and beyond the largest
    random = torch.randn(5000) * 3
    for values in (steps, random):
        assert torch.equal(ours.encode(values), encode(values))


def test_nibbles():
    from torchao.prototype.mx_formats import kernels

    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    assert torch.equal(pack_nibbles(codes), kernels.pack_uint4(codes))
    packed = torch.randint(0, 256, (5, 32), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(packed), kernels.unpack_uint4(packed))


def test_fp4_packed_by_compressed_tensors():
    from compressed_tensors.compressors.nvfp4.helpers import (
        pack_fp4_to_uint8,
        unpack_fp4_from_uint8,
    )

    values = E2M1.decode(torch.randint(0, 16, (6, 32), dtype=torch.uint8))
    packed = pack_fp4_to_uint8(values)
    assert torch.equal(pack_nibbles(E2M1.encode(values)), packed)
    back = unpack_fp4_from_uint8(packed, 6, 32, dtype=torch.float32)
    assert torch.equal(E2M1.decode(unpack_nibbles(packed)), back)


@pytest.mark.parametrize(
    ("fmt", "element", "mode"),
    [
        (MXFP4, torch.float4_e2m1fn_x2, "FLOOR"),
        (MXFP8, torch.float8_e4m3fn, "RCEIL"),
    ],
    ids=["mxfp4", "mxfp8"],
)
def test_mx(fmt, element, mode):
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    weight = torch.randn(48, 128) * torch.logspace(-6, 6, 48)[:, None]
    scale, data = to_mx(weight, element, 32, ScaleCalculationMode[mode])
    ours = quantize(weight, fmt)
    assert torch.equal(ours.scale, scale.view(torch.uint8))
    assert torch.equal(ours.data.view(torch.uint8), data.view(torch.uint8).view(48, -1))


def test_nvfp4():
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    weight = torch.randn(48, 128)
    ours = quantize(weight, NVFP4)
    scale, data = nvfp4_quantize(weight, 16, ours.scale2)
    assert torch.equal(ours.scale.float(), scale.view(torch.float8_e4m3fn).float().view(48, 8))
    codes, theirs = unpack_nibbles(ours.data), unpack_nibbles(data.view(torch.uint8).view(48, -1))
    # They multiply by the inverse scale, which moves a value across a tie once in a while.
    assert (codes != theirs).float().mean() < 1e-3


def test_tiled_scales():
    from torchao.prototype.mx_formats.utils import from_blocked, to_blocked

    scale = torch.randint(0, 256, (256, 8), dtype=torch.uint8)
    tiled = to_blocked(scale, use_triton_kernel=False).flatten()
    assert torch.equal(swizzle_scales(scale), tiled)
    assert torch.equal(unswizzle_scales(tiled, 256, 8), from_blocked(tiled, 256, 8))
