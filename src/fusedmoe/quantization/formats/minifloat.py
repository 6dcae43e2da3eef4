"""Floats of four and six bits (OCP Microscaling Formats 1.0, section 5.3): codes and values.

No infinities and no NaN: encoding saturates, and rounds ties to even.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class MiniFloat(NamedTuple):
    """1 sign, ``exponent`` and ``mantissa`` bits with ``bias``; exponent 0 is subnormal."""

    exponent: int
    mantissa: int
    bias: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def max_exponent(self) -> int:
        """The exponent of the largest power of two."""
        return (1 << self.exponent) - 1 - self.bias

    @property
    def max(self) -> float:
        return 2.0**self.max_exponent * (2 - 2.0**-self.mantissa)

    def magnitudes(self) -> list[float]:
        """The values of all codes without sign, in order."""
        steps = 1 << self.mantissa
        values = []
        for code in range(1 << (self.bits - 1)):
            exponent, mantissa = divmod(code, steps)
            normal = mantissa / steps + (exponent > 0)
            values.append(normal * 2.0 ** (max(exponent, 1) - self.bias))
        return values

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest values that have a code; NaN stays NaN."""
        magnitude = values.abs().clamp(max=self.max)
        exponent = torch.frexp(magnitude).exponent - 1
        exponent = exponent.clamp(min=1 - self.bias) - self.mantissa
        steps = torch.ldexp(magnitude, -exponent).round()  # ties to even
        return torch.ldexp(steps, exponent).clamp(max=self.max).copysign(values)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest codes, uint8 of ``values``' shape; ValueError for NaN."""
        if values.isnan().any():
            raise ValueError(f"{int(values.isnan().sum())} values to be encoded are NaN")
        table = torch.tensor(self.magnitudes(), dtype=values.dtype, device=values.device)
        code = torch.searchsorted(table, self.round(values).abs()).to(torch.uint8)
        return code | (values.signbit().to(torch.uint8) << (self.bits - 1))

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values of codes below 2^bits."""
        magnitudes = self.magnitudes()
        values = [*magnitudes, *(-m for m in magnitudes)]
        return codes.new_tensor(values, dtype=dtype)[codes.long()]


E2M1 = MiniFloat(2, 1, 1)
E3M2 = MiniFloat(3, 2, 3)
E2M3 = MiniFloat(2, 3, 1)
