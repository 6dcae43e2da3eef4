"""What both ways of moving tokens over the deep_ep package (DeepEP's Buffer) share.

    deepep_high_throughput   Standard: each token once to each rank with one of its experts, and
                             one sum back
    deepep_low_latency       Batched: each pick to its expert, rows side by side, and weighted on
                             the way back

The package is an optional extra. The buffer is made once, by ``make_deep_ep_buffer`` or by hand,
and given as ``ParallelGroups(deep_ep=...)``. DeepEP counts experts by rank, as many on each; ids
are translated to that order on the way out and back again on arrival, so that any placement will
do.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.distributed.deep_ep import PACKAGE, Placement, learn_placement
from fusedmoe.distributed.groups import TokenRanks, check_sizes, token_ranks
from fusedmoe.modular_kernel.capabilities import MissingModule
from fusedmoe.prepare_finalize.dispatch import DispatchingModular
from fusedmoe.quantization.keys import FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0

_ROW_BYTES = 512
BLOCK_FP8 = (FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0)


class DeepEPDispatching(DispatchingModular):
    """What both modes share; ``buffer`` is a ``deep_ep.Buffer`` of ``ranks``."""

    carried = (*DispatchingModular.carried, "buffer", "_placement")
    by_expert = True
    carries_lora_ids = False
    low_latency: ClassVar[bool]
    _handle: Any = None

    def __init__(
        self,
        buffer: Any,
        is_sequence_parallel: bool = False,
        *,
        ranks: TokenRanks,
        max_num_tokens: int | None = None,
    ) -> None:
        super().__init__(is_sequence_parallel, ranks=ranks, max_num_tokens=max_num_tokens)
        self.buffer = buffer
        self._placement: list[Placement] = []

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        reason = super().unmet_requirement(moe, groups)
        if reason is not None:
            return reason
        assert groups is not None
        if groups.deep_ep is None:
            missing = MissingModule.unless_installed(PACKAGE)
            return missing or "needs a deep_ep.Buffer in ParallelGroups(deep_ep=...)"
        if bool(groups.deep_ep.low_latency_mode) != cls.low_latency:
            return f"the deep_ep.Buffer is {'not ' * cls.low_latency}made for low latency"
        ranks = token_ranks(moe.moe_parallel_config, groups)
        if groups.deep_ep.group_size != ranks.size:
            return f"has a buffer of {groups.deep_ep.group_size} ranks, the layer has {ranks.size}"
        if moe.in_dtype is not torch.bfloat16:
            return f"moves rows in bfloat16, not {moe.in_dtype}"
        if moe.hidden_dim * moe.in_dtype.itemsize % _ROW_BYTES:
            return f"moves rows of a multiple of {_ROW_BYTES} bytes, hidden_dim is {moe.hidden_dim}"
        return None

    @classmethod
    def make(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> Self:
        assert groups is not None
        parallel = moe.moe_parallel_config
        return cls(
            groups.deep_ep,
            parallel.is_sequence_parallel,
            ranks=token_ranks(parallel, groups),
            max_num_tokens=moe.max_num_tokens,
        )

    def concurrent_forwards(self) -> int:
        """One: that is what the package's buffer has room for."""
        return 1

    def topk_indices_dtype(self) -> torch.dtype | None:
        return torch.int64

    def placement(self, num_experts: int, expert_map: torch.Tensor | None) -> Placement:
        """Asks the other ranks the first time, and again where the map is another tensor."""
        expert_map = self.checked_map(num_experts, expert_map)
        if not self._placement or self._placement[0].expert_map is not expert_map:
            self._placement[:] = [learn_placement(expert_map, self.ranks)]
        return self._placement[0]

    def check_tokens(self, num_tokens: int) -> None:
        """Raise ValueError where a rank brings more than there is room for, as far as is known."""
        if self._given_sizes is None:
            sizes = [num_tokens]
        else:
            sizes = check_sizes(self._given_sizes, self.ranks, num_tokens)
        self.check_room(sizes)
