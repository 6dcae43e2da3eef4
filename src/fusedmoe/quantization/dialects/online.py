"""Experts stored as floats, rounded to a format while they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Matrix, Rule, Scheme
from fusedmoe.quantization.dialects.rules import expect, make_scheme
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.quantization.tensor import QuantFormat
from fusedmoe.words import FLOATS


@dataclass(frozen=True, kw_only=True)
class OnlineQuantization(CheckpointQuantization):
    """Rounds experts stored as floats while they are read: every layer to ``format``, but for those
    in ``not_converted``. ``activation`` is how rows are rounded, None: not at all.

    Each matrix is rounded whole, so that ranks that hold parts of it agree on its scales.
    """

    dialect: str = "online"
    format: QuantFormat
    activation: QuantKey | None = None

    @classmethod
    def of(cls, name: str, *, activation: QuantKey | None = None) -> OnlineQuantization:
        """By a format's name ("int4_g128") or short name ("int4"); ValueError for other names."""
        from fusedmoe.quantization.formats import format_named

        found = format_named(name)
        if found.act_order:
            raise ValueError(f"{name}: the order of columns comes from a checkpoint")
        if not isinstance(activation, QuantKey | None):
            raise ValueError(
                f"activation is a QuantKey of fusedmoe.quantization.keys, not {activation!r}"
            )
        return cls(format=found, activation=activation)

    def converted(self, module: str) -> Scheme:
        parts = ["weight", "weight_scale"]
        parts += ["weight_scale_2"] * self.format.second_scale
        parts += ["weight_zero_point"] * (not self.format.symmetric)
        rule = Rule(needs=("weight",), gives=tuple(parts), convert=self._quantize, size=_size)
        activation = self.activation
        return make_scheme(self.dialect, self.format, rule, activation=activation, floats=True)

    def _quantize(self, matrix: Matrix, weight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from fusedmoe.quantization.formats import quantize

        expect(matrix, "weight", weight, (matrix.N, matrix.K), *FLOATS)
        try:
            q = quantize(weight, self.format, shards=matrix.shards)
        except ValueError as error:
            raise ValueError(f"{matrix.path('weight')}: {error}") from None
        found = [q.data, q.scale]
        if self.format.second_scale:
            found.append(q.scale2)
        if not self.format.symmetric:
            found.append(q.zero_point)
        return tuple(found)


def _size(weight: tuple[int, ...]) -> tuple[int, int]:
    return weight[-2], weight[-1]
