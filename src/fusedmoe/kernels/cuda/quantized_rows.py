"""Launching ``quantized_rows.cu``: constants and arguments."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from fusedmoe.kernels.cuda.quantized_decode import tile_map
from fusedmoe.kernels.cuda.quantized_launch import (
    Product,
    arguments_of,
    constants_of,
    filled,
    launch,
)
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.cuda_tiles import MOST_MADE, CudaRowsTile, scale_boxes
from fusedmoe.tuning.tiles import HOPPER_SHARED_MEMORY

SOURCES = (
    *("quantized_numbers.cuh", "activation.cuh", "quantized_walk.cuh", "quantized_lone_slots.cuh"),
    *("quantized_rows_ring.cuh", "quantized_rows_digits.cuh", "quantized_rows_sums.cuh"),
    "quantized_rows.cu",
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
    """Whether the part of ``pairs`` of every warp begins at a multiple of ``unit``."""
    return all(i * pairs // along % unit == 0 for i in range(along))


def sum_bytes(pairs: int, along: int, group: int, eights: int) -> int:
    """Bytes of a warp's sums of x for ``eights`` of slots, one for each unit of a scale, where they
    do not stay in registers."""
    chunks = group // 32
    aligned = _all_begin(pairs, along, group / 64)
    of_unit = min(chunks, 4) if aligned or chunks < 2 else 2
    units = -(-2 * -(-pairs // along) // of_unit)
    return units * eights * 64 if units * eights > 4 else 0


class Ring(NamedTuple):
    """A program's shared memory: ``stages`` of ``rows`` rows each, ``shared`` bytes in all.

    Scales come ``box`` bytes at a time; 0: as they lie.
    """

    rows: int
    stages: int
    shared: int
    box: int


def ring_of(w: QuantizedTensor, tile: CudaRowsTile, made: bool) -> Ring:
    """As many stages as there is room for beside sums, and beside blocks that are ``made``.

    Raises ValueError where that is less than two, and where warps do not share boxes of scales.
    """
    assert w.scale is not None
    rows, eights = tile.across * tile.tiles * 16, -(-tile.slots // 8)
    warps, part_bytes = tile.along * tile.across, w.data.shape[-1] // tile.parts
    scale_row = w.scale.stride(1) * w.scale.element_size()
    box, boxes = scale_boxes(scale_row, tile.parts)
    scale_bytes = boxes * box or scale_row
    if tile.along % boxes:
        raise ValueError(
            f"{tile.along} warps share {scale_bytes} bytes of scales that come {box} at a time"
        )
    shared = 4 * tile.across * 8
    if tile.along > 1:
        shared += 2 * warps * eights * 512
    if w.format.element == "int4":
        shared += warps * sum_bytes(part_bytes // PAIR, tile.along, w.format.group.col, eights)
    if made:
        shared += 2 * MOST_MADE * (3 + 8 * eights) + 32
    of_stage = rows * (part_bytes + scale_bytes) + 16 + 4
    stages = min(tile.stages, (HOPPER_SHARED_MEMORY - shared) // of_stage)
    if stages < 2:
        raise ValueError(f"{rows} rows of {part_bytes} bytes leave no room for two stages")
    return Ring(rows, stages, shared + stages * of_stage, box)


def stream(product: Product, tile: CudaRowsTile) -> None:
    """One launch; of at most ``MOST_MADE`` slots without a table programs make the blocks."""
    w, scale = product.w, product.w.scale
    assert scale is not None
    warps, row_bytes, group = tile.along * tile.across, w.data.shape[-1], w.format.group.col
    pairs = row_bytes // tile.parts // PAIR
    lone = product.ids is not None and tile.slots == 1
    made = product.ids is not None and tile.slots > 1
    ring = ring_of(w, tile, made)
    alone = tile.per_multiprocessor == 1
    registers, left = REGISTERS.get(warps, NO_REGISTERS) if alone else NO_REGISTERS
    bringers = 4 if registers else 1
    constants = constants_of(product) | {
        "COLUMNS": product.x.shape[1] // tile.parts,
        "PARTS": tile.parts,
        "GROUP": group,
        "MT": tile.tiles,
        "NT": -(-tile.slots // 8),
        "KW": tile.along,
        "WM": tile.across,
        "STEP": PAIR,
        "PITCH": 0,
        "SPANS": 0,
        "SCALE_BOX": ring.box,
        "STAGES": ring.stages,
        "PER_SM": tile.per_multiprocessor,
        "AHEAD": tile.ahead,
        "SWITCH": SWITCH[tile.slots],
        "LONE": int(lone),
        "MADE": int(made),
        "BRINGERS": bringers,
        "REGISTERS": registers,
        "BRINGER_REGISTERS": left,
        "WHOLE": int(_all_begin(pairs, tile.along, 4)),
        "ALIGNED": int(_all_begin(pairs, tile.along, group / (PAIR * w.format.values))),
    }
    parameters = filled(Arguments, product)
    parameters.R = product.out.shape[0] // tile.parts
    sizes = w.shape[0], product.out.shape[1], product.shards
    order, address = (w.interleaved, ring.rows // product.shards), ctypes.addressof(parameters)
    if row_bytes // tile.parts % 128 == 0:
        ctypes.memmove(address, tile_map(w.data.data_ptr(), *sizes, row_bytes, *order), 128)
    if ring.box:
        scale_row = scale.stride(1) * scale.element_size()
        brought = tile_map(scale.data_ptr(), *sizes, scale_row, *order, ring.box)
        ctypes.memmove(address + 128, brought, 128)
    given = SOURCES, constants, (warps + bringers) * 32, ring.shared, parameters
    launch(*given, tile.per_multiprocessor, product.programs, w.data.get_device())
