"""``quant_method: awq`` (version gemm): 4-bit integers packed along the output features.

    qweight  int32 [K, N / 8]     scales  [K / g, N]
    qzeros   int32 [K / g, N / 8] (where zero_point is true; else 8 everywhere, if there)

Within a word, columns lie in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Leaves, Matrix, Rule, Scheme
from fusedmoe.quantization.dialects.packing import unpack_awq
from fusedmoe.quantization.dialects.reading import flag, group_size_of, integer, names_of, one_of
from fusedmoe.quantization.dialects.rules import (
    expect,
    groups_in,
    make_scheme,
    transposed_scale_rule,
)
from fusedmoe.quantization.formats.int4 import int4_group, pack_nibbles


@dataclass(frozen=True, kw_only=True)
class AwqQuantization(CheckpointQuantization):
    dialect: str = "awq"
    group_size: int = 128
    zero_point: bool = True
    scale_dtype: torch.dtype = torch.float32

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

    def converted(self, module: str) -> Scheme:
        zeros = Rule(
            needs=("qzeros",),
            gives="weight_zero_point" if self.zero_point else "",
            convert=self._zeros if self.zero_point else self._check_zeros,
            optional=not self.zero_point,
        )
        return make_scheme(
            self.dialect,
            int4_group(
                self.group_size, symmetric=not self.zero_point, scale_dtype=self.scale_dtype
            ),
            Rule(needs=("qweight",), gives="weight", convert=_weight, size=_size),
            transposed_scale_rule("scales", self.group_size, self.scale_dtype),
            zeros,
        )

    def _zeros(self, matrix: Matrix, qzeros: torch.Tensor) -> torch.Tensor:
        shape = (groups_in(matrix, self.group_size), -(-matrix.N // 8))
        expect(matrix, "qzeros", qzeros, shape, torch.int32)
        return unpack_awq(qzeros, matrix.N).T

    def _check_zeros(self, matrix: Matrix, qzeros: torch.Tensor) -> None:
        """Zero points of a symmetric matrix, where there are any, are all half the range."""
        zeros = self._zeros(matrix, qzeros)
        if bool((zeros != 8).any()):
            raise ValueError(
                f"{matrix.path('qzeros')}: expected 8 everywhere as zero_point is false, found "
                f"{int(zeros[zeros != 8][0])}"
            )


def _size(qweight: tuple[int, ...]) -> tuple[int, int]:
    return qweight[1] * 8, qweight[0]


def _weight(matrix: Matrix, qweight: torch.Tensor) -> torch.Tensor:
    expect(matrix, "qweight", qweight, (matrix.K, -(-matrix.N // 8)), torch.int32)
    return pack_nibbles(unpack_awq(qweight, matrix.N).T)
