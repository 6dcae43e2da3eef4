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
    factors,
    fragment,
    has_minima,
    loaded,
    loaded_pair,
    scales_of_step,
    selectors,
    side,
    spread,
    steps_of_load,
    taken,
)
from fusedmoe.kernels.triton.hopper_mixed_scales import groups_at
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
def words_of(words, at, selector, INDEX: gl.constexpr, CASE: gl.constexpr):
    """The words of low and of high in product number INDEX of the step at ``at`` in the ring."""
    ROWS: gl.constexpr = words.shape[1]
    ELEMENT: gl.constexpr = CASE.ELEMENT
    low = loaded(words, at, place_of(INDEX, ROWS, CASE.GATED, 0), selector, ELEMENT)
    return low, loaded(words, at, place_of(INDEX, ROWS, CASE.GATED, 1), selector, ELEMENT)


@gluon.jit
def words_of_pair(words, stage, selector, INDEX: gl.constexpr, CASE: gl.constexpr):
    """``words_of`` both steps of a stage; where each has loads of its own, of the first and ():
    those of the second are read when they are needed."""
    ELEMENT: gl.constexpr = CASE.ELEMENT
    if steps_of_load(ELEMENT, 2) == 2:
        ROWS: gl.constexpr = words.shape[1]
        low = loaded_pair(words, stage, place_of(INDEX, ROWS, CASE.GATED, 0), ELEMENT)
        high = loaded_pair(words, stage, place_of(INDEX, ROWS, CASE.GATED, 1), ELEMENT)
        return (low[0], high[0]), (low[1], high[1])
    else:
        return words_of(words, stage * 2, selector, INDEX, CASE), ()


@gluon.jit
def prepare(words, k, groups, units, selector, CASE: gl.constexpr):
    """What ``operand`` makes a product of step k of, whose ``words_of`` these are: pairs and
    factors of both sides, and what sums become ``multiples`` of; then the units from there on."""
    ELEMENT: gl.constexpr = CASE.ELEMENT
    GROUP: gl.constexpr = CASE.GROUP
    COUNT: gl.constexpr = scales_of_step(GROUP)
    ZERO: gl.constexpr = 2 if GROUP != 0 else 0
    low_zero, high_zero = None, None
    if len(groups) == ZERO + 2 and not has_minima(ELEMENT):
        low_zero, high_zero = groups[ZERO], groups[ZERO + 1]
    low = taken(words[0], k, low_zero, selector, ELEMENT, COUNT)
    high = taken(words[1], k, high_zero, selector, ELEMENT, COUNT)
    if has_minima(ELEMENT):
        terms = spread(groups[2]), spread(groups[3])
        return (low, high, (spread(groups[0]), terms[0]), (spread(groups[1]), terms[1]), ()), ()
    elif len(units) != 0:
        low_unit, low_largest, low_grown = next_unit(units[0], units[1], groups[0])
        high_unit, high_largest, high_grown = next_unit(units[2], units[3], groups[1])
        ready = low, high, (), (), (low_grown, high_grown)
        return ready, (low_unit, low_largest, high_unit, high_largest)
    elif GROUP != 0:
        return (low, high, factors(groups[0], ELEMENT), factors(groups[1], ELEMENT), ()), ()
    else:
        return (low, high, (), (), ()), ()


@gluon.jit
def operand(prepared, FIRST: gl.constexpr, REST: gl.constexpr):
    """The A operand of 64 rows, for each part of the slots."""
    low = side(prepared[0], prepared[2])
    high = side(prepared[1], prepared[3])
    if REST == 0:
        return (fragment(low, high, sums_layout(FIRST)),)
    else:
        return fragment(low, high, sums_layout(FIRST)), fragment(low, high, sums_layout(REST))


@gluon.jit
def no_sums(FIRST: gl.constexpr, REST: gl.constexpr):
    first = gl.zeros([2 * SIDE, FIRST], gl.float32, sums_layout(FIRST))
    if REST == 0:
        return (first,)
    else:
        return first, gl.zeros([2 * SIDE, REST], gl.float32, sums_layout(REST))


@gluon.jit
def all_multiples(sums, by):
    """``multiples`` of every part."""
    if len(sums) == 1:
        return (multiples(sums[0], by),)
    else:
        return multiples(sums[0], by), multiples(sums[1], by)


@gluon.jit
def product(a, rows, FROM: gl.constexpr, SLOTS: gl.constexpr, sums):
    b = rows.slice(FROM, SLOTS, 0).permute((1, 0))
    return warpgroup_mma(a, b, sums, is_async=True)


@gluon.jit
def products(a, rows, sums, FIRST: gl.constexpr, REST: gl.constexpr):
    """Begin to multiply ``operand`` a by the first of these rows, part by part."""
    first = product(a[0], rows, 0, FIRST, sums[0])
    if REST == 0:
        return (first,)
    else:
        return first, product(a[1], rows, FIRST, REST, sums[1])


@gluon.jit
def waited(sums):
    if len(sums) == 1:
        return (warpgroup_mma_wait(0, deps=sums),)
    else:
        return warpgroup_mma_wait(0, deps=sums)


@gluon.jit
def multiply(
    ring, stage, phase, pointers, FIRST: gl.constexpr, REST: gl.constexpr, INDEX: gl.constexpr,
    CASE: gl.constexpr,
):  # fmt: skip
    """The sums [64, slots] of product INDEX of a tile, of the block's FIRST slots and of the
    REST behind them; ``pointers`` are its ``group_pointers``."""
    if CASE.STEPS == 1:
        return multiply_ahead(ring, stage, phase, pointers, FIRST, REST, INDEX, CASE)
    else:
        return multiply_pairs(ring, stage, phase, pointers, FIRST, REST, INDEX, CASE)


@gluon.jit
def in_new_units(sums, grown, k, GROUP: gl.constexpr):
    """The sums before step k, in the unit of its group; where no group begins the factor is one."""
    if len(grown) != 0:  # noqa: SIM102 (the outer one is settled at compile time)
        if k % (GROUP // STEP) == 0:
            sums = all_multiples(sums, grown)
    return sums


@gluon.jit
def multiply_ahead(
    ring, stage, phase, pointers, FIRST: gl.constexpr, REST: gl.constexpr, INDEX: gl.constexpr,
    CASE: gl.constexpr,
):  # fmt: skip
    """``multiply`` with one step in a stage.

    What the next step's operand is made of is prepared while this step is multiplied. Operands
    themselves are made in between: ptxas does one product after the other where the registers of
    the next operand are written while a product runs.
    """
    D: gl.constexpr = CASE.D
    ELEMENT: gl.constexpr = CASE.ELEMENT
    GROUP: gl.constexpr = CASE.GROUP
    KSTEPS: gl.constexpr = (D + STEP - 1) // STEP
    sums = no_sums(FIRST, REST)
    selector = selectors(ELEMENT, scales_of_step(GROUP))
    groups = groups_at(pointers, 0, D, ELEMENT, GROUP)
    units = first_units(groups, ELEMENT, GROUP)
    mbarrier.wait(ring.full.index(stage), phase)
    words = words_of(ring.words, stage, selector, INDEX, CASE)
    ready, units = prepare(words, 0, groups, units, selector, CASE)
    groups = groups_at(pointers, gl.minimum(1, KSTEPS - 1), D, ELEMENT, GROUP)
    for k in range(KSTEPS):
        a = operand(ready, FIRST, REST)
        sums = in_new_units(sums, ready[4], k, GROUP)
        sums = products(a, ring.rows.index(stage), sums, FIRST, REST)
        done = stage + 0
        stage, phase = next_stage(stage, phase, CASE.STAGES)
        if k + 1 < KSTEPS:
            mbarrier.wait(ring.full.index(stage), phase)
            words = words_of(ring.words, stage, selector, INDEX, CASE)
            ready, units = prepare(words, k + 1, groups, units, selector, CASE)
            groups = groups_at(pointers, gl.minimum(k + 2, KSTEPS - 1), D, ELEMENT, GROUP)
        sums = waited(sums)
        mbarrier.arrive(ring.empty.index(done), count=1)
    return all_multiples(sums, units[::2]), stage, phase


@gluon.jit
def multiply_pairs(
    ring, stage, phase, pointers, FIRST: gl.constexpr, REST: gl.constexpr, INDEX: gl.constexpr,
    CASE: gl.constexpr,
):  # fmt: skip
    """``multiply`` with two steps in a stage; the last one may be alone.

    The second operand is made while the first is multiplied; both have left their registers before
    the next ones are made.
    """
    D: gl.constexpr = CASE.D
    ELEMENT: gl.constexpr = CASE.ELEMENT
    GROUP: gl.constexpr = CASE.GROUP
    KSTEPS: gl.constexpr = (D + STEP - 1) // STEP
    sums = no_sums(FIRST, REST)
    selector = selectors(ELEMENT, scales_of_step(GROUP))
    groups = groups_at(pointers, 0, D, ELEMENT, GROUP)
    later = groups_at(pointers, gl.minimum(1, KSTEPS - 1), D, ELEMENT, GROUP)
    units = first_units(groups, ELEMENT, GROUP)
    for pair in range(KSTEPS // 2):
        k = 2 * pair
        first = stage * 2
        mbarrier.wait(ring.full.index(stage), phase)
        words, later_words = words_of_pair(ring.words, stage, selector, INDEX, CASE)
        ready, units = prepare(words, k, groups, units, selector, CASE)
        groups = groups_at(pointers, gl.minimum(k + 2, KSTEPS - 1), D, ELEMENT, GROUP)
        a = operand(ready, FIRST, REST)
        sums = in_new_units(sums, ready[4], k, GROUP)
        sums = products(a, ring.rows.index(first), sums, FIRST, REST)
        if len(later_words) == 0:
            later_words = words_of(ring.words, first + 1, selector, INDEX, CASE)
        other, units = prepare(later_words, k + 1, later, units, selector, CASE)
        later = groups_at(pointers, gl.minimum(k + 3, KSTEPS - 1), D, ELEMENT, GROUP)
        b = operand(other, FIRST, REST)
        if len(other[4]) != 0 and GROUP == STEP:
            sums = all_multiples(waited(sums), other[4])
        sums = products(b, ring.rows.index(first + 1), sums, FIRST, REST)
        sums = waited(sums)
        mbarrier.arrive(ring.empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, CASE.STAGES)
    if KSTEPS % 2 != 0:
        first = stage * 2
        mbarrier.wait(ring.full.index(stage), phase)
        words, _ = words_of_pair(ring.words, stage, selector, INDEX, CASE)
        ready, units = prepare(words, KSTEPS - 1, groups, units, selector, CASE)
        a = operand(ready, FIRST, REST)
        sums = in_new_units(sums, ready[4], KSTEPS - 1, GROUP)
        sums = products(a, ring.rows.index(first), sums, FIRST, REST)
        sums = waited(sums)
        mbarrier.arrive(ring.empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, CASE.STAGES)
    return all_multiples(sums, units[::2]), stage, phase
