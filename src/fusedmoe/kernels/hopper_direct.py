"""The experts of one or two tokens on Hopper: two launches, no tables, no scratch but ``act``.

Device code: ``kernels/triton/hopper_direct.py`` (Gluon). The definition is ``experts_reference``.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.hopper_decode import check_biases, check_experts, hopper_decode_reference
from fusedmoe.tuning.hopper_tiles import (
    MAX_DIRECT_PICKS,
    MAX_DIRECT_SLOTS,
    MAX_DIRECT_TOKENS,
    DirectTiles,
    direct_tiles,
)


def hopper_direct(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    tiles: DirectTiles | None = None,
    programs: int,
) -> None:
    """As ``hopper_decode``, for at most 32 slots, with the scratch act [R, I] alone.

    An expert chosen by two tokens is read twice. The same errors, and for too many slots.
    """
    (T, K), R = topk_ids.shape, topk_ids.numel()
    if R > MAX_DIRECT_SLOTS or T > MAX_DIRECT_TOKENS or K > MAX_DIRECT_PICKS:
        raise ValueError(
            f"hopper_direct takes at most {MAX_DIRECT_SLOTS} slots of {MAX_DIRECT_TOKENS} tokens "
            f"with {MAX_DIRECT_PICKS} picks each, got T {T} and K {K}"
        )
    check_experts(x, w1, w2, topk_weights, topk_ids, out, act, None, R)
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
    from fusedmoe.kernels.triton.hopper_direct import direct

    if R == 0:
        return
    direct(
        x,
        w1,
        w2,
        topk_weights,
        topk_ids,
        out,
        act,
        device_activation(activation, activation_config),
        w1_bias,
        w2_bias,
        expert_map,
        tiles or direct_tiles(T, K, *w2.shape[1:]),
        programs,
    )
