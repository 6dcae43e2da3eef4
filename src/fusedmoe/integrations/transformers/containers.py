"""Reading a module called ``experts`` of no known family: its layout, activation and weights.

E experts, H hidden, I intermediate, S = 2 where gated, else 1.
"""

from __future__ import annotations

import torch
from torch import nn

from fusedmoe.integrations.transformers.borrowed import (
    ExpertWeights,
    check_tensors,
    gate_of_experts,
    module_weights,
)
from fusedmoe.integrations.transformers.families import Experts
from fusedmoe.integrations.transformers.gates import Gate
from fusedmoe.integrations.transformers.stacked import gate_of_list, stack_list

# Largest difference from the module that is replaced, as a part of its largest output.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
CHECKED_TOKENS = 4


def read_experts(
    original: nn.Module, owner: nn.Module, hidden_size: int | None
) -> tuple[Gate, ExpertWeights]:
    """What runs ``original``'s experts. A list's parameters are stacked, on behalf of ``owner``.

    Raises ValueError where they cannot be run.
    """
    if isinstance(original, nn.ModuleList):
        if len(original) == 0:
            raise ValueError("the list is empty")
        return gate_of_list(original[0]), stack_list(original, owner)
    part = container_layout(original, hidden_size)
    check_tensors(dict(original.named_parameters(recurse=False)))
    return gate_of_experts(part, original), module_weights(part, original)


def container_layout(experts: nn.Module, hidden_size: int | None) -> Experts:
    """Names and orientation of a module of 3-D parameters. Raises ValueError where it is none."""
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters(recurse=False)}
    stacked = [name for name in ("gate_up_proj", "up_proj") if len(shapes.get(name, ())) == 3]
    up = stacked[0] if stacked else None
    if up is None or len(shapes.get("down_proj", ())) != 3:
        raise ValueError(f"it is no list, and its parameters are {shapes}")
    if shapes[up][0] != shapes["down_proj"][0]:
        raise ValueError(f"its projections are for different numbers of experts: {shapes}")
    named = {up, "down_proj", f"{up}_bias", "down_proj_bias"}
    if not shapes.keys() <= named:
        raise ValueError(f"it has parameters beyond {sorted(named)}: {sorted(shapes)}")
    gated = up == "gate_up_proj"
    transposed = getattr(experts, "is_transposed", None)
    if transposed is None:
        transposed = _is_transposed(shapes[up], shapes["down_proj"], 2 if gated else 1, hidden_size)
    biases = [name if name in shapes else None for name in (f"{up}_bias", "down_proj_bias")]
    if (biases[0] is None) != (biases[1] is None):
        raise ValueError(f"only one of its two projections has a bias: {sorted(shapes)}")
    return Experts(
        cls=type(experts).__name__,
        w13=up,
        w13_bias=biases[0],
        w2_bias=biases[1],
        layout="transposed" if transposed else "stacked",
    )


def _is_transposed(
    up: tuple[int, ...], down: tuple[int, ...], shards: int, hidden_size: int | None
) -> bool:
    """Whether up is [E, H, S * I] and down [E, I, H]; only H tells where both readings fit."""
    plain = up[2] == down[1] and up[1] == shards * down[2]
    turned = up[1] == down[2] and up[2] == shards * down[1]
    if plain and turned:
        plain = hidden_size in (None, up[2]) and up[1] != up[2]
        turned = hidden_size == up[1] and up[1] != up[2]
        if hidden_size is None or plain == turned:
            raise ValueError(f"the shapes {up} and {down} can be read in two ways")
    if plain == turned:
        raise ValueError(f"the shapes {up} and {down} are not those of two projections")
    return turned


@torch.no_grad()
def disagreement(original: nn.Module, layer: nn.Module, top_k: int) -> str | None:
    """How ``layer`` differs from the experts it replaces, on a few random rows; None: it does not.

    Both are called with (hidden_states, ids, weights); a list without a forward is looped over.
    """
    w2 = layer.weights.w2()  # type: ignore[union-attr,operator]
    E, H = w2.shape[:2]
    tokens, picks = CHECKED_TOKENS, min(top_k, E)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, H, generator=generator).to(w2.device, w2.dtype)
        ids = torch.rand(tokens, E, generator=generator).topk(picks).indices.to(w2.device)
        weights = torch.rand(tokens, picks, generator=generator).to(w2.device, w2.dtype)
    try:
        wanted = _own_output(original, x, ids, weights)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
        return f"called with (hidden_states, ids, weights) it raises {raised}"
    if not isinstance(wanted, torch.Tensor) or wanted.shape != x.shape:
        return "called with (hidden_states, ids, weights) it does not return rows like those"
    ours = layer(x, ids, weights)
    difference = float((ours.double() - wanted.double()).abs().max())
    scale = float(wanted.double().abs().max())
    if not difference <= TOLERANCE[w2.dtype] * scale:
        return f"on random rows our result differs by {difference:.3g}, of {scale:.3g} at most"
    return None


def _own_output(
    original: nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    if type(original).forward is not nn.ModuleList.forward:
        return original(x, ids, weights)
    assert isinstance(original, nn.ModuleList)
    rows = [
        sum(w * original[int(e)](x[t : t + 1]) for e, w in zip(ids[t], weights[t], strict=True))
        for t in range(x.shape[0])
    ]
    return torch.cat(rows)  # type: ignore[arg-type]
