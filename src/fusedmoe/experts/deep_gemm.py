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
from fusedmoe.experts.deep_gemm_run import (
    BLOCK,
    PACKAGE,
    aligned_size,
    batched_experts,
    package,
    standard_experts,
)
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    ProblemSize,
    WorkspaceShapes,
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

    def scales(self) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """The scales of both weights, and whether all of them are powers of two."""
        config = self.quant_config
        if config.w1_scale is None or config.w2_scale is None:
            raise ValueError("w1 and w2 need scales per block, found none")
        return config.w1_scale, config.w2_scale, config.a1.scale_kind == "e8m0"

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
    """Block-fp8 weights and rows in standard rows, on the package's contiguous GEMMs.

    The sum over K is made here. Raises ImportError where deep_gemm is absent.
    """

    name = "deep_gemm"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return deep_gemm_capabilities(FusedMoEActivationFormat.Standard)

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """Both GEMMs' output, then the activation's, each expert's rows padded to whole tiles."""
        rows = aligned_size(size.M * size.topk, size.E, self.alignment)
        width = self.adjust_N_for_activation(size.N, activation)
        return WorkspaceShapes((rows, max(size.N, size.K)), (rows, width), (size.M, size.K))

    def run(self, work: ExpertsWork) -> None:
        standard_experts(work, *self.scales(), self.activation_config)


class BatchedDeepGemmExperts(_DeepGemm):
    """Block-fp8 weights and rows in batched rows, on the package's masked GEMMs.

    What moved the rows also weights and sums them. Raises ImportError where deep_gemm is absent.
    """

    name = "deep_gemm_batched"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return deep_gemm_capabilities(FusedMoEActivationFormat.BatchedExperts)

    def supports_packed_ue8m0_act_scales(self) -> bool:
        """Whether dispatch may send exponents instead of scales: not here, scales are fp32."""
        return False

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """The first GEMM's output, then the activation's; M counts rows per expert."""
        e, M, N, H, _ = size
        width = self.adjust_N_for_activation(N, activation)
        return WorkspaceShapes((e, M, N), (e, M, width), (e, M, H))

    def run(self, work: ExpertsWork) -> None:
        counts, M = work.rows_per_expert, work.hidden_states.shape[1]
        likely = expected_rows(M, work.topk_ids.shape[1], work.global_num_experts)
        batched_experts(work, *self.scales(), counts, likely, self.activation_config)
