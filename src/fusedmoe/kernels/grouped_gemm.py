"""The indirect grouped GEMM: rows are gathered by slot, weights chosen by block, results scattered.

Nothing is permuted in memory: the table of slots is the permutation. Triton bodies:
``kernels/triton/grouped_gemm.py``; tiles: ``tuning/tiles.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.ids import local_ids
from fusedmoe.tuning.tiles import TileConfig


def grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tiles: TileConfig,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
    activation: MoEActivation | None = None,
    activation_config: ApplyMoEActivationConfig | None = None,
) -> torch.Tensor:
    """c[slot] = act(a[slot // top_k] @ b[expert].T + bias[expert]) for each slot.

    a [rows, D], b [e, S * N, D] (S = 2 where the activation is gated), c [R, N] with
    R <= rows * top_k, bias [e, S * N]; a, b of one dtype, any strides.
    ``blocks`` hold ``tiles.block_m`` slots each, or one (``LoneSlots``). Slots in no block, or in a
    block of an expert outside [0, e), keep what ``c`` holds. Sums are fp32; bias and
    activation are applied to them in that order, then the result is rounded once.

    Raises ValueError where shapes or dtypes disagree.
    """
    check_grouped_gemm(a, b, c, top_k, bias, None, activation)
    if isinstance(blocks, LoneSlots) and blocks.topk_ids.shape != c.shape[:1]:
        raise ValueError(f"{tuple(blocks.topk_ids.shape)} ids do not name {c.shape[0]} slots")
    if a.is_cuda:
        from fusedmoe.kernels.triton.grouped_gemm import launch

        act = device_activation(activation, activation_config)
        launch(a, b, c, blocks, tiles, top_k, bias, act)
        return c
    return grouped_gemm_reference(
        a, b, c, blocks, tiles, top_k=top_k, bias=bias, activation=activation,
        activation_config=activation_config,
    )  # fmt: skip


def grouped_gemm_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tiles: TileConfig,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    activation: MoEActivation | None = None,
    activation_config: ApplyMoEActivationConfig | None = None,
) -> torch.Tensor:
    """The definition, in plain torch; walks the blocks on the host. ``row_weights`` [R] multiply
    the fp32 rows last."""
    wide = torch.promote_types(a.dtype, torch.float32)
    for slots, expert in blocks_on_host(blocks, tiles.block_m, c.shape[0], b.shape[0]):
        rows = a[slots // top_k].to(wide) @ b[expert].to(wide).T
        if bias is not None:
            rows = rows + bias[expert].to(wide)
        if activation is not None:
            rows = activation_reference(activation, rows, activation_config)
        if row_weights is not None:
            rows = rows * row_weights[slots, None]
        c[slots] = rows.to(c.dtype)
    return c


def blocks_on_host(
    blocks: MoEAlignment | LoneSlots, size: int, R: int, e: int
) -> list[tuple[torch.Tensor, int]]:
    """(slots, expert) of each block that has an expert here."""
    if isinstance(blocks, LoneSlots):
        experts = local_ids(blocks.topk_ids, e, blocks.expert_map)
        parts = torch.arange(R, device=experts.device).split(1)
    else:
        experts = blocks.expert_ids
        parts = blocks.sorted_ids[: int(blocks.num_tokens_post_pad)].split(size)
    found = []
    for slots, expert in zip(parts, experts.tolist(), strict=False):
        if 0 <= expert < e:
            found.append((slots[(slots >= 0) & (slots < R)].long(), expert))
    return found


def check_grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    top_k: int,
    bias: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    activation: MoEActivation | None,
) -> None:
    """Raise ValueError, with the numbers, where the operands of a grouped GEMM do not fit."""
    if (a.dim(), b.dim(), c.dim()) != (2, 3, 2):
        raise ValueError(
            f"a, b, c must have 2, 3, 2 dimensions, got {tuple(a.shape)}, {tuple(b.shape)}, "
            f"{tuple(c.shape)}"
        )
    if a.dtype != b.dtype:
        raise ValueError(f"a is {a.dtype} but b is {b.dtype}")
    shards = 2 if activation is not None and activation.is_gated else 1
    if b.shape[1:] != (shards * c.shape[1], a.shape[1]):
        raise ValueError(
            f"a {tuple(a.shape)} and c {tuple(c.shape)} ask for b [e, {shards * c.shape[1]}, "
            f"{a.shape[1]}], got {tuple(b.shape)}"
        )
    if top_k < 1 or c.shape[0] > a.shape[0] * top_k:
        raise ValueError(
            f"c has {c.shape[0]} slots, more than {a.shape[0]} rows with top_k {top_k}"
        )
    if bias is not None and bias.shape != b.shape[:2]:
        raise ValueError(f"bias is {tuple(bias.shape)}, b asks for {tuple(b.shape[:2])}")
    if row_weights is not None and (
        row_weights.shape != c.shape[:1] or not row_weights.is_contiguous()
    ):
        raise ValueError(
            f"row_weights must be contiguous [{c.shape[0]}], got {tuple(row_weights.shape)} with "
            f"strides {row_weights.stride()}"
        )
