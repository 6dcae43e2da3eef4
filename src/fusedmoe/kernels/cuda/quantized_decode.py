"""Launching ``quantized_lone.cu`` and ``quantized_stream.cu``: constants and arguments."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from fusedmoe.kernels.activation import NO_ACTIVATION
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.align_pair import PairedOrder
from fusedmoe.kernels.cuda.quantized_cut import cut_of
from fusedmoe.kernels.cuda.quantized_launch import (
    Product,
    arguments_of,
    constants_of,
    filled,
    launch,
)
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.row_steps import AS_THEY_COME, BothSteps
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
    tiles: CudaDecodeTiles,
    steps: BothSteps = AS_THEY_COME,
) -> None:
    """Both GEMMs and the sum; the layer as checked by ``kernels.hopper_quantized``, its x after the
    first of the ``steps``."""
    from fusedmoe.kernels.triton.weighted_sum import weighted_sum

    x, w1, w2, _, topk_ids, _, act, y, programs = layer[:9]
    K, parts = topk_ids.shape[1], 1
    guess = topk_ids.numel() >= LIKELY_MEAN * layer.num_experts
    if isinstance(tiles.gemm2, CudaRowsTile) and tiles.gemm2.parts > 1:
        parts = tiles.gemm2.parts
        y = y.new_empty(parts * y.shape[0], y.shape[1])
    top_k = steps[0].top_k(K)
    first = Product(x, w1, act, layer.w1_bias, layer.epilogue, blocks, top_k, programs)
    order = PairedOrder.of(w2.format) if tiles.paired else None
    _multiply(first, tiles.gemm1, guess=guess, following=order)
    act = steps[1].taken(act, w2, layer.topk_ids, layer.expert_map)
    second = Product(act, w2, y, layer.w2_bias, NO_ACTIVATION, blocks, 1, programs, early=True)
    _multiply(second, tiles.gemm2)
    weighted_sum(layer._replace(y=y), parts)


def _multiply(
    product: Product,
    tile: CudaLoneTile | CudaStreamTile | CudaRowsTile | CudaWarpsTile,
    *,
    guess: bool = False,
    following: PairedOrder | None = None,
) -> None:
    """``stream`` of the kernel whose tile is given."""
    from fusedmoe.kernels.cuda import quantized_rows, quantized_warps

    if isinstance(tile, CudaRowsTile):
        quantized_rows.stream(product, tile)
    elif isinstance(tile, CudaWarpsTile):
        quantized_warps.stream(product, tile)
    else:
        stream(product, tile, guess=guess, following=following)


def stream(
    product: Product,
    tile: CudaLoneTile | CudaStreamTile,
    *,
    guess: bool = False,
    following: PairedOrder | None = None,
) -> None:
    """One launch. ``guess``: begin to read before there are tables, as if every expert had a block.
    Blocks of slots read x in ``PairedOrder``; ``following``: that of the GEMM that reads ``out``.
    """
    w, shards = product.w, product.shards
    cut = cut_of(w, product.x.shape[1], tile)
    constants = constants_of(product) | cut.constants
    if following is not None:
        constants |= zip(("NEXT", "NEXT_EVEN", "NEXT_ODD"), following, strict=True)
    parameters = filled(Arguments, product)
    parameters.guess = guess
    data, row, box = w.data.data_ptr(), w.data.shape[-1], cut.rows // shards
    boxes = tile_map(data, w.shape[0], product.out.shape[1], shards, row, w.interleaved, box)
    ctypes.memmove(ctypes.addressof(parameters), boxes, len(boxes))
    given = (*COMMON, f"{cut.entry}.cu"), constants, cut.threads, cut.shared, parameters
    launch(*given, tile.per_multiprocessor, product.programs, w.data.get_device())
