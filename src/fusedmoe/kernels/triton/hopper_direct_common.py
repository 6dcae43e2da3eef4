"""What both kernels of ``hopper_direct`` do: ids in registers, a ring of loads, its products."""

from dataclasses import dataclass
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.ids import local_expert

UNSPECIALIZED = ("R", "num_mapped", "num_local", "desc_rows")


@dataclass(frozen=True)
class DirectCase:
    """What is constant in a launch: products of D columns with the weights of N features, PICKS for
    each token, at most SLOTS in all. The ring has STAGES steps of ROWS weight rows: VALID of gate
    and as many of up below them or, not GATED, of neighbours, half of ROWS for each; in the second
    launch VALID of each pick, SHARE for each."""

    N: int
    D: int
    PICKS: int
    SLOTS: int
    ROWS: int
    VALID: int
    STAGES: int
    SHARE: int = 0
    FORMULA: str = ""
    GATED: bool = False
    INTERLEAVED: bool = False


class Picks(NamedTuple):
    """Pointers to the ids of R slots, and to the local experts of ``num_mapped`` ids (None: they
    are local), of which there are ``num_local``."""

    ids: gl.tensor
    map: gl.tensor | None
    R: gl.tensor
    num_mapped: gl.tensor
    num_local: gl.tensor


@gluon.constexpr_function
def everywhere(SLOTS, num_warps):
    """[SLOTS] with a whole copy in every thread, so that picking one value needs no exchange."""
    return gl.BlockedLayout([SLOTS], [32], [num_warps], [0])


@gluon.constexpr_function
def bytes_of(dtype):
    return dtype.primitive_bitwidth // 8


@gluon.constexpr_function
def down_tiles_of(CASE):
    """Tiles that all features make in the second launch."""
    return -(-CASE.N // CASE.VALID)


@gluon.jit
def load_experts(picks, CASE: gl.constexpr):
    """The local expert of each slot [SLOTS], -1 where there is none, in every thread."""
    slot = gl.arange(0, CASE.SLOTS, everywhere(CASE.SLOTS, gl.num_warps()))
    chosen = gl.load(picks.ids + slot, mask=slot < picks.R, other=-1, cache_modifier=".cg")
    return local_expert(chosen, picks.map, picks.num_mapped, picks.num_local)


@gluon.jit
def pick_out(values, index):
    """values[index] of a tensor that every thread holds."""
    at = gl.arange(0, values.shape[0], values.type.layout)
    return gl.sum(gl.where(at == index, values, 0), 0)


@gluon.jit
def live_task(task, tasks, experts, programs, TILES: gl.constexpr):
    """The first task from ``task`` on whose slot has an expert, or one past the last."""
    while (task < tasks) & (pick_out(experts, task // TILES) < 0):
        task += programs
    return task


@gluon.jit
def open_ring(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """(full, empty) barriers; ARRIVALS of loads fill a stage, one empties it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return full, empty


@gluon.jit
def multiply(ring, x_ring, bars, stage, phase, KSTEPS: gl.constexpr, ACC: gl.constexpr):
    """The products of one task, [rows of the ring, rows of x]."""
    full, empty = bars
    STAGES: gl.constexpr = ring.shape[0]
    M: gl.constexpr = ring.shape[1]
    N: gl.constexpr = x_ring.shape[1]
    acc = gl.zeros([M, N], gl.float32, ACC)
    for _ in range(KSTEPS):
        mbarrier.wait(full.index(stage), phase)
        x = x_ring.index(stage).permute((1, 0))
        acc = warpgroup_mma(ring.index(stage), x, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return acc, stage, phase
