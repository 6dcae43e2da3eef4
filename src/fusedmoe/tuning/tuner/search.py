"""The search: a few tiles survive every batch size, and become the curves of a table.

For each batch size the candidates of each stage are measured with few samples, the better third
again with more, and once more; the best that go together win. Then all winners are measured at all
batch sizes and at those between, side by side, and what no batch size would miss is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Protocol

from fusedmoe.tuning.tile_records import Tile, goes_with
from fusedmoe.tuning.tuned_kernels import TunedKernel
from fusedmoe.tuning.tuned_table import Curve, cheapest, choice_at, counts_to_cover

DEFAULT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
RUNG_SAMPLES = (3, 9)
FINAL_SAMPLES = 15
KEPT = 3  # one of so many survives a rung
# Slower than the best by more is not worth many samples.
HOPELESS = 1.6
NEGLIGIBLE = 0.005

Progress = Callable[[int, int, str], None]
"""How many steps are done, of how many, and what comes next."""


class Space(Protocol):
    """The tiles that one layer may have."""

    @property
    def kernel(self) -> TunedKernel: ...

    def default(self, stage: str, T: int) -> Tile:
        """What the layer takes without a table."""

    def candidates(self, stage: str, T: int) -> list[Tile]:
        """What is worth measuring for T tokens."""


class Timer(Protocol):
    """Measures tiles of one layer. What cannot run takes ``math.inf``."""

    def prepare(self, stage: str, tiles: Sequence[Tile]) -> None:
        """Called once before the search with all tiles that it may ask for."""

    def time(self, stage: str, T: int, tiles: Sequence[Tile], samples: int) -> list[float]:
        """Median microseconds of each tile, all measured in turns."""


def search(
    space: Space, tokens: Sequence[int], timer: Timer, progress: Progress | None = None
) -> tuple[Curve, ...]:
    """The curves of a layer over ``between(tokens)``, ``tokens`` ascending.

    The default tiles are measured with the candidates. Raises ValueError where nothing runs.
    """
    stages, knots = space.kernel.stages, between(tokens)
    steps = _Steps(progress, len(stages) * (len(tokens) + len(knots) + 1))
    defaults = {
        stage: list(dict.fromkeys(space.default(stage, T) for T in knots)) for stage in stages
    }
    pools = {
        (stage, T): list(dict.fromkeys([space.default(stage, T), *space.candidates(stage, T)]))
        for T in tokens
        for stage in stages
    }
    for stage in stages:
        together = dict.fromkeys(tile for T in tokens for tile in pools[stage, T])
        together |= dict.fromkeys(defaults[stage])
        steps.next(f"compiling {len(together)} tiles of {stage}")
        timer.prepare(stage, list(together))
    winners: dict[str, dict[Tile, None]] = {stage: {} for stage in stages}
    for T in tokens:
        best: list[tuple[str, Tile, float]] = []
        for stage in stages:
            steps.next(f"{stage} of {T} tokens, {len(pools[stage, T])} tiles")
            found = _best_of_each_kind(timer, stage, T, pools[stage, T])
            best += [(stage, tile, us) for us, tile in found]
        choice = cheapest(stages, best)
        if choice is None:
            raise ValueError(f"no tiles run {T} tokens of this layer")
        for stage, tile in zip(stages, choice.tiles, strict=True):
            winners[stage][tile] = None
    curves = []
    for stage in stages:
        tiles = list(dict.fromkeys([*winners[stage], *defaults[stage]]))
        columns = []
        for T in knots:
            steps.next(f"{stage} of {T} tokens, {len(tiles)} of the best")
            columns.append(_side_by_side(timer, stage, T, tiles))
        for tile, times in zip(tiles, zip(*columns, strict=True), strict=True):
            curves.append(Curve(stage, tile, tuple(round(us, 2) for us in times)))
    steps.next("done")
    return without_the_negligible(stages, knots, curves)


def between(tokens: Sequence[int]) -> tuple[int, ...]:
    """``tokens`` and, between each two, the one at equal ratio to both."""
    middles = (round(math.sqrt(low * high)) for low, high in pairwise(tokens))
    return tuple(sorted({*tokens, *middles}))


def _side_by_side(timer: Timer, stage: str, T: int, tiles: list[Tile]) -> list[float]:
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


def _best_of_each_kind(
    timer: Timer, stage: str, T: int, tiles: list[Tile]
) -> list[tuple[float, Tile]]:
    """Successive halving; the fastest of those that go with the same tiles of other stages, and
    its time."""
    for samples in RUNG_SAMPLES:
        times = timer.time(stage, T, tiles, samples)
        ranked = sorted((us, place) for place, us in enumerate(times) if math.isfinite(us))
        best: dict[Hashable, tuple[float, Tile]] = {}
        for us, place in ranked:
            best.setdefault(goes_with(tiles[place]), (us, tiles[place]))
        kept = [tiles[place] for _, place in ranked[: max(2, math.ceil(len(ranked) / KEPT))]]
        # The other stages may leave no choice of the kind.
        kept += [tile for _, tile in best.values()]
        tiles = list(dict.fromkeys(kept))
    return list(best.values())


def without_the_negligible(
    stages: tuple[str, ...], tokens: tuple[int, ...], curves: Sequence[Curve]
) -> tuple[Curve, ...]:
    """Fewer curves whose choice is nowhere slower by more than ``NEGLIGIBLE``.

    Raises ValueError where some count has no tiles that go together to begin with.
    """
    kept = [curve for curve in curves if any(math.isfinite(us) for us in curve.cost)]
    places = counts_to_cover(tokens)

    def costs(some: list[Curve]) -> list[float]:
        choices = [choice_at(stages, tokens, some, T) for T in places]
        return [math.inf if choice is None else choice.cost for choice in choices]

    whole = costs(kept)
    if not all(math.isfinite(us) for us in whole):
        raise ValueError("no tiles that go together run all token counts of this layer")
    for curve in sorted(kept, key=lambda curve: sum(curve.cost), reverse=True):
        rest = [one for one in kept if one is not curve]
        if all(
            us <= least * (1 + NEGLIGIBLE) for us, least in zip(costs(rest), whole, strict=True)
        ):
            kept = rest
    return tuple(kept)
