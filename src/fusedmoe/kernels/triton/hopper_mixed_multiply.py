"""The products of one tile: the main loops of both kernels of ``hopper_mixed_prefill``.

A warpgroup multiplies 64 weight rows by SLOTS slots: 32 rows of ``low`` and 32 of ``high`` (gate
and up, or, without a gate, neighbours), in eights that alternate, so that a thread ends up with
both numbers of a feature.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_mixed_numbers import (
    SIDE,
    STEP,
    by_scale,
    factors,
    fragment,
    loaded_layout,
    scales_of_step,
    selectors,
    side,
    taken,
    words_of_step,
)
from fusedmoe.kernels.triton.hopper_mixed_sums import (
    first_units,
    multiples,
    next_unit,
    sums_layout,
)


@gluon.constexpr_function
def place_of(INDEX, ROWS, GATED, HIGH):
    """Where in the ring's ROWS rows of words a side of product number INDEX begins."""
    if GATED:
        return INDEX * 32 + HIGH * ROWS // 2
    return INDEX * 64 + HIGH * 32


@gluon.jit
def rows_of(tile, index, ROWS: gl.constexpr, GATED: gl.constexpr):
    """(first feature of low, of high) in the product number ``index`` of a tile."""
    if GATED:
        low = tile * (ROWS // 2) + index * SIDE
        return low, low
    else:
        low = tile * ROWS + index * (2 * SIDE)
        return low, low + SIDE


@gluon.jit
def scale_rows(scales, expert, shard, feature, N: gl.constexpr, D: gl.constexpr,
               GROUP: gl.constexpr):  # fmt: skip
    """(index of the expert's first scale, and from there of those of these features)."""
    stride_expert, shard_step, row_step, block = scales
    WIDTH: gl.constexpr = 1 if GROUP == 0 else (D + GROUP - 1) // GROUP
    row = shard * shard_step + gl.minimum(feature, N - 1) // block * row_step
    return expert.to(gl.int64) * stride_expert, row * WIDTH


@gluon.jit
def group_pointers(
    scale_ptr, zero_ptr, scales, expert, first, N: gl.constexpr, D: gl.constexpr,
    ELEMENT: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """``groups_at`` goes on from here, for the features from ``first`` (low, high) on."""
    COUNT: gl.constexpr = scales_of_step(GROUP)
    layout: gl.constexpr = gl.SliceLayout(1, by_scale(words_of_step(ELEMENT), COUNT))
    r = gl.arange(0, SIDE, layout)
    base, low = scale_rows(scales, expert, 0, first[0] + r, N, D, GROUP)
    SHARD: gl.constexpr = 1 if GATED else 0
    base, high = scale_rows(scales, expert, SHARD, first[1] + r, N, D, GROUP)
    if GROUP == 0 and zero_ptr is None:
        return ()
    elif GROUP == 0:
        return (zero_ptr + base) + low, (zero_ptr + base) + high
    elif zero_ptr is None:
        return (scale_ptr + base) + low, (scale_ptr + base) + high
    else:
        return (
            (scale_ptr + base) + low,
            (scale_ptr + base) + high,
            (zero_ptr + base) + low,
            (zero_ptr + base) + high,
        )


@gluon.jit
def load_groups(ptrs, k, D: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr):
    """Scales, or zero points, [32, COUNT] of step k; ptrs [32] to those of column 0."""
    COUNT: gl.constexpr = scales_of_step(GROUP)
    layout: gl.constexpr = by_scale(words_of_step(ELEMENT), COUNT)
    if GROUP == 0:
        return gl.load(gl.expand_dims(ptrs, 1))
    elif COUNT == 1:
        return gl.load(gl.expand_dims(ptrs, 1) + k // (GROUP // STEP))
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


@gluon.jit
def prepare(
    words, groups, units, selector, INDEX: gl.constexpr, ELEMENT: gl.constexpr,
    GROUP: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """What ``operand`` makes product number INDEX of: pairs and factors of both sides, and what
    sums become ``multiples`` of; then the units from there on."""
    ROWS: gl.constexpr = words.shape[0]
    COUNT: gl.constexpr = scales_of_step(GROUP)
    layout: gl.constexpr = loaded_layout(words.shape[1])
    low = words.slice(place_of(INDEX, ROWS, GATED, 0), SIDE, 0).load(layout)
    high = words.slice(place_of(INDEX, ROWS, GATED, 1), SIDE, 0).load(layout)
    ZERO: gl.constexpr = 2 if GROUP != 0 else 0
    low_zero, high_zero = None, None
    if len(groups) == ZERO + 2:
        low_zero, high_zero = groups[ZERO], groups[ZERO + 1]
    low = taken(low, low_zero, selector, ELEMENT, COUNT)
    high = taken(high, high_zero, selector, ELEMENT, COUNT)
    if len(units) != 0:
        low_unit, low_largest, low_grown = next_unit(units[0], units[1], groups[0])
        high_unit, high_largest, high_grown = next_unit(units[2], units[3], groups[1])
        ready = low, high, (), (), (low_grown, high_grown)
        return ready, (low_unit, low_largest, high_unit, high_largest)
    elif GROUP != 0:
        return (low, high, factors(groups[0], ELEMENT), factors(groups[1], ELEMENT), ()), ()
    else:
        return (low, high, (), (), ()), ()


@gluon.jit
def operand(prepared, SLOTS: gl.constexpr):
    """The A operand of 64 rows."""
    low = side(prepared[0], prepared[2])
    high = side(prepared[1], prepared[3])
    return fragment(low, high, sums_layout(SLOTS))


@gluon.jit
def slots_of(x_ring, at, SLOTS: gl.constexpr):
    """The first rows of a step, as the B operand."""
    return x_ring.index(at).slice(0, SLOTS, 0).permute((1, 0))


@gluon.jit
def multiply(
    rings, bars, stage, phase, pointers, SLOTS: gl.constexpr, D: gl.constexpr,
    ELEMENT: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, INDEX: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """The sums [64, SLOTS] of product INDEX of a tile, of the block's first slots; ``pointers`` are
    its ``group_pointers``."""
    if STEPS == 1 and SLOTS == 256:
        return multiply_ahead(
            rings, bars, stage, phase, pointers, SLOTS, D, ELEMENT, GROUP, GATED, INDEX
        )
    else:
        return multiply_pairs(
            rings, bars, stage, phase, pointers, SLOTS, D, ELEMENT, GROUP, GATED, INDEX, STEPS
        )


@gluon.jit
def in_new_units(sums, grown, k, GROUP: gl.constexpr):
    """Sums before step k: what they are multiplied by is one where no group begins."""
    if len(grown) != 0:  # noqa: SIM102 (the outer one is settled at compile time)
        if k % (GROUP // STEP) == 0:
            sums = multiples(sums, grown)
    return sums


@gluon.jit
def multiply_ahead(
    rings, bars, stage, phase, pointers, SLOTS: gl.constexpr, D: gl.constexpr,
    ELEMENT: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    """``multiply`` with one step in a stage.

    What the next step's operand is made of is prepared while this step is multiplied. Operands
    themselves are made in between: ptxas does one product after the other where the registers of
    the next operand are written while a product runs.
    """
    w_ring, x_ring = rings
    full, empty = bars
    STAGES: gl.constexpr = x_ring.shape[0]
    KSTEPS: gl.constexpr = (D + STEP - 1) // STEP
    sums = gl.zeros([2 * SIDE, SLOTS], gl.float32, sums_layout(SLOTS))
    selector = selectors(ELEMENT, scales_of_step(GROUP))
    groups = groups_at(pointers, 0, D, ELEMENT, GROUP)
    units = first_units(groups, ELEMENT, GROUP)
    mbarrier.wait(full.index(stage), phase)
    ready, units = prepare(
        w_ring.index(stage), groups, units, selector, INDEX, ELEMENT, GROUP, GATED
    )
    groups = groups_at(pointers, gl.minimum(1, KSTEPS - 1), D, ELEMENT, GROUP)
    for k in range(KSTEPS):
        a = operand(ready, SLOTS)
        sums = in_new_units(sums, ready[4], k, GROUP)
        sums = warpgroup_mma(a, slots_of(x_ring, stage, SLOTS), sums, is_async=True)
        done = stage + 0
        stage, phase = next_stage(stage, phase, STAGES)
        if k + 1 < KSTEPS:
            mbarrier.wait(full.index(stage), phase)
            ready, units = prepare(
                w_ring.index(stage), groups, units, selector, INDEX, ELEMENT, GROUP, GATED
            )
            groups = groups_at(pointers, gl.minimum(k + 2, KSTEPS - 1), D, ELEMENT, GROUP)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index(done), count=1)
    return multiples(sums, units[::2]), stage, phase


@gluon.jit
def multiply_pairs(
    rings, bars, stage, phase, pointers, SLOTS: gl.constexpr, D: gl.constexpr,
    ELEMENT: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, INDEX: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """``multiply`` by two steps at a time, those of a stage or of two stages; the last one may be
    alone.

    The second operand is made while the first is multiplied; both have left their registers before
    the next ones are made.
    """
    w_ring, x_ring = rings
    full, empty = bars
    STAGES: gl.constexpr = full.shape[0]
    KSTEPS: gl.constexpr = (D + STEP - 1) // STEP
    sums = gl.zeros([2 * SIDE, SLOTS], gl.float32, sums_layout(SLOTS))
    selector = selectors(ELEMENT, scales_of_step(GROUP))
    groups = groups_at(pointers, 0, D, ELEMENT, GROUP)
    later = groups_at(pointers, gl.minimum(1, KSTEPS - 1), D, ELEMENT, GROUP)
    units = first_units(groups, ELEMENT, GROUP)
    for pair in range(KSTEPS // 2):
        k = 2 * pair
        first = stage * STEPS
        mbarrier.wait(full.index(stage), phase)
        ready, units = prepare(
            w_ring.index(first), groups, units, selector, INDEX, ELEMENT, GROUP, GATED
        )
        groups = groups_at(pointers, gl.minimum(k + 2, KSTEPS - 1), D, ELEMENT, GROUP)
        a = operand(ready, SLOTS)
        sums = in_new_units(sums, ready[4], k, GROUP)
        sums = warpgroup_mma(a, slots_of(x_ring, first, SLOTS), sums, is_async=True)
        done = stage + 0
        second = first + 1
        if STEPS == 1:
            stage, phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase)
            second = stage + 0
        other, units = prepare(
            w_ring.index(second), later, units, selector, INDEX, ELEMENT, GROUP, GATED
        )
        later = groups_at(pointers, gl.minimum(k + 3, KSTEPS - 1), D, ELEMENT, GROUP)
        b = operand(other, SLOTS)
        if len(other[4]) != 0 and GROUP == STEP:
            sums = multiples(warpgroup_mma_wait(0, deps=(sums,)), other[4])
        sums = warpgroup_mma(b, slots_of(x_ring, second, SLOTS), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index(done), count=1)
        if STEPS == 1:
            mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    if KSTEPS % 2 != 0:
        first = stage * STEPS
        mbarrier.wait(full.index(stage), phase)
        ready, units = prepare(
            w_ring.index(first), groups, units, selector, INDEX, ELEMENT, GROUP, GATED
        )
        a = operand(ready, SLOTS)
        sums = in_new_units(sums, ready[4], KSTEPS - 1, GROUP)
        sums = warpgroup_mma(a, slots_of(x_ring, first, SLOTS), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return multiples(sums, units[::2]), stage, phase
