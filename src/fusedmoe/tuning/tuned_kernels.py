"""The kernel that tuned tables are for, and the version of its device code.

A measured tile is worth something only for the device code it was measured with. The version is a
number raised by hand; beside it stands a digest of the text, so that a test notices a kernel
that changed and asks whether its tables still hold.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class TunedKernel:
    """What a table must know of one experts implementation.

    ``stages`` are tuned one by one. ``sources`` are the files of the package whose ``triton.jit``
    functions make up ``digest``.
    """

    name: str
    version: int
    stages: tuple[str, ...]
    sources: tuple[str, ...]
    digest: str


TRITON = TunedKernel(
    name="triton",
    version=1,
    stages=("gemm1", "gemm2"),
    sources=(
        "kernels/triton/grouped_gemm.py",
        "kernels/triton/activation.py",
        "kernels/triton/ids.py",
    ),
    digest="22221b47cca194e0",
)
