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
    ExpertTokensMetadata,
    FusedMoEExpertsModular,
    WorkspaceShapes,
)
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey


class TritonOrDeepGemmExperts(FusedMoEExpertsModular):
    """Standard rows, unquantized on arrival: which of the two quantizes them is not known before.

    Raises ImportError where deep_gemm is absent.
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

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> WorkspaceShapes:
        """Room for either: a last pass has fewer rows and may take the other way."""
        sizes = (M, N, K, topk, global_num_experts, local_num_experts)
        both = [
            one.workspace_shapes(*sizes, expert_tokens_meta, activation)
            for one in (self.deep_gemm, self.triton)
        ]
        return WorkspaceShapes(
            (max(prod(shapes.workspace13) for shapes in both),),
            (max(prod(shapes.workspace2) for shapes in both),),
            (M, K),
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.deep_gemm.process_weights_after_loading(layer)
        self.triton.process_weights_after_loading(layer)

    def chosen(self, num_slots: int, num_local_experts: int) -> FusedMoEExpertsModular:
        """Which of the two runs this many slots."""
        return self.deep_gemm if prefers_deep_gemm(num_slots, num_local_experts) else self.triton

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor | None,
        workspace2: torch.Tensor | None,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        self.chosen(topk_ids.numel(), w1.shape[0]).apply(
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            global_num_experts,
            expert_map,
            a1q_scale,
            a2_scale,
            workspace13,
            workspace2,
            expert_tokens_meta,
            apply_router_weight_on_input,
        )
