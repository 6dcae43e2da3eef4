"""Launching ``quantized_decode.cu``: the constants it is compiled with, and its arguments."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.cuda.program import CudaKernel, source_of
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.cuda_tiles import CudaDecodeTile, CudaDecodeTiles

ENTRY = "quantized_decode"
SOURCES = (
    *("quantized_numbers.cuh", "activation.cuh", "quantized_tasks.cuh", "quantized_loads.cuh"),
    "quantized_decode.cu",
)
ELEMENTS = {"int4": 0, "e2m1": 1, "int8": 2, "e4m3": 3}
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
SCALES[torch.float8_e4m3fn] = 4
BIASES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
FORMULAS = ("", "silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "swiglustep", "situ")
_POINTERS = (
    *("weights", "scale", "scale2", "zero", "bias", "x", "out", "ids", "map"),
    *("experts", "sorted", "num_post"),
)
_NUMBERS = ("R", "num_mapped", "num_local", "last_block")


class Arguments(ctypes.Structure):
    """The kernel's one parameter, field by field as the source has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("stride_x", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in _NUMBERS),
        *((name, ctypes.c_float) for name in ("limit", "alpha", "beta")),
    )


@lru_cache(maxsize=1024)
def _kernel(defines: tuple[tuple[str, int | str], ...], threads: int, shared: int) -> CudaKernel:
    text = tuple((name, str(value)) for name, value in defines)
    return CudaKernel(source_of("instructions.cuh", *SOURCES), ENTRY, text, threads, shared)


# Shared memory of a multiprocessor, and what every program costs beside its own.
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024
SPAN_BYTES = 32  # of a row's scales, and of its zero points, that travel together


class Spans(NamedTuple):
    """How a warp takes the scales of a row: those of ``steps`` steps at a time, ``alive`` such
    spans in its ring; scales and zero points may begin inside a 4-byte word (``loose``)."""

    steps: int
    alive: int
    loose: tuple[bool, bool]


@lru_cache(maxsize=1024)
def spans_of(
    steps: int, columns: int, group: int, unit: int, stride: int, along: int, stages: int
) -> Spans:
    """For rows of ``steps`` steps of so many columns, which ``along`` warps share; a scale of
    ``unit`` bytes per ``group`` columns (0: per row), ``stride`` of them in a row."""
    if group == 0:
        return Spans(1, 1, (False, False))
    parts = [(i * steps // along, (i + 1) * steps // along) for i in range(along)]
    longest = max(last - first for first, last in parts)

    def fits(span: int) -> bool:
        most = -(-span * columns // group) + (columns % group != 0)
        return most * unit + 3 <= SPAN_BYTES or (most * unit <= SPAN_BYTES and not loose(span)[0])

    def loose(span: int) -> tuple[bool, bool]:
        begins = [k * columns // group for first, last in parts for k in range(first, last, span)]
        return tuple(  # type: ignore[return-value]
            any(at * size % 4 for at in (*begins, stride)) for size in (unit, 1)
        )

    span = max((n for n in range(1, longest + 1) if fits(n)), default=0)
    if span == 0:
        raise ValueError(f"{columns} columns in groups of {group} pass {SPAN_BYTES} bytes")
    shortest = min((last - first) % span or span for first, last in parts)
    # What a ring's steps can touch: one span, and another after each of the shortest.
    return Spans(span, 1 + -(-(stages - 1) // shortest), loose(span))


def decode(
    x: torch.Tensor,
    w1: QuantizedTensor,
    w2: QuantizedTensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor,
    activation: DeviceActivation,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    blocks: MoEAlignment | LoneSlots,
    addresses: tuple[tuple[int, ...], tuple[int, ...]],
    tiles: CudaDecodeTiles,
    programs: int,
) -> None:
    """Both GEMMs and the sum; arguments are those of ``kernels.hopper_quantized``."""
    from fusedmoe.kernels.triton.weighted_sum import weighted_sum

    first, second = addresses
    K = topk_ids.shape[1]
    stream(x, w1, act, w1_bias, activation, blocks, first, K, tiles.gemm1, programs, early=False)
    stream(act, w2, y, w2_bias, None, blocks, second, 1, tiles.gemm2, programs, early=True)
    weighted_sum(y, topk_weights, topk_ids, expert_map, out, w2.shape[0])


def stream(
    x: torch.Tensor,
    w: QuantizedTensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    activation: DeviceActivation | None,
    blocks: MoEAlignment | LoneSlots,
    addresses: tuple[int, ...],
    top_k: int,
    tile: CudaDecodeTile,
    programs: int,
    *,
    early: bool,
) -> None:
    """One launch; ``addresses`` from ``weight_addresses``."""
    N, D = out.shape[1], x.shape[1]
    lone = isinstance(blocks, LoneSlots)
    R = blocks.topk_ids.numel() if isinstance(blocks, LoneSlots) else out.shape[0]
    act = activation or DeviceActivation(formula="", gated=False)
    expert_scales, scale_stride, scale_shard, scale_step, scale_block = addresses[4:]
    fmt, scale = w.format, w.scale
    assert scale is not None
    group = fmt.group.col
    if group == -1 or group >= D:
        # Zero points travel as groups' do: a row is one group, of a size that the kernel knows.
        group = 0 if fmt.symmetric else 1 << (D - 1).bit_length()
    unit = scale.element_size()
    step_columns = tile.step * fmt.values
    steps = -(-w.data.shape[-1] // tile.step)
    if tile.along > steps:
        raise ValueError(f"{tile.along} warps share a row of {steps} steps of {tile.step} bytes")
    stride = scale_stride if scale.dim() == 3 else 4
    spans = spans_of(steps, step_columns, group, unit, stride, tile.along, tile.stages)
    warps = tile.along * tile.across
    rows = tile.tiles * 16
    shared = tile.stages * rows * tile.step
    if group:
        shared += spans.alive * rows * 36 * (1 if fmt.symmetric else 2)
    shared *= warps
    if tile.along > 1:
        shared += 2 * warps * tile.tiles * (tile.slots // 8) * (128 if lone else 512)
    ids = blocks.topk_ids if isinstance(blocks, LoneSlots) else None
    defines = (
        ("FEATURES", N),
        ("COLUMNS", D),
        ("TOP_K", top_k),
        ("INTERLEAVED", int(w.interleaved)),
        ("EXPERT_SCALES", expert_scales),
        ("SCALE_STRIDE", scale_stride),
        ("SCALE_SHARD", scale_shard),
        ("SCALE_STEP", scale_step),
        ("ELEMENT", ELEMENTS[fmt.element]),
        ("GROUP", group),
        ("SCALE", SCALES[scale.dtype]),
        ("SCALE_BYTES", unit),
        ("SPAN", spans.steps),
        ("SPANS", spans.alive),
        ("SCALE_LOOSE", int(spans.loose[0])),
        ("SCALE_BLOCK", scale_block),
        ("ZERO", int(w.zero_point is not None)),
        ("ZERO_LOOSE", int(spans.loose[1])),
        ("SCALE2", int(w.scale2 is not None)),
        ("BIAS", 0 if bias is None else BIASES[bias.dtype]),
        ("FORMULA", FORMULAS.index(act.formula)),
        ("GATED", int(act.gated)),
        ("LIMITED", int(act.limit is not None)),
        ("LONE", int(lone)),
        ("EARLY", int(early)),
        ("ID64", int(ids is not None and ids.dtype == torch.int64)),
        ("WIDE", int(out.dtype == torch.float32)),
        ("MT", tile.tiles),
        ("NT", tile.slots // 8),
        ("KW", tile.along),
        ("WM", tile.across),
        ("STEP", tile.step),
        ("STAGES", tile.stages),
        ("PER_SM", tile.per_multiprocessor),
    )
    kernel = _kernel(defines, warps * 32, shared)
    tables: tuple[torch.Tensor | None, ...] = (None, None, None)
    expert_map = None
    if isinstance(blocks, LoneSlots):
        expert_map = blocks.expert_map
    else:
        tables = blocks.expert_ids, blocks.sorted_ids, blocks.num_tokens_post_pad
    tensors = (
        w.data, scale, w.scale2, w.zero_point, bias, x, out, ids, expert_map, *tables,
    )  # fmt: skip
    parameters = Arguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        x.stride(0),
        R,
        0 if expert_map is None else expert_map.shape[0],
        w.shape[0],
        0 if tables[0] is None else tables[0].shape[0] - 1,
        act.limit or 0.0,
        act.alpha,
        act.beta,
    )
    resident = min(tile.per_multiprocessor, SHARED_BYTES // (shared + RESERVED_BYTES))
    kernel.launch(programs * resident, parameters, x.get_device())
