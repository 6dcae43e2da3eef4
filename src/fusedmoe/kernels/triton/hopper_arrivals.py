"""Waiting, inside a product, for the rows that a block needs (``kernels/align_arrivals.py``)."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.align_arrivals import Arrivals
from fusedmoe.kernels.triton.peer_flags import LOOKS, STATE_COMBINE, STATE_ERROR


def arrival_arguments(
    arrivals: Arrivals | None,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, int], int]:
    """The tensors, numbers and ranks of ``await_rows``; None: all rows are here."""
    if arrivals is None:
        return (None, None, None, None), (0, 0), 1
    here = arrivals.rows.here
    return arrivals.tensors, (here.rank, arrivals.rows.timeout_us), here.layout.world


@gluon.jit
def is_late(flag_ptr, epoch):
    """Whether a flag does not show ``epoch`` after LOOKS looks."""
    late = gl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") != epoch
    looks = 1
    while late & (looks < LOOKS):
        late = gl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") != epoch
        looks += 1
    return late


@gluon.jit
def microseconds():
    """The GPU's clock."""
    now = gl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=gl.int64, is_pure=False, pack=1
    )
    return now // 1000


@gluon.jit
def await_rows(arrivals, block, all_here, WORLD: gl.constexpr):
    """Wait until the rows of a block are here; returns whether all rows are.

    arrivals: (early blocks, flags, state, error, this rank, timeout_us); the first of them None: no
    row is late.
    """
    early_ptr, flags_ptr, state_ptr, error_ptr, me, timeout_us = arrivals
    if early_ptr is not None:  # noqa: SIM102 (a compile-time branch)
        if (block >= gl.load(early_ptr)) & (all_here == 0):
            epoch = gl.load(state_ptr + STATE_COMBINE)
            for step in range(1, WORLD):
                source = (me + WORLD - step) % WORLD
                late = is_late(flags_ptr + source, epoch)
                if late:
                    begun = microseconds()
                    broken = 0
                    while late & (broken == 0):
                        late = is_late(flags_ptr + source, epoch)
                        waited = microseconds() - begun
                        missing = gl.where(late & (waited >= timeout_us), source + 1, 0)
                        # As ``peer_flags.give_up``: one thread's clock counts.
                        word_ptr = state_ptr + STATE_ERROR
                        gl.atomic_cas(word_ptr, 0, missing, sem="relaxed", scope="gpu")
                        broken = gl.atomic_add(word_ptr, 0, sem="relaxed", scope="gpu")
                        if late & (broken > 0):
                            gl.store(error_ptr, broken)
            all_here = 1
    return all_here
