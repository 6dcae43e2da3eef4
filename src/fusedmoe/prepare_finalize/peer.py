"""Each row once to each rank that needs it, by stores into the memory of the GPUs of one host.

As ``all_to_all``, but nothing is counted beforehand and the host waits for nothing: the launches
can be captured in a CUDA graph. The ranks' tokens stand in slots, ``rows`` for each rank, most of
which may be empty; the experts' sums stay where they are and are fetched by the tokens' ranks.
"""

from __future__ import annotations

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.distributed.groups import token_ranks
from fusedmoe.distributed.peer_memory import PeerMemory
from fusedmoe.kernels.peer_all_to_all import combine, dispatch
from fusedmoe.modular_kernel import FusedMoEPrepareAndFinalizeModular, PrepareResult
from fusedmoe.prepare_finalize.dispatch import Dispatching, weighted_input
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import fp8_dynamic_group
from fusedmoe.topk_weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
)


class PeerPrepareAndFinalize(Dispatching, FusedMoEPrepareAndFinalizeModular):
    """[T of this rank, H] -> [ranks * rows, H] on every rank, ids -1 where a slot is not its own.

    ``rows`` is the largest of ``tokens_per_rank``. ``memory`` is ``ParallelGroups.peers``.
    """

    name = "peer"
    memory: PeerMemory
    _owners: torch.Tensor | None = None
    _ids: torch.Tensor | None = None
    _rows: int = 0

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        reason = super().unmet_requirement(moe, groups)
        if reason is not None:
            return reason
        assert groups is not None
        if groups.peers is None:
            return "needs a PeerMemory in ParallelGroups(peers=...)"
        if not moe.moe_parallel_config.use_ep:
            return "sends tokens to whole experts, but each expert is cut over all ranks"
        axes = token_ranks(moe.moe_parallel_config, groups).axes
        if len(axes) > 1:
            return "needs one process group of all ranks whose tokens differ"
        layout = groups.peers.layout
        if (layout.hidden, layout.topk) != (moe.hidden_dim, moe.experts_per_token):
            return (
                f"has buffers for rows of {layout.hidden} and {layout.topk} picks, the layer has "
                f"{moe.hidden_dim} and {moe.experts_per_token}"
            )
        if not layout.group and layout.row_dtype is not moe.in_dtype:
            return f"has buffers for {layout.row_dtype}, the layer takes {moe.in_dtype}"
        return None

    @classmethod
    def make(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> PeerPrepareAndFinalize:
        assert groups is not None
        assert groups.peers is not None
        ranks = token_ranks(moe.moe_parallel_config, groups)
        room = groups.peers.layout.rows
        made = cls(
            moe.moe_parallel_config.is_sequence_parallel,
            ranks=ranks,
            max_num_tokens=min(room, moe.max_num_tokens or room),
        )
        made.memory = groups.peers
        return made

    def supports_async(self) -> bool:
        return False

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
        """Raises PeerTimeoutError if a rank was missed before, ValueError as ``sizes_for``."""
        memory = self.memory
        memory.check()
        key, group = None if defer_input_quant else quant_config.a1.key, memory.layout.group
        if key != (fp8_dynamic_group(group) if group else None):
            raise ValueError(
                f"the experts take rows in {key or a1.dtype}, the buffers hold "
                f"{memory.layout.row_dtype} with a scale per {group or 'no'} columns"
            )
        a1 = weighted_input(a1, topk_weights, topk_ids, apply_router_weight_on_input)
        rows = max(max(self.sizes_for(a1.shape[0])), 1)
        self._owners = self.hosts_of(num_experts, expert_map).owners
        self._ids, self._rows = topk_ids, rows
        dispatch(
            *(a1, topk_ids, topk_weights, self._owners, memory.view, rows),
            max_polls=memory.max_polls,
        )
        got = memory.view.received(rows)
        return PrepareResult(
            got.hidden_states, got.scales, None, got.topk_ids, got.topk_weights, got.outputs
        )

    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> None:
        memory = self.memory
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            weight_and_reduce_impl = TopKWeightAndReduceContiguous()
        outputs = memory.view.received(self._rows).outputs
        if fused_expert_output.data_ptr() != outputs.data_ptr():
            weight_and_reduce_impl.apply(
                outputs, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input
            )
        assert self._owners is not None
        assert self._ids is not None
        combine(
            *(output, self._ids, self._owners, memory.view, self._rows),
            max_polls=memory.max_polls,
        )
