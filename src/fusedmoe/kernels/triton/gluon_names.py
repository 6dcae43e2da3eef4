"""Operations of Gluon whose names differ among releases of Triton, under one name each.

Everything else of Gluon that the kernels use is called alike from Triton 3.6 to 3.9.
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

_OLD_BARRIER = not hasattr(gl, "barrier")
_OLD_COPIES = not hasattr(tma, "async_load") or not hasattr(async_copy, "async_load")

barrier = gl.thread_barrier if _OLD_BARRIER else gl.barrier
"""() -> None: the threads of this partition wait for one another."""

tma_load = tma.async_copy_global_to_shared if _OLD_COPIES else tma.async_load
"""(descriptor, coordinates, barrier, buffer, pred=True) -> None"""

tma_store = tma.async_copy_shared_to_global if _OLD_COPIES else tma.async_store
"""(descriptor, coordinates, buffer) -> None"""

cp_async = async_copy.async_copy_global_to_shared if _OLD_COPIES else async_copy.async_load
"""(buffer, pointers, mask=None) -> None"""


@builtin
def reinterpret(buffer: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """``buffer`` in shared memory as if it had another dtype, shape and layout."""
    view = getattr(buffer, "reinterpret", None) or buffer._reinterpret
    return view(dtype, shape, layout, _semantic=_semantic)
