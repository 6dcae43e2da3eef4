"""The experts of one or two tokens on Hopper: two launches, no tables, no scratch but ``act``.

Device code: ``kernels/triton/hopper_direct.py`` (Gluon). The definition is ``experts_reference``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.hopper_decode import check_biases, check_experts, hopper_decode_reference
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.tuning.hopper_tiles import (
    MAX_DIRECT_PICKS,
    MAX_DIRECT_SLOTS,
    MAX_DIRECT_TOKENS,
    DirectTiles,
    direct_tiles,
)


def hopper_direct(layer: LayerTensors[torch.Tensor], tiles: DirectTiles | None = None) -> None:
    """As ``hopper_decode``, for at most 32 slots; ``y`` is not used.

    An expert chosen by two tokens is read twice. The same errors, and for too many slots.
    """
    (T, K), R = layer.topk_ids.shape, layer.topk_ids.numel()
    if R > MAX_DIRECT_SLOTS or T > MAX_DIRECT_TOKENS or K > MAX_DIRECT_PICKS:
        raise ValueError(
            f"hopper_direct takes at most {MAX_DIRECT_SLOTS} slots of {MAX_DIRECT_TOKENS} tokens "
            f"with {MAX_DIRECT_PICKS} picks each, got T {T} and K {K}"
        )
    check_experts(layer, R)
    check_biases(layer)
    if not layer.x.is_cuda:
        hopper_decode_reference(layer)
        return
    from fusedmoe.kernels.triton.hopper_direct import direct

    if R > 0:
        direct(layer, tiles or direct_tiles(T, K, *layer.w2.shape[1:]))
