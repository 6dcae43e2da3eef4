"""Bring each expert's rows together in memory, and take them back to their tokens.

For GEMMs that want an expert's rows contiguous. R = T * K rows; row order is by local expert, then
by slot. Triton bodies: ``kernels/triton/permute.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusedmoe.kernels.align import MoEAlignment, align_reference, dense
from fusedmoe.kernels.ids import check_expert_map, local_ids


class MoEPermuted(NamedTuple):
    """Rows grouped by expert. Rows of no local expert come last and are not filled.

    hidden_states [R, H]; scale [R, ...] or None; expert_first_token_offset int64 [e + 1]: where
    each local expert's rows begin, its last entry the number of filled rows; inv_permuted_idx int32
    [R]: the row of each slot, R for slots of no local expert; permuted_idx int32 [R]: the slot of
    each row, R for unfilled rows.
    """

    hidden_states: torch.Tensor
    scale: torch.Tensor | None
    expert_first_token_offset: torch.Tensor
    inv_permuted_idx: torch.Tensor
    permuted_idx: torch.Tensor


@dataclass(frozen=True)
class MoEPermuteScratch:
    """The tables of ``moe_permute``, allocated once and written again at every call."""

    permuted_idx: torch.Tensor
    row_experts: torch.Tensor
    num_rows: torch.Tensor
    inv_permuted_idx: torch.Tensor
    expert_first_token_offset: torch.Tensor

    @classmethod
    def allocate(
        cls, max_slots: int, num_local_experts: int, device: torch.device | str
    ) -> MoEPermuteScratch:
        """Tables for up to ``max_slots`` = T * K slots."""
        first, second, third = (
            torch.empty(max_slots, dtype=torch.int32, device=device) for _ in range(3)
        )
        return cls(
            first,
            second,
            torch.empty(1, dtype=torch.int32, device=device),
            third,
            torch.empty(num_local_experts + 1, dtype=torch.int64, device=device),
        )


def moe_permute(
    hidden_states: torch.Tensor,
    a1q_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    n_expert: int,
    n_local_expert: int = -1,
    expert_map: torch.Tensor | None = None,
    permuted_hidden_states: torch.Tensor | None = None,
    scratch: MoEPermuteScratch | None = None,
) -> MoEPermuted:
    """hidden_states [T, H], topk_ids int [T, K] -> rows [R, H] grouped by local expert.

    ``n_local_expert`` defaults to ``n_expert``; ids outside, or mapped to -1 by ``expert_map``
    (int32 [n_expert]), have no row that is filled. A scale of two or more dimensions [T, ...] is
    gathered like its rows, any other returned as it is. ``permuted_hidden_states`` [R, H] is
    written into, where given. Raises ValueError where shapes disagree or ``scratch`` is too small.
    """
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states must be [T, H], got {tuple(hidden_states.shape)}")
    check_expert_map(expert_map, topk_ids)
    n_local = n_expert if n_local_expert < 0 else n_local_expert
    H, R = hidden_states.shape[1], topk_ids.numel()
    scratch = scratch or MoEPermuteScratch.allocate(R, n_local, hidden_states.device)
    _check(hidden_states, a1q_scale, topk_ids, n_local, permuted_hidden_states, scratch)
    if permuted_hidden_states is None:
        permuted_hidden_states = hidden_states.new_empty(R, H)
    tables = MoEAlignment(scratch.permuted_idx[:R], scratch.row_experts[:R], scratch.num_rows)
    inverse, offsets = scratch.inv_permuted_idx[:R], scratch.expert_first_token_offset
    ids, expert_map = topk_ids.reshape(-1).contiguous(), dense(expert_map)
    if hidden_states.is_cuda:
        from fusedmoe.kernels.triton.align import align
        from fusedmoe.kernels.triton.permute import gather_rows as gather
    else:
        align, gather = align_reference, gather_rows_reference
    # Blocks of one slot: the sorted slots are the permutation itself.
    align(ids, 1, n_local, R, expert_map, expert_map is not None, False, out=tables)
    gather(hidden_states, permuted_hidden_states, ids, expert_map, tables, inverse, offsets)
    scale = a1q_scale
    if a1q_scale is not None and a1q_scale.dim() > 1:
        scale = a1q_scale[tables.sorted_ids.clamp(max=max(R - 1, 0)) // topk_ids.shape[1]]
    return MoEPermuted(permuted_hidden_states, scale, offsets, inverse, tables.sorted_ids)


def gather_rows_reference(
    hidden_states: torch.Tensor,
    permuted: torch.Tensor,
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    tables: MoEAlignment,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Fill rows, the inverse table and the offsets from the sorted slots, in plain torch."""
    R, rows = ids.numel(), int(tables.num_tokens_post_pad)
    slots = tables.sorted_ids[:rows].long()
    K = R // max(hidden_states.shape[0], 1)
    permuted[:rows] = hidden_states[slots // max(K, 1)]
    inverse.fill_(R)
    inverse[slots] = torch.arange(rows, dtype=torch.int32, device=ids.device)
    local = local_ids(ids, offsets.shape[0] - 1, expert_map)
    experts = torch.arange(offsets.shape[0], device=ids.device)
    offsets.copy_(((local >= 0) & (local < experts[:, None])).sum(1))


def moe_unpermute(
    out: torch.Tensor,
    permuted_hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    expert_first_token_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t] = sum over k of topk_weights[t, k] * permuted[inv_permuted_idx[t * K + k]].

    out [T, H], permuted_hidden_states [R, H], topk_weights [T, K], inv_permuted_idx int32 [R].
    fp32 accumulation in the order of k. Slots whose row is R, or not below the last entry of
    ``expert_first_token_offset`` (int [e + 1]), count as nothing. Raises ValueError where shapes or
    dtypes disagree.
    """
    weights, rows, index = topk_weights, permuted_hidden_states, inv_permuted_idx
    fits = weights.dim() == rows.dim() == 2 and index.numel() == weights.numel()
    if not fits or out.shape != (weights.shape[0], rows.shape[1]):
        raise ValueError(
            f"topk_weights {tuple(weights.shape)} and rows {tuple(rows.shape)} do not fit out "
            f"{tuple(out.shape)} and inv_permuted_idx {tuple(index.shape)}"
        )
    offsets = expert_first_token_offset
    tables = (index,) if offsets is None else (index, offsets)
    if any(table.dtype not in (torch.int32, torch.int64) for table in tables):
        raise ValueError(f"tables must be integers, got {[table.dtype for table in tables]}")
    if offsets is not None and (offsets.dim() != 1 or not offsets.numel()):
        raise ValueError(f"expert_first_token_offset must be [e + 1], got {tuple(offsets.shape)}")
    if out.is_cuda:
        from fusedmoe.kernels.triton.permute import unpermute as implementation
    else:
        implementation = unpermute_reference
    implementation(
        out,
        permuted_hidden_states,
        topk_weights,
        inv_permuted_idx.reshape(-1),
        expert_first_token_offset,
    )
    return out


def unpermute_reference(
    out: torch.Tensor,
    permuted: torch.Tensor,
    topk_weights: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor | None,
) -> None:
    """The definition, in plain torch."""
    T, K = topk_weights.shape
    wide = torch.promote_types(permuted.dtype, torch.float32)
    rows = permuted.shape[0] if offsets is None else min(int(offsets[-1]), permuted.shape[0])
    live = ((inverse >= 0) & (inverse < rows)).view(T, K)
    index = inverse.long().clamp(0, max(rows - 1, 0)).view(T, K)
    total = torch.zeros(out.shape, dtype=wide, device=out.device)
    for pick in range(K if rows else 0):
        row = permuted[index[:, pick]].to(wide) * topk_weights[:, pick, None].to(wide)
        total += torch.where(live[:, pick, None], row, 0.0)
    out.copy_(total)


def _check(
    hidden_states: torch.Tensor,
    a1q_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    n_local: int,
    permuted: torch.Tensor | None,
    scratch: MoEPermuteScratch,
) -> None:
    (T, H), R = hidden_states.shape, topk_ids.numel()
    if topk_ids.dim() != 2 or topk_ids.shape[0] != T:
        raise ValueError(f"topk_ids {tuple(topk_ids.shape)} do not name the picks of {T} tokens")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if permuted is not None and permuted.shape != (R, H):
        raise ValueError(f"permuted_hidden_states is {tuple(permuted.shape)}, not {(R, H)}")
    if a1q_scale is not None and a1q_scale.dim() > 1 and a1q_scale.shape[0] != T:
        raise ValueError(f"a1q_scale {tuple(a1q_scale.shape)} does not scale {T} tokens")
    if scratch.permuted_idx.numel() < R or scratch.expert_first_token_offset.shape != (
        n_local + 1,
    ):
        raise ValueError(
            f"scratch is for {scratch.permuted_idx.numel()} slots and "
            f"{scratch.expert_first_token_offset.numel() - 1} experts, not {R} and {n_local}"
        )
