"""Launching ``quantized_layer.cu``: constants and arguments."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from fusedmoe.kernels.activation import NO_ACTIVATION
from fusedmoe.kernels.align import LoneSlots
from fusedmoe.kernels.cuda import quantized_rows
from fusedmoe.kernels.cuda.quantized_launch import Product, launch
from fusedmoe.kernels.cuda.quantized_rows import RowsCut
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.cuda_tiles import CudaDecodeTiles, CudaRowsTile

SOURCES = (
    *(*quantized_rows.COMMON, "quantized_layer_tables.cuh"),
    *("quantized_layer_first.cuh", *quantized_rows.GEMM),
    *("quantized_layer_second.cuh", *quantized_rows.GEMM),
    "quantized_layer.cu",
)
# Of constants that the two GEMMs have each for itself.
OWN = (
    *("COLUMNS", "PARTS", "TOP_K", "WIDE", "BIAS", "FEATURES", "INTERLEAVED", "EXPERT_SCALES"),
    *("SCALE_STRIDE", "FORMULA", "GATED", "LIMITED", "MT", "KW", "WM", "SCALE_BOX", "STAGES"),
    *("AHEAD", "SWITCH", "WHOLE", "ALIGNED"),
)
# Of shared memory: so that no two such programs fit a multiprocessor; so that one of the next
# launch's first ones, of a warp, still does.
EXCLUSIVE_BYTES, MOST_BYTES = 116 * 1024, 224 * 1024
# Registers, of which it gets 40 a thread: of a thread when a program begins, for so many warps
# that multiply, then of those and of four others. A quarter of the warps share 16384.
REGISTERS = {8: (152, 216, 24), 12: (112, 136, 32), 16: (88, 96, 32)}
MOST_REGISTERS = 60 * 1024
FEWEST_STAGES = 2


class Arguments(ctypes.Structure):
    """The kernel's one parameter, field by field as its source has it."""

    _fields_ = (
        ("first", quantized_rows.Arguments),
        ("padding", ctypes.c_char * (-ctypes.sizeof(quantized_rows.Arguments) % 64)),
        ("second", quantized_rows.Arguments),
        ("more_padding", ctypes.c_char * (-ctypes.sizeof(quantized_rows.Arguments) % 64)),
        ("pick_weights", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("stride_out", ctypes.c_int64),
        ("tokens", ctypes.c_int32),
    )


class _Room(NamedTuple):
    """What programs have in shared memory, of R slots and e experts."""

    first: RowsCut
    second: RowsCut
    R: int
    e: int

    @property
    def slots(self) -> int:
        """Of the table."""
        return max(32, 1 << (self.R - 1).bit_length())

    @property
    def scratch(self) -> int:
        """Bytes that the table is made with."""
        return -(-2 * self.e * (-(-self.R // 32) + 1) // 128) * 128

    def bytes(self, stages: tuple[int, int]) -> int:
        """With rings of so many stages."""
        first, second = self.first, self.second
        rings = max(self.scratch, stages[0] * first.stage, stages[1] * second.stage)
        beside = max(first.exchange, second.exchange) + max(first.of_x, second.of_x)
        barriers = first.barriers(stages[0]) + second.barriers(stages[1]) + 32
        return rings + beside + barriers + 14 * self.slots + 4 + 128 + 16

    def stages(self, most: tuple[int, int]) -> tuple[int, int] | None:
        """As many as fit, at most so many; None where two do not."""
        least = (FEWEST_STAGES, FEWEST_STAGES)
        for i in range(2):
            own = [n for n in range(most[i], 1, -1) if self.bytes(_with(least, i, n)) <= MOST_BYTES]
            if not own:
                return None
            least = _with(least, i, own[0])
        return least


def _with(pair: tuple[int, int], i: int, n: int) -> tuple[int, int]:
    return (n, pair[1]) if i == 0 else (pair[0], n)


def registers_of(warps: int) -> dict[str, int]:
    """Of programs with so many warps that multiply."""
    others = 4 if warps in REGISTERS else 1
    most = min(MOST_REGISTERS // (32 * (warps + others)) // 8 * 8, 248)
    begin, own, left = REGISTERS.get(warps, (most, 0, 0))
    return {"BRINGERS": others, "BOUND": begin, "REGISTERS": own, "BRINGER_REGISTERS": left}


def run_layer(layer: LayerTensors[QuantizedTensor], tiles: CudaDecodeTiles) -> bool:
    """The whole layer, as checked by ``kernels.hopper_quantized``, in one launch; False where rings
    of these tiles do not fit beside tables, and nothing is done."""
    x, w1, w2, topk_weights, topk_ids, out, act, y, programs = layer[:9]
    gemm1, gemm2 = tiles
    assert isinstance(gemm1, CudaRowsTile)
    assert isinstance(gemm2, CudaRowsTile)
    (T, K), blocks = topk_ids.shape, LoneSlots.of(topk_ids, layer.expert_map)
    if gemm2.parts > 1:
        y = y.new_empty(gemm2.parts * y.shape[0], y.shape[1])
    first = Product(x, w1, act, layer.w1_bias, layer.epilogue, blocks, K, programs)
    second = Product(act, w2, y, layer.w2_bias, NO_ACTIVATION, blocks, 1, programs)
    cuts = quantized_rows.rows_cut(first, gemm1), quantized_rows.rows_cut(second, gemm2)
    room = _Room(*cuts, T * K, w1.shape[0])
    stages = room.stages((gemm1.stages, gemm2.stages))
    if stages is None:
        return False
    constants = {name: value for name, value in cuts[0].constants.items() if name not in OWN}
    for prefix, cut, n in zip(("FIRST", "SECOND"), cuts, stages, strict=True):
        own = cut.constants | {"STAGES": n}
        constants |= {f"{prefix}_{name}": own[name] for name in OWN}
    warps = max(cut.warps for cut in cuts)
    constants |= registers_of(warps) | {"PER_SM": 1, "LONE": 0, "MADE": room.slots}
    constants["SCRATCH"] = room.scratch
    parameters = Arguments(
        first=quantized_rows.parameters_of(first, gemm1),
        second=quantized_rows.parameters_of(second, gemm2),
        pick_weights=None if topk_weights is None else topk_weights.data_ptr(),
        out=out.data_ptr(),
        stride_out=out.stride(0),
        tokens=T,
    )
    threads = (warps + constants["BRINGERS"]) * 32
    shared = max(EXCLUSIVE_BYTES, room.bytes(stages))
    launch(
        *(SOURCES, constants, threads, shared, parameters, 1, programs, x.get_device()),
        cooperative=True,
    )
    return True
