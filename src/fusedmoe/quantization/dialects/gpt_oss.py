"""``quant_method: mxfp4`` (gpt-oss): all experts of a layer in one tensor, gate and up interleaved.

{gate_up,down}_proj_blocks  uint8 [E, N, K / 32, 16]: 32 columns in 16 bytes, low nibble first
{gate_up,down}_proj_scales  uint8 [E, N, K / 32]: e8m0
{gate_up,down}_proj_bias    [E, N]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Leaves, Matrix, Rule, Scheme
from fusedmoe.quantization.dialects.patterns import is_listed
from fusedmoe.quantization.dialects.reading import names_of
from fusedmoe.quantization.dialects.rules import BIAS, e8m0_rule, expect
from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantFormat


@dataclass(frozen=True, kw_only=True)
class GptOssQuantization(CheckpointQuantization):
    dialect: str = "gpt-oss mxfp4"
    not_converted: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: dict[str, Any], leaves: Leaves) -> GptOssQuantization:
        return cls(not_converted=names_of(config, "modules_to_not_convert"))

    def scheme(self, module: str) -> Scheme | None:
        """Experts alone are quantized, whatever the list of exceptions leaves out."""
        if ".experts." not in f".{module}." or is_listed(module, self.not_converted):
            return None
        return Scheme(
            dialect=self.dialect,
            format=QuantFormat(element="e2m1", group=GroupShape(1, 32), scale_dtype=torch.uint8),
            rules=(
                Rule(needs=("blocks",), gives="weight", convert=_weight),
                e8m0_rule("scales", 32),
                BIAS,
            ),
        )


def _weight(matrix: Matrix, blocks: torch.Tensor) -> torch.Tensor:
    expect(matrix, "blocks", blocks, (matrix.N, matrix.K // 32, 16), torch.uint8)
    return blocks.flatten(-2)
