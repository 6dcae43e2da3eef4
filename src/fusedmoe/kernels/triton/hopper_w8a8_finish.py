"""The end of a task of ``hopper_w8a8``: from sums in registers to rows of the output."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.hopper_common import hopper_activation
from fusedmoe.kernels.triton.quantize import largest_magnitude
from fusedmoe.kernels.triton.quantized_common import float_scale


@gluon.constexpr_function
def halves_layout(HALF, N, num_warps):
    """[HALF, N, 2]: both halves of a feature in one thread."""
    down = min(num_warps, HALF // 32)
    across = num_warps // down
    return gl.BlockedLayout([1, max(1, N // across), 2], [32, 1, 1], [down, across, 1], [2, 1, 0])


@gluon.jit
def upper_and_lower(acc):
    """The two halves of the rows of acc, in one layout."""
    HALF: gl.constexpr = acc.shape[0] // 2
    N: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = halves_layout(HALF, N, gl.num_warps())
    pairs = gl.permute(gl.reshape(acc, [2, HALF, N]), [1, 2, 0])
    return gl.split(gl.convert_layout(pairs, layout))


@gluon.constexpr_function
def features_layout(HALF, num_warps):
    """[HALF, BN] with neighbouring features in a thread: the shape of a transposed store."""
    return gl.BlockedLayout([8, 1], [HALF // 8, 256 // HALF], [1, num_warps], [0, 1])


@gluon.jit
def store_rows(out_ptr, value, slots, column, end, N: gl.constexpr):
    """out[slot, column + m] = value[m, n] below ``end``, for slots [BN] that are not negative."""
    layout: gl.constexpr = features_layout(value.shape[0], gl.num_warps())
    column += gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
    live = slots >= 0
    row = gl.where(live, slots, 0).to(gl.int64) * N
    at = out_ptr + gl.expand_dims(row, 0) + gl.expand_dims(column, 1)
    value = gl.convert_layout(value.to(out_ptr.dtype.element_ty), layout)
    mask = gl.expand_dims(live, 0) & gl.expand_dims(column < end, 1)
    # The next launch reads what weights, streaming by, would push out of the L2.
    gl.store(at, value, mask, eviction_policy="evict_last")


@gluon.jit
def raise_largest(largest_ptr, value, slots, column, end):
    """largest[slot] = max(largest[slot], |value[:, n]| as it is stored), as bits."""
    layout: gl.constexpr = value.type.layout
    m = column + gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
    value = gl.where(gl.expand_dims(m < end, 1), value.to(gl.bfloat16).to(gl.float32), 0.0)
    bits = largest_magnitude(value, 0).to(gl.int32, bitcast=True)
    slots = gl.convert_layout(slots, gl.SliceLayout(0, layout))
    gl.atomic_max(largest_ptr + gl.maximum(slots, 0), bits, mask=slots >= 0, sem="relaxed")


@gluon.jit
def row_number(ptr, row, step, inside):
    """ptr[row * step] as fp32 [rows, 1], 0 where a row is not inside."""
    value = gl.load(ptr + row * step, inside, 0.0)
    return gl.expand_dims(float_scale(value), 1)


@gluon.jit
def finish_task(
    total, expert, column, slots, bias_ptr, out_ptr, largest_ptr, bias_steps, numbers,
    CASE: gl.constexpr,
):  # fmt: skip
    """Bias, activation and store of total [rows of a tile, BN], whose features begin at ``column``.

    slots [BN] in the layout of ``store_rows``, -1 for none; bias_steps: (from shard to shard, from
    row to row); numbers: (limit, alpha, beta).
    """
    N: gl.constexpr = CASE.N
    VALID: gl.constexpr = CASE.VALID
    GATED: gl.constexpr = CASE.GATED
    FORMULA: gl.constexpr = CASE.FORMULA
    upper, lower = upper_and_lower(total)
    m = column + gl.arange(0, upper.shape[0], gl.SliceLayout(1, upper.type.layout))
    high = m if GATED else m + VALID
    if bias_ptr is not None:
        bias_at = bias_ptr + expert.to(gl.int64) * (2 * N if GATED else N)
        apart = bias_steps[0] if GATED else 0
        upper += row_number(bias_at, m, bias_steps[1], m < N)
        lower += row_number(bias_at + apart, high, bias_steps[1], high < N)
    if GATED:
        upper = hopper_activation(FORMULA, upper, lower, numbers[0], numbers[1], numbers[2])
    elif FORMULA != "":
        upper = plain_activation(FORMULA, upper)
        lower = plain_activation(FORMULA, lower)
    end = gl.minimum(column + VALID, N)
    if largest_ptr is not None:
        raise_largest(largest_ptr, upper, slots, column, end)
    store_rows(out_ptr, upper, slots, column, end, N)
    if not GATED:
        column += VALID
        end = gl.minimum(column + VALID, N)
        if largest_ptr is not None:
            raise_largest(largest_ptr, lower, slots, column, end)
        store_rows(out_ptr, lower, slots, column, end, N)
