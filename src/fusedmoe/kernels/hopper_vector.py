"""The experts of one or two tokens on Hopper: two launches, no tables, no scratch but ``act``.

Device code: ``kernels/triton/hopper_vector.py`` (Gluon). The definition is ``experts_reference``.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.hopper_decode import check_experts, hopper_decode_reference
from fusedmoe.tuning.hopper_tiles import VectorTiles, vector_tiles

MAX_VECTOR_SLOTS = 32


def hopper_vector(
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
    tiles: VectorTiles | None = None,
    programs: int,
) -> None:
    """As ``hopper_decode``, for at most 32 slots, with the scratch act [R, I] alone.

    An expert chosen by two tokens is read twice. The same errors, and for too many slots.
    """
    (_, H, I), (T, K) = w2.shape, topk_ids.shape  # noqa: E741
    R = T * K
    tiles = tiles or vector_tiles(T, K, H, I)
    if R > MAX_VECTOR_SLOTS or tiles is None:
        raise ValueError(
            f"hopper_vector takes at most {MAX_VECTOR_SLOTS} slots whose activations fit shared "
            f"memory, got T {T}, K {K}, I {I}"
        )
    check_experts(x, w1, w2, topk_weights, topk_ids, out, act, None, R)
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
    from fusedmoe.kernels.triton.hopper_vector import vector

    if R == 0:
        return
    vector(
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
        tiles,
        programs,
    )
