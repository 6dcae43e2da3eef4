"""One rank: nothing moves. The whole of prepare is the router weight on the input, where asked."""

from __future__ import annotations

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.modular_kernel import (
    FinalizeWork,
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
    MonolithicPrepareResult,
    PrepareResult,
    PrepareWork,
)
from fusedmoe.quantization.config import FusedMoEQuantConfig


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

    def dispatch(self, work: PrepareWork) -> PrepareResult:
        return PrepareResult(work.weighted_input)

    def combine(self, work: FinalizeWork) -> None:
        self.weight_and_sum(work, work.output)


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
