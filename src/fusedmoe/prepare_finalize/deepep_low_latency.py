"""Tokens over DeepEP's low-latency kernels: in Batched rows, for decoding.

T tokens of this rank, K picks, e local experts, M rows per expert at most, H hidden. What both
modes share: ``deepep``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.modular_kernel import (
    ExpertTokensMetadata,
    FinalizeWork,
    FusedMoEActivationFormat,
    PrepareResult,
    PrepareWork,
)
from fusedmoe.modular_kernel.records import Hook
from fusedmoe.prepare_finalize.deepep import BLOCK_FP8, DeepEPDispatching
from fusedmoe.prepare_finalize.luggage import quantize_input
from fusedmoe.quantization.keys import FP8_DYNAMIC_128_UE8M0, FP8_DYNAMIC_TENSOR, QuantKey
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

LOW_LATENCY_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
"""Rows that the low-latency kernels are compiled for."""


class DeepEPLLPrepareAndFinalize(DeepEPDispatching):
    """[T, H] -> [e, ranks * max_num_tokens, H] with a count per expert, and back, weighted.

    Where the experts take fp8 with scales per 128 columns, the package rounds on the way; other
    formats are rounded on arrival. Nothing waits for the host.
    """

    name = "deepep_low_latency"
    row_format = FusedMoEActivationFormat.BatchedExperts
    low_latency = True
    _ids: torch.Tensor | None = None

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        reason = super().unmet_requirement(moe, groups)
        if reason is not None:
            return reason
        if moe.max_num_tokens is None:
            return "needs max_num_tokens, the most that any rank brings"
        if moe.hidden_dim not in LOW_LATENCY_HIDDEN:
            sizes = ", ".join(map(str, LOW_LATENCY_HIDDEN))
            return f"has kernels for hidden sizes of {sizes}, not {moe.hidden_dim}"
        return None

    def check_rows_as(self, key: QuantKey | None) -> None:
        if key == FP8_DYNAMIC_TENSOR:
            raise ValueError("one scale for all rows would count rows that are in no use")

    def max_num_tokens_per_rank(self) -> int | None:
        return self.max_num_tokens

    def start_dispatch(self, work: PrepareWork) -> tuple[Hook, Callable[[], PrepareResult]]:
        self.check_tokens(work.a1.shape[0])
        placement = self.placement(work.num_experts, work.expert_map)
        x = work.weighted_input.contiguous()
        self._ids = placement.positions_of(work.topk_ids)
        self.check_rows_as(work.key)
        blocks = work.key in BLOCK_FP8
        rows, counts, self._handle, _, hook = self.buffer.low_latency_dispatch(
            x,
            self._ids,
            self.max_num_tokens,
            placement.num_positions,
            use_fp8=blocks,
            round_scale=work.quant_config.a1.key == FP8_DYNAMIC_128_UE8M0,
            return_recv_hook=True,
        )

        def receive() -> PrepareResult:
            found, scale = rows if blocks else (rows, None)
            if not blocks and work.key is not None:
                e, M, H = found.shape
                flat, by_row = quantize_input(found.view(e * M, H), work.quant_config)
                found = flat.view(e, M, H)
                scale = by_row if by_row is None or by_row.dim() < 2 else by_row.view(e, M, -1)
            return PrepareResult(found, scale, ExpertTokensMetadata(counts))

        return hook, receive

    def start_combine(self, work: FinalizeWork) -> tuple[Hook, Callable[[], None]]:
        """Raises ValueError for experts that have weighted and summed: the package does."""
        if not isinstance(work.weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            raise ValueError(
                f"{self.name} weights and sums by itself, the experts leave "
                f"{type(work.weight_and_reduce_impl).__name__} to be done"
            )
        weights, output = work.topk_weights.float(), work.output
        combined, _, hook = self.buffer.low_latency_combine(
            work.fused_expert_output,
            self._ids,
            torch.ones_like(weights) if work.apply_router_weight_on_input else weights.contiguous(),
            self._handle,
            return_recv_hook=True,
            out=output,
        )

        def receive() -> None:
            if combined.data_ptr() != output.data_ptr():
                output.copy_(combined)

        return hook, receive
