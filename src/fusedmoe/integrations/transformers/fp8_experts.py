"""Transformers' block-quantized experts (``FP8Experts``), dequantized a few experts at a time.

Correct and slow: weights become the activations' dtype before each use, in pieces of bounded size,
and the activations are not quantized at all, so results are closer to the unquantized model than
those of kernels that quantize both.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from fusedmoe.integrations.transformers.experts_function import experts_forward
from fusedmoe.integrations.transformers.gates import gate_of
from fusedmoe.quantization.formats.groups import Grid
from fusedmoe.quantization.formats.int4 import unpack_nibbles
from fusedmoe.quantization.formats.minifloat import E2M1
from fusedmoe.quantization.keys import GroupShape

# Weights that are dequantized to fp32 at once; at least one expert.
_PIECE_BYTES = 256 << 20


class _Piece(SimpleNamespace):
    """Some experts of a module, everything unnamed as there: releases of Transformers differ in
    what they ask experts."""

    def __init__(self, whole: Any, **own: Any) -> None:
        super().__init__(_whole=whole, **own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def fp8_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As ``experts_forward``, for weights in float8_e4m3fn, or in e2m1 pairs packed in int8.

    ``*_scale_inv`` multiply: one fp32 or e8m0 number per block of ``self.block_size`` (e4m3), or
    per row and 32 columns (e2m1). Scales of the activations, if the checkpoint has any, are unused.
    Raises ValueError where the scales do not tile the weights.
    """
    up = "gate_up_proj" if self.has_gate else "up_proj"
    w13, w2 = getattr(self, up), self.down_proj
    if w13.element_size() > 1:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)
    s13, s2 = getattr(self, f"{up}_scale_inv"), self.down_proj_scale_inv
    E, dtype = w13.shape[0], hidden_states.dtype
    inside = (top_k_index >= 0) & (top_k_index < E)
    ids = top_k_index.masked_fill(~inside, E)
    output = torch.zeros_like(hidden_states, dtype=torch.float32)
    for chosen in _pieces(top_k_index, E, w13[0].numel() + w2[0].numel()):
        position = torch.full((E + 1,), len(chosen), device=chosen.device)
        position[chosen] = torch.arange(len(chosen), device=chosen.device)
        piece = _Piece(
            self,
            has_bias=False,
            is_transposed=False,
            training=False,
            _is_expert_parallel=True,  # slots of experts outside the piece count as nothing
            num_experts=len(chosen),
            _fusedmoe_gate=gate_of(self),
            down_proj=dequantize(_take(w2, chosen), _take(s2, chosen), self.block_size).to(dtype),
        )
        stacked = dequantize(
            _take(w13, chosen), _take(s13, chosen), self.block_size, parts=1 + self.has_gate
        )
        setattr(piece, up, stacked.to(dtype))
        output += experts_forward(piece, hidden_states, position[ids], top_k_weights)
    return output.to(dtype)


def _take(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """tensor[rows], by way of bytes: not every device indexes one-byte floats."""
    if tensor.element_size() > 1:
        return tensor[rows]
    return tensor.view(torch.uint8)[rows].view(tensor.dtype)


def _pieces(top_k_index: torch.Tensor, E: int, stored: int) -> tuple[torch.Tensor, ...]:
    """Experts to run together; on a CPU, where ids can be read for free, only those with tokens."""
    if top_k_index.device.type == "cpu" and not torch.compiler.is_compiling():
        used = top_k_index.unique()
        if used.numel() and not (used[0] >= -1 and used[-1] <= E):
            raise ValueError(
                f"expert ids from {int(used[0])} to {int(used[-1])} in a module of {E} experts"
            )
        used = used[(used >= 0) & (used < E)]
    else:
        used = torch.arange(E, device=top_k_index.device)
    # Bytes of one expert in fp32; packed pairs hold two numbers a byte.
    return used.split(max(1, _PIECE_BYTES // (8 * stored)))


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int] | None, parts: int = 1
) -> torch.Tensor:
    """weight [n, R, C] e4m3, or [n, R, C / 2] int8 with two e2m1 each -> fp32 [n, R, C].

    scale [n, rows, columns] in fp32, bf16 or e8m0. ``parts`` matrices may be stacked along R
    (gate and up), each with blocks of its own if that explains how many scales there are. Without
    ``block_size`` a matrix has one. ValueError where the scales do not tile the weights.
    """
    if weight.dtype == torch.int8:
        values = E2M1.decode(unpack_nibbles(weight.view(torch.uint8)))
        block_size = (1, 32)
    else:
        values = weight.float()
    R, C = values.shape[1:]
    for count in (parts, 1):
        rows, columns = block_size or (R // count, C)
        wanted = (count * math.ceil(R // count / rows), math.ceil(C / columns))
        if R % count == 0 and tuple(scale.shape[1:]) == wanted:
            grid = Grid(GroupShape(rows, columns), count)
            return values.mul_(grid.spread(scale.float(), R, C))
    raise ValueError(
        f"{scale.shape[1]} x {scale.shape[2]} scales do not tile {R} x {C} weights in blocks of "
        f"{block_size}"
    )
