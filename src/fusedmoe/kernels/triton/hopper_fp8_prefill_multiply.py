"""The products of one tile of ``hopper_fp8_prefill``: 8-bit operands from the rings, fp32 sums.

A step is 128 columns: 128 token rows and 256 weight rows, 48 KiB. A consumer warpgroup multiplies
64 rows by 128 weight rows at a time, ``low`` (gate) and then ``high`` (up).

``multiply_promoted`` adds every product of one step or two to the sums in fp32, with row scale x
block scale where scales change along the columns. That is also what keeps fp8 sums exact, because
the tensor cores add fp8 products in about 14 bits. Two sums and one product take 192 registers; two
products would not fit, so one warpgroup's additions overlap the other one's products: by turns
where every step is promoted.

``multiply_whole`` runs one product of 256 weight rows per step through all columns: int8, whose
sums are exact, and rows of fp8 that are short.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_prefill_common import HALF_M, TILE_N

SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
BY_ROW = gl.constexpr(gl.SliceLayout(1, SUM.value))
STEP = gl.constexpr(128)
WIDE_SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 32]))


@gluon.constexpr_function
def steps_of(CASE):
    """Steps that a tile takes."""
    return -(-CASE.D // STEP.value)


@gluon.constexpr_function
def takes_turns(CASE):
    """Whether every step is promoted."""
    return CASE.STEPPED or CASE.PROMOTED == 1


@gluon.jit
def open_turns(CASE: gl.constexpr):
    """Where every step is promoted, the warpgroups' products follow each other by turns, so that
    one adds to its sums while the other multiplies; left alone, both multiply and then both add.
    There are none elsewhere: memory of barriers that nobody uses would be used again, for the
    number of a drawn task, and such words are lost when the GPU turns to another process."""
    if takes_turns(CASE):
        turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(turns.index(i), count=1)
        return turns
    else:
        return 0


@gluon.jit
def next_turn(turns, turn, WHICH: gl.constexpr):
    """Let the other warpgroup go on; the phase that makes it this one's turn again."""
    mbarrier.arrive(turns.index(1 - WHICH), count=1)
    return turn ^ 1


@gluon.jit
def skip(ring, stage, phase, turn, CASE: gl.constexpr, WHICH: gl.constexpr):
    """Give a tile's steps back unread, and the turns of their two products."""
    for _ in range(steps_of(CASE)):
        mbarrier.wait(ring.full.index(stage), phase)
        mbarrier.arrive(ring.empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, CASE.STAGES)
        if takes_turns(CASE):
            for _ in gl.static_range(2):
                mbarrier.wait(ring.turns.index(WHICH), turn)
                turn = next_turn(ring.turns, turn, WHICH)
    return stage, phase, turn


@gluon.jit
def product(ring, stage, part, FIRST: gl.constexpr, HIGH: gl.constexpr, WHICH: gl.constexpr):
    """Issue one step's product of 64 rows and the low or HIGH 128 weight rows, onto ``part`` unless
    it is the FIRST."""
    a = ring.rows.index(stage).slice(WHICH * HALF_M, HALF_M, 0)
    b = ring.weights.index(stage).slice(HIGH * TILE_N, TILE_N, 0).permute((1, 0))
    return warpgroup_mma(a, b, part, use_acc=not FIRST, is_async=True)


@gluon.jit
def multiply_promoted(
    ring, stage, phase, turn, low_scales, high_scales, CASE: gl.constexpr, WHICH: gl.constexpr
):
    """One tile's (low, high), [HALF_M, TILE_N] fp32 each, every step promoted.

    ``low_scales`` and ``high_scales`` point to those of the weights, one for PER_SCALE steps; None:
    no such scales.
    """
    KSTEPS: gl.constexpr = steps_of(CASE)
    BLOCKS: gl.constexpr = low_scales is not None
    NUMBER: gl.constexpr = gl.int32 if ring.rows.dtype == gl.int8 else gl.float32
    low = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
    high = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
    if BLOCKS:
        low_scale = gl.load(low_scales).to(gl.float32)
        high_scale = gl.load(high_scales).to(gl.float32)
    for k in range(KSTEPS):
        mbarrier.wait(ring.full.index(stage), phase)
        mbarrier.wait(ring.turns.index(WHICH), turn)
        part = gl.zeros([HALF_M, TILE_N], NUMBER, SUM)
        part = product(ring, stage, part, True, 0, WHICH)
        turn = next_turn(ring.turns, turn, WHICH)
        if CASE.STEPPED:
            of_low = ring.scales.index(stage).slice(WHICH * HALF_M, HALF_M, 0).load(BY_ROW)
            of_high = of_low
        if BLOCKS:
            of_high = of_low * high_scale
            of_low *= low_scale
            ahead = gl.minimum(k + 1, KSTEPS - 1)
            low_scale = gl.load(low_scales + ahead // CASE.PER_SCALE).to(gl.float32)
            high_scale = gl.load(high_scales + ahead // CASE.PER_SCALE).to(gl.float32)
        part = warpgroup_mma_wait(0, deps=(part,))
        if CASE.STEPPED:
            low += part.to(gl.float32) * gl.expand_dims(of_low, 1)
        else:
            low += part
        mbarrier.wait(ring.turns.index(WHICH), turn)
        part = gl.zeros([HALF_M, TILE_N], NUMBER, SUM)
        part = product(ring, stage, part, True, 1, WHICH)
        turn = next_turn(ring.turns, turn, WHICH)
        part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(ring.empty.index(stage), count=1)
        if CASE.STEPPED:
            high += part.to(gl.float32) * gl.expand_dims(of_high, 1)
        else:
            high += part
        stage, phase = next_stage(stage, phase, CASE.STAGES)
    return low, high, stage, phase, turn


@gluon.jit
def multiply_in_pairs(ring, stage, phase, CASE: gl.constexpr, WHICH: gl.constexpr):
    """As ``multiply_promoted`` without scales, two steps at a time."""
    KSTEPS: gl.constexpr = steps_of(CASE)
    low = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
    high = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
    for _ in range(KSTEPS // 2):
        second, second_phase = next_stage(stage, phase, CASE.STAGES)
        mbarrier.wait(ring.full.index(stage), phase)
        part = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
        part = product(ring, stage, part, True, 0, WHICH)
        mbarrier.wait(ring.full.index(second), second_phase)
        part = product(ring, second, part, False, 0, WHICH)
        part = warpgroup_mma_wait(0, deps=(part,))
        low += part
        part = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
        part = product(ring, stage, part, True, 1, WHICH)
        part = product(ring, second, part, False, 1, WHICH)
        part = warpgroup_mma_wait(1, deps=(part,))
        mbarrier.arrive(ring.empty.index(stage), count=1)
        part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(ring.empty.index(second), count=1)
        high += part
        stage, phase = next_stage(second, second_phase, CASE.STAGES)
    if KSTEPS % 2 == 1:
        mbarrier.wait(ring.full.index(stage), phase)
        part = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
        part = product(ring, stage, part, True, 0, WHICH)
        part = warpgroup_mma_wait(0, deps=(part,))
        low += part
        part = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
        part = product(ring, stage, part, True, 1, WHICH)
        part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(ring.empty.index(stage), count=1)
        high += part
        stage, phase = next_stage(stage, phase, CASE.STAGES)
    return low, high, stage, phase


@gluon.jit
def multiply_whole(ring, stage, phase, CASE: gl.constexpr, WHICH: gl.constexpr):
    """One tile's (low, high), [HALF_M, TILE_N] fp32 each, without scales. Each step is freed when
    the next one has been issued."""
    # Triton has no int8 product of 256 columns.
    WHOLE: gl.constexpr = ring.rows.dtype == gl.int8
    NUMBER: gl.constexpr = gl.int32 if WHOLE else gl.float32
    acc = gl.zeros([HALF_M, 2 * TILE_N], NUMBER, SUM if WHOLE else WIDE_SUM)
    for k in range(steps_of(CASE)):
        mbarrier.wait(ring.full.index(stage), phase)
        a = ring.rows.index(stage).slice(WHICH * HALF_M, HALF_M, 0)
        acc = warpgroup_mma(a, ring.weights.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        before = (stage + CASE.STAGES - 1) % CASE.STAGES
        mbarrier.arrive(ring.empty.index(before), count=1, pred=k > 0)
        stage, phase = next_stage(stage, phase, CASE.STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.empty.index((stage + CASE.STAGES - 1) % CASE.STAGES), count=1)
    pairs = gl.permute(gl.reshape(acc.to(gl.float32), [HALF_M, 2, TILE_N]), [0, 2, 1])
    low, high = gl.split(pairs)
    low = gl.convert_layout(low, SUM, assert_trivial=True)
    return low, gl.convert_layout(high, SUM, assert_trivial=True), stage, phase


@gluon.jit
def multiply(
    ring, stage, phase, turn, low_scales, high_scales, CASE: gl.constexpr, WHICH: gl.constexpr
):
    """As ``multiply_promoted``; without scales every PROMOTED steps (0: never)."""
    if takes_turns(CASE):
        low, high, stage, phase, turn = multiply_promoted(
            ring, stage, phase, turn, low_scales, high_scales, CASE, WHICH
        )
    elif CASE.PROMOTED == 2:
        low, high, stage, phase = multiply_in_pairs(ring, stage, phase, CASE, WHICH)
    else:
        low, high, stage, phase = multiply_whole(ring, stage, phase, CASE, WHICH)
    return low, high, stage, phase, turn
