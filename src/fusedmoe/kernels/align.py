"""Group routed slots by expert, each group padded to whole blocks of the grouped GEMM.

A slot is one pick of one token: slot = token * K + pick. Few slots on Hopper:
``kernels/cuda/align_few.cu``; Triton bodies: ``kernels/triton/align.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.kernels.device import device_of, runs_hopper_cuda
from fusedmoe.kernels.ids import check_expert_map, local_ids

MAX_SLOTS = 2**31 - 1


class MoEAlignment(NamedTuple):
    """Blocks of ``block_size`` slots, every block of one expert.

    sorted_ids int32 [P]: slots, expert by expert, in ascending order inside an expert; padding is
    R, one past the last slot. expert_ids int32 [cdiv(P, block_size)]: the expert of each block, -1
    where it is not stored here and for unused blocks. num_tokens_post_pad int32 [1]: how much of
    ``sorted_ids`` is in use, a multiple of the block size.
    """

    sorted_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_tokens_post_pad: torch.Tensor

    @classmethod
    def empty(cls, P: int, block_size: int, device: torch.device, counts: int = 1) -> MoEAlignment:
        """Room for P slots."""
        sizes = P, -(-P // block_size), counts
        return cls(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))


class MoEAlignmentWithScatter(NamedTuple):
    """``MoEAlignment``, and scatter_idx int32 [R, 1]: the slot itself, -1 if it has no expert."""

    sorted_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_tokens_post_pad: torch.Tensor
    scatter_idx: torch.Tensor


class LoneSlots(NamedTuple):
    """Takes the place of an alignment where slots are few: every slot is a block by itself.

    topk_ids int [R]; expert_map int32 global -> local id or -1, or None; both dense. Ids of no
    local expert are skipped.
    """

    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None = None

    @classmethod
    def of(cls, topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> LoneSlots:
        """The slots of ids [T, K]; ids and map may have any strides."""
        # Flattened, [T, 1] and [1, K] keep their strides.
        return cls(topk_ids.reshape(-1).contiguous(), dense(expert_map))


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """What kernels read without strides."""
    return None if tensor is None else tensor.contiguous()


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
    *,
    num_local_experts: int | None = None,
    spare_slots: int = 0,
) -> MoEAlignment | MoEAlignmentWithScatter:
    """topk_ids int [T, K] -> blocks of slots by expert; ids outside [0, num_experts) are dropped.

    P = R + num_experts * (block_size - 1), at most R * block_size where R < num_experts, rounded up
    to whole blocks if ``pad_sorted_ids``: a size known without reading ids.

    ``expert_map`` (int32, global -> local id or -1) turns expert_ids into local ids. Slots of
    remote experts keep their blocks (expert_ids -1), unless ``ignore_invalid_experts`` drops them:
    then groups follow the local order, and ``num_local_experts`` takes the place of ``num_experts``
    in P. So many ``spare_slots`` of padding follow, for the caller's own use. Raises ValueError for
    a bad block size, too many slots, or ids that are not integers.
    """
    if block_size < 1 or num_experts < 1:
        raise ValueError(
            f"block_size and num_experts must be positive, got {block_size} and {num_experts}"
        )
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    check_expert_map(expert_map, topk_ids)
    drop_remote = expert_map is not None and ignore_invalid_experts
    groups = num_experts
    if drop_remote and num_local_experts is not None:
        groups = num_local_experts
    P = padded_slots(topk_ids.numel(), block_size, groups, pad_sorted_ids) + spare_slots
    if P > MAX_SLOTS:
        raise ValueError(
            f"{topk_ids.numel()} slots padded to blocks of {block_size} pass {MAX_SLOTS}"
        )
    ids, expert_map = topk_ids.reshape(-1).contiguous(), dense(expert_map)
    if topk_ids.is_cuda:
        drops = expert_map is None or drop_remote
        if drops and not return_scatter_idx and runs_hopper_cuda(ids.get_device()):
            from fusedmoe.kernels.cuda.align_few import align_few

            with device_of(ids):
                few = align_few(ids, block_size, groups, P, expert_map)
            if few is not None:
                return few
        from fusedmoe.kernels.triton.align import align as implementation
    else:
        implementation = align_reference
    alignment, scatter_idx = implementation(
        ids, block_size, groups, P, expert_map, drop_remote, return_scatter_idx
    )
    if scatter_idx is None:
        return alignment
    return MoEAlignmentWithScatter(*alignment, scatter_idx)


def align_local_slots(
    topk_ids: torch.Tensor,
    block_size: int,
    num_local_experts: int,
    expert_map: torch.Tensor | None,
    *,
    whole_blocks: bool = False,
    spare_slots: int = 0,
) -> MoEAlignment:
    """``moe_align_block_size`` of the slots of local experts alone, by local ids.

    ``whole_blocks``: the tables are as long as if every block were in use.
    """
    alignment = moe_align_block_size(
        topk_ids,
        block_size,
        num_local_experts if expert_map is None else expert_map.shape[0],
        expert_map,
        pad_sorted_ids=whole_blocks,
        ignore_invalid_experts=True,
        num_local_experts=num_local_experts,
        spare_slots=spare_slots,
    )
    return MoEAlignment(*alignment[:3])


def padded_slots(R: int, block_size: int, groups: int, whole_blocks: bool) -> int:
    """The most entries that R slots in ``groups`` groups can take, each padded to whole blocks."""
    P = R + groups * (block_size - 1)
    if whole_blocks:
        P = -(-P // block_size) * block_size
    return min(R * block_size, P) if groups > R else P


def align_reference(
    ids: torch.Tensor,
    block_size: int,
    groups: int,
    P: int,
    expert_map: torch.Tensor | None,
    drop_remote: bool,
    with_scatter: bool,
    out: MoEAlignment | None = None,
) -> tuple[MoEAlignment, torch.Tensor | None]:
    """The definition, in plain torch, for flat ids [R]; ``out`` are tensors to write into."""
    R = ids.numel()
    group = local_ids(ids, groups, expert_map if drop_remote else None)
    label_map = None if drop_remote else expert_map
    sorted_ids = torch.full((P,), R, dtype=torch.int32, device=ids.device)
    expert_ids = torch.full((-(-P // block_size),), -1, dtype=torch.int32, device=ids.device)
    first = 0
    for index in range(groups):
        slots = (group == index).nonzero()[:, 0]
        blocks = -(-slots.numel() // block_size)
        sorted_ids[first : first + slots.numel()] = slots
        label = index if label_map is None else int(_label(label_map, index))
        expert_ids[first // block_size : first // block_size + blocks] = label
        first += blocks * block_size
    alignment = MoEAlignment(
        sorted_ids, expert_ids, torch.tensor([first], dtype=torch.int32, device=ids.device)
    )
    if out is not None:
        alignment = MoEAlignment(*(to.copy_(made) for to, made in zip(out, alignment, strict=True)))
    scatter_idx = None
    if with_scatter:
        here = local_ids(group, MAX_SLOTS, label_map) >= 0
        slot = torch.arange(R, dtype=torch.int32, device=ids.device)
        scatter_idx = torch.where(here, slot, -1)[:, None]
    return alignment, scatter_idx


def _label(label_map: torch.Tensor, index: int) -> torch.Tensor | int:
    return label_map[index] if index < label_map.shape[0] else -1
