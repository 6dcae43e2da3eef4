"""The sum over picks at the end of a layer whose weights stream: rows by slot to rows by token.

sum_kernel   grid (T, cdiv(H, BLOCK)): y, weights -> out [T, H], in fp32, in one fixed order; y may
             be undefined afterwards (``discarded``).
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.triton.discarded import discard_rows
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2
from fusedmoe.quantization.tensor import QuantizedTensor


@triton.jit
def sum_kernel(
    y_ptr,
    weights_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    H,
    stride_out,
    num_mapped,
    num_local,
    PICKS: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    DISCARD: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One pass: rows, PARTS for each pick, are loaded before it is known which of them live, unless
    an expert map says that most of them do not. DISCARD: with one part for each pick."""
    follow_previous(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, PADDED)
    pick = row // PARTS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    slot = token * PICKS + pick
    at = (token * (PICKS * PARTS) + row)[:, None] * H + column[None, :]
    wanted = (pick < PICKS)[:, None] & inside[None, :]
    expert = tl.load(ids_ptr + slot, pick < PICKS, -1, cache_modifier=".cg")
    live = local_expert(expert, map_ptr, num_mapped, num_local) >= 0
    if map_ptr is not None:
        wanted &= live[:, None]
    rows = tl.load(y_ptr + at, wanted, 0.0, cache_modifier=".cg").to(tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + slot, pick < PICKS, 0.0, cache_modifier=".cg")
        rows *= weight.to(tl.float32)[:, None]
    total = tl.sum(tl.where(live[:, None], rows, 0.0), 0)
    tl.store(out_ptr + token * stride_out + column, total, inside)
    if DISCARD:
        tl.debug_barrier()
        discard_rows(y_ptr, slot, live, tl.program_id(1) * BLOCK, H, BLOCK)


_launch_sum = Launcher(sum_kernel, chained=True)


def weighted_sum(
    layer: LayerTensors[torch.Tensor] | LayerTensors[QuantizedTensor],
    parts: int = 1,
    *,
    few_tokens: int = 256,
    discard: bool = False,
) -> None:
    """The layer's y [T * K * parts, H] -> out [T, H]; a pick's row is the sum of its ``parts``.
    Up to ``few_tokens`` tokens are summed by narrow programs, so that there are enough of them."""
    ids, out, expert_map = layer.topk_ids, layer.out, layer.expert_map
    (T, K), (e, H, _) = ids.shape, layer.w2.shape
    warps = 1 if few_tokens >= T else 4
    _launch_sum(
        (T, -(-H // (256 * warps))),
        (layer.y, layer.topk_weights, ids, expert_map, out),
        (H, out.stride(0), 0 if expert_map is None else expert_map.shape[0], e),
        (K, parts, power_of_2(K * parts), 256 * warps, discard),
        warps,
    )
