"""Tokens over DeepEP's high-throughput kernels: in Standard rows, for prefill.

T tokens of this rank, K picks, H hidden. What both modes share: ``deepep``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedmoe.distributed.collectives import captures
from fusedmoe.modular_kernel import ExpertTokensMetadata, PrepareResult, PrepareWork
from fusedmoe.prepare_finalize.deepep import BLOCK_FP8, DeepEPDispatching
from fusedmoe.prepare_finalize.luggage import quantize_input


class DeepEPHTPrepareAndFinalize(DeepEPDispatching):
    """[T, H] -> the rows that need an expert of this rank, with global ids, and back.

    Rows in fp8 with scales per 128 columns travel like that; other formats are rounded on arrival.
    How many rows arrive is known to the host, which waits for it: not for CUDA graphs.
    """

    name = "deepep_high_throughput"
    low_latency = False

    def start_dispatch(self, work: PrepareWork) -> Callable[[], PrepareResult]:
        if captures():
            raise ValueError(f"{self.name} waits for counts of rows: it has no CUDA graphs")
        self.check_tokens(work.a1.shape[0])
        placement = self.placement(work.num_experts, work.expert_map)
        blocks = work.key in BLOCK_FP8
        x: Any = work.weighted_input.contiguous()
        x = quantize_input(x, work.quant_config) if blocks else x
        ids = placement.positions_of(work.topk_ids)
        per_rank, per_node, per_expert, goes, _ = self.buffer.get_dispatch_layout(
            ids, placement.num_positions
        )
        rows, local, weights, counts, self._handle, event = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=goes,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=work.topk_weights.float().contiguous(),
            async_finish=True,
        )

        def receive() -> PrepareResult:
            event.current_stream_wait()
            found, scale = rows if blocks else (rows, None)
            if not blocks and not work.defer_input_quant:
                found, scale = quantize_input(found, work.quant_config)
            meta = ExpertTokensMetadata.make_from_list(counts, found.device)
            here = placement.global_ids_of(local).to(work.topk_ids.dtype)
            return PrepareResult(found, scale, meta, here, weights)

        return receive

    def send_back(self, sums: torch.Tensor, output: torch.Tensor) -> Callable[[], None]:
        combined, _, event = self.buffer.combine(
            sums.to(torch.bfloat16).contiguous(), self._handle, async_finish=True
        )

        def receive() -> None:
            event.current_stream_wait()
            output.copy_(combined)

        return receive
