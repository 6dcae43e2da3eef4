"""Launching ``quantized_rows.cu``: constants and arguments."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

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

COMMON = ("quantized_numbers.cuh", "quantized_lone_slots.cuh")
GEMM = (
    *("activation.cuh", "quantized_walk.cuh", "quantized_rows_ring.cuh"),
    *("quantized_rows_sums.cuh", "quantized_rows_multiply.cuh"),
)
SOURCES = (*COMMON, "quantized_rows_tables.cuh", *GEMM, "quantized_rows.cu")
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


class RowsCut(NamedTuple):
    """What a tile makes of a product.

    ``constants`` of its source but STAGES, so many ``warps`` that multiply; bytes of a ``stage`` of
    its ring and of what else a program has in shared memory for it: sums that warps ``exchange``,
    sums ``of_x``, barriers ``beside`` those of stages.
    """

    constants: dict[str, int]
    warps: int
    stage: int
    exchange: int
    of_x: int
    beside: int

    def barriers(self, stages: int) -> int:
        """Bytes of all of them."""
        return 20 * stages + self.beside


def rows_cut(product: Product, tile: CudaRowsTile) -> RowsCut:
    """Raises ValueError where warps do not share boxes of scales."""
    w, scale = product.w, product.w.scale
    assert scale is not None
    warps, rows, eights = tile.along * tile.across, _rows(tile), -(-tile.slots // 8)
    part_bytes, group = w.data.shape[-1] // tile.parts, w.format.group.col
    scale_row, pairs = scale.stride(1) * scale.element_size(), part_bytes // PAIR
    box, boxes = scale_boxes(scale_row, tile.parts)
    scale_bytes = boxes * box or scale_row
    if tile.along % boxes:
        raise ValueError(
            f"{tile.along} warps share {scale_bytes} bytes of scales that come {box} at a time"
        )
    constants = constants_of(product) | {
        "COLUMNS": product.x.shape[1] // tile.parts,
        "PARTS": tile.parts,
        "GROUP": group,
        "MT": tile.tiles,
        "NT": eights,
        "KW": tile.along,
        "WM": tile.across,
        "STEP": PAIR,
        "PITCH": 0,
        "SPANS": 0,
        "SCALE_BOX": box,
        "AHEAD": tile.ahead,
        "SWITCH": SWITCH[tile.slots],
        "WHOLE": int(_all_begin(pairs, tile.along, 4)),
        "ALIGNED": int(_all_begin(pairs, tile.along, group / (PAIR * w.format.values))),
    }
    aligned = 1024 if part_bytes % 128 == 0 else 128
    int4 = w.format.element == "int4"
    return RowsCut(
        constants,
        warps,
        -(-rows * (part_bytes + scale_bytes) // aligned) * aligned,
        2 * warps * eights * 512 if tile.along > 1 else 0,
        warps * sum_bytes(pairs, tile.along, group, eights) if int4 else 0,
        4 * tile.across * 8,
    )


def _rows(tile: CudaRowsTile) -> int:
    return tile.across * tile.tiles * 16


def parameters_of(product: Product, tile: CudaRowsTile) -> ctypes.Structure:
    """With what the copy engine reads weights, and scales, by."""
    w, scale = product.w, product.w.scale
    assert scale is not None
    found = filled(Arguments, product)
    found.R = product.out.shape[0] // tile.parts
    row_bytes, scale_row = w.data.shape[-1], scale.stride(1) * scale.element_size()
    sizes = w.shape[0], product.out.shape[1], product.shards
    box, _ = scale_boxes(scale_row, tile.parts)
    order, address = (w.interleaved, _rows(tile) // product.shards), ctypes.addressof(found)
    if row_bytes // tile.parts % 128 == 0:
        ctypes.memmove(address, tile_map(w.data.data_ptr(), *sizes, row_bytes, *order), 128)
    if box:
        brought = tile_map(scale.data_ptr(), *sizes, scale_row, *order, box)
        ctypes.memmove(address + 128, brought, 128)
    return found


def stream(product: Product, tile: CudaRowsTile) -> None:
    """One launch; of at most ``MOST_MADE`` slots without a table programs make the blocks.

    Raises ValueError where less than two stages fit shared memory.
    """
    cut, lone = rows_cut(product, tile), product.ids is not None and tile.slots == 1
    made = product.ids is not None and not lone
    shared = cut.exchange + cut.of_x + cut.beside
    if made:
        shared += 2 * MOST_MADE * (3 + 8 * -(-tile.slots // 8)) + 32
    stages = min(tile.stages, (MOST_BYTES - shared) // (cut.stage + 20))
    if stages < 2:
        raise ValueError(f"stages of {cut.stage} bytes leave no room for two")
    shared += stages * (cut.stage + 20)
    alone = tile.per_multiprocessor == 1
    registers, left = REGISTERS.get(cut.warps, NO_REGISTERS) if alone else NO_REGISTERS
    bringers = 4 if registers else 1
    constants = cut.constants | {
        "STAGES": stages,
        "PER_SM": tile.per_multiprocessor,
        "LONE": int(lone),
        "MADE": int(made),
        "BRINGERS": bringers,
        "REGISTERS": registers,
        "BRINGER_REGISTERS": left,
    }
    parameters = parameters_of(product, tile)
    given = SOURCES, constants, (cut.warps + bringers) * 32, shared, parameters
    launch(*given, tile.per_multiprocessor, product.programs, product.w.data.get_device())
