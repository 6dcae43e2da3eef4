"""Weights that take more than a mask to become numbers, as ``quantized_gemm`` reads them.

GGUF's blocks that carry their scales (q2_k to q6_k, q4_1, q5_1), floats of six bits (MXFP6), and
integers whose columns name their groups (act-order). Triton body:
``kernels/triton/grouped_gemm_packed.py``.
"""

from __future__ import annotations

from fusedmoe.kernels.column_orders import BLOCKS, REPEATS, UNITS
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor
from fusedmoe.tuning.quantized_tiles import (
    MINIMUM_BLOCKS,
    SEXTETS,
    SUPERBLOCK_COLUMNS,
    SUPERBLOCKS,
    QuantizedTile,
)

_ALIGNED_BYTES, _WORD_BYTES = 16, 4
_BLOCKS = SUPERBLOCKS | MINIMUM_BLOCKS


def is_packed(fmt: QuantFormat) -> bool:
    """Whether weights of this format take more than a mask to become numbers."""
    return fmt.element in _BLOCKS | SEXTETS or fmt.act_order


def check_packed(w: QuantizedTensor, tile: QuantizedTile, a_ordered: bool) -> None:
    """Raise ValueError for steps that cut what belongs together, and for unaligned data. Steps have
    256 columns for superblocks, at least 128 for floats of six bits and 64 for the rest."""
    fmt, index = w.format, w.group_index
    blocks, sextets = fmt.element in SUPERBLOCKS, fmt.element in SEXTETS
    if tile.depth != SUPERBLOCK_COLUMNS if blocks else tile.depth < (128 if sextets else 64):
        raise ValueError(f"steps of {tile.depth} columns do not fit {fmt.name}")
    step = REPEATS[UNITS if sextets else BLOCKS]
    if a_ordered and (sextets or fmt.element in MINIMUM_BLOCKS) and tile.depth != step:
        raise ValueError(f"ordered rows meet {fmt.name} in steps of {step} columns")
    places = w.data.data_ptr(), *w.data.stride()[:2]
    if sextets and any(place % _WORD_BYTES for place in places):
        raise ValueError(f"rows of {fmt.name} must lie at a multiple of {_WORD_BYTES} bytes")
    if fmt.element in _BLOCKS and w.data.data_ptr() % _ALIGNED_BYTES:
        raise ValueError(f"{fmt.name} must lie at a multiple of {_ALIGNED_BYTES} bytes")
    if index is not None and not index.is_contiguous():
        raise ValueError(f"group_index must be contiguous, its strides are {index.stride()}")
    if index is not None and w.scale is not None and w.scale.shape[-1] == 0 and w.shape[2] > 0:
        raise ValueError(f"{w.shape[2]} columns of {fmt.name} have no groups to belong to")
