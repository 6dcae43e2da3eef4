"""Rows of the second product straight to the ranks whose tokens they are.

A consumer warpgroup turns its tile, by way of its two output buffers, into lines of 128 bytes and
stores each where its slot's pick lies in the buffer of the token's rank (``PeerSums``).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.peer_layout import PeerSums
from fusedmoe.kernels.triton.gluon_names import barrier
from fusedmoe.kernels.triton.hopper_prefill_common import HALF_M, PART_ACC

LINES = gl.constexpr(gl.BlockedLayout([4, 8], [4, 8], [4, 1], [1, 0]))
LINE = gl.constexpr(gl.SliceLayout(1, LINES.value))


def push_arguments(
    taker: PeerSums | None,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, int]]:
    """The tensors and numbers that ``lines_of`` takes; None: nothing is pushed."""
    if taker is None:
        return (None,), (0, 0)
    layout = taker.here.layout
    return (taker.here.bases,), (layout.picks_at(taker.rows), taker.rows * layout.topk)


@gluon.jit
def slots_of_half(sorted_ptr, row):
    """The slots of HALF_M rows, to be asked for before the products."""
    return gl.load(sorted_ptr + row + gl.arange(0, HALF_M, LINE), cache_modifier=".cg")


@gluon.jit
def lines_of(push, slots, R, H: gl.constexpr, DTYPE: gl.constexpr):
    """(where each slot's row begins [HALF_M, 1], whether there is one)."""
    bases_ptr, picks_at, share = push
    live = (slots >= 0) & (slots < R)
    slot = gl.where(live, slots, 0)
    home = slot // share
    begin = gl.load(bases_ptr + home) + picks_at
    begin += (slot - home * share).to(gl.int64) * (H * DTYPE.primitive_bitwidth // 8)
    lines = gl.expand_dims(begin, 1).to(gl.pointer_type(DTYPE))
    return gl.multiple_of(lines, [16, 16]), gl.expand_dims(live, 1)


@gluon.jit
def push_tile(lines, live, buffers, value, column, H: gl.constexpr):
    """Store [HALF_M, TILE_N], as ``store_tile``."""
    PART: gl.constexpr = buffers.shape[2]
    parts = gl.permute(gl.reshape(value.to(buffers.dtype), [HALF_M, 2, PART]), [0, 2, 1])
    left, right = gl.split(parts)
    left = gl.convert_layout(left, PART_ACC)
    push_part(lines, live, buffers.index(0), left, column, H)
    right = gl.convert_layout(right, PART_ACC)
    push_part(lines, live, buffers.index(1), right, column + PART, H)


@gluon.jit
def push_part(lines, live, buffer, value, column, H: gl.constexpr):
    """Whoever is still reading the other buffer is done with this one: there is a barrier between
    a part and the next."""
    buffer.store(value)
    barrier()
    column += gl.arange(0, buffer.shape[1], gl.SliceLayout(0, LINES))
    column = gl.expand_dims(column, 0)
    gl.store(lines + column, buffer.load(LINES), mask=live & (column < H))
