"""Scales that are powers of two: a byte s means 2^(s - 127), 255 is NaN (OCP MX 1.0, 5.4.1)."""

from __future__ import annotations

import torch

BIAS = 127


def decode_e8m0(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 -> powers of two; 255 -> NaN."""
    values = torch.ldexp(torch.ones_like(codes, dtype=torch.float64), codes.int() - BIAS).to(dtype)
    return values.masked_fill(codes == 255, float("nan"))


def floor_e8m0(amax: torch.Tensor, max_exponent: int) -> torch.Tensor:
    """The exponent of amax less the elements' largest one: OCP's rule, which lets values saturate.

    A group of zeros gets 2^0. NaN and infinite amax give 255.
    """
    return _code(torch.frexp(amax).exponent - 1 - max_exponent, amax)


def ceil_e8m0(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """The least power of two with amax / scale <= ``largest``: nothing saturates."""
    mantissa, exponent = torch.frexp(amax / largest)
    return _code(torch.where(mantissa == 0.5, exponent - 1, exponent), amax)


def _code(exponent: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    code = (exponent + BIAS).clamp(0, 254)
    code = code.masked_fill(amax == 0, BIAS).masked_fill(~amax.isfinite(), 255)
    return code.to(torch.uint8)
