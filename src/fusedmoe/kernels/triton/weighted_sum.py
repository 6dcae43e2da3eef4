"""The sum over picks at the end of a streamed layer: rows by slot to rows by token, in fp32."""

import torch

from fusedmoe.kernels.triton.hopper_decode import sum_kernel
from fusedmoe.kernels.triton.launch import Launcher, power_of_2

_launch_sum = Launcher(sum_kernel, chained=True)


def weighted_sum(
    y: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
    num_local: int,
    parts: int = 1,
) -> None:
    """y [T * K * parts, H] -> out [T, H]; a pick's row is the sum of its ``parts``."""
    (T, K), H = topk_ids.shape, out.shape[1]
    warps = 1 if T <= 256 else 4
    _launch_sum(
        (T, -(-H // (256 * warps))),
        (y, topk_weights, topk_ids, expert_map, out),
        (H, out.stride(0), 0 if expert_map is None else expert_map.shape[0], num_local),
        (K, parts, power_of_2(K * parts), 256 * warps, False),
        warps,
    )
