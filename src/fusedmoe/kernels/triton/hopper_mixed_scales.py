"""Where the scales and zero points of a step lie, for ``hopper_mixed_prefill``."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.triton.hopper_mixed_numbers import (
    SIDE,
    STEP,
    by_scale,
    chunks_of_step,
    scales_of_step,
    short_of,
)


class Weights(NamedTuple):
    """What comes to the products: pointers to scales, zero points (or terms), second scales and
    biases (None: there are none); of the scales, the stride of experts, the steps from gate to up
    and from row to row, and how many rows share one."""

    scale: gl.tensor
    zero: gl.tensor | None
    scale2: gl.tensor | None
    bias: gl.tensor | None
    stride_expert: gl.tensor
    shard_step: gl.tensor
    row_step: gl.tensor
    block: gl.tensor


@gluon.jit
def scale_rows(weights, expert, shard, feature, CASE: gl.constexpr):
    """(index of the expert's first scale, and from there of those of these features)."""
    GROUP: gl.constexpr = CASE.GROUP
    WIDTH: gl.constexpr = 1 if GROUP == 0 else (CASE.D + GROUP - 1) // GROUP
    row = shard * weights.shard_step
    row += gl.minimum(feature, CASE.N - 1) // weights.block * weights.row_step
    return expert.to(gl.int64) * weights.stride_expert, row * WIDTH


@gluon.jit
def group_pointers(weights, expert, first, CASE: gl.constexpr):
    """``groups_at`` goes on from here, for the features from ``first`` (low, high) on."""
    COUNT: gl.constexpr = scales_of_step(CASE.GROUP)
    layout: gl.constexpr = gl.SliceLayout(1, by_scale(chunks_of_step(CASE.ELEMENT), COUNT))
    r = gl.arange(0, SIDE, layout)
    base, low = scale_rows(weights, expert, 0, first[0] + r, CASE)
    SHARD: gl.constexpr = 1 if CASE.GATED else 0
    base, high = scale_rows(weights, expert, SHARD, first[1] + r, CASE)
    if CASE.GROUP == 0 and weights.zero is None:
        return ()
    elif CASE.GROUP == 0:
        return (weights.zero + base) + low, (weights.zero + base) + high
    elif weights.zero is None:
        return (weights.scale + base) + low, (weights.scale + base) + high
    else:
        return (
            (weights.scale + base) + low,
            (weights.scale + base) + high,
            (weights.zero + base) + low,
            (weights.zero + base) + high,
        )


@gluon.constexpr_function
def in_words(SCALE, D, ELEMENT, GROUP):
    """Whether both scales of a step are loaded, and kept until they are needed, as one word."""
    return short_of(ELEMENT) != 0 and gl.uint8 == SCALE and GROUP == 32 and D % 64 == 0


@gluon.jit
def load_groups(ptrs, k, D: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr):
    """Scales, or zero points, [32, COUNT] of step k; ptrs [32] to those of column 0."""
    COUNT: gl.constexpr = scales_of_step(GROUP)
    layout: gl.constexpr = by_scale(chunks_of_step(ELEMENT), COUNT)
    if GROUP == 0:
        return gl.load(gl.expand_dims(ptrs, 1))
    elif COUNT == 1:
        return gl.load(gl.expand_dims(ptrs, 1) + k // (GROUP // STEP))
    elif in_words(ptrs.dtype.element_ty, D, ELEMENT, GROUP):
        both = ptrs.to(gl.pointer_type(gl.uint16), bitcast=True)
        return gl.load(gl.expand_dims(both, 1) + k).to(gl.int32)
    else:
        at = k * COUNT + gl.arange(0, COUNT, gl.SliceLayout(0, layout))
        if D % STEP != 0:
            at = gl.minimum(at, (D + GROUP - 1) // GROUP - 1)
        return gl.load(gl.expand_dims(ptrs, 1) + gl.expand_dims(at, 0))


@gluon.jit
def groups_at(ptrs, k, D: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr):
    """What ``ptrs`` (tuple of pointers [32]) have for step k: scales of low and of high, then zero
    points likewise; where a row has one scale for all columns, only zero points."""
    if len(ptrs) == 0:
        return (k,)
    elif len(ptrs) == 2:
        low = load_groups(ptrs[0], k, D, ELEMENT, GROUP)
        return low, load_groups(ptrs[1], k, D, ELEMENT, GROUP)
    else:
        low = load_groups(ptrs[0], k, D, ELEMENT, GROUP)
        high = load_groups(ptrs[1], k, D, ELEMENT, GROUP)
        low_zero = load_groups(ptrs[2], k, D, ELEMENT, GROUP)
        return low, high, low_zero, load_groups(ptrs[3], k, D, ELEMENT, GROUP)
