"""Launching ``quantized_lone.cu`` and ``quantized_stream.cu``: constants and arguments."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.align_pair import PairedOrder
from fusedmoe.kernels.cuda.quantized_cut import cut_of
from fusedmoe.kernels.cuda.quantized_launch import arguments_of, constants_of, filled, launch
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.cuda_tiles import (
    STEP,
    CudaDecodeTiles,
    CudaLoneTile,
    CudaRowsTile,
    CudaStreamTile,
    CudaWarpsTile,
)

COMMON = (
    *("quantized_numbers.cuh", "activation.cuh", "quantized_walk.cuh", "quantized_lone_slots.cuh"),
    *("quantized_tasks.cuh", "quantized_spans.cuh", "quantized_scales.cuh", "quantized_ends.cuh"),
)
Arguments = arguments_of(
    ("tiles",),
    ("scale", "scale2", "zero", "bias", "x", "out", "ids", "map", "experts", "sorted", "num_post"),
    ("R", "num_mapped", "num_local", "last_block", "guess"),
)
LIKELY_MEAN = 2  # slots per expert from which on most experts have some


@lru_cache(maxsize=4096)
def tile_map(data: int, e: int, features: int, shards: int, row: int, interleaved: bool,
             box: int, width: int | None = None) -> bytes:  # fmt: skip
    """What the copy engine reads steps of rows by, swizzled, or ``width`` bytes of them as they
    lie: ``box`` features of every shard, of e * shards * features rows of ``row`` bytes at address
    ``data``; zeros beyond the last."""
    from cuda.bindings import driver

    from fusedmoe.kernels.cuda.program import checked

    apart = (shards, 1) if interleaved else (1, features)
    kind = driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8
    swizzle = driver.CUtensorMapSwizzle
    found = checked(
        driver.cuTensorMapEncodeTiled(
            kind,
            4,
            data,
            [driver.cuuint64_t(size) for size in (row, features, shards, e)],
            [driver.cuuint64_t(row * rows) for rows in (*apart, shards * features)],
            [driver.cuuint32_t(size) for size in (width or STEP, box, shards, 1)],
            [driver.cuuint32_t(1)] * 4,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle.CU_TENSOR_MAP_SWIZZLE_128B
            if width is None
            else swizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(found.getPtr(), 128)


def decode(
    layer: LayerTensors[QuantizedTensor],
    blocks: MoEAlignment | LoneSlots,
    addresses: tuple[tuple[int, ...], tuple[int, ...]],
    tiles: CudaDecodeTiles,
) -> None:
    """Both GEMMs and the sum; the layer as checked by ``kernels.hopper_quantized``."""
    from fusedmoe.kernels.triton.weighted_sum import weighted_sum

    x, w1, w2, topk_weights, topk_ids, out, act, y, programs = layer[:9]
    first, second = addresses
    K, parts = topk_ids.shape[1], 1
    guess = topk_ids.numel() >= LIKELY_MEAN * layer.num_experts
    of_first = x, w1, act, layer.w1_bias, layer.epilogue, blocks, first, K, tiles.gemm1, programs
    of_second = act, w2, y, layer.w2_bias, None, blocks, second, 1, tiles.gemm2, programs
    if isinstance(tiles.gemm2, CudaRowsTile) and tiles.gemm2.parts > 1:
        parts = tiles.gemm2.parts
        of_second = act, w2, y.new_empty(parts * y.shape[0], y.shape[1]), *of_second[3:]
    order = PairedOrder.of(w2.format) if tiles.paired else None
    _gemm(*of_first, early=False, guess=guess, following=order)
    _gemm(*of_second, early=True)
    sums = of_second[2]
    weighted_sum(sums, topk_weights, topk_ids, layer.expert_map, out, w2.shape[0], parts)


def _gemm(
    *given: Any, early: bool, guess: bool = False, following: PairedOrder | None = None
) -> None:
    """``stream`` of the kernel whose tile is given."""
    from fusedmoe.kernels.cuda import quantized_rows, quantized_warps

    tile = given[8]
    if isinstance(tile, CudaRowsTile):
        quantized_rows.stream(*given, early=early)
    elif isinstance(tile, CudaWarpsTile):
        quantized_warps.stream(*given, early=early)
    else:
        stream(*given, early=early, guess=guess, following=following)


def stream(
    x: torch.Tensor,
    w: QuantizedTensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    activation: DeviceActivation | None,
    blocks: MoEAlignment | LoneSlots,
    addresses: tuple[int, ...],
    top_k: int,
    tile: CudaLoneTile | CudaStreamTile,
    programs: int,
    *,
    early: bool,
    guess: bool = False,
    following: PairedOrder | None = None,
) -> None:
    """One launch; ``addresses`` from ``weight_addresses``. ``guess``: begin to read before there
    are tables, as if every expert had a block. Blocks of slots read x in ``PairedOrder``;
    ``following``: that of the GEMM that reads ``out``."""
    N, D = out.shape[1], x.shape[1]
    act = activation or DeviceActivation(formula="", gated=False)
    cut = cut_of(w, D, addresses[5], tile)
    constants = constants_of(x, w, out, bias, act, addresses, top_k, early) | cut.constants
    if following is not None:
        constants |= zip(("NEXT", "NEXT_EVEN", "NEXT_ODD"), following, strict=True)
    wide_ids = isinstance(blocks, LoneSlots) and blocks.topk_ids.dtype == torch.int64
    constants |= {"ID64": int(wide_ids)}
    parameters = filled(Arguments, x, w, out, bias, act, blocks)
    parameters.guess = guess
    shards = 2 if act.gated else 1
    data, row, box = w.data.data_ptr(), w.data.shape[-1], cut.rows // shards
    boxes = tile_map(data, w.shape[0], N, shards, row, w.interleaved, box)
    ctypes.memmove(ctypes.addressof(parameters), boxes, len(boxes))
    given = (*COMMON, f"{cut.entry}.cu"), constants, cut.threads, cut.shared, parameters
    launch(*given, tile.per_multiprocessor, programs, x.get_device())
