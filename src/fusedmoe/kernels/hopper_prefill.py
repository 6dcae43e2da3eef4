"""The experts of a large batch on Hopper: the whole layer but routing, bound by the products.

Device code: ``kernels/triton/hopper_prefill.py`` (Gluon). The definition is ``experts_reference``.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import MoEAlignment, align_local_slots, padded_slots
from fusedmoe.kernels.align_arrivals import Arrivals, align_arrivals
from fusedmoe.kernels.hopper_decode import check_biases, check_experts, hopper_decode_reference
from fusedmoe.kernels.peer_layout import LateRows
from fusedmoe.tuning.hopper_tiles import COUNTER_SLOTS, PrefillTiles

PREFILL_BLOCK = 128


def prefill_rows(R: int, num_local: int) -> int:
    """How many rows the scratch of R slots over ``num_local`` experts has at most."""
    return padded_slots(R, PREFILL_BLOCK, num_local, whole_blocks=True)


def hopper_prefill(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    tiles: PrefillTiles | None = None,
    programs: int,
) -> None:
    """As ``hopper_decode``, but for the scratch: act [P, I] and y [P, H], P = ``prefill_rows``.

    The same errors.
    """
    P = prefill_rows(topk_ids.numel(), w2.shape[0])
    check_experts(x, w1, w2, topk_weights, topk_ids, out, act, y, P)
    check_biases(w1, w2, w1_bias, w2_bias)
    if not x.is_cuda:
        hopper_decode_reference(
            x,
            w1,
            w2,
            topk_weights,
            topk_ids,
            out,
            activation=activation,
            activation_config=activation_config,
            w1_bias=w1_bias,
            w2_bias=w2_bias,
            expert_map=expert_map,
        )
        return
    from fusedmoe.kernels.triton.hopper_prefill import prefill

    e, R = w2.shape[0], topk_ids.numel()
    if R == 0:
        return
    x, tables, arrivals = align_rows(x, topk_ids, e, expert_map)
    prefill(
        x,
        w1,
        w2,
        topk_weights,
        topk_ids,
        out,
        act,
        y,
        torch.empty(R, dtype=torch.int32, device=x.device),
        device_activation(activation, activation_config),
        w1_bias,
        w2_bias,
        expert_map,
        tables,
        tiles or PrefillTiles(),
        programs,
        arrivals,
    )


def align_rows(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_local: int,
    expert_map: torch.Tensor | None,
) -> tuple[torch.Tensor, MoEAlignment, Arrivals | None]:
    """x as an ordinary tensor, its slots in blocks, and when each may begin if rows are late."""
    if isinstance(x, LateRows):
        tables, arrivals = align_arrivals(
            topk_ids, PREFILL_BLOCK, num_local, expert_map, x, spare_slots=COUNTER_SLOTS
        )
        return x.plain(), tables, arrivals
    tables = align_local_slots(
        topk_ids, PREFILL_BLOCK, num_local, expert_map, whole_blocks=True, spare_slots=COUNTER_SLOTS
    )
    return x, tables, None
