"""Launching ``quantized_warps.cu``: constants and arguments."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedmoe.kernels.cuda.quantized_cut import MOST_BYTES, group_columns, spans_of
from fusedmoe.kernels.cuda.quantized_launch import (
    Product,
    arguments_of,
    constants_of,
    filled,
    launch,
)
from fusedmoe.quantization.formats.lookup import CODECS, LIFTS
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor
from fusedmoe.tuning.cuda_tiles import TABLE_BYTES, CudaWarpsTile

SOURCES = (
    *("quantized_numbers.cuh", "activation.cuh", "quantized_walk.cuh", "quantized_warps_tasks.cuh"),
    *("quantized_warps_loads.cuh", "quantized_scales.cuh", "quantized_table.cuh"),
    "quantized_warps.cu",
)
STEP, PITCH, SLOTS = 64, 36, 8
Arguments = arguments_of(
    (),
    ("weights", "scale", "scale2", "zero", "bias", "x", "out", "experts", "sorted", "num_post"),
    ("R", "num_local", "last_block"),
)


def stream(product: Product, tile: CudaWarpsTile) -> None:
    """One launch, of blocks of eight slots; of fewer stages than the tile says where they do not
    fit."""
    w, D = product.w, product.x.shape[1]
    steps = -(-w.data.shape[-1] // STEP)
    if tile.along > steps:
        raise ValueError(f"{tile.along} warps share a row of {steps} steps of {STEP} bytes")
    cuts = (cut_of(w, D, replace(tile, stages=n)) for n in range(tile.stages, 1, -1))
    fitting = next((cut for cut in cuts if cut[1] <= MOST_BYTES), None)
    if fitting is None:
        raise ValueError(f"two stages of {tile} do not fit {MOST_BYTES} bytes")
    constants, shared = fitting
    parameters, threads = filled(Arguments, product), tile.along * tile.across * 32
    given = SOURCES, constants_of(product) | constants, threads, shared, parameters
    launch(*given, tile.per_multiprocessor, product.programs, w.data.get_device())


def cut_of(w: QuantizedTensor, D: int, tile: CudaWarpsTile) -> tuple[dict[str, int], int]:
    """The constants that say how a tile cuts rows of D columns, and a program's shared memory."""
    fmt, scale = w.format, w.scale
    assert scale is not None
    group, steps = group_columns(fmt, D), -(-w.data.shape[-1] // STEP)
    stride, unit = (scale.stride(1) if scale.dim() == 3 else 4), scale.element_size()
    spans = spans_of(steps, STEP * fmt.values, group, unit, stride, tile.along, tile.stages)
    warps, rows = tile.along * tile.across, tile.tiles * 16
    shared = tile.stages * rows * STEP
    if group:
        shared += spans.alive * rows * PITCH * (1 if fmt.symmetric else 2)
    shared *= warps
    if tile.along > 1:
        shared += 2 * warps * tile.tiles * 512
    shared += TABLE_BYTES if fmt.element in CODECS else 0
    constants = spans.constants() | table_constants(fmt)
    constants |= {"GROUP": group, "MT": tile.tiles, "NT": 1, "KW": tile.along, "WM": tile.across}
    constants |= {"STEP": STEP, "PITCH": PITCH, "STAGES": tile.stages}
    return constants | {"PER_SM": tile.per_multiprocessor}, shared


def table_constants(fmt: QuantFormat) -> dict[str, int]:
    """What ``quantized_table.cuh`` is told of the entries that nibbles stand for."""
    if fmt.element not in CODECS:
        return {}
    lift = LIFTS[fmt.element]
    entries = torch.tensor(CODECS[fmt.element].table, dtype=torch.float64) * lift
    pairs = entries.bfloat16().view(torch.int32).tolist()
    numbers = {f"TABLE_{i}": pair & 0xFFFFFFFF for i, pair in enumerate(pairs)}
    return numbers | {"TABLE_LIFT": round(lift * 2**16)}
