"""TunedTable: measured times of a few tiles over batch sizes, and the choice they imply.

A table holds curves, one per stage and tile: the time at a few token counts. Between them a curve
is a straight line over the logarithms of both, and the choice at T is the lowest curve there. So
the time of what is chosen never jumps between two batch sizes: where the choice changes, both
tiles take the same time. Everything here is a pure function of sizes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

from fusedmoe.activation import MoEActivation
from fusedmoe.tuning.tiles import TileConfig
from fusedmoe.tuning.tuned_kernels import TRITON

SIXTEEN_BIT = "16bit"


@dataclass(frozen=True, kw_only=True)
class LayerKey:
    """One rank's layer: E local experts, K picks, H hidden, I intermediate.

    ``weights`` names their format ("bf16", "fp8_w8a8", ...), ``form`` how the first GEMM reads
    them: "halves" (gate, then up), "interleaved" or "plain". In a table's key None is any, and
    the weights may be ``SIXTEEN_BIT``.
    """

    E: int
    I: int  # noqa: E741
    weights: str
    K: int | None = None
    H: int | None = None
    form: str | None = None

    def mismatch(self, layer: LayerKey) -> str | None:
        """What ``layer`` has otherwise than this key asks for, in words; None where it fits."""
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(layer, name)
            either = mine == SIXTEEN_BIT and theirs in ("bf16", "fp16")
            if mine is not None and mine != theirs and not either:
                return f"it is for {name} {mine}, the layer has {theirs}"
        return None


def gemm1_form(activation: MoEActivation) -> str:
    """``LayerKey.form`` of a layer with this activation."""
    if not activation.is_gated:
        return "plain"
    return "interleaved" if activation is MoEActivation.SWIGLUOAI else "halves"


class Curve(NamedTuple):
    """What ``tile`` costs in ``stage`` at each of the table's token counts."""

    stage: str
    tile: TileConfig
    cost: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class TunedTable:
    """The curves of one layer on one device, over ascending ``tokens``.

    ``device`` is a ``device_key``, ``kernel`` the name of ``TRITON``; ``triton`` the release
    measured with (None: not known). Costs are microseconds per call, or, where ``measured`` is
    False, how many times the batch is larger or smaller than the one a tile was made for. ``text``
    is the table as a file, and two tables are equal where their texts are.
    """

    device: str
    kernel: str
    kernel_version: int
    triton: str | None
    layer: LayerKey
    tokens: tuple[int, ...]
    curves: tuple[Curve, ...]
    measured: bool
    text: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TunedTable) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def tiles(self, T: int) -> tuple[TileConfig, ...]:
        """The tiles for T tokens, one per stage of the kernel."""
        return _choose(self, T)

    def cost(self, T: int) -> float:
        """What ``tiles(T)`` cost together, by the curves."""
        return _envelope(self, T)[0]

    def unfit(self, layer: LayerKey) -> str | None:
        """Why this table says nothing about ``layer``; None where it does."""
        if self.kernel_version != TRITON.version:
            return (
                f"it was measured with version {self.kernel_version} of the kernel "
                f"{self.kernel!r}, this is version {TRITON.version}"
            )
        return self.layer.mismatch(layer)


def interpolated(tokens: tuple[int, ...], cost: tuple[float, ...], T: int) -> float:
    """A curve's value at T; beyond its ends it stays at their values."""
    right = bisect_right(tokens, T)
    if right == 0:
        return cost[0]
    if right == len(tokens):
        return cost[-1]
    low, high = tokens[right - 1], tokens[right]
    share = math.log(T / low) / math.log(high / low)
    return math.exp((1.0 - share) * math.log(cost[right - 1]) + share * math.log(cost[right]))


@lru_cache(maxsize=4096)
def _choose(table: TunedTable, T: int) -> tuple[TileConfig, ...]:
    return _envelope(table, T)[1]


def _envelope(table: TunedTable, T: int) -> tuple[float, tuple[TileConfig, ...]]:
    """The cheapest tiles that go together, and their cost; the first in the table among equals."""
    best: dict[int, dict[str, tuple[float, TileConfig]]] = {}
    for stage, tile, cost in table.curves:
        value = interpolated(table.tokens, cost, T)
        stages = best.setdefault(tile.block_m, {})  # one alignment serves both
        if stage not in stages or value < stages[stage][0]:
            stages[stage] = value, tile
    found: tuple[float, tuple[TileConfig, ...]] | None = None
    for stages in best.values():
        if len(stages) == len(TRITON.stages):
            total = sum(value for value, _ in stages.values())
            if found is None or total < found[0]:
                found = total, tuple(stages[stage][1] for stage in TRITON.stages)
    assert found is not None  # table_file refuses tables without a complete set
    return found
