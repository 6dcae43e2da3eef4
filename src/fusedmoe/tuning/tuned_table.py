"""TunedTable: measured times of a few tiles over batch sizes, and the choice they imply.

A table holds curves, one per stage and tile: the time at a few token counts. Between them a curve
is a straight line over the logarithms of both, and the choice at T is the lowest curve there. So
the time of what is chosen does not jump between two batch sizes: where the choice changes, both
tiles take the same time, unless one of them has no times beyond. Everything here is a pure function
of sizes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from fusedmoe.activation import MoEActivation
from fusedmoe.tuning.tile_records import Tile, goes_with
from fusedmoe.tuning.tuned_kernels import KERNELS, TunedKernel

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
    """What ``tile`` costs in ``stage`` at each of the table's token counts; infinite where it is
    not for so many tokens."""

    stage: str
    tile: Tile
    cost: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class TunedTable:
    """The curves of one layer on one device, over ascending ``tokens``.

    ``device`` is a ``device_key``, ``kernel`` one of ``KERNELS``; ``triton`` the release measured
    with (None: not known). Costs are microseconds per call, or, where ``measured`` is
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

    @property
    def tuned_kernel(self) -> TunedKernel:
        return KERNELS[self.kernel]

    def tiles(self, T: int) -> tuple[Tile, ...]:
        """The tiles for T tokens, one per stage of the kernel."""
        return _choose(self, T)

    def cost(self, T: int) -> float:
        """What ``tiles(T)`` cost together, by the curves."""
        return _envelope(self, T).cost

    def unfit(self, layer: LayerKey) -> str | None:
        """Why this table says nothing about ``layer``; None where it does."""
        version = self.tuned_kernel.version
        if self.kernel_version != version:
            return (
                f"it was measured with version {self.kernel_version} of the kernel "
                f"{self.kernel!r}, this is version {version}"
            )
        return self.layer.mismatch(layer)


def interpolated(tokens: tuple[int, ...], cost: tuple[float, ...], T: int) -> float:
    """A curve's value at T; beyond its ends it stays at their values."""
    right = bisect_right(tokens, T)
    if right == 0:
        return cost[0]
    if right == len(tokens) or tokens[right - 1] == T:
        return cost[right - 1]
    low, high = tokens[right - 1], tokens[right]
    share = math.log(T / low) / math.log(high / low)
    return math.exp((1.0 - share) * math.log(cost[right - 1]) + share * math.log(cost[right]))


class Choice(NamedTuple):
    """What goes together, one tile per stage, and what it costs."""

    cost: float
    tiles: tuple[Tile, ...]


def cheapest(stages: tuple[str, ...], costs: Iterable[tuple[str, Tile, float]]) -> Choice | None:
    """The cheapest tiles that go together, the first among equals; None where none are finite."""
    best: dict[Hashable, dict[str, tuple[float, Tile]]] = {}
    for stage, tile, cost in costs:
        found = best.setdefault(goes_with(tile), {})
        if math.isfinite(cost) and (stage not in found or cost < found[stage][0]):
            found[stage] = cost, tile
    choices = [
        Choice(sum(found[stage][0] for stage in stages), tuple(found[stage][1] for stage in stages))
        for found in best.values()
        if len(found) == len(stages)
    ]
    return min(choices, key=lambda choice: choice.cost, default=None)


def choice_at(
    stages: tuple[str, ...], tokens: tuple[int, ...], curves: Iterable[Curve], T: int
) -> Choice | None:
    """The cheapest tiles for T tokens by these curves."""
    costs = ((stage, tile, interpolated(tokens, cost, T)) for stage, tile, cost in curves)
    return cheapest(stages, costs)


def counts_to_cover(tokens: tuple[int, ...]) -> list[int]:
    """All of ``tokens``, and one between each two that are not neighbours: whoever has tiles for
    these has some for every count."""
    # A curve that is finite at both ends of a stretch is so everywhere on it.
    return sorted({*tokens, *(low + 1 for low, high in pairwise(tokens) if high > low + 1)})


def gap(stages: tuple[str, ...], tokens: tuple[int, ...], curves: Sequence[Curve]) -> int | None:
    """The first count for which no tiles go together."""
    found = (T for T in counts_to_cover(tokens) if choice_at(stages, tokens, curves, T) is None)
    return next(found, None)


@lru_cache(maxsize=4096)
def _choose(table: TunedTable, T: int) -> tuple[Tile, ...]:
    return _envelope(table, T).tiles


def _envelope(table: TunedTable, T: int) -> Choice:
    found = choice_at(table.tuned_kernel.stages, table.tokens, table.curves, T)
    assert found is not None  # table_file refuses tables with a gap
    return found
