"""Which ranks' tokens meet in a layer, as process groups that were given, never as WORLD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusedmoe.config import FusedMoEParallelConfig, ParallelGroups

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TokenRanks:
    """The ranks that hold different tokens of one layer's batch, in the order of their rows.

    ``axes`` are process groups from the outermost to the innermost: with axes of sizes a and b,
    rank ``i * b + j`` is the i-th of the first and the j-th of the second. One group is one axis;
    where only the groups of single dimensions are known, collectives go over one after the other.
    """

    axes: tuple[ProcessGroup, ...]

    @property
    def size(self) -> int:
        size = 1
        for axis in self.axes:
            size *= axis.size()
        return size

    @property
    def rank(self) -> int:
        rank = 0
        for axis in self.axes:
            rank = rank * axis.size() + axis.rank()
        return rank


def missing_groups(parallel: FusedMoEParallelConfig, groups: ParallelGroups) -> str | None:
    """The group that tokens of this layer have to move over and that is not given, in words."""
    if _spanning_group(parallel, groups) is not None:
        return None
    for name, size in _dimensions(parallel):
        if size > 1 and getattr(groups, name) is None:
            return f"{name}_size {size} has no process group"
    return None


def token_ranks(parallel: FusedMoEParallelConfig, groups: ParallelGroups) -> TokenRanks:
    """The ranks over which tokens differ: dp x pcp, and x tp where sequence-parallel.

    Raises ValueError where a group is missing (``missing_groups``).
    """
    reason = missing_groups(parallel, groups)
    if reason is not None:
        raise ValueError(reason)
    spanning = _spanning_group(parallel, groups)
    if spanning is not None:
        return TokenRanks((spanning,))
    axes = [
        ParallelGroups.process_group(getattr(groups, name))
        for name, size in _dimensions(parallel)
        if size > 1
    ]
    return TokenRanks(tuple(axis for axis in axes if axis is not None))


def _dimensions(parallel: FusedMoEParallelConfig) -> list[tuple[str, int]]:
    """Names and sizes of the dimensions along which tokens differ, outermost first."""
    return [("dp", parallel.dp_size), ("pcp", parallel.pcp_size), ("tp", parallel.sp_size)]


def _spanning_group(
    parallel: FusedMoEParallelConfig, groups: ParallelGroups
) -> ProcessGroup | None:
    """The ep group, if the ranks with different tokens are exactly its ranks."""
    tokens = parallel.dp_size * parallel.pcp_size * parallel.sp_size
    if groups.ep is None or tokens != parallel.ep_size:
        return None
    return ParallelGroups.process_group(groups.ep)


def communication_device(group: ProcessGroup) -> torch.device:
    """Where small tensors have to be for ``group`` to send them: the CPU, if it can at all."""
    import torch

    backends: Any = torch.distributed.get_backend_config(group)  # "cpu:gloo,cuda:nccl", say
    if "cpu:" in str(backends):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_sizes(sizes: Sequence[int], ranks: TokenRanks, num_tokens: int) -> list[int]:
    """``sizes`` as a list, if it has one entry per rank and this rank's is ``num_tokens``."""
    found = [int(size) for size in sizes]
    if len(found) != ranks.size or min(found) < 0:
        raise ValueError(
            f"tokens_per_rank must be {ranks.size} counts of tokens, one per rank, got {found}"
        )
    if found[ranks.rank] != num_tokens:
        raise ValueError(
            f"rank {ranks.rank} has {num_tokens} tokens, tokens_per_rank says {found[ranks.rank]}: "
            f"{found}"
        )
    return found
