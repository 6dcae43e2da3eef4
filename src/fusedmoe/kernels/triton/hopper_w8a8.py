"""Few slots per expert on Hopper with both operands in 8 bits: weights stream to the WGMMA.

align and quantize x -> GEMM1 -> GEMM2 -> sum. x is rounded beside the alignment. GEMM1 writes act
in 16 bits; GEMM2 rounds it on its way to shared memory, by groups of 128 columns, by the largest
magnitudes of its rows, which GEMM1 has found, or by a given scale. Weights of GEMM1 are loaded
before the tables are there, those of GEMM2 before GEMM1 has ended.
"""

from typing import NamedTuple

import torch

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.grouped_gemm_quantized import weight_addresses
from fusedmoe.kernels.quantize import QuantizedRows
from fusedmoe.kernels.triton.hopper_launch import HopperLauncher, kept, weight_views
from fusedmoe.kernels.triton.hopper_w8a8_gemm import StreamCase, gemm_kernel
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.w8a8_tiles import StreamTile

# Registers of a thread in programs of eight warps: alone on a multiprocessor (with room for the sum
# beside it), and several together.
ALONE, TOGETHER = 208, 128

_launch_gemm = HopperLauncher(gemm_kernel)
_case = kept(StreamCase)


class Rows(NamedTuple):
    """What enters a GEMM: ``data`` [*, D], slot's row ``slot // top_k``, and what is known of its
    ``scale``, by ``rounding`` as in ``hopper_w8a8_rows``."""

    data: torch.Tensor
    scale: torch.Tensor | None
    top_k: int
    rounding: str
    e8m0: bool = False

    @classmethod
    def stored(cls, rows: QuantizedRows, top_k: int) -> "Rows":
        return cls(rows.data.view(torch.int32), rows.scale, top_k, "stored")

    @property
    def strides(self) -> tuple[int, int, int]:
        """How far rows lie apart; and their scales, from row to row and from group to group."""
        of_scales = (0, 0)
        if self.scale is not None and self.scale.numel() > 1:
            groups = self.scale.shape[1] if self.scale.dim() == 2 else 1
            of_scales = groups, int(groups > 1)
        return self.data.stride(0), *of_scales


def gemm(
    x: Rows,
    w: QuantizedTensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    act: DeviceActivation,
    blocks: MoEAlignment,
    tile: StreamTile,
    programs: int,
    *,
    largest: torch.Tensor | None = None,
    early: bool = False,
    guess: bool = False,
) -> None:
    """One launch, as in ``gemm_kernel``."""
    (R, N), D = out.shape, w.shape[2]
    row_shard_step, row_step, *of_scales = weight_addresses(w)[2:]
    low, high, desc_rows = weight_views(w.data, w.shards, w.interleaved, (tile.box, STEP.value))
    below = tile.valid if w.shards == 1 else 0
    columns = w.format.group.col
    scale_count = 0 if w.scale is None else w.scale.numel()
    group = columns if 0 < columns < D else 0
    by_groups = group > 0 or x.rounding == "group" or x.strides[2] > 0
    case = _case(
        N=N,
        D=D,
        PICKS=x.top_k,
        ROUNDING=x.rounding,
        E8M0=x.e8m0,
        STEPPED=w.format.element != "int8" or by_groups,
        GROUP=group,
        FORMULA=act.formula,
        GATED=act.gated,
        EARLY=early,
        GUESS=guess,
        ROWS=tile.rows,
        VALID=tile.valid,
        SLOTS=tile.slots,
        DEPTH=tile.depth,
        SPAN=tile.span,
        STAGES=tile.stages,
    )
    _launch_gemm(
        programs * tile.programs,
        (low, high),
        (
            x.data, x.scale, w.scale, bias, out, largest,
            blocks.expert_ids, blocks.sorted_ids, blocks.num_tokens_post_pad,
        ),
        (
            R, blocks.sorted_ids.shape[0] // tile.slots, w.shape[0], desc_rows, below, *x.strides,
            *of_scales, row_shard_step, row_step, scale_count,
            *act.numbers,
        ),
        (case,),
        num_warps=tile.warps,
        maxnreg=ALONE if tile.programs == 1 else TOGETHER,
    )  # fmt: skip
