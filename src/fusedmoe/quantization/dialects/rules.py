"""Rules that dialects share: weights stored plainly, scales of each kind, and their checks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import Matrix, Rule, Scheme
from fusedmoe.quantization.keys import PER_TENSOR, GroupShape, QuantKey
from fusedmoe.quantization.tensor import QuantFormat
from fusedmoe.words import FLOATS


def make_scheme(
    dialect: str,
    format: QuantFormat,
    *rules: Rule,
    activation: QuantKey | None = None,
    input_scale: str = "input_scale",
    ignored: tuple[str, ...] = (),
    floats: bool = False,
) -> Scheme:
    """A scheme of ``rules``, and of what every one has: biases, and stored scales of activations
    (``input_scale``) where those are static."""
    static = activation is not None and activation.static
    return Scheme(
        dialect=dialect,
        format=format,
        rules=(*rules, BIAS, *[scalar_rule(input_scale, "input_scale")] * static),
        activation=activation,
        ignored=ignored,
        floats=floats,
    )


def expect(
    matrix: Matrix,
    suffix: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...] | None,
    *dtypes: torch.dtype,
) -> None:
    """ValueError naming the tensor unless it has this shape and one of these dtypes."""
    if dtypes and tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{matrix.path(suffix)}: expected {wanted}, found {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(
            f"{matrix.path(suffix)}: expected shape {shape} for a {matrix.N} x {matrix.K} matrix, "
            f"found {tuple(tensor.shape)}"
        )


def check_finite(matrix: Matrix, suffix: str, scale: torch.Tensor) -> torch.Tensor:
    """``scale``, unless it holds inf or NaN (ValueError naming the first). Signs are free."""
    values = scale.float()
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        where, found = bad.nonzero()[0].tolist(), float(values[bad][0])
        raise ValueError(f"{matrix.path(suffix)}: expected finite scales, found {found} at {where}")
    return scale


def _rule_of_scales(suffix: str, convert: Callable[..., torch.Tensor], **about: Any) -> Rule:
    """``convert(matrix, scale, suffix=..., **about)`` makes the scales of the tensor ``suffix``."""
    made = partial(convert, suffix=suffix, **about)
    return Rule(needs=(suffix,), gives="weight_scale", convert=made)


def scale_rule(suffix: str, group: GroupShape, dtype: torch.dtype) -> Rule:
    """Floating-point scales stored row by row as the canonical ones are, in any float dtype."""
    return _rule_of_scales(suffix, _scale, group=group, dtype=dtype)


def _scale(
    matrix: Matrix, scale: torch.Tensor, *, suffix: str, group: GroupShape, dtype: torch.dtype
) -> torch.Tensor:
    expect(matrix, suffix, scale, None, *FLOATS, torch.float8_e8m0fnu)
    shaped = shape_scale(matrix, suffix, scale, group)
    return check_finite(matrix, suffix, _widened(shaped, dtype))


def _widened(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``scale`` in ``dtype``, unless its own holds more: nothing is rounded here."""
    own = scale.dtype if scale.dtype in FLOATS else dtype
    return scale.to(torch.promote_types(own, dtype))


def transposed_scale_rule(suffix: str, columns: int, dtype: torch.dtype) -> Rule:
    """Scales [K / columns, N] in any float dtype; ``columns`` -1 is the whole row."""
    return _rule_of_scales(suffix, _transposed_scale, columns=columns, dtype=dtype)


def _transposed_scale(
    matrix: Matrix, scale: torch.Tensor, *, suffix: str, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    expect(matrix, suffix, scale, (groups_in(matrix, columns), matrix.N), *FLOATS)
    return check_finite(matrix, suffix, _widened(scale, dtype)).T


def group_index_rule(suffix: str, columns: int) -> Rule:
    """The group of each column, which has ``columns`` of them: int [K]."""
    return Rule(
        needs=(suffix,),
        gives="weight_group_index",
        convert=partial(_group_index, suffix=suffix, columns=columns),
    )


def _group_index(matrix: Matrix, index: torch.Tensor, *, suffix: str, columns: int) -> torch.Tensor:
    expect(matrix, suffix, index, (matrix.K,), torch.int32, torch.int64)
    low, high, groups = int(index.min()), int(index.max()), groups_in(matrix, columns)
    if low < 0 or high >= groups:
        raise ValueError(
            f"{matrix.path(suffix)}: expected groups in [0, {groups}), found "
            f"{low if low < 0 else high}"
        )
    return index.to(torch.int32).expand(matrix.shards, -1)


def groups_in(matrix: Matrix, columns: int) -> int:
    """How many groups of ``columns`` a row has; -1 is all of it."""
    return 1 if columns == -1 else -(-matrix.K // columns)


def repeated_scale_rule(suffix: str, dtype: torch.dtype) -> Rule:
    """One number for the matrix (or each shard), given to all of its rows."""
    return _rule_of_scales(suffix, _repeated_scale, dtype=dtype)


def _repeated_scale(
    matrix: Matrix, scale: torch.Tensor, *, suffix: str, dtype: torch.dtype
) -> torch.Tensor:
    expect(matrix, suffix, scale, None, *FLOATS)
    whole = shape_scale(matrix, suffix, scale, PER_TENSOR)
    numbers = check_finite(matrix, suffix, _widened(whole, dtype))
    return numbers.reshape(-1, 1).repeat_interleave(matrix.N // matrix.shards, 0)


def shape_scale(
    matrix: Matrix, suffix: str, scale: torch.Tensor, group: GroupShape
) -> torch.Tensor:
    """``scale`` as [rows, columns] of the canonical layout ([] or [S] per tensor), checked."""
    if group == PER_TENSOR:
        if scale.numel() not in (1, matrix.shards):
            expect(matrix, suffix, scale, ())
        flat = scale.reshape(-1)
        return flat[0] if matrix.shards == 1 else flat.expand(matrix.shards)
    row, col = group
    each = -(-(matrix.N // matrix.shards) // row)
    if row == 1 and col > 0 and matrix.K % col:
        raise ValueError(
            f"{matrix.path(suffix)}: groups of {col} columns do not divide the {matrix.K} of the "
            "matrix"
        )
    shape = (matrix.shards * each, 1 if col == -1 else -(-matrix.K // col))
    if tuple(scale.shape) != shape and scale.numel() == shape[0] * shape[1]:
        squeezed = tuple(size for size in scale.shape if size != 1)
        if squeezed == tuple(size for size in shape if size != 1):
            scale = scale.reshape(shape)
    expect(matrix, suffix, scale, shape)
    return scale


def e8m0_rule(suffix: str, columns: int) -> Rule:
    """Exponents in uint8 or float8_e8m0fnu, one for ``columns`` columns of a row."""
    return _rule_of_scales(suffix, _e8m0, columns=columns)


def _e8m0(matrix: Matrix, scale: torch.Tensor, *, suffix: str, columns: int) -> torch.Tensor:
    expect(matrix, suffix, scale, None, torch.uint8, torch.float8_e8m0fnu)
    raw = shape_scale(matrix, suffix, scale, GroupShape(1, columns)).view(torch.uint8)
    return check_exponents(matrix, suffix, raw)


def check_exponents(matrix: Matrix, suffix: str, raw: torch.Tensor) -> torch.Tensor:
    """``raw`` uint8, unless it holds the NaN of e8m0 (ValueError naming the first)."""
    if bool((raw == 255).any()):
        where = (raw == 255).nonzero()[0].tolist()
        raise ValueError(
            f"{matrix.path(suffix)}: expected finite scales, found nan (e8m0 255) at {where}"
        )
    return raw


def e4m3_scale_rule(suffix: str, columns: int) -> Rule:
    """Scales in float8_e4m3fn, one for ``columns`` columns of a row."""
    return _rule_of_scales(suffix, _e4m3_scale, columns=columns)


def _e4m3_scale(matrix: Matrix, scale: torch.Tensor, *, suffix: str, columns: int) -> torch.Tensor:
    expect(matrix, suffix, scale, None, torch.float8_e4m3fn)
    return check_finite(matrix, suffix, shape_scale(matrix, suffix, scale, GroupShape(1, columns)))


def scalar_rule(suffix: str, gives: str, *, inverse: bool = False, optional: bool = False) -> Rule:
    """One fp32 number for the matrix (or for each shard); ``inverse`` stores 1 / x."""
    return Rule(
        needs=(suffix,),
        gives=gives,
        convert=partial(_scalar, suffix=suffix, inverse=inverse),
        optional=optional,
    )


def _scalar(matrix: Matrix, stored: torch.Tensor, *, suffix: str, inverse: bool) -> torch.Tensor:
    expect(matrix, suffix, stored, None, *FLOATS)
    number = shape_scale(matrix, suffix, stored, PER_TENSOR).to(torch.float32)
    check_finite(matrix, suffix, number)
    if not inverse:
        return number
    scale = number.reciprocal()
    if not bool(scale.isfinite().all()):
        smallest = float(number.abs().amin())
        raise ValueError(
            f"{matrix.path(suffix)}: expected the inverse of a scale, found {smallest:g}"
        )
    return scale


def plain_weight_rule(suffix: str, *dtypes: torch.dtype, stored: int = 1, values: int = 1) -> Rule:
    """A weight whose elements lie as the canonical ones do, ``stored`` bytes for ``values``."""
    return Rule(
        needs=(suffix,),
        gives="weight",
        convert=partial(_plain_weight, suffix=suffix, dtypes=dtypes, stored=stored, values=values),
        size=partial(_plain_size, stored=stored, values=values),
    )


def _plain_weight(
    matrix: Matrix,
    weight: torch.Tensor,
    *,
    suffix: str,
    dtypes: tuple[torch.dtype, ...],
    stored: int,
    values: int,
) -> torch.Tensor:
    expect(matrix, suffix, weight, (matrix.N, matrix.K // values * stored), *dtypes)
    if weight.dtype == torch.float8_e4m3fn:
        _check_no_nan(matrix, suffix, weight)
    return weight.view(torch.uint8) if values > 1 else weight


def _plain_size(shape: tuple[int, ...], *, stored: int, values: int) -> tuple[int, int]:
    return shape[-2], shape[-1] // stored * values


def _check_no_nan(matrix: Matrix, suffix: str, weight: torch.Tensor) -> None:
    """ValueError for e4m3 numbers of NaN: 0x7f, the largest of signed bytes, or 0xff, of unsigned.

    Two maxima run at the memory's rate, where comparing each byte takes a multiple of that.
    """
    if not weight.numel():
        return
    for byte, number in ((torch.int8, 127), (torch.uint8, 255)):
        if int(weight.view(byte).amax()) == number:
            where = (weight.view(byte) == number).nonzero()[0].tolist()
            raise ValueError(
                f"{matrix.path(suffix)}: expected numbers, found nan (e4m3 0x{number:x}) at {where}"
            )


def _as_it_is(matrix: Matrix, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


BIAS = Rule(needs=("bias",), gives="bias", convert=_as_it_is, optional=True)
FP8_WEIGHT = plain_weight_rule("weight", torch.float8_e4m3fn)
