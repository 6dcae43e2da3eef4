"""The keys of all formats there are, as patterns: what an implementation of everything runs."""

from __future__ import annotations

from itertools import product

import torch

from fusedmoe.quantization.formats import lookup, superblocks
from fusedmoe.quantization.formats.mxfp4 import MXFP4
from fusedmoe.quantization.formats.mxfp6 import MXFP6_E2M3, MXFP6_E3M2
from fusedmoe.quantization.formats.mxfp8 import MXFP8
from fusedmoe.quantization.formats.nvfp4 import NVFP4
from fusedmoe.quantization.formats.superblocks import superblock_format
from fusedmoe.quantization.keys import (
    ANY,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP4_DYNAMIC,
    MXFP6_E2M3_DYNAMIC,
    MXFP6_E3M2_DYNAMIC,
    MXFP8_DYNAMIC,
    NVFP4_DYNAMIC,
    NVFP4_STATIC,
    PER_CHANNEL,
    PER_TENSOR,
    GroupShape,
    QuantKey,
    fp8_dynamic_group,
)

_GROUPS = GroupShape(1, ANY)
_INTEGERS: tuple[torch.dtype | str, ...] = (torch.int8, "int4")

FP8_WEIGHTS = tuple(
    QuantKey(torch.float8_e4m3fn, True, shape)
    for shape in (PER_TENSOR, PER_CHANNEL, GroupShape(ANY, ANY))
)
INTEGER_WEIGHTS = tuple(
    QuantKey(dtype, True, shape, symmetric=symmetric, act_order=act_order)
    for dtype, shape, symmetric, act_order in product(
        _INTEGERS, (PER_CHANNEL, _GROUPS), (True, False), (False, True)
    )
    if shape == _GROUPS or not act_order
)
MX_WEIGHTS = tuple(fmt.key for fmt in (MXFP4, MXFP8, MXFP6_E3M2, MXFP6_E2M3, NVFP4))
TABLE_WEIGHTS = tuple(QuantKey(element, True, _GROUPS) for element in lookup.CODECS)
SUPERBLOCK_WEIGHTS = tuple(superblock_format(name).key for name in superblocks.CODECS)
WEIGHT_KEYS = FP8_WEIGHTS + INTEGER_WEIGHTS + MX_WEIGHTS + TABLE_WEIGHTS + SUPERBLOCK_WEIGHTS

ACTIVATION_KEYS = (
    FP8_DYNAMIC_TENSOR,
    FP8_STATIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    fp8_dynamic_group(ANY),
    fp8_dynamic_group(ANY, "e8m0"),
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP4_DYNAMIC,
    MXFP8_DYNAMIC,
    MXFP6_E3M2_DYNAMIC,
    MXFP6_E2M3_DYNAMIC,
    NVFP4_DYNAMIC,
    NVFP4_STATIC,
)
