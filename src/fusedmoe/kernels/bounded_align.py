"""Blocks of slots for a batch whose number of tokens is known on the device alone.

What differs from ``kernels/align.py``: only slots of valid tokens are looked at, and experts are
placed in one run of ids. Triton bodies: ``kernels/triton/bounded_align.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.kernels.align import MAX_SLOTS, MoEAlignment, align_reference, padded_slots

# Up to so many slots one launch counts and places them; each of its programs reads all of them.
ONE_LAUNCH_SLOTS = 4096


class BoundedRouting(NamedTuple):
    """Which slots this rank computes: ids of its experts, in rows of valid tokens.

    routing_map int32 or int64 [T, K], contiguous: global ids. num_valid int32 or int64 [1]: rows
    from there on are not read; less than 0 counts as 0, more than T as T. This rank's experts have
    the ids first_expert, ..., first_expert + num_local - 1; every other id counts as nothing.
    """

    routing_map: torch.Tensor
    num_valid: torch.Tensor
    first_expert: int
    num_local: int

    @property
    def R(self) -> int:
        """How many slots there are, valid or not."""
        return self.routing_map.numel()


def bounded_align(
    routing: BoundedRouting,
    block_size: int,
    expected_slots: int | None = None,
    *,
    spare_slots: int = 0,
) -> MoEAlignment:
    """Slots of ``routing`` by local expert, as ``moe_align_block_size`` orders them.

    Sizes follow from the routing map's alone: P = R + num_local * (block_size - 1) rounded up to
    whole blocks (at most R * block_size). ``expected_slots`` (default: all) chooses the way it is
    done, never the result. So many ``spare_slots`` of padding follow, whole blocks of it. Raises
    ValueError for a block size below 1 and for too many slots.
    """
    if block_size < 1 or routing.num_local < 1:
        raise ValueError(
            f"block_size and num_local must be positive, got {block_size} and {routing.num_local}"
        )
    P = padded_slots(routing.R, block_size, routing.num_local, whole_blocks=True) + spare_slots
    if P > MAX_SLOTS:
        raise ValueError(f"{routing.R} slots padded to blocks of {block_size} pass {MAX_SLOTS}")
    if not routing.routing_map.is_cuda:
        return bounded_align_reference(routing, block_size, P)
    from fusedmoe.kernels.triton.bounded_align import align_at_once, align_in_steps

    few = (routing.R if expected_slots is None else expected_slots) <= ONE_LAUNCH_SLOTS
    return (align_at_once if few else align_in_steps)(routing, block_size, P)


def bounded_align_reference(routing: BoundedRouting, block_size: int, P: int) -> MoEAlignment:
    """The definition, in plain torch."""
    ids = bounded_ids(routing)
    return align_reference(ids, block_size, routing.num_local, P, None, False, False)[0]


def bounded_ids(routing: BoundedRouting) -> torch.Tensor:
    """The local expert of each slot, -1 where there is none: int64 [R]. Plain torch, no sync."""
    ids = routing.routing_map.long() - routing.first_expert
    token = torch.arange(ids.shape[0], device=ids.device)[:, None]
    known = (token < routing.num_valid) & (routing.routing_map >= routing.first_expert)
    return torch.where(known & (ids < routing.num_local), ids, -1).flatten()
