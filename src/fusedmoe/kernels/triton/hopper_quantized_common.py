"""From bytes in shared memory to an operand of the WGMMA in registers, for every 4- and 8-bit type.

A thread takes 32 neighbouring bytes of a weight row. A sum over columns may be taken in any order:
the bytes a thread holds count as the columns that the instruction expects of it (``fragment``), and
x is put into the same order when it is copied to shared memory (``put_x``).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.triton.quantized_common import (
    e4m3_bf16,
    float_scale,
    half_scale_bits,
    int8_bf16,
    times_bf16,
)

HALF_EXPONENT = gl.constexpr(2.0**63)


@gluon.constexpr_function
def stored_layout(TILE, num_warps):
    """[TILE, 128] bytes: 32 neighbours of one row per thread, rows m and m + TILE / 2 in one."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [TILE // 2, 0]]
    lanes = [[0, 32], [0, 64], [1, 0], [2, 0], [4, 0]]
    warps = [[8 << i, 0] for i in range(num_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [TILE, 128])


@gluon.constexpr_function
def grouped_layout(TILE, PER, num_warps):
    """The same as [TILE, 128 / PER, PER]."""
    flat = stored_layout(TILE, num_warps)

    def split(bases):
        return [[row, col // PER, col % PER] for row, col in bases]

    return gl.DistributedLinearLayout(
        split(flat.reg_bases),
        split(flat.lane_bases),
        split(flat.warp_bases),
        [],
        [TILE, 128 // PER, PER],
    )


@gluon.jit
def int4_words(packed):
    """Nibbles 0, 4, 1, 5 and 2, 6, 3, 7 of each word, plus 128."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 a;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 a, $4, 4;
            lop3.b32 $1, a, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 a, $4, 8;
            lop3.b32 $2, a, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 a, $4, 12;
            lop3.b32 $3, a, 0x000F000F, 0x43004300, 0xEA;
        }""",
        "=r,=r,=r,=r,r",
        [packed],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def e2m1_words(packed):
    """Nibbles in the same order, times 2^-126."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 s, t;
            shl.b32 s, $4, 12;
            shl.b32 t, $4, 6;
            and.b32 s, s, 0x80008000;
            lop3.b32 $0, t, 0x01C001C0, s, 0xEA;
            shl.b32 s, $4, 8;
            shl.b32 t, $4, 2;
            and.b32 s, s, 0x80008000;
            lop3.b32 $1, t, 0x01C001C0, s, 0xEA;
            shl.b32 s, $4, 4;
            shr.u32 t, $4, 2;
            and.b32 s, s, 0x80008000;
            lop3.b32 $2, t, 0x01C001C0, s, 0xEA;
            shr.u32 t, $4, 6;
            and.b32 s, $4, 0x80008000;
            lop3.b32 $3, t, 0x01C001C0, s, 0xEA;
        }""",
        "=r,=r,=r,=r,r",
        [packed],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def minus_bf16(x, y):
    return gl.inline_asm_elementwise(
        "sub.rn.bf16x2 $0, $1, $2;",
        "=r,r,r",
        [x, y],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def scaled(numbers, scale, PER: gl.constexpr):
    """numbers [TILE, 128] times scale [TILE, 128 / PER], one per PER stored elements."""
    TILE: gl.constexpr = numbers.shape[0]
    layout: gl.constexpr = grouped_layout(TILE, PER, gl.num_warps())
    parts = gl.convert_layout(gl.reshape(numbers, [TILE, 128 // PER, PER]), layout)
    parts = times_bf16(parts, gl.expand_dims(scale, 2))
    return gl.convert_layout(gl.reshape(parts, [TILE, 128]), stored_layout(TILE, gl.num_warps()))


@gluon.jit
def lowered(numbers, middle, PER: gl.constexpr):
    """numbers [TILE, 128] less middle [TILE, 128 / PER]."""
    TILE: gl.constexpr = numbers.shape[0]
    layout: gl.constexpr = grouped_layout(TILE, PER, gl.num_warps())
    parts = gl.convert_layout(gl.reshape(numbers, [TILE, 128 // PER, PER]), layout)
    parts = minus_bf16(parts, gl.expand_dims(middle, 2))
    return gl.convert_layout(gl.reshape(parts, [TILE, 128]), stored_layout(TILE, gl.num_warps()))


@gluon.jit
def fragment(numbers, MMA: gl.constexpr):
    """numbers [TILE, 128] as an A operand: no value changes its thread, only its column's name."""
    TILE: gl.constexpr = numbers.shape[0]
    named = gl.reshape(numbers, [2, TILE // 16, 8, 4, 16, 2])
    named = gl.reshape(gl.permute(named, [1, 0, 2, 4, 3, 5]), [TILE, 128])
    return gl.convert_layout(named, gl.DotOperandLayout(0, MMA, 2))


@gluon.jit
def put_x(low_x, high_x, x, HALVES: gl.constexpr):
    """Copy x [BN, columns of a step] to shared memory in the order in which ``fragment`` names
    columns; two halves where a byte holds two columns."""
    BN: gl.constexpr = x.shape[0]
    if HALVES:
        bits = gl.permute(gl.reshape(x, [BN, 4, 8, 2, 2, 2]), [0, 2, 5, 1, 3, 4])
        low, high = gl.split(gl.reshape(bits, [BN, 128, 2]))
        low_x.store(low)
        high_x.store(high)
    else:
        bits = gl.permute(gl.reshape(x, [BN, 4, 16, 2]), [0, 2, 1, 3])
        low_x.store(gl.reshape(bits, [BN, 128]))


@gluon.jit
def word_numbers(packed, zero, scale, ELEMENT: gl.constexpr, PER: gl.constexpr):
    """Both halves of the nibbles as numbers times their scales [TILE, 128 / PER] (None: as they
    are; e2m1 keeps 2^-63 of its exponent to itself)."""
    if ELEMENT == "int4":
        even, odd = int4_words(packed)
        if zero is None:
            middle = gl.full(packed.shape, 136.0, gl.bfloat16, packed.type.layout)
            even, odd = minus_bf16(even, middle), minus_bf16(odd, middle)
        else:
            middle = (zero.to(gl.float32) + 128.0).to(gl.bfloat16)
            even, odd = lowered(even, middle, PER), lowered(odd, middle, PER)
    else:
        even, odd = e2m1_words(packed)
    if scale is not None:
        if ELEMENT == "e2m1":
            factor = half_scale_bits(scale).to(gl.bfloat16, bitcast=True)
        else:
            factor = float_scale(scale).to(gl.bfloat16)
        even, odd = scaled(even, factor, PER), scaled(odd, factor, PER)
    return even, odd


@gluon.jit
def byte_numbers(packed, scale, ELEMENT: gl.constexpr, PER: gl.constexpr):
    """Bytes as numbers, times their scales."""
    value = int8_bf16(packed) if ELEMENT == "int8" else e4m3_bf16(packed)
    if scale is not None:
        value = scaled(value, float_scale(scale).to(gl.bfloat16), PER)
    return value


@gluon.jit
def row_number(ptr, row, step, inside):
    """ptr[row * step] as fp32 [rows, 1], 0 where a row is not inside."""
    value = gl.load(ptr + row * step, inside, 0.0)
    return gl.expand_dims(float_scale(value), 1)


@gluon.jit
def store_features(
    out_ptr, value, block, sorted_ptr, R, column, N: gl.constexpr, LONE: gl.constexpr
):
    """out[slot, column + m] = value[m, n] for the real slots of a block."""
    HALF: gl.constexpr = value.shape[0]
    BN: gl.constexpr = value.shape[1]
    layout: gl.constexpr = gl.BlockedLayout(
        [8, 1], [HALF // 8, 256 // HALF], [1, gl.num_warps()], [0, 1]
    )
    slots, live = find_slots(block, sorted_ptr, R, LONE, BN, gl.SliceLayout(0, layout))
    column += gl.arange(0, HALF, gl.SliceLayout(1, layout))
    row = gl.where(live, slots, 0).to(gl.int64) * N
    at = out_ptr + gl.expand_dims(row, 0) + gl.expand_dims(column, 1)
    value = gl.convert_layout(value.to(out_ptr.dtype.element_ty), layout)
    gl.store(at, value, gl.expand_dims(live, 0) & gl.expand_dims(column < N, 1))


@gluon.jit
def find_slots(block, sorted_ptr, R, LONE: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """(slots [BN], which are real) of a block."""
    place = gl.arange(0, BN, LAYOUT)
    if LONE:
        return gl.where(place == 0, block, -1), place == 0
    else:
        slots = gl.load(sorted_ptr + block * BN + place, cache_modifier=".cg")
        return slots, (slots >= 0) & (slots < R)


@gluon.jit
def tile_features(tile, N, TILE: gl.constexpr, GATED: gl.constexpr, LAYOUT: gl.constexpr):
    """(shard, feature) of the rows [TILE] of a tile; features past N - 1 are taken for it."""
    HALF: gl.constexpr = TILE // 2
    m = gl.arange(0, TILE, LAYOUT)
    if GATED:
        return m // HALF, gl.minimum(tile * HALF + m % HALF, N - 1)
    else:
        return m * 0, gl.minimum(tile * TILE + m, N - 1)


@gluon.jit
def load_groups(ptrs, first, D, SUB: gl.constexpr, GROUP: gl.constexpr):
    """Scales [TILE, columns of a step / SUB] from column ``first`` on."""
    COUNT: gl.constexpr = ptrs.shape[1]
    layout: gl.constexpr = gl.SliceLayout(0, ptrs.type.layout)
    column = gl.minimum(first + gl.arange(0, COUNT, layout) * SUB, D - 1)
    return gl.load(ptrs + gl.expand_dims(column // GROUP, 0))
