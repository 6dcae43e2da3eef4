"""What keeps the kernels for Hopper from running somewhere."""

from __future__ import annotations

from functools import lru_cache

import torch

from fusedmoe.config import FusedMoEConfig
from fusedmoe.kernels.hopper_decode import ALIGNED_ELEMENTS
from fusedmoe.kernels.releases import is_known, known
from fusedmoe.tuning.hopper_tiles import MAX_PICKS

_ALIGNED_BYTES = 16


@lru_cache
def missing_gluon() -> str | None:
    """Why the kernels cannot be built here, or None."""
    try:
        import triton
        from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma  # noqa: F401
    except ImportError as error:
        return f"needs Gluon for Hopper from Triton: {error}"
    if not is_known(triton.__version__):
        return f"is written for the Gluon of Triton {known()}, this is {triton.__version__}"
    return None


def viewable(*weights: torch.Tensor) -> bool:
    """Whether TMA can read these, of 16 bits, as matrices."""
    return all(w.is_contiguous() and w.data_ptr() % _ALIGNED_BYTES == 0 for w in weights)


def readable(rows: torch.Tensor) -> bool:
    """Whether rows of 16 bits can be gathered 16 bytes at a time, and TMA can read them as a
    matrix."""
    return (
        rows.stride(1) == 1
        and rows.stride(0) % ALIGNED_ELEMENTS == 0
        and rows.stride(0) >= rows.shape[1]
        and rows.data_ptr() % _ALIGNED_BYTES == 0
    )


def too_many_picks(K: int) -> str | None:
    """Why K picks of a token are more than the sums add up; None: they are not."""
    return f"adds up at most {MAX_PICKS} picks of a token, not {K}" if K > MAX_PICKS else None


def unmet_by_hopper(moe: FusedMoEConfig) -> str | None:
    """What kernels for Hopper lack here, or None."""
    capability = torch.cuda.get_device_capability(moe.device)
    if capability[0] != 9:
        return f"is written for compute capability 9, this GPU has {capability}"
    return too_many_picks(moe.experts_per_token) or missing_gluon()
