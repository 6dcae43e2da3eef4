"""Launching ``quantized_warps.cu``: constants and arguments."""

from __future__ import annotations

from fusedmoe.kernels.cuda.quantized_cut import group_columns, spans_of
from fusedmoe.kernels.cuda.quantized_launch import (
    Product,
    arguments_of,
    constants_of,
    filled,
    launch,
)
from fusedmoe.tuning.cuda_tiles import CudaWarpsTile

SOURCES = (
    *("quantized_numbers.cuh", "activation.cuh", "quantized_walk.cuh", "quantized_warps_tasks.cuh"),
    *("quantized_warps_loads.cuh", "quantized_scales.cuh", "quantized_warps.cu"),
)
STEP, PITCH, SLOTS = 64, 36, 8
Arguments = arguments_of(
    (),
    ("weights", "scale", "scale2", "zero", "bias", "x", "out", "experts", "sorted", "num_post"),
    ("R", "num_local", "last_block"),
)


def stream(product: Product, tile: CudaWarpsTile) -> None:
    """One launch, of blocks of eight slots."""
    w, D = product.w, product.x.shape[1]
    fmt, scale = w.format, w.scale
    assert scale is not None
    group, steps = group_columns(fmt, D), -(-w.data.shape[-1] // STEP)
    if tile.along > steps:
        raise ValueError(f"{tile.along} warps share a row of {steps} steps of {STEP} bytes")
    stride, unit = (scale.stride(1) if scale.dim() == 3 else 4), scale.element_size()
    spans = spans_of(steps, STEP * fmt.values, group, unit, stride, tile.along, tile.stages)
    warps, rows = tile.along * tile.across, tile.tiles * 16
    shared = tile.stages * rows * STEP
    if group:
        shared += spans.alive * rows * PITCH * (1 if fmt.symmetric else 2)
    shared *= warps
    if tile.along > 1:
        shared += 2 * warps * tile.tiles * 512
    constants = constants_of(product) | spans.constants()
    constants |= {"GROUP": group, "MT": tile.tiles, "NT": 1, "KW": tile.along, "WM": tile.across}
    constants |= {"STEP": STEP, "PITCH": PITCH, "STAGES": tile.stages}
    constants["PER_SM"] = tile.per_multiprocessor
    parameters = filled(Arguments, product)
    given = SOURCES, constants, warps * 32, shared, parameters, tile.per_multiprocessor
    launch(*given, product.programs, w.data.get_device())
