"""The sums of a product and the unit that they are in.

Rows of ``low`` and of ``high`` alternate in eights. Where scales of groups do not multiply numbers,
sums are multiples of a row's last scale.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.triton.hopper_mixed_numbers import SIDE, STEP
from fusedmoe.kernels.triton.quantized_common import float_scale


@gluon.constexpr_function
def sums_layout(SLOTS):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 16])


@gluon.jit
def sides(acc):
    """The rows of low and those of high in a product's sums, [32, SLOTS] each; moves no data."""
    SLOTS: gl.constexpr = acc.shape[1]
    eights = gl.permute(gl.reshape(acc, [SIDE // 8, 2, 8, SLOTS]), [0, 2, 3, 1])
    low, high = gl.split(eights)
    return gl.reshape(low, [SIDE, SLOTS]), gl.reshape(high, [SIDE, SLOTS])


@gluon.jit
def together(low, high, MMA: gl.constexpr):
    """Sums from what ``sides`` makes of them."""
    SLOTS: gl.constexpr = low.shape[1]
    eights = gl.join(
        gl.reshape(low, [SIDE // 8, 8, SLOTS]), gl.reshape(high, [SIDE // 8, 8, SLOTS])
    )
    sums = gl.reshape(gl.permute(eights, [0, 3, 1, 2]), [2 * SIDE, SLOTS])
    return gl.convert_layout(sums, MMA, assert_trivial=True)


@gluon.constexpr_function
def in_units(ELEMENT, GROUP, SCALE):
    """Whether scales of type SCALE multiply sums instead of numbers, whose products with a scale
    that is no power of two would be rounded: where it costs no more."""
    if ELEMENT == "e2m1" or gl.uint8 == SCALE:
        return False
    return (2 * STEP.value if ELEMENT == "int4" else STEP.value) <= GROUP


@gluon.jit
def first_unit(scale):
    """The ``next_unit`` before that of a row's first group."""
    least = gl.full(scale.shape, 2.0**-60, gl.float32, scale.type.layout)
    return least, least


@gluon.jit
def next_unit(unit, largest, scale):
    """(The unit of a row's sums once a group with this scale is added, the largest scale so far,
    the factor that takes the sums so far to that unit.)

    The unit is the scale, so that numbers stay as they are. A scale below 2^-60 of the largest
    counts as that: it adds nothing, and it may be zero.
    """
    scale = float_scale(scale)
    largest = gl.maximum(largest, gl.abs(scale))
    least = largest * 2.0**-60
    new = gl.where(gl.abs(scale) < least, least, scale)
    return new, largest, unit / new


@gluon.jit
def first_units(groups, ELEMENT: gl.constexpr, GROUP: gl.constexpr):
    """What ``prepare`` takes and returns of the units of low and of high, if sums have any."""
    if GROUP != 0:
        if in_units(ELEMENT, GROUP, groups[0].dtype):
            return first_unit(groups[0]) + first_unit(groups[1])
        else:
            return ()
    else:
        return ()


@gluon.jit
def multiples(sums, by):
    """Sums [64, SLOTS] times ``by``: what [32, 1] rows of low and of high have, or nothing."""
    if len(by) == 0:
        return sums
    else:
        low, high = sides(sums)
        rows: gl.constexpr = gl.SliceLayout(1, low.type.layout)
        low *= gl.expand_dims(gl.convert_layout(gl.reshape(by[0], [SIDE]), rows), 1)
        high *= gl.expand_dims(gl.convert_layout(gl.reshape(by[1], [SIDE]), rows), 1)
        return together(low, high, sums_layout(sums.shape[1]))
