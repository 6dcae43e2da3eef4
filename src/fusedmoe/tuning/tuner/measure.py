"""Tiles measured on a GPU: CUDA graphs that go through several sets of weights and routings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from fusedmoe.bench.problems import Cell, Problem, random_weights
from fusedmoe.bench.replays import Replays, record, time_in_turns
from fusedmoe.bench.report import Percentiles
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.bench.timing import Call
from fusedmoe.experts.triton import slot_blocks, triton_experts
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.modular_kernel import ExpertsWork
from fusedmoe.tuning.tiles import LayerTiles, TileConfig
from fusedmoe.tuning.tuner.gemms import activation_of, key_of, run_gemm
from fusedmoe.tuning.tuner.precompile import Compilers, is_refusal
from fusedmoe.tuning.tuner.space import TunedLayer, predicted_us

ROUTING = "uniform"
_MAX_COPIES = 3
_MEMORY_SHARE = 0.5


def tuned_layer(shape: LayerShape, dtype: torch.dtype) -> TunedLayer:
    """The layer as the search sees it."""
    form = key_of(shape, dtype).form
    assert form is not None
    return TunedLayer(shape.k, shape.E, shape.H, shape.I, dtype.itemsize, form)


class GpuTimer:
    """Measures one layer on ``device`` with random weights, tokens and routing.

    Each call reads other weights, by another routing, than the one before it, so that no cache
    still holds them. ``compilers`` compile ahead in other processes, where given.
    """

    def __init__(
        self,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
        compilers: Compilers | None = None,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        free, _ = torch.cuda.mem_get_info(device)
        copies = int(free * _MEMORY_SHARE) // (shape.weight_elements * dtype.itemsize)
        self.weights = random_weights(shape, dtype, device, max(1, min(_MAX_COPIES, copies)))
        self._layer = tuned_layer(shape, dtype)
        self._compilers = compilers
        self._refused: set[tuple[str, TileConfig]] = set()
        self._batch = _Batch(self, 1)

    def prepare(self, stage: str, tiles: Sequence[TileConfig]) -> None:
        """Compile ``tiles``; those that cannot be are not tried again."""
        if self._compilers is not None:
            refused = self._compilers.compile(self.shape, self.dtype, self.device, stage, tiles)
            self._refused |= {(stage, tile) for tile in refused}

    def time(self, stage: str, T: int, tiles: Sequence[TileConfig], samples: int) -> list[float]:
        """Median microseconds of each tile; infinite where it does not run on this device."""
        batch = self._batch_of(T)
        running: dict[str, Replays] = {}
        for place, tile in enumerate(tiles):
            if (stage, tile) in self._refused:
                continue
            calls = [partial(batch.gemm, stage, tile, index) for index in range(len(self.weights))]
            try:
                running[str(place)] = record(calls, self._expected_us(stage, T, tile), samples)
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

    def time_layer(self, T: int, choices: Sequence[LayerTiles], samples: int) -> list[Percentiles]:
        """Times of all the experts do from given picks, alignment and sum included."""
        batch = self._batch_of(T)
        expected = sum(
            self._expected_us(stage, T, tile) for stage, tile in choices[0]._asdict().items()
        )
        running: dict[str, Replays] = {}
        for place, tiles in enumerate(choices):
            calls: list[Call] = [
                partial(batch.layer, tiles, index) for index in range(len(self.weights))
            ]
            running[str(place)] = record(calls, expected, samples)
        return [Percentiles.of(times) for times in time_in_turns(running).values()]

    def _batch_of(self, T: int) -> _Batch:
        if self._batch.T != T:
            self._batch = _Batch(self, T)
        return self._batch

    def _expected_us(self, stage: str, T: int, tile: TileConfig) -> float:
        return predicted_us(self._layer.gemm(stage, T), tile)


class _Batch:
    """Inputs and outputs for T tokens; alignments are made once per height of blocks."""

    def __init__(self, timer: GpuTimer, T: int) -> None:
        self.T, self._shape, self._weights = T, timer.shape, timer.weights
        cell = Cell(timer.shape, timer.dtype, ROUTING, T, "experts")
        self.problem = Problem.of(cell, len(timer.weights), timer.device)
        R, like = T * timer.shape.k, self.problem.x
        self._act = torch.randn(R, timer.shape.I, device=like.device).to(like.dtype)
        self._act_out, self._rows = torch.empty_like(self._act), like.new_empty(R, timer.shape.H)
        self._out = torch.empty_like(like)
        self._blocks: dict[tuple[int, int], MoEAlignment | LoneSlots] = {}

    def gemm(self, stage: str, tile: TileConfig, index: int) -> torch.Tensor:
        first = stage == "gemm1"
        a, c = (self.problem.x, self._act_out) if first else (self._act, self._rows)
        blocks = self._blocks_of(index, tile.block_m)
        return run_gemm(self._shape, stage, tile, self._weights[index], a, c, blocks)

    def layer(self, tiles: LayerTiles, index: int) -> torch.Tensor:
        weights, picks = self._weights[index], self.problem.situations[index]
        activation, numbers = activation_of(self._shape)
        work = ExpertsWork(
            self._out,
            self.problem.x,
            weights.w1,
            weights.w2,
            picks.topk_weights,
            picks.topk_ids,
            activation,
            self._shape.E,
            workspace13=self._act_out,
            workspace2=self._rows,
        )
        triton_experts(work, numbers, weights.b1, weights.b2, tiles=tiles)
        return self._out

    def _blocks_of(self, index: int, block_m: int) -> MoEAlignment | LoneSlots:
        key = index, block_m
        if key not in self._blocks:
            ids = self.problem.situations[index].topk_ids
            self._blocks[key] = slot_blocks(ids, self._shape.E, None, block_m, False)
        return self._blocks[key]
