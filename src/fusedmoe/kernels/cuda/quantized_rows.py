"""Launching ``quantized_rows.cu``: constants and arguments."""

from __future__ import annotations

import ctypes

import torch

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.cuda.quantized_cut import MOST_BYTES
from fusedmoe.kernels.cuda.quantized_decode import tile_map
from fusedmoe.kernels.cuda.quantized_launch import arguments_of, constants_of, filled, launch
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.cuda_tiles import MOST_MADE, CudaRowsTile, scale_boxes

SOURCES = (
    *("quantized_numbers.cuh", "activation.cuh", "quantized_walk.cuh", "quantized_lone_slots.cuh"),
    *("quantized_rows_ring.cuh", "quantized_rows_sums.cuh", "quantized_rows.cu"),
)
# Of a thread, for programs of so many warps, and what their four others keep.
REGISTERS, NO_REGISTERS = {8: (240, 24), 12: (160, 32), 16: (112, 32)}, (0, 32)
# For how many items another block's rows of x are counted, by its slots.
SWITCH = {1: 0, 8: 1, 16: 8}
PAIR = 32  # bytes of a row that one matrix instruction takes
Arguments = arguments_of(
    ("boxes", "scale_boxes"),
    ("weights", "scale", "bias", "x", "out", "ids", "map", "experts", "sorted", "num_post"),
    ("R", "num_mapped", "num_local", "last_block"),
)


def _all_begin(pairs: int, along: int, unit: float) -> bool:
    """Whether every warp's part of so many pairs begins with a whole ``unit`` of them."""
    return all(i * pairs // along % unit == 0 for i in range(along))


def sum_bytes(pairs: int, along: int, group: int, eights: int) -> int:
    """Of a warp's sums of x for so many eights of slots, one for each unit of a scale, where they
    do not stay in registers."""
    chunks = group // 32
    aligned = _all_begin(pairs, along, group / 64)
    of_unit = min(chunks, 4) if aligned or chunks < 2 else 2
    units = -(-2 * -(-pairs // along) // of_unit)
    return units * eights * 64 if units * eights > 4 else 0


def stream(
    x: torch.Tensor,
    w: QuantizedTensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    activation: DeviceActivation | None,
    blocks: MoEAlignment | LoneSlots,
    addresses: tuple[int, ...],
    top_k: int,
    tile: CudaRowsTile,
    programs: int,
    *,
    early: bool,
) -> None:
    """One launch; ``addresses`` from ``weight_addresses``, ``blocks`` of the tile's slots, or the
    ids of at most ``MOST_MADE`` that programs make such blocks of."""
    N, D, scale = out.shape[1], x.shape[1], w.scale
    assert scale is not None
    act = activation or DeviceActivation(formula="", gated=False)
    warps, rows = tile.along * tile.across, tile.across * tile.tiles * 16
    row_bytes, eights, group = w.data.shape[-1], -(-tile.slots // 8), w.format.group.col
    part_bytes = row_bytes // tile.parts
    lone = isinstance(blocks, LoneSlots) and tile.slots == 1
    made = isinstance(blocks, LoneSlots) and tile.slots > 1
    scale_row = addresses[5] * scale.element_size()
    box, boxes = scale_boxes(scale_row, tile.parts)
    scale_bytes = boxes * box or scale_row
    of_stage = rows * (part_bytes + scale_bytes) + 16 + 4
    shared = 4 * tile.across * 8
    if tile.along > 1:
        shared += 2 * warps * eights * 512
    if w.format.element == "int4":
        shared += warps * sum_bytes(part_bytes // PAIR, tile.along, group, eights)
    if tile.along % boxes:
        raise ValueError(
            f"{tile.along} warps share {scale_bytes} bytes of scales that come {box} at a time"
        )
    if made:
        shared += 2 * MOST_MADE * (3 + 8 * eights) + 32
    stages = min(tile.stages, (MOST_BYTES - shared) // of_stage)
    if stages < 2:
        raise ValueError(f"{rows} rows of {part_bytes} bytes leave no room for two stages")
    shared += stages * of_stage
    constants = constants_of(x, w, out, bias, act, addresses, top_k, early)
    constants |= {"COLUMNS": D // tile.parts, "PARTS": tile.parts, "GROUP": group}
    constants |= {"MT": tile.tiles, "NT": eights, "KW": tile.along, "WM": tile.across}
    constants |= {"STEP": PAIR, "PITCH": 0, "SPANS": 0, "SCALE_BOX": box}
    constants |= {"STAGES": stages, "PER_SM": tile.per_multiprocessor}
    constants |= {"AHEAD": tile.ahead, "SWITCH": SWITCH[tile.slots]}
    ids = blocks.topk_ids if isinstance(blocks, LoneSlots) else None
    constants |= {"LONE": int(lone), "MADE": int(made)}
    constants |= {"ID64": int(ids is not None and ids.dtype == torch.int64)}
    registers, left = (
        REGISTERS.get(warps, NO_REGISTERS) if tile.per_multiprocessor == 1 else NO_REGISTERS
    )
    bringers = 4 if registers else 1
    pairs = part_bytes // PAIR
    constants |= {
        "BRINGERS": bringers,
        "REGISTERS": registers,
        "BRINGER_REGISTERS": left,
        "WHOLE": int(_all_begin(pairs, tile.along, 4)),
    }
    constants |= {"ALIGNED": int(_all_begin(pairs, tile.along, group / (PAIR * w.format.values)))}
    parameters = filled(Arguments, x, w, out, bias, act, blocks)
    parameters.R = out.shape[0] // tile.parts
    shards = 2 if act.gated else 1
    sizes = w.shape[0], N, shards
    order, address = (w.interleaved, rows // shards), ctypes.addressof(parameters)
    if part_bytes % 128 == 0:
        ctypes.memmove(address, tile_map(w.data.data_ptr(), *sizes, row_bytes, *order), 128)
    if box:
        brought = tile_map(scale.data_ptr(), *sizes, scale_row, *order, box)
        ctypes.memmove(address + 128, brought, 128)
    given = SOURCES, constants, (warps + bringers) * 32, shared, parameters
    launch(*given, tile.per_multiprocessor, programs, x.get_device())
