"""Every rank gets all tokens and keeps what its experts make of them: all-gather, reduce-scatter.

The simplest way to move tokens, right for every size, and capturable where ``tokens_per_rank`` is
given. The ranks' parts of the sum go back to the token's rank and are added there in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.distributed.collectives import all_gather_rows, reduce_scatter_rows
from fusedmoe.modular_kernel import (
    FusedMoEPrepareAndFinalizeMonolithic,
    MonolithicPrepareResult,
    PrepareResult,
    PrepareWork,
)
from fusedmoe.prepare_finalize.dispatch import Dispatching, DispatchingModular
from fusedmoe.quantization.config import FusedMoEQuantConfig


class MoEPrepareAndFinalizeNaiveDPEPModular(DispatchingModular):
    """All-gather, then reduce-scatter: [T of this rank, H] -> [T of all ranks, H] and back.

    With a LoRA context, the adapter ids are the last of what travels beside the activations.
    """

    name = "naive_dp_ep"
    _sizes: list[int]

    def start_dispatch(self, work: PrepareWork) -> Callable[[], PrepareResult]:
        rows, scale = self.quantized(work.weighted_input, work.quant_config, work.defer_input_quant)
        luggage = self.luggage([work.topk_weights, work.topk_ids], scale)
        self._sizes = self.sizes_for(work.a1.shape[0])
        gathered = all_gather_rows(rows, self._sizes, self.ranks)
        beside = all_gather_rows(luggage.packed(), self._sizes, self.ranks)

        def receive() -> PrepareResult:
            (all_weights, all_ids), all_scales = self.unpacked(luggage, beside())
            return PrepareResult(gathered(), all_scales, None, all_ids, all_weights)

        return receive

    def send_back(self, sums: torch.Tensor, output: torch.Tensor) -> Callable[[], None]:
        combined = reduce_scatter_rows(sums, self._sizes, self.ranks)

        def receive() -> None:
            output.copy_(combined())

        return receive


class MoEPrepareAndFinalizeNaiveDPEPMonolithic(Dispatching, FusedMoEPrepareAndFinalizeMonolithic):
    """As the modular one, for experts that route by themselves: logits travel instead of ids."""

    name = "naive_dp_ep"
    _sizes: list[int]

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        if moe.has_hash_routing:
            return "sends no input ids, which hash routing by the experts needs"
        return super().unmet_requirement(moe, groups)

    def supports_async(self) -> bool:
        return False

    def prepare(
        self,
        a1: torch.Tensor,
        router_logits: torch.Tensor,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> MonolithicPrepareResult:
        rows, scale = self.quantized(a1, quant_config, defer_input_quant)
        self._sizes = self.sizes_for(a1.shape[0])
        luggage = self.luggage([router_logits], scale)
        gathered = all_gather_rows(rows, self._sizes, self.ranks)
        beside = all_gather_rows(luggage.packed(), self._sizes, self.ranks)
        (all_logits,), all_scales = self.unpacked(luggage, beside())
        return MonolithicPrepareResult(gathered(), all_scales, all_logits)

    def finalize(self, fused_expert_output: torch.Tensor) -> torch.Tensor:
        self.restore_lora_ids()
        return reduce_scatter_rows(fused_expert_output, self._sizes, self.ranks)()
