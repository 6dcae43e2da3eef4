"""Which scale an element of a [N, K] matrix belongs to: the geometry that all formats share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantizedTensor


class Grid(NamedTuple):
    """Groups of (rows, columns) over ``shards`` matrices stacked along N; see QuantizedTensor."""

    group: GroupShape
    shards: int = 1
    interleaved: bool = False

    @classmethod
    def of(cls, q: QuantizedTensor) -> Grid:
        return cls(q.format.group, q.shards, q.interleaved)

    def row_index(self, N: int, device: torch.device) -> torch.Tensor:
        """int64 [N]: the row of the scales that each row of the matrix uses."""
        row, per_shard = torch.arange(N, device=device), N // self.shards
        shard = row % self.shards if self.interleaved else row // per_shard
        if self.group.row == -1:
            return shard
        inside = row // self.shards if self.interleaved else row % per_shard
        block, blocks = inside // self.group.row, -(-per_shard // self.group.row)
        return block * self.shards + shard if self.interleaved else shard * blocks + block

    def split(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """[..., N, K] -> [..., scale rows, scale columns, elements of a group].

        Groups that the edge cuts are completed with ``fill``. Per tensor: [..., S, 1, elements].
        """
        N, K = values.shape[-2:]
        if self.interleaved:
            x = values.unflatten(-2, (N // self.shards, self.shards)).transpose(-3, -2)
        else:
            x = values.unflatten(-2, (self.shards, N // self.shards))
        rows = N // self.shards if self.group.row == -1 else self.group.row
        columns = K if self.group.col == -1 else self.group.col
        x = F.pad(x, (0, -K % columns, 0, -x.shape[-2] % rows), value=fill)
        x = x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # [.., S, R, rows, C, columns]
        x = x.transpose(-3, -2).flatten(-2)  # [.., S, R, C, rows * columns]
        x = x.transpose(-4, -3) if self.interleaved else x
        return x.flatten(-4, -3)

    def spread(
        self, scale: torch.Tensor, N: int, K: int, group_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One number per element, [..., N, K] or [..., N, 1], from scales as stored.

        ``group_index`` [..., S, K], as ``QuantizedTensor`` has it, replaces the columns' positions.
        """
        per_tensor = self.group.row == -1
        scale = scale.unsqueeze(-1) if per_tensor else scale
        whole = not per_tensor and self.group.row == 1 and scale.shape[-2] == N
        x = scale if whole else scale[..., self.row_index(N, scale.device), :]
        if group_index is not None:
            shard = torch.arange(N, device=scale.device)
            shard = shard % self.shards if self.interleaved else shard // (N // self.shards)
            groups = groups_of(group_index, self.group.col)
            return x.gather(-1, groups[..., shard, :].expand(*x.shape[:-1], K))
        if x.shape[-1] == 1:
            return x
        return x.repeat_interleave(self.group.col, -1)[..., :K]


def groups_of(group_index: torch.Tensor, columns: int) -> torch.Tensor:
    """int64 [..., K]: the group of the column that lies at each position; ``columns`` to a group
    where they are sorted."""
    place = torch.arange(group_index.shape[-1], device=group_index.device)
    return torch.where(group_index < 0, place // columns, group_index)


def columns_of(group_index: torch.Tensor) -> torch.Tensor:
    """int64 [..., K]: which column lies at each position; none is out of range."""
    K = group_index.shape[-1]
    place = torch.arange(K, device=group_index.device)
    return torch.where(group_index < 0, (~group_index).clamp(max=max(0, K - 1)), place)


def columns_by_group(group_index: torch.Tensor, columns: int) -> torch.Tensor:
    """int64 [..., K]: the columns in the order of their groups.

    Raises ValueError unless every group has ``columns`` members.
    """
    K = group_index.shape[-1]
    order = group_index.long().argsort(dim=-1, stable=True)
    wanted = torch.arange(K, device=group_index.device) // columns
    if not torch.equal(group_index.long().gather(-1, order), wanted.expand(group_index.shape)):
        raise ValueError(
            f"group_index does not give each of {K // columns} groups {columns} columns"
        )
    return order
