"""The search: a few tiles survive every batch size, and become the curves of a table.

For each batch size the candidates of each GEMM are measured with few samples, the better third
again with more, and once more; the best that go together win. Then all winners are measured at all
batch sizes and at those between, side by side, and what no batch size would miss is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

from fusedmoe.tuning.tiles import TileConfig
from fusedmoe.tuning.tuned_kernels import TRITON
from fusedmoe.tuning.tuned_table import Curve
from fusedmoe.tuning.tuner.space import H200, Machine, TunedLayer, candidates

STAGES = TRITON.stages
DEFAULT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
RUNG_SAMPLES = (3, 9)
FINAL_SAMPLES = 15
KEPT = 3  # one of so many survives a rung
# Slower than the best by more is not worth many samples.
HOPELESS = 1.6
NEGLIGIBLE = 0.005

Progress = Callable[[int, int, str], None]
"""How many steps are done, of how many, and what comes next."""


class Timer(Protocol):
    """Measures tiles of one layer. What cannot run takes ``math.inf``."""

    def prepare(self, stage: str, tiles: Sequence[TileConfig]) -> None:
        """Called once before the search with all tiles that it may ask for."""

    def time(self, stage: str, T: int, tiles: Sequence[TileConfig], samples: int) -> list[float]:
        """Median microseconds of each tile, all measured in turns."""


def search(
    layer: TunedLayer,
    tokens: Sequence[int],
    timer: Timer,
    defaults: Callable[[str, int], TileConfig],
    machine: Machine = H200,
    progress: Progress | None = None,
) -> tuple[Curve, ...]:
    """The curves of ``layer`` over ``between(tokens)``, ``tokens`` ascending.

    ``defaults(stage, T)`` are measured with the candidates. Raises ValueError where nothing runs.
    """
    pools = {
        (stage, T): list(
            dict.fromkeys([defaults(stage, T), *candidates(layer.gemm(stage, T), machine)])
        )
        for T in tokens
        for stage in STAGES
    }
    knots = between(tokens)
    total = len(STAGES) * (len(tokens) + len(knots) + 1)
    steps = _Steps(progress, total)
    for stage in STAGES:
        together = dict.fromkeys(tile for T in tokens for tile in pools[stage, T])
        together |= dict.fromkeys(defaults(stage, T) for T in knots)
        steps.next(f"compiling {len(together)} tiles of {stage}")
        timer.prepare(stage, list(together))
    winners: dict[str, dict[TileConfig, None]] = {stage: {} for stage in STAGES}
    for T in tokens:
        best: dict[str, dict[int, tuple[float, TileConfig]]] = {}
        for stage in STAGES:
            steps.next(f"{stage} of {T} tokens, {len(pools[stage, T])} tiles")
            best[stage] = _best_by_height(timer, stage, T, pools[stage, T])
        for stage, tile in zip(STAGES, _pair(best, T), strict=True):
            winners[stage][tile] = None
    curves = []
    for stage in STAGES:
        tiles = list(dict.fromkeys([*winners[stage], *(defaults(stage, T) for T in knots)]))
        columns = []
        for T in knots:
            steps.next(f"{stage} of {T} tokens, {len(tiles)} of the best")
            columns.append(_side_by_side(timer, stage, T, tiles))
        for tile, times in zip(tiles, zip(*columns, strict=True), strict=True):
            if all(math.isfinite(us) for us in times):
                curves.append(Curve(stage, tile, tuple(round(us, 2) for us in times)))
    steps.next("done")
    return without_the_negligible(curves)


def between(tokens: Sequence[int]) -> tuple[int, ...]:
    """``tokens`` and, between each two, the one at equal ratio to both."""
    middles = (round(math.sqrt(low * high)) for low, high in pairwise(tokens))
    return tuple(sorted({*tokens, *middles}))


def _side_by_side(timer: Timer, stage: str, T: int, tiles: list[TileConfig]) -> list[float]:
    """Times of all tiles, precise for those that are near the best.

    Those get their turns by themselves: after a tile that keeps the GPU waiting, the next one finds
    it cooler and looks faster than it is.
    """
    times = timer.time(stage, T, tiles, RUNG_SAMPLES[0])
    near = [place for place, us in enumerate(times) if us <= HOPELESS * min(times)]
    again = timer.time(stage, T, [tiles[place] for place in near], FINAL_SAMPLES)
    for place, us in zip(near, again, strict=True):
        times[place] = us
    return times


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self, what: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, what)
        self._done += 1


def _best_by_height(
    timer: Timer, stage: str, T: int, tiles: list[TileConfig]
) -> dict[int, tuple[float, TileConfig]]:
    """Successive halving; the fastest tile of each block_m with its time."""
    for samples in RUNG_SAMPLES:
        times = timer.time(stage, T, tiles, samples)
        ranked = sorted((us, place) for place, us in enumerate(times) if math.isfinite(us))
        best: dict[int, tuple[float, TileConfig]] = {}
        for us, place in ranked:
            best.setdefault(tiles[place].block_m, (us, tiles[place]))
        kept = [tiles[place] for _, place in ranked[: max(2, math.ceil(len(ranked) / KEPT))]]
        # The other GEMM may leave no choice of the height.
        kept += [tile for _, tile in best.values()]
        tiles = list(dict.fromkeys(kept))
    return best


def _pair(best: dict[str, dict[int, tuple[float, TileConfig]]], T: int) -> list[TileConfig]:
    """The fastest tiles of equal height."""
    heights = set.intersection(*(set(found) for found in best.values()))
    if not heights:
        raise ValueError(f"no pair of tiles runs {T} tokens of this layer")
    height = min(
        sorted(heights), key=lambda block_m: sum(found[block_m][0] for found in best.values())
    )
    return [best[stage][height][1] for stage in STAGES]


def without_the_negligible(curves: Sequence[Curve]) -> tuple[Curve, ...]:
    """Fewer curves whose choice is nowhere slower by more than ``NEGLIGIBLE``.

    Raises ValueError where no two tiles of equal height are left to begin with.
    """
    kept = list(curves)
    count = len(kept[0].cost) if kept else 0
    whole = [_lowest(kept, place) for place in range(count)]
    if not whole or not all(math.isfinite(us) for us in whole):
        raise ValueError("no pair of tiles runs all token counts of this layer")
    for curve in sorted(curves, key=lambda curve: sum(curve.cost), reverse=True):
        rest = [one for one in kept if one is not curve]
        if all(_lowest(rest, p) <= whole[p] * (1 + NEGLIGIBLE) for p in range(count)):
            kept = rest
    return tuple(kept)


def _lowest(curves: Sequence[Curve], place: int) -> float:
    """The time of the best pair at one of the token counts."""
    best: dict[tuple[int, str], float] = {}
    for stage, tile, cost in curves:
        key = tile.block_m, stage
        best[key] = min(best.get(key, math.inf), cost[place])
    heights = {block_m for block_m, _ in best}
    return min(
        (sum(best.get((height, stage), math.inf) for stage in STAGES) for height in heights),
        default=math.inf,
    )
