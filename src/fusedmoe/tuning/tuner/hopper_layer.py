"""The Hopper experts as the tuner sees them: one choice of kernel and tiles for the whole layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from fusedmoe.bench.problems import Cell, Problem, Weights, random_weights
from fusedmoe.bench.report import limit_us
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.experts.hopper import hopper_experts, scratch_rows
from fusedmoe.tuning.choice import DeviceFacts
from fusedmoe.tuning.hopper_space import hopper_candidates, serves
from fusedmoe.tuning.hopper_tiles import DirectTiles, HopperTiles, PrefillTiles, hopper_tiles
from fusedmoe.tuning.tile_records import Tile
from fusedmoe.tuning.tiles import TileConfig
from fusedmoe.tuning.tuned_kernels import HOPPER, TunedKernel
from fusedmoe.tuning.tuner.tunable import Batch, Tunable, activation_of, is_refusal

# Rates of an H200, in GB/s and TFLOP/s; and what a layer takes beside, in microseconds.
_READ_GBS, _TFLOPS, _BESIDE = 4400.0, 650.0, 8.0
_COMPILED_TOKENS = 16


class HopperLayer(Tunable):
    """A layer on the Hopper experts."""

    kernel: ClassVar[TunedKernel] = HOPPER

    def space(self, facts: DeviceFacts) -> HopperSpace:
        return HopperSpace(self.shape)

    def batch(self, problem: Problem, weights: Sequence[Weights]) -> HopperBatch:
        return HopperBatch(problem, weights)

    def compile(self, device: torch.device, stage: str, tiles: Sequence[Tile]) -> dict[Tile, str]:
        """Run each once, on a layer of few experts: what is compiled does not depend on them."""
        few = replace(self.shape, E=self.shape.k)
        weights = random_weights(few, self.dtype, device, 1)

        def batch(T: int) -> HopperBatch:
            cell = Cell(few, self.dtype, "uniform", T, "experts")
            return HopperBatch(Problem.of(cell, 1, device), weights)

        one, some = batch(1), batch(_COMPILED_TOKENS)
        refused: dict[Tile, str] = {}
        for tile in tiles:
            try:
                (one if isinstance(tile, DirectTiles) else some).layer((tile,), 0)
            except Exception as error:
                if not is_refusal(error):
                    raise
                refused[tile] = str(error).splitlines()[0]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return refused


class HopperSpace:
    """The kernels for so many tokens, each with its likely tiles."""

    kernel: TunedKernel = HOPPER

    def __init__(self, shape: LayerShape) -> None:
        self._shape = shape

    def default(self, stage: str, T: int) -> HopperTiles:
        shape = self._shape
        return hopper_tiles(T, shape.k, shape.E, shape.E, shape.H, shape.I)

    def candidates(self, stage: str, T: int) -> list[Tile]:
        shape = self._shape
        return list(hopper_candidates(T, shape.k, shape.E, shape.H, shape.I))


class HopperBatch(Batch):
    """The layer has one stage, so that it and the layer are the same."""

    def __init__(self, problem: Problem, weights: Sequence[Weights]) -> None:
        shape, T = problem.cell.shape, problem.cell.T
        super().__init__(problem, weights, scratch_rows(PrefillTiles(), T * shape.k, shape.E))

    def runs(self, tile: Tile) -> bool:
        assert not isinstance(tile, TileConfig)
        return serves(tile, self.T, self.shape.k, self.shape.E)

    def stage(self, stage: str, tile: Tile, index: int) -> torch.Tensor:
        return self.layer((tile,), index)

    def layer(self, tiles: tuple[Tile, ...], index: int) -> torch.Tensor:
        (tile,) = tiles
        assert not isinstance(tile, TileConfig)
        weights, numbers = self.weights[index], activation_of(self.shape)[1]
        hopper_experts(self.work(index), numbers, weights.b1, weights.b2, tiles=tile)
        return self.out

    def expected_us(self, stage: str, tile: Tile) -> float:
        return limit_us(self.problem, _READ_GBS, _TFLOPS) + _BESIDE
