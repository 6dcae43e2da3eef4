"""One rank in the batched format: each expert's rows side by side, as many as there is room for.

The plain form of what the low-latency dispatches deliver; for tests, and for experts that want it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.kernels.ids import local_ids
from fusedmoe.modular_kernel import (
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    PrepareResult,
    PrepareWork,
)
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular


def rows_by_expert(
    tensors: Sequence[torch.Tensor], local: torch.Tensor, e: int, room: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each of ``tensors`` [T, n] as [e, room, n], and how many rows each expert has: int32 [e].

    ``local`` int64 [T, K]: local ids, -1 for none. Row j of an expert is its j-th slot in token
    order; one that it has no room for is dropped, and rows in no use hold anything.
    """
    T, K = local.shape
    slot_expert = local.reshape(-1, 1)
    chosen = slot_expert == torch.arange(e, device=local.device)  # [R, e]
    position = (chosen.cumsum(0) - 1).gather(1, slot_expert.clamp(min=0))
    fits = (slot_expert >= 0) & (position < room)
    # One row past the end takes what belongs nowhere.
    row = torch.where(fits, slot_expert * room + position, e * room)[:, 0]
    found = []
    for tensor in tensors:
        # Not every dtype of one byte can be indexed.
        plain = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        rows = plain.new_empty(e * room + 1, tensor.shape[1])
        rows[row] = plain.repeat_interleave(K, dim=0, output_size=T * K)
        found.append(rows[:-1].view(tensor.dtype).view(e, room, -1))
    return found, chosen.sum(0).clamp(max=room).to(torch.int32)


class BatchedPrepareAndFinalize(MoEPrepareAndFinalizeNoDPEPModular):
    """[T, H] -> [e, max_num_tokens, H] and back, without leaving the device.

    An expert may get a row of every token, so more than ``max_num_tokens`` tokens are a ValueError.
    """

    name = "batched"
    row_format = FusedMoEActivationFormat.BatchedExperts

    def __init__(self, max_num_tokens: int, num_local_experts: int) -> None:
        if max_num_tokens < 1 or num_local_experts < 1:
            raise ValueError(
                f"max_num_tokens {max_num_tokens} and num_local_experts {num_local_experts} must "
                "be positive"
            )
        self.max_num_tokens = max_num_tokens
        self.num_local_experts = num_local_experts

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        if moe.max_num_tokens is None:
            return "needs max_num_tokens, the rows that each expert has room for"
        return super().unmet_requirement(moe, groups)

    @classmethod
    def make(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> BatchedPrepareAndFinalize:
        assert moe.max_num_tokens is not None
        return cls(moe.max_num_tokens, moe.num_local_experts)

    def max_num_tokens_per_rank(self) -> int | None:
        return self.max_num_tokens

    def dispatch(self, work: PrepareWork) -> PrepareResult:
        """Row j of an expert is its j-th slot in token order; the ids returned are local ones.

        The ids of one token are distinct; a second row of a token for a full expert is dropped.
        """
        T, room = work.a1.shape[0], self.max_num_tokens
        if room < T:
            raise ValueError(f"{T} tokens, but each expert has room for {room}")
        e, ids = self.num_local_experts, work.topk_ids
        local = local_ids(ids, e, work.expert_map)
        (rows,), counts = rows_by_expert([work.weighted_input], local, e, room)
        return PrepareResult(
            *(rows, None, ExpertTokensMetadata(counts)), local.to(ids.dtype), work.topk_weights
        )
