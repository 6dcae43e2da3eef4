"""The grouped GEMM over [e, M, D] rows with a count per expert: the batched format's GEMM.

Rows in use become blocks of the indirect GEMM, so there is one GEMM body for both formats and rows
past a count cost nothing.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.grouped_gemm import grouped_gemm
from fusedmoe.tuning.tiles import TileConfig


def batched_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    blocks: MoEAlignment,
    tiles: TileConfig,
    *,
    bias: torch.Tensor | None = None,
    activation: MoEActivation | None = None,
    activation_config: ApplyMoEActivationConfig | None = None,
) -> torch.Tensor:
    """c[x, m] = act(a[x, m] @ b[x].T + bias[x]) for each expert x and each row m in use.

    a [e, M, D], b [e, S * N, D] (S = 2 where the activation is gated), c [e, M, N] contiguous,
    bias [e, S * N]. ``blocks`` is ``batched_moe_align_block_size(M, tiles.block_m, counts)``; rows
    past a count are neither read nor written. Raises ValueError where shapes disagree.
    """
    if a.dim() != 3 or c.dim() != 3 or not a.shape[:2] == c.shape[:2] == (b.shape[0], c.shape[1]):
        raise ValueError(
            f"a {tuple(a.shape)}, b {tuple(b.shape)}, c {tuple(c.shape)} are not [e, M, D], "
            "[e, S * N, D], [e, M, N]"
        )
    if not c.is_contiguous():
        raise ValueError(f"c must be contiguous, its strides are {c.stride()}")
    grouped_gemm(
        a.flatten(0, 1), b, c.flatten(0, 1), blocks, tiles, top_k=1, bias=bias,
        activation=activation, activation_config=activation_config,
    )  # fmt: skip
    return c


def batched_gemm_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    counts: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: MoEActivation | None = None,
    activation_config: ApplyMoEActivationConfig | None = None,
) -> torch.Tensor:
    """The definition, from the counts int32 [e] themselves."""
    wide = torch.promote_types(a.dtype, torch.float32)
    for expert, count in enumerate(counts.clamp(0, a.shape[1]).tolist()):
        rows = a[expert, :count].to(wide) @ b[expert].to(wide).T
        if bias is not None:
            rows = rows + bias[expert].to(wide)
        if activation is not None:
            rows = activation_reference(activation, rows, activation_config)
        c[expert, :count] = rows.to(c.dtype)
    return c
