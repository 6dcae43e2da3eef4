"""How tiles cut weights for ``quantized_lone.cu``, ``quantized_warps.cu`` and
``quantized_stream.cu``: rings and spans."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fusedmoe.quantization.formats.lookup import CODECS
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor
from fusedmoe.tuning.cuda_tiles import (
    STEP,
    TABLE_BYTES,
    CudaLoneTile,
    CudaStreamTile,
    CudaWarpsTile,
)
from fusedmoe.tuning.tiles import HOPPER_SHARED_MEMORY

CutTile = CudaLoneTile | CudaWarpsTile | CudaStreamTile
WARPS_STEP, WARPS_PITCH = 64, 36  # of quantized_warps.cu: bytes of a step, and from span to span
SPAN_BYTES = 32  # of a row's scales, and of its zero points, that travel together


class Spans(NamedTuple):
    """How a warp takes the scales of a row: those of ``steps`` steps at a time, ``alive`` such
    spans in its ring, ``pitch`` bytes from row to row: no two of eight begin in one bank; scales
    and zero points may begin inside a 4-byte word (``loose``)."""

    steps: int
    alive: int
    pitch: int
    loose: tuple[bool, bool]

    def constants(self) -> dict[str, int]:
        """As the sources name them."""
        scale_loose, zero_loose = map(int, self.loose)
        loose = {"SCALE_LOOSE": scale_loose, "ZERO_LOOSE": zero_loose}
        return {"SPAN": self.steps, "SPANS": self.alive, **loose}


@lru_cache(maxsize=1024)
def spans_of(
    steps: int, columns: int, group: int, unit: int, stride: int, along: int, stages: int
) -> Spans:
    """The spans for rows of ``steps`` steps of ``columns``, which ``along`` warps share; a scale of
    ``unit`` bytes per ``group`` columns (0: per row), ``stride`` of them in a row."""
    if group == 0:
        return Spans(1, 1, 0, (False, False))
    parts = [(i * steps // along, (i + 1) * steps // along) for i in range(along)]
    longest = max(last - first for first, last in parts)

    def size(span: int) -> int:
        most = -(-span * columns // group) + (columns % group != 0)
        return max(
            most * part + 3 * miss for part, miss in zip((unit, 1), loose(span), strict=True)
        )

    def loose(span: int) -> tuple[bool, bool]:
        begins = [k * columns // group for first, last in parts for k in range(first, last, span)]
        return tuple(  # type: ignore[return-value]
            any(at * bytes_ % 4 for at in (*begins, stride)) for bytes_ in (unit, 1)
        )

    span = max((n for n in range(1, longest + 1) if size(n) <= SPAN_BYTES), default=0)
    if span == 0:
        raise ValueError(f"{columns} columns in groups of {group} pass {SPAN_BYTES} bytes")
    # As many spans, but even ones, where those fit too.
    even = -(-longest // -(-longest // span))
    span = even if size(even) <= SPAN_BYTES else span
    shortest = min((last - first) % span or span for first, last in parts)
    # What a ring's steps can touch: one span, and another after each of the shortest.
    pitch = (-(-size(span) // 4) | 1) * 4
    return Spans(span, 1 + -(-(stages - 1) // shortest), pitch, loose(span))


def group_columns(fmt: QuantFormat, columns: int) -> int:
    """Columns that share a scale in rows of ``columns``, 0: all of them."""
    group = fmt.group.col
    if group != -1 and group < columns:
        return group
    # Zero points travel as groups' do: a row is one group, of a size that the kernel knows.
    return 0 if fmt.symmetric else 1 << (columns - 1).bit_length()


class Cut(NamedTuple):
    """What a tile makes of a launch: constants of the source ``entry``, threads and bytes of shared
    memory of a program, ``rows`` that the copy engine brings at a time."""

    entry: str
    constants: dict[str, int]
    threads: int
    shared: int
    rows: int


def cut_of(w: QuantizedTensor, columns: int, tile: CutTile) -> Cut:
    """How ``tile`` cuts rows of ``columns``, with fewer stages where its own do not fit; ValueError
    where two do not, and for more warps than steps."""
    for stages in range(tile.stages, 1, -1):
        cut = _cut(w, columns, tile, stages)
        if cut.shared <= HOPPER_SHARED_MEMORY:
            return cut
    raise ValueError(f"two stages of {tile} do not fit {HOPPER_SHARED_MEMORY} bytes")


def _cut(w: QuantizedTensor, columns: int, tile: CutTile, stages: int) -> Cut:
    fmt, scale = w.format, w.scale
    assert scale is not None
    group, in_turns = group_columns(fmt, columns), isinstance(tile, CudaWarpsTile)
    step = WARPS_STEP if in_turns else STEP
    steps = -(-w.data.shape[-1] // step)
    along = 1 if isinstance(tile, CudaStreamTile) else tile.along
    if along > steps:
        raise ValueError(f"{along} warps share a row of {steps} steps of {step} bytes")
    stride = scale.stride(1) if scale.dim() == 3 else 4
    unit, step_columns = scale.element_size(), step * fmt.values
    spans = spans_of(steps, step_columns, group, unit, stride, along, stages)
    pitch = WARPS_PITCH if in_turns else spans.pitch
    constants = spans.constants() | {
        "GROUP": group,
        "STEP": step,
        "PITCH": pitch,
        "KW": along,
        "STAGES": stages,
        "PER_SM": tile.per_multiprocessor,
    }
    # Of a row: its scales and zero points in the ring.
    span_bytes = spans.alive * pitch * (1 if fmt.symmetric else 2) if group else 0
    if isinstance(tile, CudaStreamTile):
        constants |= {"LONE": 0, "MT": 1, "NT": tile.slots // 8, "WM": tile.warps}
        rows = tile.warps * 16
        # Weights, x and two barriers.
        of_stage = rows * step + step // 16 * (2 * fmt.values * tile.slots * 16 + 16) + 16
        shared = stages * of_stage + rows * span_bytes
        return Cut("quantized_stream", constants, (tile.warps + 2) * 32, shared, rows)
    constants |= {"MT": tile.tiles, "NT": 1, "WM": tile.across}
    warps, rows = along * tile.across, tile.tiles * 16
    # Weights and scales; sums that warps share.
    of_warp = rows * (stages * step + span_bytes)
    if in_turns:
        of_warp += 2 * tile.tiles * 512 if along > 1 else 0
        table = TABLE_BYTES if fmt.element in CODECS else 0
        return Cut("quantized_warps", constants, warps * 32, warps * of_warp + table, rows)
    # x and a barrier.
    of_warp += stages * (2 * step_columns + 8) + (2 * tile.tiles * 128 if along > 1 else 0)
    constants |= {"LONE": 1}
    return Cut("quantized_lone", constants, warps * 32, warps * of_warp + 128, rows)
