"""Where the copies of each expert are, as tensors; and how even the load on ranks is.

L layers, E logical experts, P physical ones (slots over all ranks: rank r has the slots
[r * P / ranks, (r + 1) * P / ranks)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class LogicalMaps(NamedTuple):
    """logical_to_physical int [L, E, most copies], -1 behind the last copy; counts int [L, E]."""

    logical_to_physical: torch.Tensor
    replica_count: torch.Tensor


def compute_logical_maps(physical_to_logical: torch.Tensor, num_logical: int) -> LogicalMaps:
    """The maps that follow from physical_to_logical int [L, P]; copies in the order of their slots,
    in the same dtype.

    Raises ValueError where an expert has no copy or an id is none of [0, num_logical).
    """
    if physical_to_logical.dim() != 2:
        raise ValueError(
            f"physical_to_logical must be [L, P], got {tuple(physical_to_logical.shape)}"
        )
    L, P = physical_to_logical.shape
    ids = physical_to_logical.long()
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_logical):
        raise ValueError(
            f"physical_to_logical holds ids in [{int(ids.min())}, {int(ids.max())}], not in "
            f"[0, {num_logical})"
        )
    count = ids.new_zeros(L, num_logical).scatter_add_(1, ids, torch.ones_like(ids))
    if count.numel() and int(count.min()) < 1:
        layer, expert = (count < 1).nonzero()[0].tolist()
        raise ValueError(f"expert {expert} of layer {layer} has no copy among {P} slots")
    most = int(count.max()) if count.numel() else 0
    table = ids.new_full((L, num_logical, most), -1)
    # Sorted by expert, slots keep their order; a slot's place among its expert's copies follows.
    order = ids.argsort(dim=1, stable=True)
    sorted_ids = ids.gather(1, order)
    first = count.cumsum(1) - count
    place = torch.arange(P, device=ids.device)[None] - first.gather(1, sorted_ids)
    table[torch.arange(L, device=ids.device)[:, None], sorted_ids, place] = order
    dtype = physical_to_logical.dtype
    return LogicalMaps(table.to(dtype), count.to(dtype))


def rank_loads(
    load: torch.Tensor, physical_to_logical: torch.Tensor, num_ranks: int
) -> torch.Tensor:
    """Load of each rank [L, ranks] fp64, from that of logical experts [L, E].

    The tokens of an expert are spread evenly over its copies, as routing does it.
    """
    ids = physical_to_logical.long()
    if ids.shape[1] % num_ranks:
        raise ValueError(f"{ids.shape[1]} slots do not divide over {num_ranks} ranks")
    count = torch.zeros(load.shape, dtype=torch.float64, device=load.device)
    count.scatter_add_(1, ids, torch.ones(ids.shape, dtype=torch.float64, device=load.device))
    each = (load.double() / count.clamp_min(1)).gather(1, ids)
    return each.view(ids.shape[0], num_ranks, -1).sum(-1)


def imbalance(loads: torch.Tensor) -> float:
    """Sum over layers of the largest rank load, over that of the mean: 1 is even. loads [L, ranks].

    What the slowest rank costs, since every layer waits for it. 1 where there is no load.
    """
    mean = float(loads.double().mean(dim=-1).sum())
    return float(loads.double().amax(dim=-1).sum()) / mean if mean > 0 else 1.0


def balancedness(loads: torch.Tensor) -> float:
    """1 / ``imbalance``: the share of the ranks' time that is not waited away."""
    return 1.0 / imbalance(loads)
