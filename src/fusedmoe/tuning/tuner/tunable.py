"""What the tuner must know of a kernel: its tiles, how they run, how they are compiled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.bench.problems import Problem, Weights
from fusedmoe.bench.shapes import SWIGLUOAI_LIMIT, LayerShape
from fusedmoe.modular_kernel import ExpertsWork
from fusedmoe.tuning.choice import DeviceFacts, PlainLayer
from fusedmoe.tuning.tile_records import Tile
from fusedmoe.tuning.tuned_kernels import TunedKernel
from fusedmoe.tuning.tuned_table import LayerKey
from fusedmoe.tuning.tuner.search import Space


class Batch(ABC):
    """A layer's problem for T tokens, with scratch ``act`` [rows, I] and ``y`` [rows, H].

    Each set of weights has the routing of the same index.
    """

    def __init__(self, problem: Problem, weights: Sequence[Weights], rows: int) -> None:
        self.problem, self.shape, self.weights = problem, problem.cell.shape, weights
        x = problem.x
        self.act = torch.randn(rows, self.shape.I, device=x.device).to(x.dtype)
        self.y, self.out = x.new_empty(rows, self.shape.H), torch.empty_like(x)

    @property
    def T(self) -> int:
        return self.problem.cell.T

    def work(self, index: int) -> ExpertsWork:
        """The layer with one of the sets of weights."""
        weights, picks = self.weights[index], self.problem.situations[index]
        return ExpertsWork(
            self.out,
            self.problem.x,
            weights.w1,
            weights.w2,
            picks.topk_weights,
            picks.topk_ids,
            activation_of(self.shape)[0],
            self.shape.E,
            workspace13=self.act,
            workspace2=self.y,
        )

    def runs(self, tile: Tile) -> bool:
        """Whether it is worth measuring a tile here."""
        return True

    @abstractmethod
    def stage(self, stage: str, tile: Tile, index: int) -> torch.Tensor:
        """Run one stage; returns what it wrote."""

    @abstractmethod
    def layer(self, tiles: tuple[Tile, ...], index: int) -> torch.Tensor:
        """Run all the experts do from given picks."""

    @abstractmethod
    def expected_us(self, stage: str, tile: Tile) -> float:
        """About how long a stage takes."""


@dataclass(frozen=True)
class Tunable(ABC):
    """A layer on one of the kernels that have tables."""

    kernel: ClassVar[TunedKernel]
    shape: LayerShape
    dtype: torch.dtype

    @property
    def key(self) -> LayerKey:
        """What a table of this layer says it is for."""
        shape = self.shape
        sizes = shape.k, shape.E, shape.H, shape.I
        return PlainLayer(*sizes, self.dtype, activation_of(shape)[0]).key

    @abstractmethod
    def space(self, facts: DeviceFacts) -> Space:
        """The tiles it may have."""

    @abstractmethod
    def batch(self, problem: Problem, weights: Sequence[Weights]) -> Batch:
        """A problem of this layer, ready to run."""

    @abstractmethod
    def compile(self, device: torch.device, stage: str, tiles: Sequence[Tile]) -> dict[Tile, str]:
        """The tiles that cannot be compiled or loaded, each with the reason."""


def activation_of(shape: LayerShape) -> tuple[MoEActivation, ApplyMoEActivationConfig]:
    """The activation of a shape, with the numbers that its family has."""
    limit = SWIGLUOAI_LIMIT if shape.activation == "swigluoai" else None
    return MoEActivation.from_str(shape.activation), ApplyMoEActivationConfig(clamp_limit=limit)


def is_refusal(error: Exception) -> bool:
    """Whether Triton says that it cannot run this tile here, and nothing worse happened."""
    return type(error).__module__.partition(".")[0] == "triton"
