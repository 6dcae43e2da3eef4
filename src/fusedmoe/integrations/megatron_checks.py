"""What the functions of ``integrations/megatron.py`` refuse, with the numbers, before a launch.

T rows of the buffers, K picks, e experts of this rank, H hidden, I intermediate.
"""

from __future__ import annotations

import torch


def check_routing(
    routing_map: torch.Tensor,
    valid_tokens: torch.Tensor,
    num_local_experts: int,
    local_expert_start: int,
) -> None:
    """Raise ValueError unless routing_map is int [T, K >= 1] and valid_tokens one int beside it."""
    integers = (torch.int32, torch.int64)
    if routing_map.dtype not in integers or routing_map.dim() != 2 or routing_map.shape[1] < 1:
        raise ValueError(
            f"routing_map must be int32 or int64 [T, K], got {routing_map.dtype} "
            f"{tuple(routing_map.shape)}"
        )
    if not isinstance(valid_tokens, torch.Tensor):
        raise ValueError(f"valid_tokens must be a tensor on the device, got {valid_tokens!r}")
    if valid_tokens.dtype not in integers or valid_tokens.numel() != 1:
        raise ValueError(
            f"valid_tokens must be one int32, got {valid_tokens.dtype} {tuple(valid_tokens.shape)}"
        )
    if valid_tokens.device != routing_map.device:
        raise ValueError(
            f"valid_tokens is on {valid_tokens.device}, routing_map on {routing_map.device}"
        )
    if num_local_experts < 1 or local_expert_start < 0:
        raise ValueError(
            f"num_local_experts {num_local_experts} must be positive, local_expert_start "
            f"{local_expert_start} not negative"
        )


def check_hints(**hints: int | None) -> None:
    """Raise ValueError unless each is a whole number or None."""
    for name, hint in hints.items():
        if hint is not None and not isinstance(hint, int):
            raise ValueError(f"{name} must be a whole number or None, got {hint!r:.40}")


def check_layer(
    hidden_states: torch.Tensor,
    probs: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc2_weight: torch.Tensor,
    routing_map: torch.Tensor,
    out: torch.Tensor | None,
    *,
    gated: bool,
    num_local_experts: int,
) -> None:
    """Raise ValueError unless everything is bf16, fits together and is on one device."""
    for name, tensor in (
        ("hidden_states", hidden_states),
        ("fc1_weight", fc1_weight),
        ("fc2_weight", fc2_weight),
    ):
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"{name} must be bfloat16, got {tensor.dtype}")
    if hidden_states.dim() != 2 or fc2_weight.dim() != 3:
        raise ValueError(
            f"hidden_states must be [T, H] and fc2_weight [e, H, I], got "
            f"{tuple(hidden_states.shape)} and {tuple(fc2_weight.shape)}"
        )
    (T, H), K, I = hidden_states.shape, routing_map.shape[1], fc2_weight.shape[2]  # noqa: E741
    e = num_local_experts
    wanted: tuple[tuple[str, torch.Tensor | None, tuple[int, ...]], ...] = (
        ("routing_map", routing_map, (T, K)),
        ("probs", probs, (T, K)),
        ("fc1_weight", fc1_weight, (e, 2 * I if gated else I, H)),
        ("fc2_weight", fc2_weight, (e, H, I)),
        ("out", out, (T, H)),
    )
    for name, found, shape in wanted:
        if found is None:
            continue
        if found.shape != shape:
            raise ValueError(
                f"{name} is {tuple(found.shape)}; T {T}, K {K}, H {H}, I {I} and "
                f"{e} local experts ask for {shape}"
            )
        if found.device != hidden_states.device:
            raise ValueError(f"{name} is on {found.device}, not on {hidden_states.device}")
    for name, found in (("probs", probs), ("out", out)):
        if found is not None and not found.is_floating_point():
            raise ValueError(f"{name} must be of a float dtype, got {found.dtype}")
