"""Launching ``quantized_warps.cu``: constants and arguments."""

from __future__ import annotations

from functools import lru_cache

import torch

from fusedmoe.kernels.cuda.quantized_cut import cut_of
from fusedmoe.kernels.cuda.quantized_launch import (
    Product,
    arguments_of,
    constants_of,
    filled,
    launch,
)
from fusedmoe.quantization.formats.lookup import CODECS, LIFTS
from fusedmoe.tuning.cuda_tiles import CudaWarpsTile

SOURCES = (
    *("quantized_numbers.cuh", "activation.cuh", "quantized_walk.cuh", "quantized_warps_tasks.cuh"),
    *("quantized_warps_loads.cuh", "quantized_scales.cuh", "quantized_table.cuh"),
    "quantized_warps.cu",
)
Arguments = arguments_of(
    (),
    ("weights", "scale", "scale2", "zero", "bias", "x", "out", "experts", "sorted", "num_post"),
    ("R", "num_local", "last_block"),
)


def stream(product: Product, tile: CudaWarpsTile) -> None:
    """One launch, of blocks of eight slots."""
    w = product.w
    cut = cut_of(w, product.x.shape[1], tile)
    constants = constants_of(product) | cut.constants | table_constants(w.format.element)
    given = SOURCES, constants, cut.threads, cut.shared, filled(Arguments, product)
    launch(*given, tile.per_multiprocessor, product.programs, w.data.get_device())


@lru_cache
def table_constants(element: str) -> dict[str, int]:
    """What ``quantized_table.cuh`` is told of the entries that nibbles stand for."""
    if element not in CODECS:
        return {}
    lift = LIFTS[element]
    entries = torch.tensor(CODECS[element].table, dtype=torch.float64, device="cpu") * lift
    pairs = entries.bfloat16().view(torch.int32).tolist()
    numbers = {f"TABLE_{i}": pair & 0xFFFFFFFF for i, pair in enumerate(pairs)}
    return numbers | {"TABLE_LIFT": round(lift * 2**16)}
