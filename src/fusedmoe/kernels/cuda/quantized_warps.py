"""Launching ``quantized_warps.cu``: constants and arguments."""

from __future__ import annotations

import torch

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.cuda.quantized_cut import group_columns, spans_of
from fusedmoe.kernels.cuda.quantized_launch import arguments_of, constants_of, filled, launch
from fusedmoe.quantization.tensor import QuantizedTensor
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


def stream(
    x: torch.Tensor,
    w: QuantizedTensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    activation: DeviceActivation | None,
    blocks: MoEAlignment,
    addresses: tuple[int, ...],
    top_k: int,
    tile: CudaWarpsTile,
    programs: int,
    *,
    early: bool,
) -> None:
    """One launch; ``addresses`` from ``weight_addresses``, ``blocks`` of eight slots."""
    D, fmt, scale = x.shape[1], w.format, w.scale
    assert scale is not None
    act = activation or DeviceActivation(formula="", gated=False)
    group, steps = group_columns(fmt, D), -(-w.data.shape[-1] // STEP)
    if tile.along > steps:
        raise ValueError(f"{tile.along} warps share a row of {steps} steps of {STEP} bytes")
    stride, unit = (addresses[5] if scale.dim() == 3 else 4), scale.element_size()
    spans = spans_of(steps, STEP * fmt.values, group, unit, stride, tile.along, tile.stages)
    warps, rows = tile.along * tile.across, tile.tiles * 16
    shared = tile.stages * rows * STEP
    if group:
        shared += spans.alive * rows * PITCH * (1 if fmt.symmetric else 2)
    shared *= warps
    if tile.along > 1:
        shared += 2 * warps * tile.tiles * 512
    constants = constants_of(x, w, out, bias, act, addresses, top_k, early) | spans.constants()
    constants |= {"GROUP": group, "MT": tile.tiles, "NT": 1, "KW": tile.along, "WM": tile.across}
    constants |= {"STEP": STEP, "PITCH": PITCH}
    constants |= {"STAGES": tile.stages, "PER_SM": tile.per_multiprocessor}
    parameters = filled(Arguments, x, w, out, bias, act, blocks)
    given = SOURCES, constants, warps * 32, shared, parameters, tile.per_multiprocessor
    launch(*given, programs, x.get_device())
