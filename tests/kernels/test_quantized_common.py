"""Helpers of the quantized kernels that only move bits, under Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
common = pytest.importorskip("fusedmoe.kernels.triton.quantized_common")
half_scale_bits, float_scale = common.half_scale_bits, common.float_scale


@triton.jit
def half_scale_kernel(scale_ptr, bits_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(bits_ptr + at, half_scale_bits(tl.load(scale_ptr + at)))


@triton.jit
def float_scale_kernel(scale_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, float_scale(tl.load(scale_ptr + at)))


def half_scales(scale):
    bits = torch.empty(scale.shape, dtype=torch.int16)
    half_scale_kernel[(1,)](scale, bits, scale.numel())
    return bits.view(torch.bfloat16).double()


EXPONENTS = torch.arange(256, dtype=torch.uint8)


def test_scales_of_e2m1_are_moved_into_place():
    """2^63 times every e8m0 scale up to 2^64, to the bit; NaN stays NaN; e4m3 scales likewise."""
    wanted = torch.exp2(EXPONENTS.double().clamp(max=191) - 127 + 63)
    out = half_scales(EXPONENTS)
    assert out[:255].equal(wanted[:255])
    assert out[255].isnan()
    numbers = torch.rand(64).to(torch.float8_e4m3fn)
    assert half_scales(numbers).equal(numbers.double() * 2.0**63)


def test_scales_as_numbers():
    out = torch.empty(256)
    float_scale_kernel[(1,)](EXPONENTS, out, 256)
    assert out[:255].double().equal(torch.exp2(EXPONENTS.double() - 127)[:255])
    assert out[255].isnan()
