"""From words of weights in shared memory to an operand of the WGMMA in registers.

Of every 16 columns of a WGMMA's A operand, lane t of four holds 2t, 2t + 1, 2t + 8 and 2t + 9: half
of two words of bytes. So both lanes that share a word load it, and each takes
its part (``selectors``).

Nibbles of a word all go to one lane instead, and the columns of the other operand are put into the
order that this makes (``fusedmoe.kernels.lane_order``): then three instructions make two numbers of
nibbles, where six would, and a word is loaded once.

Two columns that are neighbours in that order make a pair, one word of 32 bits with the halves in
bf16. ``taken`` makes pairs of words, without their scales; ``side`` multiplies by those.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.triton.hopper_mixed_planes import load_planes, load_planes_pair, take_planes
from fusedmoe.kernels.triton.hopper_mixed_sextets import (
    lanes_of_row,
    load_sextets,
    take_sextets,
)
from fusedmoe.kernels.triton.hopper_mixed_words import (
    as_pair,
    halves,
    less,
    power_pair,
    power_pairs,
    take_e2m1,
    take_e4m3,
    take_entries,
    take_int4,
    take_int8,
    times,
    times_both,
    times_plus,
)
from fusedmoe.kernels.triton.lookup import NF4_LIFT
from fusedmoe.kernels.triton.quantized_common import float_scale

STEP = gl.constexpr(64)  # columns
SIDE = gl.constexpr(32)  # weight rows of low, or of high, in one product
HALF_EXPONENT = gl.constexpr(2.0**63)


@gluon.constexpr_function
def is_sextet(ELEMENT):
    return ELEMENT in ("e3m2", "e2m3")


@gluon.constexpr_function
def has_minima(ELEMENT):
    """Superblocks, whose integers meet a scale and a term."""
    return ELEMENT in ("q4_k", "q5_k")


@gluon.constexpr_function
def in_lane_order(ELEMENT):
    """Whether a lane takes eight columns of 32, which lie so in the other operand."""
    return ELEMENT not in ("int8", "e4m3")


@gluon.constexpr_function
def chunks_of_step(ELEMENT):
    """What ``pairs_layout`` calls WORDS: runs of columns that are words of nibbles or of bytes."""
    return 8 if in_lane_order(ELEMENT) else 16


@gluon.constexpr_function
def words_of_step(ELEMENT):
    """Words of 32 bits that hold a row's columns of one step."""
    more = {"e3m2": 4, "e2m3": 4, "q5_k": 8}.get(ELEMENT, 0)
    return chunks_of_step(ELEMENT) + more


@gluon.constexpr_function
def boxes_of_step(ELEMENT):
    """Loads of TMA that bring them: each has a power of two of words."""
    return 3 if is_sextet(ELEMENT) else 2 if ELEMENT == "q5_k" else 1


@gluon.constexpr_function
def steps_of_load(ELEMENT, STEPS):
    """Steps of a stage whose words one load brings: all, where a step has 32 bytes of a row."""
    return STEPS if words_of_step(ELEMENT) == 8 else 1


@gluon.constexpr_function
def loads_of_stage(ELEMENT, STEPS):
    return boxes_of_step(ELEMENT) * (STEPS // steps_of_load(ELEMENT, STEPS))


@gluon.constexpr_function
def short_of(ELEMENT):
    """The exponent of two that floats are short of beside ``factors``, for their sums."""
    return {"e2m1": 63, "e3m2": 61, "e2m3": 63}.get(ELEMENT, 0)


@gluon.constexpr_function
def rest_of_sums(ELEMENT):
    """What sums are multiplied by in the end."""
    return 1 / NF4_LIFT.value if ELEMENT == "nf4" else 2.0 ** short_of(ELEMENT)


@gluon.constexpr_function
def scales_of_step(GROUP):
    """Scales that a row has in one step; GROUP columns share one, 0: all do."""
    return 1 if GROUP == 0 or GROUP >= 64 else 64 // GROUP


@gluon.constexpr_function
def loaded_layout(WORDS, STEPS=1):
    """[32, WORDS * STEPS] words: nibbles for one lane each, bytes in both lanes that share them."""
    if WORDS == 8:
        registers, lanes = [[0, 4], [0, 8]][:STEPS], [[0, 1], [0, 2]]
    else:
        registers, lanes = [[0, 2], [0, 4], [0, 8]], [[0, 0], [0, 1]]
    lanes += [[1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32, WORDS * STEPS])


@gluon.constexpr_function
def pairs_layout(WORDS, COUNT):
    """[32, COUNT, chunks of a scale, lanes] pairs of one step, whose rows have COUNT scales.

    Nibbles: chunks of 8 columns in lanes' order, each with a pair for 4 lanes. Where 16 columns
    share a scale, those are two lanes' of four chunks. Bytes: chunks of 4 columns and 2 lanes, of
    which two lie beside each other.
    """
    inner = WORDS // COUNT
    if WORDS == 8 and COUNT == 4:
        shape = [32, 4, 4, 2]
        registers = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 2, 0, 0]]
        lanes = [[0, 0, 0, 1], [0, 1, 0, 0]]
    elif WORDS == 8:
        shape = [32, COUNT, inner, 4]
        registers = [[0, chunk // inner, chunk % inner, 0] for chunk in (1, 2, 4)]
        lanes = [[0, 0, 0, 1], [0, 0, 0, 2]]
    else:
        shape = [32, COUNT, inner, 2]
        registers = [[0, chunk // inner, chunk % inner, 0] for chunk in (2, 4, 8)]
        lanes = [[0, 0, 0, 1], [0, 0, 1, 0]]
    lanes += [[1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[8, 0, 0, 0], [16, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


@gluon.constexpr_function
def by_scale(WORDS, COUNT):
    """Layout of [32, COUNT] scales."""
    return gl.SliceLayout(2, gl.SliceLayout(3, pairs_layout(WORDS, COUNT)))


@gluon.jit
def selectors(ELEMENT: gl.constexpr, COUNT: gl.constexpr):
    """What a lane takes of words: its number where columns have six bits, else which bytes, as prmt
    wants to know it, [1, 1, 1, lanes]."""
    if is_sextet(ELEMENT):
        return lanes_of_row()
    else:
        layout: gl.constexpr = pairs_layout(chunks_of_step(ELEMENT), COUNT)
        lane_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
        lane = gl.arange(0, layout.shape[3], lane_layout)
        chosen = lane * 0x0202 + 0x4140 if ELEMENT == "int8" else lane * 0x2020 + 0x1404
        return gl.expand_dims(gl.expand_dims(gl.expand_dims(chosen, 0), 1), 2)


@gluon.jit
def loaded(w_ring, at, row, selector, ELEMENT: gl.constexpr):
    """The words of SIDE rows from ``row`` on of the step at ``at`` in the ring."""
    if is_sextet(ELEMENT):
        return load_sextets(w_ring, at, row, selector, SIDE)
    elif has_minima(ELEMENT):
        return load_planes(w_ring, boxes_of_step(ELEMENT) * at, row, SIDE, ELEMENT)
    else:
        layout: gl.constexpr = loaded_layout(w_ring.shape[2])
        return w_ring.index(at).slice(row, SIDE, 0).load(layout)


@gluon.jit
def loaded_pair(w_ring, at, row, ELEMENT: gl.constexpr):
    """What ``loaded`` gives of both steps that one load has brought."""
    box = w_ring.index(at).slice(row, SIDE, 0)
    if has_minima(ELEMENT):
        return load_planes_pair(box, SIDE)
    else:
        words = gl.reshape(box.load(loaded_layout(8, 2)), [SIDE, 2, 8])
        first, second = gl.split(gl.permute(words, [0, 2, 1]))
        layout: gl.constexpr = loaded_layout(8)
        first = gl.convert_layout(first, layout, assert_trivial=True)
        return first, gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def factors(scale, ELEMENT: gl.constexpr):
    """Scales [32, COUNT] as a tuple of pairs [32, COUNT, 1, 1]; those of floats in four or
    six bits times 2^63. Two in bytes may come as words [32, 1].

    Numbers of eight bits in groups of 32 get what bf16 cuts off a scale as a second pair: nearly
    all of their products are rounded, and twice would be too often.
    """
    if scale.dtype == gl.int32:
        first, second = power_pairs(scale)
        both = gl.reshape(gl.join(first, second), [SIDE, 2])
        layout: gl.constexpr = by_scale(chunks_of_step(ELEMENT), 2)
        return (spread(gl.convert_layout(both, layout, assert_trivial=True)),)
    elif short_of(ELEMENT) != 0 and scale.dtype == gl.uint8:
        return (spread(power_pair(scale.to(gl.int32))),)
    elif ELEMENT == "e2m1":
        return (spread(as_pair(scale.to(gl.float32) * HALF_EXPONENT)),)
    elif ELEMENT == "int4" or scale.dtype == gl.uint8 or scale.dtype == gl.bfloat16:
        return (spread(as_pair(float_scale(scale))),)
    else:
        exact = float_scale(scale)
        rest = exact - exact.to(gl.bfloat16).to(gl.float32)
        return spread(as_pair(exact)), spread(as_pair(rest))


@gluon.jit
def spread(pair):
    return gl.expand_dims(gl.expand_dims(pair, 2), 3)


@gluon.jit
def in_chunks(first, second, third, fourth, COUNT: gl.constexpr):
    """What words [32, 8] of nibbles have for four chunks each, by scales; moves no data."""
    even, odd = gl.join(first, third), gl.join(second, fourth)
    pairs = gl.reshape(gl.join(even, odd), [SIDE, 2, 4, 4])
    if COUNT == 4:
        pairs = gl.permute(gl.reshape(pairs, [SIDE, 4, 2, 4]), [0, 1, 3, 2])
    else:
        pairs = gl.reshape(gl.permute(pairs, [0, 1, 3, 2]), [SIDE, COUNT, 8 // COUNT, 4])
    return gl.convert_layout(pairs, pairs_layout(8, COUNT), assert_trivial=True)


@gluon.jit
def taken(words, k, zero, selector, ELEMENT: gl.constexpr, COUNT: gl.constexpr):
    """Pairs of numbers from what ``loaded`` gave of step k; zero [32, COUNT] or None."""
    layout: gl.constexpr = pairs_layout(chunks_of_step(ELEMENT), COUNT)
    if ELEMENT == "int4":
        first, second, third, fourth = take_int4(words)
        pairs = in_chunks(first, second, third, fourth, COUNT)
        if zero is None:
            middle = gl.full([1, 1, 1, 1], 0x43084308, gl.int32, layout)
        else:
            middle = spread(as_pair(zero.to(gl.float32) + 128.0))
        return less(pairs, middle)
    elif ELEMENT == "e2m1":
        first, second, third, fourth = take_e2m1(words)
        return in_chunks(first, second, third, fourth, COUNT)
    elif ELEMENT == "nf4" or ELEMENT == "iq4_nl":
        first, second, third, fourth = take_entries(words, ELEMENT)
        return in_chunks(first, second, third, fourth, COUNT)
    elif has_minima(ELEMENT):
        first, second, third, fourth = take_planes(words, k, ELEMENT)
        return in_chunks(first, second, third, fourth, COUNT)
    elif is_sextet(ELEMENT):
        first, second, third, fourth = take_sextets(words, selector, ELEMENT)
        return in_chunks(first, second, third, fourth, COUNT)
    else:
        words = gl.reshape(words, [SIDE, COUNT, words.shape[1] // COUNT])
        shared: gl.constexpr = gl.SliceLayout(3, layout)
        words = gl.expand_dims(gl.convert_layout(words, shared, assert_trivial=True), 3)
        if ELEMENT == "int8":
            return take_int8(words, selector)
        else:
            return take_e4m3(words, selector)


@gluon.jit
def ordered_columns(even, odd):
    """[32, STEP] columns from both halves of pairs; moves no data."""
    both = gl.join(even, odd)
    if even.shape[1] == 4:
        both = gl.permute(gl.reshape(both, [SIDE, 2, 2, 4, 2, 2]), [0, 1, 3, 2, 4, 5])
    return gl.reshape(both, [SIDE, STEP])


@gluon.jit
def side(pairs, factor):
    """bf16 [32, STEP]: pairs times what ``factors`` gave for them, if anything."""
    if len(factor) == 0:
        even, odd = halves(pairs)
    elif len(factor) == 1:
        even, odd = times(pairs, factor[0])
    elif factor[0].dtype == gl.float32:
        even, odd = times_plus(pairs, factor[0], factor[1])
    else:
        even, odd = times_both(pairs, factor[0], factor[1])
    return ordered_columns(even, odd)


@gluon.jit
def fragment(low, high, MMA: gl.constexpr):
    """low and high [32, STEP] as an A operand [64, STEP], eights in turn; moves no data."""
    both = gl.reshape(gl.join(low, high), [SIDE // 8, 8, STEP, 2])
    both = gl.reshape(gl.permute(both, [0, 3, 1, 2]), [2 * SIDE, STEP])
    return gl.convert_layout(both, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
