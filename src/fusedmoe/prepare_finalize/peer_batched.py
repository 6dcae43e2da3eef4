"""As ``peer``, for experts that take each one's rows side by side.

What has arrived is laid out anew on its own rank. Each expert has room for a row of every slot that
a forward uses: meant for the small batches of decoding.
"""

from __future__ import annotations

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.kernels.ids import local_ids
from fusedmoe.modular_kernel import ExpertTokensMetadata, FusedMoEActivationFormat, PrepareResult
from fusedmoe.prepare_finalize.batched import rows_by_expert
from fusedmoe.prepare_finalize.peer import PeerPrepareAndFinalize


class PeerBatchedPrepareAndFinalize(PeerPrepareAndFinalize):
    """[T of this rank, H] -> [e, ranks * rows, H] with a count per expert; ids are local ones."""

    name = "peer_batched"
    row_format = FusedMoEActivationFormat.BatchedExperts
    carried = (*PeerPrepareAndFinalize.carried, "num_local_experts")
    num_local_experts: int

    @classmethod
    def make(
        cls, moe: FusedMoEConfig, groups: ParallelGroups | None
    ) -> PeerBatchedPrepareAndFinalize:
        made = super().make(moe, groups)
        made.num_local_experts = moe.num_local_experts
        return made

    def max_num_tokens_per_rank(self) -> int | None:
        return self.memory.layout.rows

    def expert_output(self) -> torch.Tensor | None:
        return None  # rows of experts, not of slots

    def _received(self) -> PrepareResult:
        got = super()._received()
        assert got.topk_ids is not None
        e, room = self.num_local_experts, got.hidden_states.shape[0]
        local = local_ids(got.topk_ids, e, self._expert_map)
        tensors = [got.hidden_states] if got.scale is None else [got.hidden_states, got.scale]
        (rows, *scales), counts = rows_by_expert(tensors, local, e, room)
        return PrepareResult(
            rows,
            scales[0] if scales else None,
            ExpertTokensMetadata(counts),
            local.int(),
            got.topk_weights,
        )
