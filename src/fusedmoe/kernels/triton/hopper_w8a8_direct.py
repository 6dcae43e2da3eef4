"""One or two tokens with both operands in 8 bits: ``hopper_direct``, whose rows are rounded on the
way.

The two launches, roles and tasks are those of ``hopper_direct``. There are so few rows that all of
their steps lie in shared memory: the consumers round them there while the first weights are on
their way. Products of 128 columns are added up in fp32 with their scales, as in
``hopper_w8a8_gemm``.
"""

from typing import Any, NamedTuple

import torch

from fusedmoe.kernels.grouped_gemm_quantized import weight_addresses
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.triton.hopper_direct import direct_sizes
from fusedmoe.kernels.triton.hopper_launch import (
    HopperLauncher,
    kept,
    matrix_descriptor,
    weight_views,
)
from fusedmoe.kernels.triton.hopper_w8a8_direct_common import RoundedCase
from fusedmoe.kernels.triton.hopper_w8a8_direct_down import down_kernel
from fusedmoe.kernels.triton.hopper_w8a8_direct_up import up_kernel
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.hopper_tiles import DirectTiles

# Of a thread in a program of eight warps, alone on its multiprocessor.
MAX_REGISTERS = 168

_launch_up = HopperLauncher(up_kernel)
_launch_down = HopperLauncher(down_kernel)
_case = kept(RoundedCase)


class Rounding(NamedTuple):
    """How rows are rounded: ``how`` is ROUNDING of ``RoundedCase``."""

    how: str
    scale: torch.Tensor | None
    e8m0: bool


def direct(
    layer: LayerTensors[QuantizedTensor],
    roundings: tuple[Rounding, Rounding],
    tiles: DirectTiles,
) -> None:
    """Launch both kernels; the layer as checked by ``kernels.hopper_w8a8``."""
    x, w1, w2, topk_weights, topk_ids, out, act, _, programs = layer[:9]
    activation, expert_map = layer.epilogue, layer.expert_map
    (e, H, I), K = w2.shape, topk_ids.shape[1]  # noqa: E741
    R, num_mapped, slots, picks = direct_sizes(topk_ids, expert_map)
    kind = w1.shards, w1.interleaved
    low, high, desc_rows = weight_views(w1.data, *kind, (tiles.up_box, STEP.value))
    shard_step, row_step, *of_scales = weight_addresses(w1)[2:]
    _launch_up(
        programs,
        (low, high),
        (x, roundings[0].scale, w1.scale, layer.w1_bias, act, topk_ids, expert_map),
        (
            *(R, num_mapped, e, desc_rows, x.stride(0), *of_scales, shard_step, row_step),
            *activation.numbers,
        ),
        (
            _case(
                *(I, H, K, slots, 2 * tiles.up_rows, tiles.up_valid, tiles.up_stages),
                *(0, activation.formula, activation.gated),
                BN=8,
                **_rounded(w1, roundings[0]),
            ),
        ),
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )
    _, row_step, *of_scales = weight_addresses(w2)[2:]
    _launch_down(
        programs,
        (matrix_descriptor(w2.data, I, (tiles.down_box, STEP.value)),),
        (
            *(act, roundings[1].scale, w2.scale, layer.w2_bias, topk_weights, out, topk_ids),
            expert_map,
        ),
        (out.stride(0), R, num_mapped, e, *of_scales[:2], *of_scales[3:], row_step),
        (
            _case(
                *(H, I, K, slots, tiles.down_rows, tiles.down_valid, tiles.down_stages),
                tiles.down_rows // picks,
                BN=max(8, picks),
                **_rounded(w2, roundings[1]),
            ),
        ),
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )


def _rounded(w: QuantizedTensor, rounding: Rounding) -> dict[str, Any]:
    """What a case is told of weights and of how rows are rounded. int8 sums are exact; where rows
    have one scale, they run through."""
    columns, D = w.format.group.col, w.shape[2]
    group = columns if 0 < columns < D else 0
    stepped = w.format.element != "int8" or group > 0 or rounding.how == "group"
    how = {"ROUNDING": rounding.how, "E8M0": rounding.e8m0}
    return {**how, "STEPPED": stepped, "GROUP": group}
