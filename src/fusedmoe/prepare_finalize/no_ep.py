"""One rank: nothing moves. The whole of prepare is the router weight on the input, where asked."""

from __future__ import annotations

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.modular_kernel import (
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
    MonolithicPrepareResult,
    PrepareResult,
)
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduce


def weight_input(
    a1: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """a1 * weight in a1's dtype, out of place: shared experts still read a1. K must be 1."""
    if topk_ids.shape[1] != 1:
        raise ValueError(
            f"apply_router_weight_on_input needs top-1 routing, got K = {topk_ids.shape[1]}"
        )
    return a1 * topk_weights.to(a1.dtype)


class _OneRank(FusedMoEPrepareAndFinalize):
    name = "no_ep"

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        parallel = moe.moe_parallel_config
        apart = {"dp": parallel.dp_size, "pcp": parallel.pcp_size, "sp": parallel.sp_size}
        moving = ", ".join(f"{name}_size {size}" for name, size in apart.items() if size > 1)
        if groups is None or not moving:
            return None
        return f"moves no tokens, but ranks hold different ones ({moving})"


class MoEPrepareAndFinalizeNoDPEPModular(_OneRank, FusedMoEPrepareAndFinalizeModular):
    """Standard rows in, Standard rows out."""

    def prepare(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> PrepareResult:
        if apply_router_weight_on_input:
            a1 = weight_input(a1, topk_weights, topk_ids)
        return PrepareResult(a1)

    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> None:
        self.weight_and_sum(
            output,
            fused_expert_output,
            topk_weights,
            topk_ids,
            apply_router_weight_on_input,
            weight_and_reduce_impl,
        )


class MoEPrepareAndFinalizeNoDPEPMonolithic(_OneRank, FusedMoEPrepareAndFinalizeMonolithic):
    """Rows and logits pass through."""

    def prepare(
        self,
        a1: torch.Tensor,
        router_logits: torch.Tensor,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> MonolithicPrepareResult:
        return MonolithicPrepareResult(a1, None, router_logits)

    def finalize(self, fused_expert_output: torch.Tensor) -> torch.Tensor:
        return fused_expert_output
