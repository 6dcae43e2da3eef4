"""The Triton experts as the tuner sees them: two grouped GEMMs with a tile each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from fusedmoe.bench.problems import Problem, Weights
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.experts.triton import slot_blocks, triton_experts
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.grouped_gemm import grouped_gemm
from fusedmoe.tuning.choice import DeviceFacts, tiles_for
from fusedmoe.tuning.tile_records import Tile
from fusedmoe.tuning.tiles import LayerTiles, TileConfig, slots_are_alone
from fusedmoe.tuning.tuned_kernels import TRITON, TunedKernel
from fusedmoe.tuning.tuner.space import H200, Machine, TunedLayer, candidates, predicted_us
from fusedmoe.tuning.tuner.tunable import Batch, Tunable, activation_of, is_refusal


class TritonLayer(Tunable):
    """A layer on the Triton experts."""

    kernel: ClassVar[TunedKernel] = TRITON

    def space(self, facts: DeviceFacts) -> TritonSpace:
        return TritonSpace(self, facts)

    def batch(self, problem: Problem, weights: Sequence[Weights]) -> TritonBatch:
        return TritonBatch(self, problem, weights)

    def compile(self, device: torch.device, stage: str, tiles: Sequence[Tile]) -> dict[Tile, str]:
        """Launch ``tiles`` on no rows: the same types, strides and constants as later, and nothing
        to compute."""
        gemm1 = stage == "gemm1"
        a, c, weights = _nothing_to_read(self, device, gemm1)
        refused: dict[Tile, str] = {}
        for tile in tiles:
            assert isinstance(tile, TileConfig)
            try:
                for blocks in nothing_to_do(self.shape, tile, device):
                    self.run_gemm(stage, tile, weights, a, c, blocks)
            except Exception as error:
                if not is_refusal(error):
                    raise
                refused[tile] = str(error).splitlines()[0]
        return refused

    @property
    def gemms(self) -> TunedLayer:
        """As the model of its GEMMs sees it."""
        shape, form = self.shape, self.key.form
        assert form is not None
        return TunedLayer(shape.k, shape.E, shape.H, shape.I, self.dtype.itemsize, form)

    def run_gemm(
        self,
        stage: str,
        tile: TileConfig,
        weights: Weights,
        a: torch.Tensor,
        c: torch.Tensor,
        blocks: MoEAlignment | LoneSlots,
    ) -> torch.Tensor:
        """a [T, H] -> c [R, I] for "gemm1", a [R, I] -> c [R, H] for "gemm2"; returns ``c``."""
        if stage == "gemm2":
            return grouped_gemm(a, weights.w2, c, blocks, tile, top_k=1, bias=weights.b2)
        activation, config = activation_of(self.shape)
        return grouped_gemm(
            a,
            weights.w1,
            c,
            blocks,
            tile,
            top_k=self.shape.k,
            bias=weights.b1,
            activation=activation,
            activation_config=config,
        )


class TritonSpace:
    """The likely tiles of both GEMMs."""

    kernel: TunedKernel = TRITON

    def __init__(self, layer: TritonLayer, facts: DeviceFacts) -> None:
        self._layer, self._gemms = layer, layer.gemms
        self._facts = facts._replace(triton=None)  # no packaged tables
        self._machine: Machine = H200._replace(shared_memory=facts.shared_memory)

    def default(self, stage: str, T: int) -> TileConfig:
        shape, dtype = self._layer.shape, self._layer.dtype
        sizes = T, shape.k, shape.E, shape.H, shape.I
        tiles = tiles_for(*sizes, dtype, activation_of(shape)[0], self._facts)
        found: TileConfig = getattr(tiles, stage)
        return found

    def candidates(self, stage: str, T: int) -> list[Tile]:
        return list(candidates(self._gemms.gemm(stage, T), self._machine))


class TritonBatch(Batch):
    """Alignments are made once per height of blocks."""

    def __init__(self, layer: TritonLayer, problem: Problem, weights: Sequence[Weights]) -> None:
        super().__init__(problem, weights, problem.cell.T * problem.cell.shape.k)
        self._layer, self._gemms = layer, layer.gemms
        self._act_out = torch.empty_like(self.act)
        self._blocks: dict[tuple[int, int], MoEAlignment | LoneSlots] = {}

    def stage(self, stage: str, tile: Tile, index: int) -> torch.Tensor:
        assert isinstance(tile, TileConfig)
        first = stage == "gemm1"
        a, c = (self.problem.x, self._act_out) if first else (self.act, self.y)
        blocks = self._blocks_of(index, tile.block_m)
        return self._layer.run_gemm(stage, tile, self.weights[index], a, c, blocks)

    def layer(self, tiles: tuple[Tile, ...], index: int) -> torch.Tensor:
        gemm1, gemm2 = tiles
        assert isinstance(gemm1, TileConfig)
        assert isinstance(gemm2, TileConfig)
        weights, numbers = self.weights[index], activation_of(self.shape)[1]
        work = self.work(index)._replace(workspace13=self._act_out)
        triton_experts(work, numbers, weights.b1, weights.b2, tiles=LayerTiles(gemm1, gemm2))
        return self.out

    def expected_us(self, stage: str, tile: Tile) -> float:
        assert isinstance(tile, TileConfig)
        return predicted_us(self._gemms.gemm(stage, self.T), tile)

    def _blocks_of(self, index: int, block_m: int) -> MoEAlignment | LoneSlots:
        key = index, block_m
        if key not in self._blocks:
            ids = self.problem.situations[index].topk_ids
            self._blocks[key] = slot_blocks(ids, self.shape.E, None, block_m, False)
        return self._blocks[key]


def _nothing_to_read(
    layer: TritonLayer, device: torch.device, gemm1: bool
) -> tuple[torch.Tensor, torch.Tensor, Weights]:
    """a and c of one token, and weights of which all experts are the same memory."""
    shape, dtype = layer.shape, layer.dtype

    def empty(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device)

    def one_expert(rows: int, columns: int) -> torch.Tensor:
        return empty(rows, columns).expand(shape.E, rows, columns)

    def biases(rows: int) -> torch.Tensor | None:
        return empty(shape.E, rows) if shape.bias else None

    wide = shape.shards * shape.I
    weights = Weights(
        one_expert(wide, shape.H), one_expert(shape.H, shape.I), biases(wide), biases(shape.H)
    )
    x, act, y = empty(1, shape.H), empty(shape.k, shape.I), empty(shape.k, shape.H)
    return (x, act, weights) if gemm1 else (act, y, weights)


def nothing_to_do(
    shape: LayerShape, tile: TileConfig, device: torch.device
) -> Iterator[MoEAlignment | LoneSlots]:
    """Blocks without a slot, of each kind that the layer may come to with this tile."""

    def numbers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    yield MoEAlignment(numbers(*[shape.k] * tile.block_m), numbers(-1), numbers(0))
    if slots_are_alone(shape.k, shape.E) and tile.block_m < 64:
        yield LoneSlots(numbers(*[-1] * shape.k))
