"""The kernels that tuned tables are for, and the versions of their device code.

A measured tile is worth something only for the device code it was measured with. The version is a
number raised by hand; beside it stands a digest of the text, so that a test notices a kernel
that changed and asks whether its tables still hold.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class TunedKernel:
    """What a table must know of one experts implementation.

    ``stages`` are tuned one by one, each with a tile of one of the types that ``tiles`` names (keys
    of ``tile_records.TILE_TYPES``). ``sources`` are the files of the package whose jit functions
    make up ``digest``.
    """

    name: str
    version: int
    stages: tuple[str, ...]
    tiles: tuple[str, ...]
    sources: tuple[str, ...]
    digest: str


TRITON = TunedKernel(
    name="triton",
    version=1,
    stages=("gemm1", "gemm2"),
    tiles=("tile",),
    sources=(
        "kernels/triton/grouped_gemm.py",
        "kernels/triton/activation.py",
        "kernels/triton/ids.py",
    ),
    digest="22221b47cca194e0",
)

# One choice for the whole layer: which of its kernels runs depends on the batch as tiles do.
HOPPER = TunedKernel(
    name="hopper",
    version=1,
    stages=("layer",),
    tiles=("direct", "decode", "prefill"),
    sources=(
        "kernels/triton/activation.py",
        "kernels/triton/hopper_arrivals.py",
        "kernels/triton/hopper_common.py",
        "kernels/triton/hopper_decode_dealt.py",
        "kernels/triton/hopper_decode_down.py",
        "kernels/triton/hopper_decode_steps.py",
        "kernels/triton/hopper_decode_up.py",
        "kernels/triton/hopper_direct_common.py",
        "kernels/triton/hopper_direct_down.py",
        "kernels/triton/hopper_direct_up.py",
        "kernels/triton/hopper_drawn.py",
        "kernels/triton/hopper_prefill.py",
        "kernels/triton/hopper_prefill_common.py",
        "kernels/triton/hopper_prefill_consumer.py",
        "kernels/triton/hopper_prefill_down.py",
        "kernels/triton/hopper_prefill_up.py",
        "kernels/triton/hopper_pushed.py",
    ),
    digest="9760f402e39a16d0",
)

KERNELS = {kernel.name: kernel for kernel in (TRITON, HOPPER)}
