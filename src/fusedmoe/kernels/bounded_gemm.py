"""The grouped GEMM of a batch whose number of tokens is known on the device alone.

What differs from ``kernels/grouped_gemm.py``: the number of programs is the caller's choice, and
each takes tiles until there are none left, so a launch need not be sized for the largest batch.
Triton body: ``kernels/triton/bounded_gemm.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment, padded_slots
from fusedmoe.kernels.bounded_align import BoundedRouting, bounded_ids
from fusedmoe.kernels.grouped_gemm import check_grouped_gemm, grouped_gemm_reference
from fusedmoe.tuning.tiles import TileConfig

# In epilogues: none, or one of these.
EPILOGUES = (MoEActivation.SILU, MoEActivation.RELU2_NO_MUL)


def programs_for(
    expected_slots: int, num_local: int, N: int, tiles: TileConfig, *, lone: bool
) -> int:
    """Enough programs for one tile each, wherever ``expected_slots`` slots are routed to."""
    blocks = expected_slots
    if not lone:
        P = padded_slots(expected_slots, tiles.block_m, num_local, whole_blocks=True)
        blocks = P // tiles.block_m
    return max(1, blocks * -(-N // tiles.block_n))


def bounded_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    blocks: MoEAlignment | BoundedRouting,
    tiles: TileConfig,
    *,
    top_k: int,
    programs: int,
    row_weights: torch.Tensor | None = None,
    activation: MoEActivation | None = None,
) -> torch.Tensor:
    """c[slot] = weight[slot] * act(a[slot // top_k] @ b[expert].T) for each slot that is here.

    a [rows, D], b [e, S * N, D] (S = 2 for SILU), c [R, N] with R <= rows * top_k, row_weights
    contiguous [R] or None. ``blocks`` is a table, its blocks ``tiles.block_m`` slots each, or the
    routing itself: then every valid slot is a block (worth it where slots are few). All other slots
    keep what ``c`` holds. ``programs`` may be any positive number. Sums are fp32, and so are
    activation (silu with a gate, relu2_no_mul, or None) and weight; the result is rounded once.

    Raises ValueError where shapes or dtypes disagree.
    """
    check_grouped_gemm(a, b, c, top_k, None, row_weights, activation)
    if activation is not None and activation not in EPILOGUES:
        raise ValueError(f"{activation.value} is none of {[act.value for act in EPILOGUES]}")
    if programs < 1:
        raise ValueError(f"programs must be positive, got {programs}")
    if isinstance(blocks, MoEAlignment):
        P, needed = blocks.sorted_ids.shape[0], blocks.expert_ids.shape[0] * tiles.block_m
        if needed < P:
            raise ValueError(
                f"{blocks.expert_ids.shape[0]} blocks of {tiles.block_m} are fewer than {P} slots"
            )
    elif c.shape[0] != blocks.R:
        raise ValueError(f"{blocks.R} ids do not name {c.shape[0]} slots")
    if not a.is_cuda:
        return bounded_gemm_reference(
            a, b, c, blocks, tiles, top_k=top_k, programs=programs, row_weights=row_weights,
            activation=activation,
        )  # fmt: skip
    from fusedmoe.kernels.triton.bounded_gemm import launch

    return launch(a, b, c, blocks, tiles, top_k, programs, row_weights, activation)


def bounded_gemm_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    blocks: MoEAlignment | BoundedRouting,
    tiles: TileConfig,
    *,
    top_k: int,
    programs: int,
    row_weights: torch.Tensor | None = None,
    activation: MoEActivation | None = None,
) -> torch.Tensor:
    """The definition: the grouped GEMM over the same blocks, however many programs there are."""
    return grouped_gemm_reference(
        a,
        b,
        c,
        blocks if isinstance(blocks, MoEAlignment) else LoneSlots(bounded_ids(blocks)),
        tiles,
        top_k=top_k,
        row_weights=row_weights,
        activation=activation,
    )
