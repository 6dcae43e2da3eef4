"""Block-fp8 experts on the deep_gemm package, in Standard and in batched rows; an optional extra.

The run itself is ``deep_gemm_run``; here is what selection sees. Compute capability 9 takes any
fp32 scales; from 10 on the package turns scales into exponents, so that only powers of two (the
UE8M0 scheme) keep their values.

T tokens, K picks, e local experts, M rows per expert at most, H hidden, I intermediate.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.deep_gemm_ops import batched, batched_op, standard, standard_op
from fusedmoe.experts.deep_gemm_run import BLOCK, PACKAGE, BlockWeights, aligned_size, package
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    WorkspaceShapes,
    rows_per_expert,
)
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0, GroupShape, QuantKey

_WEIGHTS = QuantKey(torch.float8_e4m3fn, True, GroupShape(BLOCK, BLOCK))


def deep_gemm_capabilities(rows: FusedMoEActivationFormat) -> ExpertsCapabilities:
    """What the package's GEMMs allow; interleaved gates would cross the blocks of the scales."""
    return ExpertsCapabilities(
        activation_format=rows,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16}),
        activations=frozenset(MoEActivation) - {MoEActivation.RELU2, MoEActivation.SWIGLUOAI},
        weight_formats=frozenset(
            (_WEIGHTS, rows_key) for rows_key in (FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0)
        ),
        min_capability=(9, 0),
        requires=(PACKAGE,),
        bias=False,
    )


def unmet_sizes(moe: FusedMoEConfig, activation_key: QuantKey | None) -> str | None:
    """What about the layer's sizes, or the GPU's way with scales, rules the package out."""
    for name in ("hidden_dim", "intermediate_size_per_partition"):
        if getattr(moe, name) % BLOCK:
            return f"takes sizes of whole blocks of {BLOCK}, {name} is {getattr(moe, name)}"
    if activation_key == FP8_DYNAMIC_128:
        major, _ = torch.cuda.get_device_capability(moe.device)
        if major > 9:
            return f"takes powers of two as scales on compute capability {major}"
    return None


def expected_rows(M: int, topk: int, num_experts: int) -> int:
    """Rows of one expert where M tokens pick evenly: what masked GEMMs choose their tiles by."""
    return max(1, min(M, -(-M * topk // num_experts)))


def prefers_deep_gemm(R: int, e: int) -> bool:
    """Whether R slots fill e experts' tiles: half of the rows at least, if they spread evenly.

    Below that most of each 128-row tile of the contiguous layout is padding.
    """
    return BLOCK * e <= 2 * R


class _DeepGemm(FusedMoEExpertsModular):
    """What both formats of rows share. Raises ImportError where the package is absent."""

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        self.alignment = int(package().get_mk_alignment_for_contiguous_layout())

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        return unmet_sizes(moe, activation_key)

    def weights(self, w1: torch.Tensor, w2: torch.Tensor) -> BlockWeights:
        """Both weights with the scales that the quant config has for them."""
        config = self.quant_config
        if config.w1_scale is None or config.w2_scale is None:
            raise ValueError("w1 and w2 need scales per block, found none")
        e8m0 = config.a1.scale_kind == "e8m0"
        return BlockWeights(w1, config.w1_scale, w2, config.w2_scale, e8m0)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Raise ValueError where scales that would be cut to exponents are more than that."""
        if self.quant_config.a1.scale_kind != "e8m0":
            return
        if self.moe_config.device.type != "cuda":
            return
        if torch.cuda.get_device_capability(self.moe_config.device)[0] <= 9:
            return
        for name in ("w1", "w2"):
            scale = getattr(self.quant_config, f"{name}_scale")
            if not bool((scale.frexp().mantissa == 0.5).all()):
                raise ValueError(f"{name}_scale has scales that are no powers of two")


class DeepGemmExperts(_DeepGemm):
    """Standard rows; the sum over K is made here."""

    name = "deep_gemm"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return deep_gemm_capabilities(FusedMoEActivationFormat.Standard)

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
        """Both GEMMs' output, then the activation's, each expert's rows padded to whole tiles."""
        rows = aligned_size(M * topk, local_num_experts, self.alignment)
        width = self.adjust_N_for_activation(N, activation)
        return WorkspaceShapes((rows, max(N, K)), (rows, width), (M, K))

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
        assert workspace13 is not None
        assert workspace2 is not None
        weights = self.weights(w1, w2)
        run = standard_op if torch.compiler.is_compiling() else standard
        run(
            output,
            hidden_states,
            a1q_scale,
            *(weights.w1, weights.w1_scale, weights.w2, weights.w2_scale, weights.e8m0),
            torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights,
            topk_ids,
            activation.value,
            self.activation_config.numbers(),
            expert_map,
            workspace13,
            workspace2,
        )


class BatchedDeepGemmExperts(_DeepGemm):
    """Batched rows; what moved the rows also weights and sums them."""

    name = "deep_gemm_batched"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return deep_gemm_capabilities(FusedMoEActivationFormat.BatchedExperts)

    def supports_packed_ue8m0_act_scales(self) -> bool:
        """Whether dispatch may send exponents instead of scales: not here, scales are fp32."""
        return False

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
        """The first GEMM's output, then the activation's; M counts rows per expert."""
        e, width = local_num_experts, self.adjust_N_for_activation(N, activation)
        return WorkspaceShapes((e, M, N), (e, M, width), (e, M, K))

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
        counts = rows_per_expert(expert_tokens_meta, w1.shape[0])
        assert workspace13 is not None
        assert workspace2 is not None
        weights = self.weights(w1, w2)
        run = batched_op if torch.compiler.is_compiling() else batched
        run(
            output,
            hidden_states,
            a1q_scale,
            *(weights.w1, weights.w1_scale, weights.w2, weights.w2_scale, weights.e8m0),
            counts,
            expected_rows(hidden_states.shape[1], topk_ids.shape[1], global_num_experts),
            activation.value,
            self.activation_config.numbers(),
            workspace13,
            workspace2,
        )
