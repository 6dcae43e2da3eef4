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
    here = arrivals.here
    return arrivals.tensors, (here.rank, arrivals.max_polls), here.layout.world


@gluon.jit
def is_late(flag_ptr, epoch):
    return gl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") != epoch


@gluon.jit
def await_rows(arrivals, block, known, WORLD: gl.constexpr):
    """Until the rows of a block are here: how many other ranks' rows are known to be.

    arrivals: (needs, flags, state, error, this rank, max_polls); ``needs`` None: all are here.
    """
    needs_ptr, flags_ptr, state_ptr, error_ptr, me, max_polls = arrivals
    if needs_ptr is not None:
        needs = gl.load(needs_ptr + block)
        while known < needs:
            known += 1
            source = (me + WORLD - known) % WORLD
            epoch = gl.load(state_ptr + STATE_COMBINE)
            broken = gl.load(state_ptr + STATE_ERROR)
            late = is_late(flags_ptr + source, epoch)
            polls = 0
            while late & (polls < max_polls) & (broken == 0):
                late = is_late(flags_ptr + source, epoch)
                polls += 1
            if late & (broken == 0):
                gl.store(state_ptr + STATE_ERROR, source + 1)
                gl.store(error_ptr, source + 1)
    return known
