"""Multiply the K expert outputs of each token by their weights and add them up.

One launch, fp32 accumulation in the order of the picks, rounded once: the same bits from run to
run and from batch to batch. Triton body: ``kernels/triton/mul_sum.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.align import dense
from fusedmoe.kernels.ids import check_expert_map, local_ids
from fusedmoe.kernels.peer_layout import PeerSums


def moe_fused_mul_sum(
    inputs: torch.Tensor,
    topk_weights: torch.Tensor | None,
    outputs: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_valid_tokens: torch.Tensor | None = None,
    *,
    num_local_experts: int | None = None,
) -> torch.Tensor:
    """out[t] = sum over k of topk_weights[t, k] * inputs[t, k].

    inputs [T, K, H], topk_weights [T, K] (None: all one) -> [T, H], in ``outputs`` or a new tensor
    of the inputs' dtype. A slot counts as nothing, and its row is not read, where its id in
    ``topk_ids`` [T, K] is -1, lies outside ``expert_map`` (int32, global -> local id or -1) or maps
    to -1, or is not below ``num_local_experts``. ``num_valid_tokens`` int32 [1]: rows from there on
    are neither read nor written. ``outputs`` that are ``PeerSums`` go to their tokens' ranks.

    Raises ValueError where shapes disagree.
    """
    _check(inputs, topk_weights, outputs, topk_ids, expert_map, num_valid_tokens)
    expert_map = dense(expert_map)
    if outputs is None:
        outputs = inputs.new_empty(inputs.shape[0], inputs.shape[2])
    whole = num_valid_tokens is None and inputs.is_contiguous()
    if isinstance(outputs, PeerSums) and whole and topk_ids is not None:
        from fusedmoe.kernels.peer_sums import send_sums

        rows = inputs.view(-1, inputs.shape[2])
        send_sums(outputs, rows, topk_weights, topk_ids, expert_map, num_local_experts)
        return outputs
    if inputs.is_cuda:
        from fusedmoe.kernels.triton.mul_sum import mul_sum

        given = inputs, topk_weights, outputs, topk_ids, expert_map, num_valid_tokens
        mul_sum(*given, num_local_experts)
        return outputs
    return moe_fused_mul_sum_reference(
        inputs, topk_weights, outputs, topk_ids, expert_map, num_valid_tokens,
        num_local_experts=num_local_experts,
    )  # fmt: skip


def moe_fused_mul_sum_reference(
    inputs: torch.Tensor,
    topk_weights: torch.Tensor | None,
    outputs: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_valid_tokens: torch.Tensor | None = None,
    *,
    num_local_experts: int | None = None,
) -> torch.Tensor:
    """The definition, in plain torch; reads ``num_valid_tokens`` on the host."""
    T, K, H = inputs.shape
    wide = torch.promote_types(inputs.dtype, torch.float32)
    total = torch.zeros(T, H, dtype=wide, device=inputs.device)
    live = _live_slots(inputs, topk_ids, expert_map, num_local_experts)
    for pick in range(K):
        row = inputs[:, pick].to(wide)
        if topk_weights is not None:
            row = row * topk_weights[:, pick, None].to(wide)
        total += torch.where(live[:, pick, None], row, 0.0)
    if outputs is None:
        outputs = inputs.new_empty(T, H)
    rows = T if num_valid_tokens is None else int(num_valid_tokens)
    outputs[:rows].copy_(total[:rows])
    return outputs


def _live_slots(
    inputs: torch.Tensor,
    topk_ids: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    num_local_experts: int | None,
) -> torch.Tensor:
    if topk_ids is None:
        return inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
    num_local = torch.iinfo(torch.int32).max if num_local_experts is None else num_local_experts
    return local_ids(topk_ids, num_local, expert_map) >= 0


def _check(
    inputs: torch.Tensor,
    topk_weights: torch.Tensor | None,
    outputs: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
) -> None:
    if inputs.dim() != 3:
        raise ValueError(f"inputs must be [T, K, H], got {tuple(inputs.shape)}")
    T, K, H = inputs.shape
    wanted: tuple[tuple[str, torch.Tensor | None, tuple[int, ...]], ...] = (
        ("topk_weights", topk_weights, (T, K)),
        ("topk_ids", topk_ids, (T, K)),
        ("outputs", outputs, (T, H)),
        ("num_valid_tokens", num_valid_tokens, (1,)),
    )
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but inputs {(T, K, H)} ask for {shape}"
            )
    check_expert_map(expert_map, topk_ids)
