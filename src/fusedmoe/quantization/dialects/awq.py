"""``quant_method: awq`` (version gemm): 4-bit integers packed along the output features.

    qweight  int32 [K, N / 8]     scales  [K / g, N]
    qzeros   int32 [K / g, N / 8] (where zero_point is true)

Within a word, columns lie in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Leaves, Matrix, Rule, Scheme
from fusedmoe.quantization.dialects.packing import pack_nibbles, unpack_awq
from fusedmoe.quantization.dialects.patterns import is_listed
from fusedmoe.quantization.dialects.reading import flag, group_size_of, integer, names_of, one_of
from fusedmoe.quantization.dialects.rules import BIAS, FLOATS, check_finite, expect
from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantFormat


@dataclass(frozen=True, kw_only=True)
class AwqQuantization(CheckpointQuantization):
    dialect: str = "awq"
    group_size: int = 128
    zero_point: bool = True
    scale_dtype: torch.dtype = torch.float32
    not_converted: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: dict[str, Any], leaves: Leaves) -> AwqQuantization:
        bits = integer(config, "bits" if "bits" in config else "w_bit", 4)
        if bits != 4:
            raise ValueError(f"quantization_config: awq has 4 bits, got {bits}")
        one_of(config, "version", None, "gemm")
        key = "group_size" if "group_size" in config else "q_group_size"
        return cls(
            group_size=group_size_of(config, key, 128),
            zero_point=flag(config, "zero_point", True),
            scale_dtype=leaves.get("scales", torch.float32),
            not_converted=names_of(config, "modules_to_not_convert"),
        )

    def scheme(self, module: str) -> Scheme | None:
        if is_listed(module, self.not_converted):
            return None
        zeros = Rule(
            needs=("qzeros",),
            gives="weight_zero_point" if self.zero_point else "",
            convert=self._zeros if self.zero_point else lambda matrix, qzeros: None,
            optional=not self.zero_point,
        )
        return Scheme(
            dialect=self.dialect,
            format=QuantFormat(
                element="int4",
                group=GroupShape(1, self.group_size),
                scale_dtype=self.scale_dtype,
                symmetric=not self.zero_point,
            ),
            rules=(
                Rule(needs=("qweight",), gives="weight", convert=_weight, size=_size),
                Rule(needs=("scales",), gives="weight_scale", convert=self._scale),
                zeros,
                BIAS,
            ),
        )

    def _groups(self, matrix: Matrix) -> int:
        return 1 if self.group_size == -1 else -(-matrix.K // self.group_size)

    def _scale(self, matrix: Matrix, scales: torch.Tensor) -> torch.Tensor:
        expect(matrix, "scales", scales, (self._groups(matrix), matrix.N), *FLOATS)
        return check_finite(matrix, "scales", scales.T.to(self.scale_dtype))

    def _zeros(self, matrix: Matrix, qzeros: torch.Tensor) -> torch.Tensor:
        shape = (self._groups(matrix), -(-matrix.N // 8))
        expect(matrix, "qzeros", qzeros, shape, torch.int32)
        return unpack_awq(qzeros, matrix.N).T


def _size(qweight: tuple[int, ...]) -> tuple[int, int]:
    return qweight[1] * 8, qweight[0]


def _weight(matrix: Matrix, qweight: torch.Tensor) -> torch.Tensor:
    expect(matrix, "qweight", qweight, (matrix.K, -(-matrix.N // 8)), torch.int32)
    return pack_nibbles(unpack_awq(qweight, matrix.N).T)
