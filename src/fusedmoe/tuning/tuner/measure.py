"""Tiles measured on a GPU: CUDA graphs that go through several sets of weights and routings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from fusedmoe.bench.problems import Cell, Problem, random_weights
from fusedmoe.bench.replays import Replays, record, time_in_turns
from fusedmoe.bench.report import Percentiles
from fusedmoe.bench.timing import Call
from fusedmoe.tuning.tile_records import Tile
from fusedmoe.tuning.tuner.precompile import Compilers
from fusedmoe.tuning.tuner.tunable import Batch, Tunable, is_refusal

ROUTING = "uniform"
_MAX_COPIES = 3
_MEMORY_SHARE = 0.5


class GpuTimer:
    """Measures a layer on ``device`` with random weights, tokens and routing.

    Each call reads other weights, by another routing, than the one before it, so that no cache
    still holds them. ``compilers`` compile ahead in other processes, where given.
    """

    def __init__(
        self,
        tunable: Tunable,
        device: torch.device,
        compilers: Compilers | None = None,
    ) -> None:
        self.tunable, self.device = tunable, device
        shape, dtype = tunable.shape, tunable.dtype
        free, _ = torch.cuda.mem_get_info(device)
        copies = int(free * _MEMORY_SHARE) // (shape.weight_elements * dtype.itemsize)
        self.weights = random_weights(shape, dtype, device, max(1, min(_MAX_COPIES, copies)))
        self._compilers = compilers
        self._refused: set[tuple[str, Tile]] = set()
        self._batch: Batch | None = None

    def prepare(self, stage: str, tiles: Sequence[Tile]) -> None:
        """Compile ``tiles``; those that cannot be are not tried again."""
        if self._compilers is not None:
            refused = self._compilers.compile(self.tunable, self.device, stage, tiles)
            self._refused |= {(stage, tile) for tile in refused}

    def time(self, stage: str, T: int, tiles: Sequence[Tile], samples: int) -> list[float]:
        """Median microseconds of each tile; infinite where it does not run, or is not for so
        many tokens."""
        batch = self._batch_of(T)
        running: dict[str, Replays] = {}
        for place, tile in enumerate(tiles):
            if (stage, tile) in self._refused or not batch.runs(tile):
                continue
            calls = [partial(batch.stage, stage, tile, index) for index in range(len(self.weights))]
            try:
                running[str(place)] = record(calls, batch.expected_us(stage, tile), samples)
            except Exception as error:
                if not is_refusal(error):
                    raise
                self._refused.add((stage, tile))
        times = time_in_turns(running)
        return [
            Percentiles.of(times[str(place)]).us if str(place) in times else math.inf
            for place in range(len(tiles))
        ]

    def problem(self, T: int) -> Problem:
        """What goes through the layer at T tokens."""
        return self._batch_of(T).problem

    def time_layer(
        self, T: int, choices: Sequence[tuple[Tile, ...]], samples: int
    ) -> list[Percentiles]:
        """Times of all the experts do from given picks, alignment and sum included, with a tile
        for each stage."""
        batch = self._batch_of(T)
        stages = self.tunable.kernel.stages
        expected = sum(map(batch.expected_us, stages, choices[0]))
        running: dict[str, Replays] = {}
        for place, tiles in enumerate(choices):
            calls: list[Call] = [
                partial(batch.layer, tiles, index) for index in range(len(self.weights))
            ]
            running[str(place)] = record(calls, expected, samples)
        return [Percentiles.of(times) for times in time_in_turns(running).values()]

    def _batch_of(self, T: int) -> Batch:
        if self._batch is None or self._batch.T != T:
            self._batch = None  # its memory, before the next one takes some
            cell = Cell(self.tunable.shape, self.tunable.dtype, ROUTING, T, "experts")
            problem = Problem.of(cell, len(self.weights), self.device)
            self._batch = self.tunable.batch(problem, self.weights)
        return self._batch
