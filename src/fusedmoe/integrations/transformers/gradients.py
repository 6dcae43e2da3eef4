"""What a backward pass through our experts does: it fails, and says how to have one."""

from __future__ import annotations

from typing import Any

import torch

TRAINABLE = (
    "put the model in training mode (model.train()), which runs Transformers' grouped_mm, or use "
    "torch.no_grad()"
)
PACKED = "packed weights have no gradients; use torch.no_grad()"


class NoBackward(torch.autograd.Function):
    """Ties a result to its input, so that a backward pass fails instead of skipping it.

    ``advice``, the last argument, goes into the message.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, hidden_states: torch.Tensor, advice: str = TRAINABLE
    ) -> torch.Tensor:
        ctx.advice = advice
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return None, refused_gradient(grads[0], ctx.advice), None


@torch.library.custom_op("fusedmoe::refused_gradient", mutates_args=())
def refused_gradient(gradient: torch.Tensor, advice: str) -> torch.Tensor:
    """Raises RuntimeError when it runs, not when a compiler traces a backward pass in advance."""
    raise RuntimeError(f"the fusedmoe experts have no backward pass; {advice}")


@refused_gradient.register_fake
def _(gradient: torch.Tensor, advice: str) -> torch.Tensor:
    return torch.empty_like(gradient)
