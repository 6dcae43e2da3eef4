"""Expert load balancing: logical ids -> ids of one replica each, and the load they make.

Logical expert l has ``logical_replica_count[l]`` copies, ``logical_to_physical_map[l, r]``. The
copy is chosen by a hash of the token index, so the choice needs no state and no random numbers.
On CUDA one Triton launch (``kernels/triton/eplb_map.py``), elsewhere the reference.

Notation: T tokens, K picks, L logical experts, P physical experts, R largest replica count.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.device import device_of

HASH_MULTIPLIER = 2654435769


def eplb_map_to_physical_and_record(
    topk_ids: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    expert_load_view: torch.Tensor,
    *,
    should_record: torch.Tensor | None = None,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """topk_ids int [T, K] -> physical ids of the same dtype; adds 1 to the load of each.

    logical_to_physical_map int [L, R], logical_replica_count int [L], expert_load_view int32 [P].
    An id outside [0, L), an expert without replicas and a map entry outside [0, P) give -1, and
    load nothing. Rows from ``num_unpadded_tokens`` (one integer on the device) on are mapped but
    not counted; nothing is counted where ``should_record`` (one element on the device) is zero.
    """
    given = (
        *(topk_ids, logical_to_physical_map, logical_replica_count, expert_load_view),
        *(should_record, num_unpadded_tokens),
    )
    _check(*given)
    run = torch.ops.fusedmoe.eplb_map if torch.compiler.is_compiling() else _eplb_map
    return run(*given)


def _eplb_map(
    topk_ids: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    expert_load_view: torch.Tensor,
    should_record: torch.Tensor | None,
    num_unpadded_tokens: torch.Tensor | None,
) -> torch.Tensor:
    tables = logical_to_physical_map, logical_replica_count, expert_load_view
    if topk_ids.is_cuda:
        from fusedmoe.kernels.triton.eplb_map import eplb_map_triton

        with device_of(topk_ids):
            return eplb_map_triton(topk_ids, *tables, should_record, num_unpadded_tokens)
    return eplb_map_reference(topk_ids, *tables, should_record, num_unpadded_tokens)


_eplb_map_op = torch.library.custom_op(
    "fusedmoe::eplb_map", _eplb_map, mutates_args=("expert_load_view",)
)


@_eplb_map_op.register_fake
def _(topk_ids: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    return topk_ids.new_empty(topk_ids.shape)


def eplb_map_reference(
    topk_ids: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    expert_load_view: torch.Tensor,
    should_record: torch.Tensor | None = None,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in plain torch."""
    num_logical, max_replicas = logical_to_physical_map.shape
    num_physical = expert_load_view.shape[0]
    logical = topk_ids.long()
    token = torch.arange(topk_ids.shape[0], device=topk_ids.device)[:, None]
    known = (logical >= 0) & (logical < num_logical)
    row = logical.clamp(0, num_logical - 1)
    count = logical_replica_count.long()[row].clamp(max=max_replicas)
    replica = ((token * HASH_MULTIPLIER) & 0xFFFFFFFF) % count.clamp_min(1)
    physical = logical_to_physical_map.long()[row, replica]
    valid = known & (count > 0) & (physical >= 0) & (physical < num_physical)
    physical = physical.masked_fill(~valid, -1)
    counted = valid
    if num_unpadded_tokens is not None:
        counted = counted & (token < num_unpadded_tokens.reshape(()))
    if should_record is not None:
        counted = counted & (should_record.reshape(()) != 0)
    expert_load_view.index_add_(
        0, physical.clamp_min(0).flatten(), counted.flatten().to(torch.int32)
    )
    return physical.to(topk_ids.dtype)


def _check(
    topk_ids: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    expert_load_view: torch.Tensor,
    should_record: torch.Tensor | None,
    num_unpadded_tokens: torch.Tensor | None,
) -> None:
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids must be [T, K], got {tuple(topk_ids.shape)}")
    table, count, load = logical_to_physical_map, logical_replica_count, expert_load_view
    if table.dim() != 2 or min(table.shape) < 1 or count.shape != table.shape[:1]:
        raise ValueError(
            "logical_to_physical_map must be [L, max replicas] and logical_replica_count [L], got "
            f"{tuple(table.shape)} and {tuple(count.shape)}"
        )
    if (
        load.dim() != 1
        or load.shape[0] < 1
        or load.dtype is not torch.int32
        or not load.is_contiguous()
    ):
        raise ValueError(
            f"expert_load_view must be contiguous int32 [P], got {load.dtype} {tuple(load.shape)}"
        )
    integers = (torch.int16, torch.int32, torch.int64)
    for name, tensor, dtypes in (
        ("topk_ids", topk_ids, integers),
        ("logical_to_physical_map", table, integers),
        ("logical_replica_count", count, integers),
        ("should_record", should_record, (torch.bool, torch.uint8, *integers)),
        ("num_unpadded_tokens", num_unpadded_tokens, integers),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} may not be {tensor.dtype}")
        if tensor.device != load.device:
            raise ValueError(f"{name} is on {tensor.device}, the load on {load.device}")
    for name, tensor in (
        ("should_record", should_record),
        ("num_unpadded_tokens", num_unpadded_tokens),
    ):
        if tensor is not None and tensor.numel() != 1:
            raise ValueError(f"{name} must have one element, got {tuple(tensor.shape)}")
