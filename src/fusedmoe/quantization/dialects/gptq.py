"""``quant_method: gptq``: integers packed into int32 words along the input features.

    qweight  int32 [K * bits / 32, N]     scales  [K / g, N]
    qzeros   int32 [K / g, N * bits / 32] (packed along the output features)
    g_idx    int32 [K]: the group of each input feature

Version 1 (``checkpoint_format: gptq``) stores zero points minus one, version 2 as they are.
``desc_act`` orders the columns by importance before grouping, so that g_idx is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Leaves, Matrix, Rule, Scheme
from fusedmoe.quantization.dialects.packing import element_of, integers, unpack_words, zero_points
from fusedmoe.quantization.dialects.reading import (
    flag,
    group_size_of,
    integer,
    names_of,
    one_of,
    section,
)
from fusedmoe.quantization.dialects.rules import (
    expect,
    group_index_rule,
    groups_in,
    make_scheme,
    transposed_scale_rule,
)
from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantFormat


@dataclass(frozen=True, kw_only=True)
class GptqQuantization(CheckpointQuantization):
    """``layers`` are other settings, or None for unquantized."""

    dialect: str = "gptq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    version: int = 1
    scale_dtype: torch.dtype = torch.float32

    @classmethod
    def read(cls, config: dict[str, Any], leaves: Leaves) -> GptqQuantization:
        key = "checkpoint_format" if "checkpoint_format" in config else "format"
        stored = one_of(config, key, None, "gptq", "gptq_v2")
        if flag(config, "is_marlin_format", False):
            raise ValueError("quantization_config: weights in the layout of one kernel (marlin)")
        return cls(
            **_settings(config, {}),
            version=2 if stored == "gptq_v2" else 1,
            scale_dtype=leaves.get("scales", torch.float32),
            not_converted=names_of(config, "modules_to_not_convert"),
            layers=_overrides(section(config, "dynamic")),
        )

    def converted(self, module: str) -> Scheme | None:
        name = self.layer_names.first(module)
        if name is None:
            return self._scheme()
        settings = self.layers[name]
        if settings is None:
            return None
        mine = {
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.act_order,
        }
        return replace(self, **_settings(settings, mine))._scheme()

    def _scheme(self) -> Scheme:
        act_order = self.act_order and self.group_size > 0
        return make_scheme(
            f"gptq v{self.version}",
            QuantFormat(
                element=element_of(self.bits),
                group=GroupShape(1, self.group_size),
                scale_dtype=self.scale_dtype,
                symmetric=self.symmetric,
                act_order=act_order,
            ),
            Rule(needs=("qweight",), gives="weight", convert=self._weight, size=self._size),
            transposed_scale_rule("scales", self.group_size, self.scale_dtype),
            Rule(
                needs=("qzeros",),
                gives="" if self.symmetric else "weight_zero_point",
                convert=self._check_zeros if self.symmetric else self._zeros,
                optional=self.symmetric,
            ),
            group_index_rule("g_idx", self.group_size)
            if act_order
            else Rule(needs=("g_idx",), gives="", convert=self._check_group_index, optional=True),
        )

    def _size(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        return qweight[1], qweight[0] * 32 // self.bits

    def _weight(self, matrix: Matrix, qweight: torch.Tensor) -> torch.Tensor:
        words = -(-matrix.K * self.bits // 32)
        expect(matrix, "qweight", qweight, (words, matrix.N), torch.int32)
        return integers(unpack_words(qweight.T.contiguous(), self.bits, matrix.K), self.bits)

    def _zeros(self, matrix: Matrix, qzeros: torch.Tensor) -> torch.Tensor:
        shape = (groups_in(matrix, self.group_size), -(-matrix.N * self.bits // 32))
        expect(matrix, "qzeros", qzeros, shape, torch.int32)
        stored = unpack_words(qzeros, self.bits, matrix.N)
        if self.version == 1:
            stored = (stored + 1) & ((1 << self.bits) - 1)
        return zero_points(stored, self.bits).T

    def _check_zeros(self, matrix: Matrix, qzeros: torch.Tensor) -> None:
        """Zero points of a symmetric matrix are all half the range."""
        zeros = self._zeros(matrix, qzeros)
        half = 8 if self.bits <= 4 else 0
        if bool((zeros != half).any()):
            found = int(zeros[zeros != half][0])
            other = "gptq" if self.version == 2 else "gptq_v2"
            raise ValueError(
                f"{matrix.path('qzeros')}: expected {half} everywhere as sym is true, found "
                f"{found} (is its checkpoint_format {other}?)"
            )

    def _check_group_index(self, matrix: Matrix, g_idx: torch.Tensor) -> None:
        """Without act-order, groups follow each other."""
        expect(matrix, "g_idx", g_idx, (matrix.K,), torch.int32, torch.int64)
        size = matrix.K if self.group_size == -1 else self.group_size
        plain = torch.arange(matrix.K, device=g_idx.device) // size
        if not torch.equal(g_idx.long(), plain):
            where = int((g_idx != plain).nonzero()[0])
            raise ValueError(
                f"{matrix.path('g_idx')}: expected {int(plain[where])} at {where} as desc_act is "
                f"false and groups are {size} wide, found {int(g_idx[where])}"
            )


def _settings(config: dict[str, Any], inherited: dict[str, Any]) -> dict[str, Any]:
    """The fields that can differ from layer to layer."""
    values = inherited | config
    bits = integer(values, "bits")
    if not 2 <= bits <= 8:
        raise ValueError(f"quantization_config: bits must be 2 to 8, got {bits}")
    return {
        "bits": bits,
        "group_size": group_size_of(values),
        "symmetric": flag(values, "sym", True),
        "act_order": flag(values, "desc_act", False),
    }


def _overrides(dynamic: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """GPTQModel's ``dynamic``: "-:pattern" leaves layers alone, "+:pattern" has settings."""
    found: dict[str, dict[str, Any] | None] = {}
    for pattern, settings in dynamic.items():
        if not isinstance(settings, dict):
            raise ValueError(f"quantization_config: dynamic {pattern!r} is no object")
        name = pattern[2:] if pattern.startswith(("-:", "+:")) else pattern
        found.setdefault(f"re:{name}", None if pattern.startswith("-:") else settings)
    return found
