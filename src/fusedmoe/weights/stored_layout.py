"""How tensors of a checkpoint hold experts, and the pieces they fall into: one shard of one each.

E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fusedmoe.weights.param_spec import Dim, ExpertSizes, ParamSpec, ShardId, split_interleaved
from fusedmoe.weights.params_mapping import ExpertTensorName


class StoredLayout(NamedTuple):
    """``transposed``: 3-D tensors are [E, H, I]-like; ``interleaved``: joined gate and up alternate
    row by row instead of following each other."""

    sizes: ExpertSizes
    num_experts: int
    transposed: bool
    interleaved: bool

    def pieces(
        self, parsed: ExpertTensorName, spec: ParamSpec, name: str, tensor: torch.Tensor
    ) -> Iterator[tuple[int, ShardId, torch.Tensor]]:
        """(logical expert, shard, whole shard) of one checkpoint tensor, as views."""
        count = self.num_experts
        one = spec.joined(spec.checkpoint_shape(self.sizes), len(parsed.shards))
        if parsed.expert is not None:
            _check_shape(name, tensor, one)
            experts = {parsed.expert: tensor}
        else:
            # Stacked rows [E * I, H] end in the hidden dimension, whichever projection they are.
            stacked = len(one) == tensor.dim() == 2
            ends_in_hidden = bool(spec.axes) and spec.axes[-1].dim is Dim.HIDDEN
            flip = len(one) == 2 and (not ends_in_hidden if stacked else self.transposed)
            of_one = one[::-1] if flip else one
            _check_shape(
                name, tensor, (count * of_one[0], of_one[1]) if stacked else (count, *of_one)
            )
            rows = tensor.unflatten(0, (count, -1)) if stacked else tensor
            experts = dict(enumerate((rows.mT if flip else rows).unbind(0)))
        for expert, data in experts.items():
            shards = self.split(parsed.shards, spec, data, name)
            for shard, piece in zip(parsed.shards, shards, strict=True):
                yield expert, shard, piece

    def split(
        self, shards: tuple[ShardId, ...], spec: ParamSpec, data: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, ...]:
        """The shards of one expert that are in one tensor, as views.

        Raises ValueError where the tensor does not hold them, or holds what they share.
        """
        count, axis = len(shards), spec.intermediate_axis
        if count == 1:
            return (data,)
        if data.dim() <= (axis or 0) or data.shape[axis or 0] % count:
            raise ValueError(
                f"{name}: {tuple(data.shape)} does not hold {' and '.join(shards)} of {spec.name}"
            )
        if axis is None:
            return data.unbind(0)
        if self.interleaved:
            rows = spec.axes[axis].file_per or spec.axes[axis].per
            if rows > 1:
                raise ValueError(
                    f"{name}: {spec.name} has one number for {rows} rows, where rows of "
                    f"{' and '.join(shards)} alternate"
                )
            return split_interleaved(data, axis, count)
        return data.chunk(count, axis)


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    found = tuple(tensor.shape)
    if found == expected or (not expected and tensor.numel() == 1):
        return
    flipped = expected[:-2] + expected[-2:][::-1]
    hint = "; it is stored the other way round" if found == flipped else ""
    raise ValueError(f"{name}: expected shape {expected}, found {found}{hint}")
