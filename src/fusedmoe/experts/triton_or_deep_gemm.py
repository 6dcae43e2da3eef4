"""Block-fp8 experts: deep_gemm where rows are enough for its tiles, Triton where they are few.

``prefers_deep_gemm`` decides, from sizes alone: the same sizes always take the same way.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.deep_gemm import DeepGemmExperts, prefers_deep_gemm
from fusedmoe.experts.triton_quantized import TritonQuantizedExperts
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEExpertsModular,
    ProblemSize,
    WorkspaceShapes,
)
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey


class TritonOrDeepGemmExperts(FusedMoEExpertsModular):
    """Block-fp8 weights and rows, on deep_gemm or on Triton, by the number of slots.

    Rows arrive unquantized: which of the two quantizes them is not known before. Raises ImportError
    where deep_gemm is absent.
    """

    name = "triton_or_deep_gemm"

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        self.deep_gemm = DeepGemmExperts(moe_config, quant_config)
        self.triton = TritonQuantizedExperts(moe_config, quant_config)

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        deep_gemm = DeepGemmExperts.capabilities()
        return replace(deep_gemm, requires=(*deep_gemm.requires, "triton"))

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        both = (
            one.is_supported_config(moe, weight_key, activation_key, cls.activation_format())[1]
            for one in (DeepGemmExperts, TritonQuantizedExperts)
        )
        return next(filter(None, both), None)

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """Room for either: a last pass has fewer rows and may take the other way."""
        both = [one.shapes(size, num_experts, activation) for one in (self.deep_gemm, self.triton)]
        return WorkspaceShapes(
            (max(prod(shapes.workspace13) for shapes in both),),
            (max(prod(shapes.workspace2) for shapes in both),),
            (size.M, size.K),
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.deep_gemm.process_weights_after_loading(layer)
        self.triton.process_weights_after_loading(layer)

    def chosen(self, num_slots: int, num_local_experts: int) -> FusedMoEExpertsModular:
        """Which of the two runs this many slots."""
        return self.deep_gemm if prefers_deep_gemm(num_slots, num_local_experts) else self.triton

    def run(self, work: ExpertsWork) -> None:
        self.chosen(work.topk_ids.numel(), work.w1.shape[0]).run(work)
