"""Waiting, inside a product, for the rows that a block needs (``kernels/align_arrivals.py``)."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.align_arrivals import Arrivals
from fusedmoe.kernels.triton.peer_flags import STATE_COMBINE, STATE_ERROR


def numbers_of(
    arrivals: Arrivals | None,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, int], int]:
    """The tensors, numbers and ranks of ``await_rows``; None: all rows are here."""
    if arrivals is None:
        return (None, None, None, None), (0, 0), 1
    here = arrivals.rows.here
    return arrivals.tensors, (here.rank, arrivals.rows.max_polls), here.layout.world


@gluon.jit
def is_late(flag_ptr, epoch):
    return gl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") != epoch


@gluon.jit
def await_rows(arrivals, block, all_here, WORLD: gl.constexpr):
    """Until the rows of a block are here: whether all rows are.

    arrivals: (early blocks, flags, state, error, this rank, max_polls); the first of them None: no
    row is late.
    """
    early_ptr, flags_ptr, state_ptr, error_ptr, me, max_polls = arrivals
    if early_ptr is not None:  # noqa: SIM102 (a compile-time branch)
        if (block >= gl.load(early_ptr)) & (all_here == 0):
            epoch = gl.load(state_ptr + STATE_COMBINE)
            for step in range(1, WORLD):
                source = (me + WORLD - step) % WORLD
                broken = gl.load(state_ptr + STATE_ERROR)
                late = is_late(flags_ptr + source, epoch)
                polls = 0
                while late & (polls < max_polls) & (broken == 0):
                    late = is_late(flags_ptr + source, epoch)
                    polls += 1
                if late & (broken == 0):
                    gl.store(state_ptr + STATE_ERROR, source + 1)
                    gl.store(error_ptr, source + 1)
            all_here = 1
    return all_here
