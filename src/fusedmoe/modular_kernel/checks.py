"""What enters the experts, checked before a kernel runs. T tokens, K picks, H hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig

_ID_DTYPES = (torch.int32, torch.int64)


def check_picks(
    hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> None:
    """Raise ValueError unless these are [T, H], float [T, K] and int32 or int64 [T, K], on one
    device."""
    x, weights, ids = hidden_states, topk_weights, topk_ids
    if x.dim() != 2 or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"expected hidden_states [T, H] and topk_ids [T, K], got {tuple(x.shape)} and "
            f"{tuple(ids.shape)}"
        )
    if weights.shape != ids.shape:
        raise ValueError(f"topk_weights is {tuple(weights.shape)}, topk_ids {tuple(ids.shape)}")
    if not weights.is_floating_point():
        raise ValueError(f"topk_weights must be floating point, got {weights.dtype}")
    if ids.dtype not in _ID_DTYPES:
        raise ValueError(f"topk_ids must be int32 or int64, got {ids.dtype}")
    check_device(x, topk_weights=weights, topk_ids=ids)


def check_device(hidden_states: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise ValueError for the first tensor that is there and not where ``hidden_states`` are."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden_states.device:
            raise ValueError(
                f"{name} is on {tensor.device}, hidden_states on {hidden_states.device}"
            )


def check_weights(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    activation: MoEActivation,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> None:
    """Raise ValueError unless these go with rows [T, H]: [e, S * I, H], [e, H, I], biases
    [e, S * I] and [e, H]; floats of one dtype, biases apart; all on one device."""
    x = hidden_states
    if x.dim() != 2 or w1.dim() != 3 or w2.dim() != 3:
        raise ValueError(
            f"expected hidden_states [T, H], w1 [e, S * I, H] and w2 [e, H, I], got "
            f"{tuple(x.shape)}, {tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    e, _, width = w2.shape
    H, N = x.shape[1], width * (2 if activation.is_gated else 1)
    wanted = (
        ("w1", w1, (e, N, H)),
        ("w2", w2, (e, H, width)),
        ("w1_bias", w1_bias, (e, N)),
        ("w2_bias", w2_bias, (e, H)),
    )
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but hidden_states {tuple(x.shape)}, w2 "
                f"{tuple(w2.shape)} and {activation.value} ask for {shape}"
            )
    if not x.dtype == w1.dtype == w2.dtype or not x.is_floating_point():
        raise ValueError(f"hidden_states, w1, w2 are {x.dtype}, {w1.dtype}, {w2.dtype}")
    check_device(x, w1=w1, w2=w2, w1_bias=w1_bias, w2_bias=w2_bias)


def check_rows(hidden_states: torch.Tensor, moe: FusedMoEConfig) -> None:
    """Raise ValueError unless hidden_states are rows [T, H] of the layer's width and dtype."""
    x = hidden_states
    if x.dim() != 2 or x.shape[1] != moe.hidden_dim or x.dtype != moe.in_dtype:
        raise ValueError(
            f"these experts take rows [T, {moe.hidden_dim}] in {moe.in_dtype}, got "
            f"{tuple(x.shape)} in {x.dtype}"
        )


def check_counts(tokens_per_rank: Sequence[int] | None, dispatchers: int, num_tokens: int) -> None:
    """Raise ValueError unless there is an integer for each rank that brings tokens.

    On a single rank the number is compared with its tokens; among several, the prepare/finalize
    does that.
    """
    if tokens_per_rank is None:
        return
    if not all(hasattr(count, "__index__") for count in tokens_per_rank):
        raise ValueError(f"tokens_per_rank must be integers, got {list(tokens_per_rank)}")
    alone_and_wrong = dispatchers == 1 and list(tokens_per_rank) != [num_tokens]
    if len(tokens_per_rank) != dispatchers or alone_and_wrong:
        raise ValueError(
            f"tokens_per_rank is {list(tokens_per_rank)} for {num_tokens} tokens here and "
            f"{dispatchers} ranks that bring tokens"
        )


def check_ids(topk_ids: torch.Tensor, num_experts: int, debug_checks: bool) -> None:
    """Raise ValueError for an id outside [-1, num_experts).

    On the CPU always, on a GPU (where it waits for the device) with ``debug_checks``. Graphs of
    compiled code hold no such check: on a GPU, ids out of range count as -1 there.
    """
    if topk_ids.numel() == 0 or torch.compiler.is_compiling():
        return
    if topk_ids.device.type != "cpu" and not debug_checks:
        return
    low, high = (int(bound) for bound in topk_ids.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(f"topk_ids lie in [{low}, {high}], not in [-1, {num_experts})")
