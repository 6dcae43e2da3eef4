"""Weighted sum over the K picks of each token, for as many tokens as the device says are valid.

Triton body: ``kernels/triton/bounded_sum.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.bounded_align import BoundedRouting, bounded_ids


def bounded_sum(
    rows: torch.Tensor,
    topk_weights: torch.Tensor | None,
    routing: BoundedRouting,
    out: torch.Tensor,
    position: torch.Tensor | None = None,
    expected_tokens: int | None = None,
) -> torch.Tensor:
    """out[t] = sum over the picks k that are here of topk_weights[t, k] * rows[t * K + k].

    rows [R, H], topk_weights [T, K] (None: all one), out [T, H], of any float dtypes and strides.
    With ``position`` (int32 [R]) slot s's row is rows[position[s]], rows [P, H]. Sums are fp32, in
    one fixed order, rounded once to ``out``'s dtype. Rows of ``out`` past the valid tokens keep
    what they hold; rows, weights and positions of slots that are not here are not read.
    ``expected_tokens`` (default T) sizes the launch, never the result.

    Raises ValueError where shapes disagree.
    """
    (T, K), H = routing.routing_map.shape, rows.shape[-1]
    wanted = (
        ("rows", rows, (routing.R if position is None else rows.shape[0], H)),
        ("topk_weights", topk_weights, (T, K)),
        ("out", out, (T, H)),
        ("position", position, (routing.R,)),
    )
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, T {T}, K {K}, H {H} ask for {shape}"
            )
    if not rows.is_cuda:
        return bounded_sum_reference(rows, topk_weights, routing, out, position, expected_tokens)
    from fusedmoe.kernels.triton.bounded_sum import weigh_and_add

    return weigh_and_add(rows, topk_weights, routing, out, position, expected_tokens)


def bounded_sum_reference(
    rows: torch.Tensor,
    topk_weights: torch.Tensor | None,
    routing: BoundedRouting,
    out: torch.Tensor,
    position: torch.Tensor | None = None,
    expected_tokens: int | None = None,
) -> torch.Tensor:
    """The definition, in plain torch; reads the number of tokens on the host."""
    T, K = routing.routing_map.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    here = (bounded_ids(routing) >= 0).view(T, K)
    at = torch.arange(routing.R, device=rows.device).view(T, K)
    if position is not None:
        at = torch.where(here, position.view(T, K), 0)
    total = torch.zeros(out.shape, dtype=wide, device=rows.device)
    for pick in range(K):
        row = rows[at[:, pick]].to(wide)
        if topk_weights is not None:
            row = row * topk_weights[:, pick, None].to(wide)
        total += torch.where(here[:, pick, None], row, 0.0)
    valid = min(max(int(routing.num_valid), 0), T)
    out[:valid].copy_(total[:valid])
    return out
