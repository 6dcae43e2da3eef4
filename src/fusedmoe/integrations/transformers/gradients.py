"""What a backward pass through our experts does: it fails, and says how to have one."""

from __future__ import annotations

from typing import Any

import torch


class NoBackward(torch.autograd.Function):
    """Ties a result to its input, so that a backward pass fails instead of skipping it."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return None, refused_gradient(grads[0])


@torch.library.custom_op("fusedmoe::refused_gradient", mutates_args=())
def refused_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """Raises RuntimeError when it runs, not when a compiler traces a backward pass in advance."""
    raise RuntimeError(
        "the fusedmoe experts have no backward pass; put the model in training mode "
        "(model.train()), which runs Transformers' grouped_mm, or use torch.no_grad()"
    )


@refused_gradient.register_fake
def _(gradient: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gradient)
