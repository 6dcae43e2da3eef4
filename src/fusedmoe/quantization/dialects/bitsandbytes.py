"""``quant_method: bitsandbytes``: NF4 with (perhaps quantized) block maxima, and LLM.int8.

nf4   weight uint8 [N * K / 2, 1]: the flattened matrix, the first number in the high nibble
      weight.absmax: fp32, one per block, or uint8 into weight.nested_quant_map [256], times
          weight.nested_absmax (one per 256), plus nested_offset
      (or these bytes as bnb_4bit_quant_storage, with fewer rows)
      weight.quant_map [16], weight.quant_state.bitsandbytes__nf4: JSON (blocksize, shape, ...)
int8  weight int8 [N, K], SCB [N]: what 127 stands for; weight_format: 0, row by row

LLM.int8 rounds rows but for the columns where one lies past llm_int8_threshold (6 by default),
which meet the weights as floats: here all of them do, unless the threshold is 0, for none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Leaves, Matrix, Rule, Scheme
from fusedmoe.quantization.dialects.packing import swap_nibbles
from fusedmoe.quantization.dialects.reading import flag, names_of, one_of
from fusedmoe.quantization.dialects.rules import (
    check_finite,
    expect,
    make_scheme,
    plain_weight_rule,
)
from fusedmoe.quantization.formats.int8 import INT8_CHANNEL
from fusedmoe.quantization.formats.lookup import NF4_TABLE, nf4_group
from fusedmoe.quantization.keys import INT8_DYNAMIC_TOKEN

_STATE = "weight.quant_state.bitsandbytes__nf4"
_STORAGE = (torch.int8, torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 64
_NESTED_BLOCK = 256
_MAX_STATE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class BitsAndBytesQuantization(CheckpointQuantization):
    """``four_bits``: NF4; else int8. ``nested``: the maxima are quantized too. ``rounded``: so are
    the rows that meet int8."""

    dialect: str = "bitsandbytes"
    four_bits: bool
    nested: bool = False
    rounded: bool = False

    @classmethod
    def read(cls, config: dict[str, Any], leaves: Leaves) -> BitsAndBytesQuantization:
        four_bits = flag(config, "load_in_4bit", False) or flag(config, "_load_in_4bit", False)
        if four_bits:
            one_of(config, "bnb_4bit_quant_type", "nf4")
        elif not (flag(config, "load_in_8bit", False) or flag(config, "_load_in_8bit", False)):
            raise ValueError("quantization_config: neither load_in_4bit nor load_in_8bit is true")
        nested = flag(config, "bnb_4bit_use_double_quant", False)
        if leaves:
            nested = "weight.nested_absmax" in leaves
        return cls(
            four_bits=four_bits,
            nested=nested,
            rounded=config.get("llm_int8_threshold") == 0,
            not_converted=names_of(config, "llm_int8_skip_modules") or ("lm_head",),
        )

    def converted(self, module: str) -> Scheme:
        if self.four_bits:
            return self._nf4()
        return _INT8 if self.rounded else replace(_INT8, activation=None)

    def _nf4(self) -> Scheme:
        maxima = ["weight.absmax"]
        if self.nested:
            maxima += ["weight.nested_absmax", "weight.nested_quant_map"]
        return make_scheme(
            f"{self.dialect} nf4",
            nf4_group(_BLOCK),
            Rule(needs=("weight", "weight.quant_map"), gives="weight", convert=_nf4_weight),
            Rule(
                needs=(_STATE, *maxima),
                gives="weight_scale",
                convert=_nested_scale if self.nested else _plain_scale,
                size=_size,
                size_in_values=True,
            ),
        )


def _nf4_weight(matrix: Matrix, weight: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``bnb_4bit_quant_storage`` may call the bytes something else."""
    if weight.dtype in _STORAGE and weight.is_contiguous():
        weight = weight.view(torch.uint8).reshape(-1, 1)
    expect(matrix, "weight", weight, (matrix.N * matrix.K // 2, 1), torch.uint8)
    expect(matrix, "weight.quant_map", table, (16,), torch.float32)
    if not torch.allclose(table, table.new_tensor(NF4_TABLE), rtol=0, atol=1e-6):
        raise ValueError(
            f"{matrix.path('weight.quant_map')}: expected the NF4 table, found another"
        )
    return swap_nibbles(weight).reshape(matrix.N, matrix.K // 2)


def _json_of(path: str, raw: torch.Tensor) -> dict[str, Any]:
    """The object that bytes spell. Raises ValueError naming ``path``."""
    try:
        if raw.dtype != torch.uint8 or raw.numel() > _MAX_STATE_BYTES:
            raise ValueError(f"{raw.numel()} numbers of {raw.dtype}")
        state = json.loads(bytes(raw.flatten().tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON in uint8, found {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected an object, found {state!r}")
    return state


def _size(raw: torch.Tensor, *maxima: torch.Tensor) -> tuple[int, int]:
    shape: Any = _json_of(_STATE, raw).get("shape")
    good = isinstance(shape, list) and len(shape) == 2
    if not good or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{_STATE}: expected two sizes, found {shape!r}")
    return shape[0], shape[1]


def _state_of(matrix: Matrix, raw: torch.Tensor) -> dict[str, Any]:
    """The JSON that says how the maxima are stored, checked against ``matrix``."""
    path = matrix.path(_STATE)
    state = _json_of(path, raw)
    for key, wanted in (("blocksize", _BLOCK), ("shape", [matrix.N, matrix.K])):
        if state.get(key) != wanted:
            raise ValueError(f"{path}: expected {key} {wanted}, found {state.get(key)!r}")
    if matrix.K % _BLOCK:
        raise ValueError(
            f"{matrix.path('weight')}: blocks of {_BLOCK} of the flattened matrix cut its rows of "
            f"{matrix.K}"
        )
    return state


def _plain_scale(matrix: Matrix, raw: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    _state_of(matrix, raw)
    expect(matrix, "weight.absmax", absmax, (matrix.N * matrix.K // _BLOCK,), torch.float32)
    return check_finite(matrix, "weight.absmax", absmax).reshape(matrix.N, -1)


def _nested_scale(
    matrix: Matrix,
    raw: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_map: torch.Tensor,
) -> torch.Tensor:
    state, count = _state_of(matrix, raw), matrix.N * matrix.K // _BLOCK
    expect(matrix, "weight.absmax", absmax, (count,), torch.uint8)
    blocks = -(-count // _NESTED_BLOCK)
    expect(matrix, "weight.nested_absmax", nested_absmax, (blocks,), torch.float32)
    expect(matrix, "weight.nested_quant_map", nested_map, (256,), torch.float32)
    check_finite(matrix, "weight.nested_absmax", nested_absmax)
    check_finite(matrix, "weight.nested_quant_map", nested_map)
    offset = state.get("nested_offset")
    if state.get("nested_blocksize") != _NESTED_BLOCK or not isinstance(offset, int | float):
        raise ValueError(
            f"{matrix.path(_STATE)}: expected nested_blocksize {_NESTED_BLOCK} and nested_offset, "
            f"found {state.get('nested_blocksize')!r} and {offset!r}"
        )
    spread = nested_absmax.repeat_interleave(_NESTED_BLOCK)[:count]
    scale = nested_map[absmax.long()] * spread + offset
    return check_finite(matrix, "weight.absmax", scale).reshape(matrix.N, -1)


def _int8_scale(matrix: Matrix, largest: torch.Tensor) -> torch.Tensor:
    expect(matrix, "SCB", largest, (matrix.N,), torch.float32)
    return (check_finite(matrix, "SCB", largest) / 127).reshape(matrix.N, 1)


def _check_layout(matrix: Matrix, layout: torch.Tensor) -> None:
    """Older versions could save the order that one GPU's kernels read, as 1, 2 or 3."""
    expect(matrix, "weight_format", layout, None, torch.uint8)
    if layout.numel() != 1 or layout.any():
        raise ValueError(
            f"{matrix.path('weight_format')}: expected 0 (row by row), found {layout.tolist()}"
        )


_INT8 = make_scheme(
    "bitsandbytes int8",
    INT8_CHANNEL,
    plain_weight_rule("weight", torch.int8),
    Rule(needs=("SCB",), gives="weight_scale", convert=_int8_scale),
    Rule(needs=("weight_format",), gives="", convert=_check_layout, optional=True),
    activation=INT8_DYNAMIC_TOKEN,
)
