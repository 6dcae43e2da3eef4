"""GateLinear: the linear layer that makes router logits."""

from __future__ import annotations

import torch
from torch import nn

from fusedmoe.kernels.gate import gate_linear


class GateLinear(nn.Module):
    """logits [..., E] = x [..., H] weight^T + bias, replicated on every rank.

    ``out_dtype`` (None: that of the input) is the dtype of the logits; it may be set later, when
    the experts are known. Routing is sensitive to rounding, so fp32 logits from bf16 operands are
    computed without a detour over bf16. ``batch_invariant``: a token's logits have the same bits
    in any batch; slower. A layer with ``MoEOptions(batch_invariant=True)`` sets it.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = False,
        out_dtype: torch.dtype | None = None,
        params_dtype: torch.dtype | None = None,
        *,
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if input_size < 1 or output_size < 1:
            raise ValueError(f"sizes must be at least 1, got {input_size} -> {output_size}")
        if params_dtype is not None:
            _check_dtype("weights", params_dtype)
        self.input_size = input_size
        self.output_size = output_size
        self.batch_invariant = batch_invariant
        self.out_dtype: torch.dtype | None = None
        if out_dtype is not None:
            self.set_out_dtype(out_dtype)
        self.weight = nn.Parameter(
            torch.empty(output_size, input_size, dtype=params_dtype, device=device),
            requires_grad=False,
        )
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(
                torch.zeros(output_size, dtype=params_dtype, device=device), requires_grad=False
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(H), bias zero."""
        bound = self.input_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def set_out_dtype(self, out_dtype: torch.dtype) -> None:
        """Make the logits' dtype ``out_dtype`` from now on."""
        _check_dtype("logits", out_dtype)
        self.out_dtype = out_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> logits [..., E]; no gradient flows."""
        return gate_linear(
            x,
            self.weight,
            self.bias,
            out_dtype=self.out_dtype,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        return f"{self.input_size} -> {self.output_size}, out_dtype={self.out_dtype}"


def _check_dtype(what: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"{what} must be floating point of 16 bits or more, got {dtype}")
