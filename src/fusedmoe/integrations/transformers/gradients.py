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
        raise RuntimeError(
            "the fusedmoe experts have no backward pass; put the model in training mode "
            "(model.train()), which runs Transformers' grouped_mm, or use torch.no_grad()"
        )
