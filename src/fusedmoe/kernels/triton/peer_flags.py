"""What tells the ranks of a host about each other: flags in the peers' memory, and an epoch.

announce_kernel  grid (1,): raises the flag that this rank's outputs are ready.
wait_kernel      grid (1,): waits for the others' flags of any kind, and keeps no more of the GPU
                 than that from what runs meanwhile.

Every rank owns a buffer that all others can address (``bases`` int64 [WORLD]: where they lie for
this rank). Flags hold an epoch, which lives in ``state`` on the device so that a graph can be
replayed: a dispatch takes STATE_DISPATCH and hands it to the combine, whose last program moves it
on. A rank sends its next dispatch only after its combine, which waits for every other rank's
experts; so no buffer is written while somebody still reads it.

Waits end after ``max_polls`` looks: the rank that is missing is written, plus one, to ``error``
(pinned host memory) and to ``state``, after which nothing waits any more.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.peer_layout import PeerView
from fusedmoe.kernels.triton.launch import Launcher

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.int8: tl.int8,
}

STATE_DISPATCH = tl.constexpr(0)
STATE_COMBINE = tl.constexpr(1)
STATE_ERROR = tl.constexpr(2)
STATE_DONE = tl.constexpr(3)


@triton.jit
def peer_pointer(bases_ptr, rank, offset, dtype: tl.constexpr):
    """Where a section of ``rank``'s buffer begins, as a pointer to ``dtype``."""
    address = tl.load(bases_ptr + rank) + offset
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def wait_for_flags(
    bases_ptr, state_ptr, error_ptr, epoch, flags_at, max_polls, me, WORLD: tl.constexpr
):
    """Until every rank's flag in this rank's buffer shows ``epoch``."""
    rank = tl.arange(0, WORLD)
    flags_ptr = peer_pointer(bases_ptr, me, flags_at, tl.int32) + rank
    broken = tl.load(state_ptr + STATE_ERROR)
    late = tl.atomic_add(flags_ptr, 0, sem="acquire", scope="sys") != epoch
    polls = 0
    while (tl.max(late.to(tl.int32), axis=0) > 0) & (polls < max_polls) & (broken == 0):
        late = tl.atomic_add(flags_ptr, 0, sem="acquire", scope="sys") != epoch
        polls += 1
    missing = tl.max(tl.where(late, rank + 1, 0), axis=0)
    if (missing > 0) & (broken == 0):
        tl.store(state_ptr + STATE_ERROR, missing)
        tl.store(error_ptr, missing)


@triton.jit
def raise_flags(bases_ptr, epoch, flags_at, me, WORLD: tl.constexpr):
    """Show ``epoch`` at every rank, after everything that this program knows to be written."""
    there = tl.load(bases_ptr + tl.arange(0, WORLD)) + flags_at
    flags_ptr = there.to(tl.pointer_type(tl.int32)) + me
    tl.atomic_xchg(flags_ptr, epoch, sem="release", scope="sys")


@triton.jit
def announce_kernel(bases_ptr, state_ptr, flags_at, me, WORLD: tl.constexpr):
    raise_flags(bases_ptr, tl.load(state_ptr + STATE_COMBINE), flags_at, me, WORLD)


@triton.jit
def wait_kernel(bases_ptr, state_ptr, error_ptr, flags_at, max_polls, me, WORLD: tl.constexpr):
    epoch = tl.load(state_ptr + STATE_COMBINE)
    wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, max_polls, me, WORLD)


_announce = Launcher(announce_kernel)
_wait = Launcher(wait_kernel)


def announce(here: PeerView) -> None:
    _announce(
        (1, 1),
        (here.bases, here.state),
        (here.layout.combine_flags_at, here.rank),
        (here.layout.world,),
        1,
    )


def wait(here: PeerView, flags_at: int, max_polls: int) -> None:
    _wait(
        (1, 1),
        (here.bases, here.state, here.error),
        (flags_at, max_polls, here.rank),
        (here.layout.world,),
        1,
    )
