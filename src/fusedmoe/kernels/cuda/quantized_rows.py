"""Launching ``quantized_rows.cu``: constants and arguments."""

from __future__ import annotations

import ctypes

from fusedmoe.kernels.cuda.quantized_cut import MOST_BYTES
from fusedmoe.kernels.cuda.quantized_decode import tile_map
from fusedmoe.kernels.cuda.quantized_launch import (
    Product,
    arguments_of,
    constants_of,
    filled,
    launch,
)
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


def stream(product: Product, tile: CudaRowsTile) -> None:
    """One launch; of at most ``MOST_MADE`` slots without a table programs make the blocks."""
    w, scale = product.w, product.w.scale
    assert scale is not None
    warps, rows = tile.along * tile.across, tile.across * tile.tiles * 16
    row_bytes, eights, group = w.data.shape[-1], -(-tile.slots // 8), w.format.group.col
    part_bytes = row_bytes // tile.parts
    lone = product.ids is not None and tile.slots == 1
    made = product.ids is not None and tile.slots > 1
    scale_row = scale.stride(1) * scale.element_size()
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
    constants = constants_of(product)
    constants |= {"COLUMNS": product.x.shape[1] // tile.parts, "PARTS": tile.parts, "GROUP": group}
    constants |= {"MT": tile.tiles, "NT": eights, "KW": tile.along, "WM": tile.across}
    constants |= {"STEP": PAIR, "PITCH": 0, "SPANS": 0, "SCALE_BOX": box}
    constants |= {"STAGES": stages, "PER_SM": tile.per_multiprocessor}
    constants |= {"AHEAD": tile.ahead, "SWITCH": SWITCH[tile.slots]}
    constants |= {"LONE": int(lone), "MADE": int(made)}
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
    parameters = filled(Arguments, product)
    parameters.R = product.out.shape[0] // tile.parts
    sizes = w.shape[0], product.out.shape[1], product.shards
    order, address = (w.interleaved, rows // product.shards), ctypes.addressof(parameters)
    if part_bytes % 128 == 0:
        ctypes.memmove(address, tile_map(w.data.data_ptr(), *sizes, row_bytes, *order), 128)
    if box:
        brought = tile_map(scale.data_ptr(), *sizes, scale_row, *order, box)
        ctypes.memmove(address + 128, brought, 128)
    given = SOURCES, constants, (warps + bringers) * 32, shared, parameters
    launch(*given, tile.per_multiprocessor, product.programs, w.data.get_device())
