"""What is measured: a cell of the table, and the tensors that go through its layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.bench.shapes import SWIGLUOAI_LIMIT, LayerShape
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.testing.routing import routing_logits
from fusedmoe.testing.tolerances import format_name, relative_error

Scope = Literal["layer", "experts"]
"""From router logits, or with the picks given."""

SCOPES: tuple[Scope, ...] = ("layer", "experts")
_CHECKED_PAIRS = 24


@dataclass(frozen=True)
class Cell:
    """One problem: a layer, a dtype, how tokens spread over the experts, T tokens."""

    shape: LayerShape
    dtype: torch.dtype
    routing: str
    T: int
    scope: Scope = "layer"

    def __str__(self) -> str:
        what = f"{self.shape.name} {format_name(self.dtype)} {self.routing} T={self.T}"
        return what if self.scope == "layer" else f"{what} {self.scope}"


class Situation(NamedTuple):
    """Router logits fp32 [T, all experts] and what softmax, top-k and renormalising make of them:
    weights fp32 and ids int32 [T, k]."""

    logits: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


def pick(logits: torch.Tensor, k: int) -> Situation:
    """The rule of all cells: softmax, the k largest, renormalised."""
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(k, dim=-1)
    return Situation(logits, weights / weights.sum(-1, keepdim=True), ids.to(torch.int32))


@dataclass(frozen=True)
class Weights:
    """w1 [E, 2I, H] ([E, I, H] without a gate) and w2 [E, H, I] of one layer, biases [E, 2I] and
    [E, H] or None."""

    w1: torch.Tensor
    w2: torch.Tensor
    b1: torch.Tensor | None = None
    b2: torch.Tensor | None = None


def random_weights(
    shape: LayerShape, dtype: torch.dtype, device: torch.device, copies: int
) -> list[Weights]:
    """Independent sets of normal weights that keep the size of what goes through them."""

    def normal(*size: int, std: float) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0, std)

    def one() -> Weights:
        E, H, I = shape.E, shape.H, shape.I  # noqa: E741
        wide = shape.shards * I
        w1, w2 = normal(E, wide, H, std=H**-0.5), normal(E, H, I, std=I**-0.5)
        if not shape.bias:
            return Weights(w1, w2)
        return Weights(w1, w2, normal(E, wide, std=0.1), normal(E, H, std=0.1))

    return [one() for _ in range(copies)]


@dataclass(frozen=True)
class Problem:
    """A cell with its tensors: x [T, H], and one situation per run that must find cold caches."""

    cell: Cell
    x: torch.Tensor
    situations: list[Situation]

    @classmethod
    def of(cls, cell: Cell, situations: int, device: torch.device) -> Problem:
        """``situations`` of them, by the seeds 0, 1, ...; x is normal, of torch's own seed."""
        shape = cell.shape
        picked = [
            pick(
                routing_logits(cell.routing, cell.T, shape.num_experts, shape.k, seed, device),
                shape.k,
            )
            for seed in range(situations)
        ]
        return cls(cell, torch.randn(cell.T, shape.H, device=device).to(cell.dtype), picked)

    @cached_property
    def active_experts(self) -> float:
        """Experts of this rank that some token picks, averaged over the situations."""
        counts = [self._local(one).unique().numel() for one in self.situations]
        return sum(counts) / len(counts)

    @cached_property
    def pairs(self) -> float:
        """Picks of this rank's experts, averaged over the situations."""
        counts = [self._local(one).numel() for one in self.situations]
        return sum(counts) / len(counts)

    def _local(self, situation: Situation) -> torch.Tensor:
        ids = situation.topk_ids
        return ids[ids < self.cell.shape.E]

    @property
    def flops(self) -> float:
        """Of both products for ``pairs``, two per multiplication and addition."""
        return self.cell.shape.pair_flops * self.pairs

    def error(self, weights: Weights, out: torch.Tensor) -> float:
        """Relative Frobenius error of a few tokens of the first situation, against fp64."""
        tokens, exact = self.exact(weights)
        return relative_error(out[tokens], exact).frobenius

    def exact(self, weights: Weights) -> tuple[list[int], torch.Tensor]:
        """A few tokens, the first and the last among them, and what the first situation makes of
        them, in fp64."""
        cell, first = self.cell, self.situations[0]
        shape = cell.shape
        checked = min(cell.T, max(3, _CHECKED_PAIRS * shape.ranks // shape.k))
        spread = torch.linspace(0, cell.T - 1, checked, device="cpu")
        tokens = spread.round().long().unique().tolist()
        limit = SWIGLUOAI_LIMIT if shape.activation == "swigluoai" else None
        ids = first.topk_ids[tokens].long()
        return tokens, experts_reference(
            self.x[tokens].double(),
            weights.w1,
            weights.w2,
            first.topk_weights[tokens].double(),
            ids.masked_fill(ids >= shape.E, -1),
            activation=MoEActivation.from_str(shape.activation),
            activation_config=ApplyMoEActivationConfig(clamp_limit=limit),
            w1_bias=weights.b1,
            w2_bias=weights.b2,
            compute_dtype=torch.float64,
        )
