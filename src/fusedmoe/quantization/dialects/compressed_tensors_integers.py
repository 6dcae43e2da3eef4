"""The integers of compressed-tensors: signed, stored with half the range added, zeros likewise.

packed        weight_packed int32 [N, ceil(K * bits / 32)], weight_scale [N, K / g] or [N, 1],
              weight_shape [2], which may be left out, weight_g_idx [K],
              weight_zero_point int32 [ceil(N * bits / 32), K / g] (packed along N)
one byte each weight int8 [N, K], weight_scale, weight_zero_point int8
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import Leaves, Matrix, Rule, Scheme
from fusedmoe.quantization.dialects.packing import element_of, integers, unpack_words, zero_points
from fusedmoe.quantization.dialects.reading import flag, integer, one_of
from fusedmoe.quantization.dialects.rules import (
    expect,
    group_index_rule,
    make_scheme,
    repeated_scale_rule,
    scale_rule,
    shape_scale,
)
from fusedmoe.quantization.formats.int4 import pack_nibbles
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    PER_ROW,
    PER_TENSOR,
    GroupShape,
    QuantKey,
)
from fusedmoe.quantization.tensor import QuantFormat

DIALECT = "compressed-tensors"
_STRATEGIES = ("token", "tensor", "channel", "group", "block", "tensor_group")
_SHAPE = "weight_shape"
IGNORED = (_SHAPE, "weight_observer", "input_zero_point", "output_scale")


def integer_scheme(
    weights: dict[str, Any],
    inputs: dict[str, Any],
    bits: int,
    group: GroupShape,
    packing: Any,
    leaves: Leaves,
) -> Scheme:
    """The scheme of ``bits``-bit integers whose scales are shared by ``group``."""
    if not 2 <= bits <= 8:
        raise ValueError(f"quantization_config: integers of {bits} bits are not known")
    if group.row > 1 or (group == PER_TENSOR and bits < 8):
        raise ValueError(
            f"quantization_config: unknown scheme: {bits}-bit integers by "
            f"{weights.get('strategy')!r}"
        )
    symmetric, whole = flag(weights, "symmetric", True), group == PER_TENSOR
    if whole and not symmetric:
        raise ValueError("quantization_config: one zero point for a whole matrix is not known")
    group = PER_ROW if whole else group
    packed = "weight_packed" in leaves or (packing == "pack-quantized" and "weight" not in leaves)
    ordered = one_of(weights, "actorder", None, False, True, "weight", "static", "group", "dynamic")
    needs_index = ordered is True or ordered in ("group", "dynamic")
    act_order = packed and group.col > 0 and (needs_index or "weight_g_idx" in leaves)
    scale_dtype = leaves.get("weight_scale", torch.float32)
    rules = [
        Rule(
            needs=("weight_packed" if packed else "weight",),
            gives="weight",
            convert=partial(_packed if packed else _one_byte_each, bits),
            size=partial(_size, bits if packed else None),
        ),
        repeated_scale_rule("weight_scale", scale_dtype)
        if whole
        else scale_rule("weight_scale", group, scale_dtype),
    ]
    if packed:
        rules.append(Rule(needs=(_SHAPE,), gives="", convert=_check_shape, optional=True))
    if symmetric:
        check = partial(_check_zeros, bits)
        rules.append(Rule(needs=("weight_zero_point",), gives="", convert=check, optional=True))
    else:
        convert = partial(_packed_zeros if packed else _plain_zeros, bits, group)
        rules.append(Rule(needs=("weight_zero_point",), gives="weight_zero_point", convert=convert))
    if act_order:
        rules.append(group_index_rule("weight_g_idx", group.col))
    return make_scheme(
        DIALECT,
        QuantFormat(
            element=element_of(bits),
            group=group,
            scale_dtype=scale_dtype,
            symmetric=symmetric,
            act_order=act_order,
        ),
        *rules,
        activation=_activation_of_integers(inputs),
        ignored=(*IGNORED, "weight_g_idx"),
    )


def _activation_of_integers(inputs: dict[str, Any]) -> QuantKey | None:
    if not inputs:
        return None
    kind, bits = one_of(inputs, "type", "int", "float"), integer(inputs, "num_bits", 8)
    dynamic = dynamic_of(inputs)
    if not flag(inputs, "symmetric", True):
        raise ValueError("quantization_config: zero points of activations are not known")
    strategy = one_of(inputs, "strategy", "token", "tensor", "group")
    if bits != 8 or not dynamic or strategy != "token":
        raise ValueError(
            f"quantization_config: unknown scheme: {'dynamic' if dynamic else 'static'} {bits}-bit "
            f"{kind} activations per {strategy} with integer weights"
        )
    return INT8_DYNAMIC_TOKEN if kind == "int" else FP8_DYNAMIC_TOKEN


def dynamic_of(inputs: dict[str, Any]) -> bool:
    """Whether scales of activations are computed; "local": those of groups, beside one that is
    stored."""
    if one_of(inputs, "strategy", None, *_STRATEGIES) == "tensor_group":
        return bool(one_of(inputs, "dynamic", None, False, True, "local"))
    return flag(inputs, "dynamic", False)


def _size(packed_bits: int | None, stored: tuple[int, ...]) -> tuple[int, int]:
    """Numbers of 3, 5, 6 and 7 bits lie across two words."""
    return stored[0], stored[1] if packed_bits is None else stored[1] * 32 // packed_bits


def _packed(bits: int, matrix: Matrix, packed: torch.Tensor) -> torch.Tensor:
    words = -(-matrix.K * bits // 32)
    expect(matrix, "weight_packed", packed, (matrix.N, words), torch.int32)
    return integers(unpack_words(packed, bits, matrix.K), bits)


def _check_shape(matrix: Matrix, shape: torch.Tensor) -> None:
    """What the words were before they were packed; the layer knows it, too."""
    expect(matrix, _SHAPE, shape, (2,), torch.int64, torch.int32)
    if shape.tolist() != [matrix.N, matrix.K]:
        raise ValueError(
            f"{matrix.path(_SHAPE)}: expected {[matrix.N, matrix.K]}, found {shape.tolist()}"
        )


def _one_byte_each(bits: int, matrix: Matrix, weight: torch.Tensor) -> torch.Tensor:
    """The data of integers that are stored in a byte each; those of four bits are packed here."""
    expect(matrix, "weight", weight, (matrix.N, matrix.K), torch.int8)
    if bits > 4:
        return weight
    low, high = (int(bound) for bound in weight.aminmax()) if weight.numel() else (0, 0)
    if low < -8 or high > 7:
        raise ValueError(
            f"{matrix.path('weight')}: expected numbers of {bits} bits, found "
            f"{low if low < -8 else high}"
        )
    return pack_nibbles((weight.to(torch.int16) + 8).to(torch.uint8))


def _packed_zeros(
    bits: int, group: GroupShape, matrix: Matrix, zeros: torch.Tensor
) -> torch.Tensor:
    columns = 1 if group.col == -1 else matrix.K // group.col
    shape = (-(-matrix.N * bits // 32), columns)
    expect(matrix, "weight_zero_point", zeros, shape, torch.int32)
    return zero_points(unpack_words(zeros.T.contiguous(), bits, matrix.N).T, bits)


def _check_zeros(bits: int, matrix: Matrix, zeros: torch.Tensor) -> None:
    """Older files have zero points of symmetric weights, too: one byte each, or packed."""
    if zeros.dtype == torch.int32:
        zeros = unpack_words(zeros.T.contiguous(), bits, matrix.N) - (1 << (bits - 1))
    if bool((zeros != 0).any()):
        raise ValueError(
            f"{matrix.path('weight_zero_point')}: expected 0 everywhere as symmetric is true, "
            f"found {int(zeros[zeros != 0][0])}"
        )


def _plain_zeros(bits: int, group: GroupShape, matrix: Matrix, zeros: torch.Tensor) -> torch.Tensor:
    expect(matrix, "weight_zero_point", zeros, None, torch.int8)
    zeros = shape_scale(matrix, "weight_zero_point", zeros, group)
    return zeros if bits > 4 else (zeros + 8).to(torch.uint8)
