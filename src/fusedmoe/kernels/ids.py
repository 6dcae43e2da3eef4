"""From a routed id to the expert stored here: the rule that every kernel and reference shares."""

from __future__ import annotations

import torch


def check_expert_map(expert_map: torch.Tensor | None, topk_ids: torch.Tensor | None) -> None:
    """Raise ValueError unless this is a table int32 or int64 [num_experts] beside ``topk_ids``."""
    if expert_map is None:
        return
    if topk_ids is None:
        raise ValueError(f"expert_map {tuple(expert_map.shape)} comes with topk_ids, got None")
    known = expert_map.dtype in (torch.int32, torch.int64)
    if expert_map.dim() != 1 or not expert_map.numel() or not known:
        raise ValueError(
            "expert_map must be one-dimensional, not empty and int32 or int64, got "
            f"{expert_map.dtype} {tuple(expert_map.shape)}"
        )
    if expert_map.device != topk_ids.device:
        raise ValueError(f"expert_map is on {expert_map.device}, topk_ids on {topk_ids.device}")


def local_ids(
    topk_ids: torch.Tensor, num_local: int, expert_map: torch.Tensor | None
) -> torch.Tensor:
    """Local expert of each slot, -1 where there is none (padding, remote, out of range).

    topk_ids: int [T, K]; expert_map: int32 [num_experts] global -> local id or -1, or None where
    the ids are local already. Returns int64 [T, K] in [-1, num_local).
    """
    ids = topk_ids.long()
    if expert_map is not None:
        inside = (ids >= 0) & (ids < expert_map.shape[0])
        mapped = expert_map.long()[ids.clamp(0, expert_map.shape[0] - 1)]
        ids = torch.where(inside, mapped, -1)
    return torch.where((ids >= 0) & (ids < num_local), ids, -1)
