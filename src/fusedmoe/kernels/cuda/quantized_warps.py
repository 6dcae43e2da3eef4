"""Launching ``quantized_warps.cu``: constants and arguments."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.cuda.program import CudaKernel, source_of
from fusedmoe.kernels.cuda.quantized_cut import group_columns, spans_of
from fusedmoe.kernels.cuda.quantized_decode import (
    BIASES,
    RESERVED_BYTES,
    SHARED_BYTES,
    weight_constants,
)
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.cuda_tiles import CudaWarpsTile

SOURCES = (
    *("quantized_numbers.cuh", "activation.cuh", "quantized_walk.cuh", "quantized_warps_tasks.cuh"),
    *("quantized_warps_loads.cuh", "quantized_scales.cuh", "quantized_warps.cu"),
)
STEP, PITCH, SLOTS = 64, 36, 8
_POINTERS = (
    *("weights", "scale", "scale2", "zero", "bias", "x", "out"),
    *("experts", "sorted", "num_post"),
)


class Arguments(ctypes.Structure):
    """The kernel's one parameter, field by field as the source has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("stride_x", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("R", "num_local", "last_block")),
        *((name, ctypes.c_float) for name in ("limit", "alpha", "beta")),
    )


@lru_cache(maxsize=1024)
def _kernel(defines: tuple[tuple[str, int], ...], threads: int, shared: int) -> CudaKernel:
    text = tuple((name, str(value)) for name, value in defines)
    return CudaKernel(
        source_of("instructions.cuh", *SOURCES), "quantized_warps", text, threads, shared
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
    constants = weight_constants(w, addresses, act) | spans.constants()
    constants |= {"COLUMNS": D, "TOP_K": top_k, "EARLY": int(early), "GROUP": group}
    constants |= {"WIDE": int(out.dtype == torch.float32)}
    constants |= {"BIAS": 0 if bias is None else BIASES[bias.dtype]}
    constants |= {"MT": tile.tiles, "NT": 1, "KW": tile.along, "WM": tile.across}
    constants |= {"STEP": STEP, "PITCH": PITCH}
    constants |= {"STAGES": tile.stages, "PER_SM": tile.per_multiprocessor}
    constants |= {"NEXT": 0, "NEXT_EVEN": 0, "NEXT_ODD": 0}
    kernel = _kernel(tuple(constants.items()), warps * 32, shared)
    tensors = (w.data, scale, w.scale2, w.zero_point, bias, x, out)
    tables = blocks.expert_ids, blocks.sorted_ids, blocks.num_tokens_post_pad
    parameters = Arguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in (*tensors, *tables)),
        x.stride(0),
        out.shape[0],
        w.shape[0],
        blocks.expert_ids.shape[0] - 1,
        act.limit or 0.0,
        act.alpha,
        act.beta,
    )
    resident = min(tile.per_multiprocessor, SHARED_BYTES // (shared + RESERVED_BYTES))
    kernel.launch(programs * resident, parameters, x.get_device())
