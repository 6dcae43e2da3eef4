"""Launching ``gate_cluster.cu``: constants and arguments."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from fusedmoe.kernels.cuda.program import CudaKernel, source_of
from fusedmoe.kernels.gate import CLUSTER, PIECE, ClusterTile

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EXPERTS = 16  # experts of a tile
AHEAD = 4  # pieces that a warp loads into registers at once
BLOCK_BYTES = 112 << 10  # with more, the next launch's block would find no room beside this one


class Arguments(ctypes.Structure):
    """The kernel's one parameter, field by field as the source has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("stride_x", "stride_w")),
        *((name, ctypes.c_int32) for name in ("T", "E")),
    )


@lru_cache(maxsize=256)
def _kernel(defines: tuple[tuple[str, int], ...], threads: int, shared: int) -> CudaKernel:
    text = tuple((name, str(value)) for name, value in defines)
    source = source_of("instructions.cuh", "gate_cluster.cu")
    return CudaKernel(source, "gate_cluster", text, threads, shared, CLUSTER)


def gate_cluster(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: ClusterTile,
) -> torch.Tensor:
    """Logits [T, E] of x [T, H] and weight [E, H], as ``kernels.gate`` has checked them."""
    (T, H), E = x.shape, weight.shape[0]
    out = torch.empty((T, E), dtype=out_dtype, device=x.device)
    if T == 0 or E == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    size = x.element_size()
    tokens = 8 if T <= 8 else 16
    # ``shared``: sums of warps and of blocks, and a barrier; ``pieces``: of two experts and tokens.
    shared = (tile.warps * tokens * (EXPERTS + 4) + tokens * EXPERTS) * 4 + 8
    pieces = tile.warps * 32 * tile.pieces * (2 + tokens // 8) * 16
    staged = tile.pieces > AHEAD and shared + pieces <= BLOCK_BYTES
    constants = {
        "NT": tokens // 8,
        "CLUSTER": CLUSTER,
        "WARPS": tile.warps,
        "PIECES": tile.pieces,
        "AHEAD": min(tile.pieces, AHEAD),
        "STAGED": int(staged),
        "PIECE": PIECE,
        "ROW_BYTES": H * size,
        "ELEMENT": ELEMENTS[x.dtype],
        "OUT": ELEMENTS[out_dtype],
        "BIAS": -1 if bias is None else ELEMENTS[bias.dtype],
    }
    threads = tile.warps * 32
    kernel = _kernel(tuple(constants.items()), threads, shared + pieces if staged else shared)
    arguments = Arguments(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.stride(0) * size,
        weight.stride(0) * size,
        T,
        E,
    )
    tiles = -(-T // tokens) * -(-E // EXPERTS)
    kernel.launch(tiles * CLUSTER, arguments, x.get_device())
    return out
