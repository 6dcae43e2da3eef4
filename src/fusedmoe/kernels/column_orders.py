"""Orders of columns in which rows meet packed weights, named by the weights.

What a step reads of packed weights are columns apart from each other. Rows whose columns lie in the
order of the step are copied as they lie, and one product takes all columns of a step:

    halves   the columns of even number, then those of odd number: two columns share a byte
    sixes    of every superblock of 256, tiles of 32: two neighbours of each of eight words in both
             halves (``sixes``, ``threes``)
    units    of every 128 columns, tiles of 16: two neighbours of each unit (``sextets``)
    blocks   of every 128 columns, tiles of 32: two neighbours of each four in the first halves of
             four blocks, or in the second ones (``minimum_blocks``)
    lanes    of every 32 columns, those that a lane of Hopper's products has (``lane_order``)

Device code: ``place_of`` in ``kernels/triton/quantized_common.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.tensor import QuantFormat
from fusedmoe.tuning.quantized_tiles import MINIMUM_BLOCKS, SEXTETS, TILED_SUPERBLOCKS

HALVES, SIXES, UNITS, BLOCKS, LANES = "halves", "sixes", "units", "blocks", "lanes"
REPEATS = {"": 1, HALVES: 2, SIXES: 256, UNITS: 128, BLOCKS: 128, LANES: 32}
"""Rows have a multiple of so many columns."""

_NIBBLES = frozenset({"int4", "e2m1", "nf4", "iq4_nl"})
# Of [rows, repeats, *sizes]: the sizes, and the order of all dimensions.
_SPLITS = {
    HALVES: ((2,), (0, 2, 1)),
    SIXES: ((2, 2, 2, 8, 2, 2), (0, 1, 4, 3, 6, 2, 5, 7)),
    UNITS: ((8, 8, 2), (0, 1, 3, 2, 4)),
    BLOCKS: ((4, 2, 4, 2, 2), (0, 1, 3, 5, 2, 4, 6)),
    LANES: ((4, 2, 4), (0, 1, 4, 2, 3)),
}


def order_for(fmt: QuantFormat, D: int) -> str:
    """The order of columns in which rows [.., D] are fastest with weights of this format; "": as
    they are."""
    order = ""
    if fmt.element in _NIBBLES and not fmt.act_order:
        order = HALVES
    elif fmt.element in SEXTETS:
        order = UNITS
    elif fmt.element in TILED_SUPERBLOCKS:
        order = SIXES
    elif fmt.element in MINIMUM_BLOCKS:
        order = BLOCKS
    return "" if D % REPEATS[order] else order


def ordered(x: torch.Tensor, order: str) -> torch.Tensor:
    """x [rows, D] with its columns in this order."""
    if not order:
        return x
    sizes, dimensions = _SPLITS[order]
    return x.unflatten(1, (-1, *sizes)).permute(dimensions).flatten(1)


def unordered(x: torch.Tensor, order: str) -> torch.Tensor:
    """The inverse of ``ordered``."""
    if not order:
        return x
    sizes, dimensions = _SPLITS[order]
    whole = x.shape[0], x.shape[1] // REPEATS[order], *sizes
    lie = x.view([whole[at] for at in dimensions])
    return lie.permute([dimensions.index(at) for at in range(len(whole))]).flatten(1)
