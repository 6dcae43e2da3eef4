"""What tells the ranks of a host about each other: flags in the peers' memory, and an epoch.

announce_kernel  grid (1,): raises the flag that this rank's outputs are ready.
wait_kernel      grid (1,): waits for the others' flags of any kind, and keeps no more of the GPU
                 than that from what runs meanwhile.

Every rank owns a buffer that all others can address (``bases`` int64 [WORLD]: where they lie for
this rank). Flags hold an epoch, which lives in ``state`` on the device so that a graph can be
replayed: a dispatch takes STATE_DISPATCH, and its last program hands it to the combine and moves it
on. A rank sends its next dispatch only after its combine, which waits for every other rank's
experts; so no buffer is written while somebody still reads it.

Waits end after ``timeout_us`` microseconds: the rank that is missing is written, plus one, to
``error`` (pinned host memory) and to ``state``, after which nothing waits for longer than LOOKS
looks at its flags. So often the clock is asked, which takes longer than a look, and never by a
wait that ends before. Looks are no clock: on H200s one takes a third of a microsecond, and more
where many programs look at once.
"""

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import globaltimer

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

LOOKS = tl.constexpr(128)
HAS_CLOCK = tl.constexpr(not knobs.runtime.interpret)


@triton.jit
def microseconds(looks):
    """The GPU's clock; under the interpreter, which has none, one microsecond per look."""
    if HAS_CLOCK:
        return globaltimer() // 1000
    else:
        return looks


@triton.jit
def peer_pointer(bases_ptr, rank, offset, dtype: tl.constexpr):
    """Where a section of ``rank``'s buffer begins, as a pointer to ``dtype``."""
    address = tl.load(bases_ptr + rank) + offset
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def look(flags_ptr, epoch, WORLD: tl.constexpr):
    """After LOOKS looks, or as soon as all flags show ``epoch``: the last rank that is late plus
    one, or 0."""
    flags_ptr += tl.arange(0, WORLD)
    missing = 1
    looks = 0
    while (missing > 0) & (looks < LOOKS):
        late = tl.atomic_add(flags_ptr, 0, sem="acquire", scope="sys") != epoch
        missing = tl.max(tl.where(late, tl.arange(0, WORLD) + 1, 0), axis=0)
        looks += 1
    return missing


@triton.jit
def give_up(state_ptr, missing, waited, timeout_us):
    """Who was missed on this GPU, plus one, or 0: after ``timeout_us`` it is ``missing``.

    Threads read the clock at different times, but have to leave a loop together: one of them
    exchanges, its clock counts, and all of them go by what it reads then.
    """
    missing = tl.where(waited < timeout_us, 0, missing)
    tl.atomic_cas(state_ptr + STATE_ERROR, 0, missing, sem="relaxed", scope="gpu")
    return tl.atomic_add(state_ptr + STATE_ERROR, 0, sem="relaxed", scope="gpu")


@triton.jit
def wait_for_flags(
    bases_ptr, state_ptr, error_ptr, epoch, flags_at, timeout_us, me, WORLD: tl.constexpr
):
    """Wait until every rank's flag in this rank's buffer shows ``epoch``."""
    flags_ptr = peer_pointer(bases_ptr, me, flags_at, tl.int32)
    missing = look(flags_ptr, epoch, WORLD)
    if missing > 0:
        looks = tl.full((), 0, tl.int64)
        begun = microseconds(looks)
        broken = 0
        while (missing > 0) & (broken == 0):
            missing = look(flags_ptr, epoch, WORLD)
            looks += LOOKS
            if missing > 0:
                broken = give_up(state_ptr, missing, microseconds(looks) - begun, timeout_us)
        if broken > 0:
            tl.store(error_ptr, broken)


@triton.jit
def raise_flags(bases_ptr, epoch, flags_at, me, WORLD: tl.constexpr):
    """Show ``epoch`` at every rank, after everything that this program knows to be written."""
    there = tl.load(bases_ptr + tl.arange(0, WORLD)) + flags_at
    flags_ptr = there.to(tl.pointer_type(tl.int32)) + me
    tl.atomic_xchg(flags_ptr, epoch, sem="release", scope="sys")


@triton.jit
def tell_kind(bases_ptr, pushed, kinds_at, me, WORLD: tl.constexpr):
    """Write at every rank whether this one has pushed rows of picks, before its flag is raised."""
    there = tl.load(bases_ptr + tl.arange(0, WORLD)) + kinds_at
    tl.store(there.to(tl.pointer_type(tl.int32)) + me, pushed)
    tl.debug_barrier()


@triton.jit
def announce_kernel(bases_ptr, state_ptr, flags_at, kinds_at, pushed, me, WORLD: tl.constexpr):
    tell_kind(bases_ptr, pushed, kinds_at, me, WORLD)
    raise_flags(bases_ptr, tl.load(state_ptr + STATE_COMBINE), flags_at, me, WORLD)


@triton.jit
def wait_kernel(bases_ptr, state_ptr, error_ptr, flags_at, timeout_us, me, WORLD: tl.constexpr):
    epoch = tl.load(state_ptr + STATE_COMBINE)
    wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, timeout_us, me, WORLD)


_announce = Launcher(announce_kernel)
_wait = Launcher(wait_kernel)


def announce(here: PeerView, pushed: bool) -> None:
    _announce(
        (1, 1),
        (here.bases, here.state),
        (here.layout.combine_flags_at, here.layout.kinds_at, int(pushed), here.rank),
        (here.layout.world,),
        1,
    )


def wait(here: PeerView, flags_at: int, timeout_us: int) -> None:
    _wait(
        (1, 1),
        (here.bases, here.state, here.error),
        (flags_at, timeout_us, here.rank),
        (here.layout.world,),
        1,
    )
