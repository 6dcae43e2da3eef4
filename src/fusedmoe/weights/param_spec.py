"""What one parameter of the routed experts means, as data, and the one way it is cut and filled.

A parameter is named ``<owner>_<suffix>`` (``w13_weight``). Seen from the checkpoint it consists of
shards: w1 (gate), w3 (up) and w2 (down), each one tensor per expert whose axes are the layer's
dimensions. Everything a format adds (packed weights, group scales, ...) is another ``ParamSpec``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Literal

import torch

ShardId = Literal["w1", "w2", "w3"]


class Dim(Enum):
    """A dimension that an axis runs over."""

    HIDDEN = "hidden"
    INTERMEDIATE = "intermediate"  # the one that tensor parallelism cuts
    ONE = "one"


@dataclass(frozen=True)
class Axis:
    """One axis; ``per`` units of the dimension share ``count`` stored elements.

    That is packing (2 units in one byte, 4 in three), groups and blocks (a scale for 128 units).
    ``file_per``: a checkpoint's elements stand for that many units, and are repeated when loaded.
    """

    dim: Dim
    per: int = 1
    count: int = 1
    file_per: int | None = None

    def length(self, units: int) -> int:
        return -(-units // self.per) * self.count

    def file_length(self, units: int) -> int:
        return self.length(units) if self.file_per is None else -(-units // self.file_per)

    def refined(self, loaded: torch.Tensor, axis: int, units: int) -> torch.Tensor:
        """``loaded`` with one element per stored one along ``axis``."""
        if self.file_per is None or self.file_per == self.per:
            return loaded
        index = torch.arange(0, units, self.per, device=loaded.device) // self.file_per
        return loaded.index_select(axis, index)


HIDDEN = Axis(Dim.HIDDEN)
INTERMEDIATE = Axis(Dim.INTERMEDIATE)


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """The sizes of one expert in the checkpoint and as stored (padded), and this rank's place.

    ``intermediate`` is the whole expert's, ``intermediate_stored`` what one rank holds of it:
    rank r owns units [r * stored, (r + 1) * stored), as many of them as there are.
    ``num_w13_shards`` is 1 without a gate; ``interleaved`` puts w1 and w3 in alternate rows.
    """

    hidden: int
    hidden_stored: int
    intermediate: int
    intermediate_stored: int
    num_w13_shards: int = 2
    interleaved: bool = False
    tp_size: int = 1
    tp_rank: int = 0

    def __post_init__(self) -> None:
        if self.hidden_stored < self.hidden:
            raise ValueError(f"{self.hidden_stored} stored hidden units cannot hold {self.hidden}")
        if self.intermediate_stored * self.tp_size < self.intermediate:
            raise ValueError(
                f"{self.tp_size} ranks of {self.intermediate_stored} intermediate units cannot "
                f"hold {self.intermediate}"
            )


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter. w13 joins w1 and w3 along its INTERMEDIATE axis (a new first one if none).

    ``axes`` are those of one shard of one expert, in storage order. ``fill`` goes where the
    checkpoint has nothing (0 for weights, 1 for scales). ``sharded`` False keeps the whole
    INTERMEDIATE axis on every rank. ``rank0_only`` marks an addend of the output, which must enter
    the sum over ranks once. ``dtype`` None is the layer's.
    """

    owner: Literal["w13", "w2"]
    suffix: str
    axes: tuple[Axis, ...]
    fill: float = 0.0
    sharded: bool = True
    rank0_only: bool = False
    dtype: torch.dtype | None = None

    @cached_property
    def name(self) -> str:
        return f"{self.owner}_{self.suffix}"

    def joined(self, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The shape of ``count`` shards of this ``shape`` in one tensor."""
        axis = self.intermediate_axis
        if count == 1:
            return shape
        if axis is None:
            return (count, *shape)
        return (*shape[:axis], count * shape[axis], *shape[axis + 1 :])

    @property
    def intermediate_axis(self) -> int | None:
        dims = [axis.dim for axis in self.axes]
        return dims.index(Dim.INTERMEDIATE) if Dim.INTERMEDIATE in dims else None

    def shard_ids(self, sizes: ExpertSizes) -> tuple[ShardId, ...]:
        if self.owner == "w2":
            return ("w2",)
        return ("w1", "w3") if sizes.num_w13_shards == 2 else ("w1",)

    def checkpoint_shape(self, sizes: ExpertSizes) -> tuple[int, ...]:
        """The shape of one shard of one expert, whole."""
        units = _units(sizes)
        return tuple(axis.file_length(units[axis.dim]) for axis in self.axes)

    def stored_shard_shape(self, sizes: ExpertSizes) -> tuple[int, ...]:
        """The shape of one shard of one expert on this rank, padding included."""
        ranks = 1 if self.sharded else sizes.tp_size
        intermediate = sizes.intermediate_stored * ranks
        units = {Dim.HIDDEN: sizes.hidden_stored, Dim.INTERMEDIATE: intermediate, Dim.ONE: 1}
        return tuple(axis.length(units[axis.dim]) for axis in self.axes)

    def expert_shape(self, sizes: ExpertSizes) -> tuple[int, ...]:
        """The shape of one expert's parameter here; w13's first axis may count one shard."""
        shape, count = self.stored_shard_shape(sizes), len(self.shard_ids(sizes))
        if self.owner == "w13" and self.intermediate_axis is None:
            return (count, *shape)
        return self.joined(shape, count)

    def shard_view(
        self, expert_data: torch.Tensor, shard_id: ShardId, sizes: ExpertSizes
    ) -> torch.Tensor:
        """The part of one expert's parameter that ``shard_id`` fills."""
        ids = self.shard_ids(sizes)
        if shard_id not in ids:
            raise ValueError(f"{self.name} has shards {', '.join(ids)}, not {shard_id}")
        if self.owner == "w2":
            return expert_data
        position, axis = ids.index(shard_id), self.intermediate_axis
        if axis is None:
            return expert_data[position]
        if sizes.interleaved:
            return split_interleaved(expert_data, axis, len(ids))[position]
        length = expert_data.shape[axis] // len(ids)
        return expert_data.narrow(axis, position * length, length)


WEIGHTS = (
    ParamSpec(owner="w13", suffix="weight", axes=(INTERMEDIATE, HIDDEN)),
    ParamSpec(owner="w2", suffix="weight", axes=(HIDDEN, INTERMEDIATE)),
)
"""Of floats; quantized ones depend on the format."""
BIASES = (
    ParamSpec(owner="w13", suffix="bias", axes=(INTERMEDIATE,)),
    ParamSpec(owner="w2", suffix="bias", axes=(HIDDEN,), rank0_only=True),
)


def _units(sizes: ExpertSizes) -> dict[Dim, int]:
    """The size of the whole expert in the checkpoint."""
    return {Dim.HIDDEN: sizes.hidden, Dim.INTERMEDIATE: sizes.intermediate, Dim.ONE: 1}


def split_interleaved(x: torch.Tensor, axis: int, count: int) -> tuple[torch.Tensor, ...]:
    """``count`` views of ``x``: entries 0, count, 2 * count, ... of ``axis``, then 1, ... ."""
    return x.unflatten(axis, (-1, count)).unbind(axis + 1)


def cut_for_rank(loaded: torch.Tensor, spec: ParamSpec, sizes: ExpertSizes) -> torch.Tensor:
    """This rank's part of one whole shard of one expert: a view; short or empty on last ranks."""
    axis = spec.intermediate_axis
    if axis is None or not spec.sharded or sizes.tp_size == 1:
        return loaded
    width = spec.axes[axis].length(sizes.intermediate_stored)
    if width * spec.axes[axis].per != sizes.intermediate_stored * spec.axes[axis].count:
        raise ValueError(
            f"{spec.name} keeps {spec.axes[axis].per} intermediate units in one element, which do "
            f"not divide the {sizes.intermediate_stored} of one of {sizes.tp_size} ranks"
        )
    start = min(sizes.tp_rank * width, loaded.shape[axis])
    return loaded.narrow(axis, start, min(width, loaded.shape[axis] - start))


def load_shard(
    expert_data: torch.Tensor,
    loaded: torch.Tensor,
    spec: ParamSpec,
    shard_id: ShardId,
    sizes: ExpertSizes,
    name: str,
) -> None:
    """Write one whole checkpoint shard of one expert into that expert's parameter.

    What the checkpoint does not cover is filled with ``spec.fill``. Raises ValueError naming the
    tensor ``name`` where its shape or dtype is not the expected one.
    """
    expected = spec.checkpoint_shape(sizes)
    if tuple(loaded.shape) != expected and (expected or loaded.numel() != 1):
        raise ValueError(
            f"{name}: expected shape {expected} for {shard_id} of {spec.name}, "
            f"found {tuple(loaded.shape)}"
        )
    check_dtype(name, loaded.dtype, spec.name, expert_data.dtype)
    if loaded.is_meta:
        raise ValueError(f"{name}: is on 'meta', where it has no values")
    target = spec.shard_view(expert_data, shard_id, sizes)
    loaded = loaded.reshape(expected)
    for position, axis in enumerate(spec.axes):
        loaded = axis.refined(loaded, position, _units(sizes)[axis.dim])
    piece = cut_for_rank(loaded, spec, sizes)
    if spec.rank0_only and sizes.tp_rank != 0:
        piece = piece.narrow(0, 0, 0)
    if piece.shape != target.shape:
        target.fill_(spec.fill)
        for position, length in enumerate(piece.shape):
            target = target.narrow(position, 0, length)
    target.copy_(piece)


def check_dtype(name: str, found: torch.dtype, param_name: str, wanted: torch.dtype) -> None:
    """Raise ValueError unless a tensor ``name`` may be written into a parameter of dtype
    ``wanted``: floats of 16 bits or more may be rounded into one another."""
    wide = all(dtype.is_floating_point and dtype.itemsize >= 2 for dtype in (found, wanted))
    if found != wanted and not wide:
        raise ValueError(
            f"{name}: found {found}, which is not converted silently to the {wanted} of "
            f"{param_name}"
        )
