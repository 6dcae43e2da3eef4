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
from fusedmoe.quantization.dialects.reading import names_of
from fusedmoe.quantization.dialects.rules import e8m0_rule, expect, make_scheme
from fusedmoe.quantization.formats.mxfp4 import MXFP4


@dataclass(frozen=True, kw_only=True)
class GptOssQuantization(CheckpointQuantization):
    dialect: str = "gpt-oss mxfp4"

    @classmethod
    def read(cls, config: dict[str, Any], leaves: Leaves) -> GptOssQuantization:
        return cls(not_converted=names_of(config, "modules_to_not_convert"))

    def converted(self, module: str) -> Scheme | None:
        """Experts alone are quantized, whatever the list of exceptions leaves out."""
        if ".experts." not in f".{module}.":
            return None
        blocks = Rule(needs=("blocks",), gives="weight", convert=_weight)
        return make_scheme(self.dialect, MXFP4, blocks, e8m0_rule("scales", 32))


def _weight(matrix: Matrix, blocks: torch.Tensor) -> torch.Tensor:
    expect(matrix, "blocks", blocks, (matrix.N, matrix.K // 32, 16), torch.uint8)
    return blocks.flatten(-2)
