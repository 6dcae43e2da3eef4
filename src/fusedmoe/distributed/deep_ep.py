"""What the deep_ep package needs to know of a layer: buffers of the right size, experts by rank."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fusedmoe.distributed.collectives import all_gather_rows
from fusedmoe.distributed.groups import TokenRanks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PACKAGE = "deep_ep"


def make_deep_ep_buffer(
    group: ProcessGroup, hidden_dim: int, num_experts: int, max_num_tokens: int | None = None
) -> Any:
    """A ``deep_ep.Buffer`` of the sizes that the package recommends; every rank has to come here.

    In low-latency mode where ``max_num_tokens``, the most that any rank brings, is given; else for
    high throughput. ``num_experts`` counts those of all ranks. Raises ImportError where the
    package is absent, ValueError where the experts are not as many on each rank.
    """
    try:
        Buffer = import_module(PACKAGE).Buffer
    except ImportError as error:
        raise ImportError(f"a deep_ep.Buffer needs the package {PACKAGE}") from error
    ranks = group.size()
    if num_experts % ranks:
        raise ValueError(f"{num_experts} experts are not as many on each of {ranks} ranks")
    if max_num_tokens is not None:
        size = Buffer.get_low_latency_rdma_size_hint(max_num_tokens, hidden_dim, ranks, num_experts)
        queues = num_experts // ranks
        return Buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=queues)
    row_bytes = hidden_dim * torch.bfloat16.itemsize
    configs = [Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)]
    return Buffer(
        group,
        max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs),
        max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs),
    )


class Placement(NamedTuple):
    """Where experts are in DeepEP's order, learnt from every rank's map.

    ``position`` int64 [num_experts]: rank * e + local id of an expert, -1 where no rank has it;
    ``global_id`` int64 [e]: the id of each local expert; ``num_positions``: ranks * e.
    """

    expert_map: torch.Tensor
    position: torch.Tensor
    global_id: torch.Tensor
    num_positions: int

    def positions_of(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T, K]; -1 stays, and is what ids out of range become."""
        num_experts = self.position.shape[0]
        known = (topk_ids >= 0) & (topk_ids < num_experts)
        found = self.position[topk_ids.long().clamp(0, num_experts - 1)]
        return torch.where(known, found, -1).contiguous()

    def global_ids_of(self, local_ids: torch.Tensor) -> torch.Tensor:
        """Local ids or -1 -> global ids or -1, int64."""
        found = self.global_id[local_ids.long().clamp(min=0)]
        return torch.where(local_ids >= 0, found, -1)


def learn_placement(expert_map: torch.Tensor, ranks: TokenRanks) -> Placement:
    """Ask every rank for its map int32 [num_experts], global -> local id or -1.

    An expert that several ranks have is the first one's. Raises ValueError, on every rank, where
    the ranks have different numbers of experts.
    """
    maps = all_gather_rows(expert_map[None].contiguous(), [1] * ranks.size, ranks)().long()
    counts = (maps >= 0).sum(1).tolist()
    e = counts[ranks.rank]
    if len(set(counts)) != 1 or e == 0:
        raise ValueError(f"DeepEP needs as many experts on each rank, they have {counts}")
    owner = (maps >= 0).int().argmax(0)
    local = maps.gather(0, owner[None])[0]
    mine = maps[ranks.rank]
    global_id = torch.empty(e, dtype=torch.int64, device=maps.device)
    here = (mine >= 0).nonzero()[:, 0]
    global_id[mine[here]] = here
    return Placement(
        expert_map, torch.where(local >= 0, owner * e + local, -1), global_id, ranks.size * e
    )
