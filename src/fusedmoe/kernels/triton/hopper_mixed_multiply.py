"""The products of one tile: the main loops of both kernels of ``hopper_mixed_prefill``.

A warpgroup multiplies one or two times 64 weight rows by SLOTS slots: 32 rows of ``low`` and 32 of
``high`` at a time (gate and up, or, without a gate, neighbours), in eights that alternate, so that
a thread ends up with both numbers of a feature.
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


@gluon.constexpr_function
def sums_layout(SLOTS):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 16])


@gluon.constexpr_function
def place_of(INDEX, ROWS, GATED, HIGH):
    """Where in a tile's ROWS rows of words a side of product number INDEX begins."""
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
    words, groups, selector, INDEX: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """What ``operand`` makes product number INDEX of: pairs and factors of both sides."""
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
    if GROUP != 0:
        return low, high, factors(groups[0], ELEMENT), factors(groups[1], ELEMENT)
    else:
        return low, high, (), ()


@gluon.jit
def operand(prepared, GROUP: gl.constexpr, SLOTS: gl.constexpr):
    """The A operand of 64 rows."""
    low = side(prepared[0], prepared[2], GROUP)
    high = side(prepared[1], prepared[3], GROUP)
    return fragment(low, high, sums_layout(SLOTS))


@gluon.jit
def multiply_one(
    rings, bars, stage, phase, pointers, D: gl.constexpr, ELEMENT: gl.constexpr,
    GROUP: gl.constexpr, GATED: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    """The sums [64, SLOTS] of product INDEX of a tile; ``pointers`` are its ``group_pointers``.

    What the next step's operand is made of is prepared while this step is multiplied. Operands
    themselves are made in between: ptxas does one product after the other where the registers of
    the next operand are written while a product runs.
    """
    w_ring, x_ring = rings
    full, empty = bars
    STAGES: gl.constexpr = x_ring.shape[0]
    SLOTS: gl.constexpr = x_ring.shape[1]
    KSTEPS: gl.constexpr = (D + STEP - 1) // STEP
    sums = gl.zeros([2 * SIDE, SLOTS], gl.float32, sums_layout(SLOTS))
    selector = selectors(ELEMENT, scales_of_step(GROUP))
    groups = groups_at(pointers, 0, D, ELEMENT, GROUP)
    mbarrier.wait(full.index(stage), phase)
    ready = prepare(w_ring.index(stage), groups, selector, INDEX, ELEMENT, GROUP, GATED)
    groups = groups_at(pointers, gl.minimum(1, KSTEPS - 1), D, ELEMENT, GROUP)
    for k in range(KSTEPS):
        a = operand(ready, GROUP, SLOTS)
        sums = warpgroup_mma(a, x_ring.index(stage).permute((1, 0)), sums, is_async=True)
        done = stage + 0
        stage, phase = next_stage(stage, phase, STAGES)
        if k + 1 < KSTEPS:
            mbarrier.wait(full.index(stage), phase)
            ready = prepare(w_ring.index(stage), groups, selector, INDEX, ELEMENT, GROUP, GATED)
            groups = groups_at(pointers, gl.minimum(k + 2, KSTEPS - 1), D, ELEMENT, GROUP)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index(done), count=1)
    return sums, stage, phase


@gluon.jit
def prepare_two(
    rings, bars, stage, phase, of_first, of_second, selector, ELEMENT: gl.constexpr,
    GROUP: gl.constexpr, GATED: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    """``prepare``, for products INDEX and INDEX + 1 of the step that this waits for."""
    mbarrier.wait(bars[0].index(stage), phase)
    words = rings[0].index(stage)
    first = prepare(words, of_first, selector, INDEX, ELEMENT, GROUP, GATED)
    return first, prepare(words, of_second, selector, INDEX + 1, ELEMENT, GROUP, GATED)


@gluon.jit
def multiply_two(
    rings, bars, stage, phase, first, second, D: gl.constexpr, ELEMENT: gl.constexpr,
    GROUP: gl.constexpr, GATED: gl.constexpr, INDEX: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """The sums [64, SLOTS] of products INDEX and INDEX + 1 of a tile; ``first`` and ``second`` are
    their ``group_pointers``.

    Both operands are made, then multiplied: the other warpgroup's products fill the time. AHEAD:
    they are prepared as in ``multiply_one``, which takes 32 registers more.
    """
    x_ring, empty = rings[1], bars[1]
    STAGES: gl.constexpr = x_ring.shape[0]
    SLOTS: gl.constexpr = x_ring.shape[1]
    KSTEPS: gl.constexpr = (D + STEP - 1) // STEP
    LEAD: gl.constexpr = 1 if AHEAD else 0
    selector = selectors(ELEMENT, scales_of_step(GROUP))
    upper = gl.zeros([2 * SIDE, SLOTS], gl.float32, sums_layout(SLOTS))
    lower = gl.zeros([2 * SIDE, SLOTS], gl.float32, sums_layout(SLOTS))
    of_first = groups_at(first, 0, D, ELEMENT, GROUP)
    of_second = groups_at(second, 0, D, ELEMENT, GROUP)
    if AHEAD:
        ready, other = prepare_two(
            rings, bars, stage, phase, of_first, of_second, selector, ELEMENT, GROUP, GATED, INDEX
        )
        of_first = groups_at(first, gl.minimum(1, KSTEPS - 1), D, ELEMENT, GROUP)
        of_second = groups_at(second, gl.minimum(1, KSTEPS - 1), D, ELEMENT, GROUP)
    for k in range(KSTEPS):
        ahead = gl.minimum(k + 1 + LEAD, KSTEPS - 1)
        if not AHEAD:
            ready, other = prepare_two(
                rings, bars, stage, phase, of_first, of_second, selector, ELEMENT, GROUP, GATED,
                INDEX,
            )  # fmt: skip
            of_first = groups_at(first, ahead, D, ELEMENT, GROUP)
            of_second = groups_at(second, ahead, D, ELEMENT, GROUP)
        x = x_ring.index(stage).permute((1, 0))
        a = operand(ready, GROUP, SLOTS)
        b = operand(other, GROUP, SLOTS)
        upper = warpgroup_mma(a, x, upper, is_async=True)
        lower = warpgroup_mma(b, x, lower, is_async=True)
        done = stage + 0
        stage, phase = next_stage(stage, phase, STAGES)
        if AHEAD:  # noqa: SIM102 (the outer one is settled at compile time)
            if k + 1 < KSTEPS:
                ready, other = prepare_two(
                    rings, bars, stage, phase, of_first, of_second, selector, ELEMENT, GROUP,
                    GATED, INDEX,
                )  # fmt: skip
                of_first = groups_at(first, ahead, D, ELEMENT, GROUP)
                of_second = groups_at(second, ahead, D, ELEMENT, GROUP)
        upper, lower = warpgroup_mma_wait(0, deps=(upper, lower))
        mbarrier.arrive(empty.index(done), count=1)
    return upper, lower, stage, phase
