"""What enters a layer's forward, checked and flattened to one row per token."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenBatch(NamedTuple):
    """x [T, width], and what came with it: logits [T, E], input_ids [T], is_padding bool [T]."""

    x: torch.Tensor
    router_logits: torch.Tensor | None
    input_ids: torch.Tensor | None
    is_padding: torch.Tensor | None


def flatten_inputs(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    num_router_logits: int | None,
) -> TokenBatch:
    """hidden_states [..., width] and its companions as rows of tokens.

    Raises ValueError where their leading shapes differ, logits do not have
    ``num_router_logits`` columns (None: unknown) or are not floating point.
    """
    if hidden_states.dim() < 1 or hidden_states.shape[-1] < 1:
        raise ValueError(f"hidden_states must be [..., H], got {tuple(hidden_states.shape)}")
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    T = x.shape[0]
    if router_logits is not None:
        columns = router_logits.shape[-1] if router_logits.dim() else 0
        wanted = columns if num_router_logits is None else num_router_logits
        if router_logits.dim() < 1 or columns != wanted or router_logits.numel() != T * columns:
            raise ValueError(
                f"router_logits must be [{T}, {'E' if num_router_logits is None else wanted}] for "
                f"hidden_states {tuple(hidden_states.shape)}, got {tuple(router_logits.shape)}"
            )
        if not router_logits.dtype.is_floating_point:
            raise ValueError(f"router_logits must be floating point, got {router_logits.dtype}")
        if router_logits.device != x.device:
            raise ValueError(f"router_logits are on {router_logits.device}, tokens on {x.device}")
        router_logits = router_logits.reshape(T, columns)
    return TokenBatch(
        x,
        router_logits,
        _one_per_token(input_ids, T, "input_ids"),
        _one_per_token(is_padding, T, "is_padding"),
    )


def _one_per_token(values: torch.Tensor | None, T: int, name: str) -> torch.Tensor | None:
    if values is None:
        return None
    if values.numel() != T:
        raise ValueError(f"{name} must hold one value for each of {T} tokens, got {values.numel()}")
    return values.reshape(T)


def check_rows(x: torch.Tensor, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless x [T, width] is what the routed experts take."""
    if x.shape[-1] != width:
        raise ValueError(
            f"the routed experts take rows of hidden size {width}, got {tuple(x.shape)}"
        )
    if x.dtype != dtype:
        raise ValueError(f"the experts' weights compute in {dtype}, hidden_states are {x.dtype}")
    if x.device != device:
        raise ValueError(f"the experts' weights are on {device}, hidden_states on {x.device}")
