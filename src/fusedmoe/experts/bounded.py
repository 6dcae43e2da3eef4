"""Experts for buffers of which the first rows count, how many being a number on the device.

    align -> GEMM1 with activation -> GEMM2 -> weighted sum over K

Every launch is sized for the tokens that are expected and right for any number of them, so one CUDA
graph serves all. The alignment falls away where slots are few.

T rows of the buffers, K picks, e local experts, H hidden, I intermediate, R = T * K slots, S = 2
where gated.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts.triton import shared_memory_of
from fusedmoe.kernels.bounded_align import BoundedRouting, bounded_align
from fusedmoe.kernels.bounded_gemm import bounded_gemm, programs_for
from fusedmoe.kernels.bounded_sum import bounded_sum
from fusedmoe.tuning.tiles import LayerTiles, layer_tiles


def bounded_experts(
    out: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    routing_map: torch.Tensor,
    num_valid: torch.Tensor,
    first_expert: int,
    activation: str,
    expected_tokens: int,
    num_experts: int,
) -> None:
    """Write the weighted sum over K of the first ``num_valid`` tokens into ``out`` [T, H].

    hidden_states [T, H], w1 [e, S * I, H], w2 [e, H, I] of one dtype (bf16, fp16 or fp32), of any
    strides, as are topk_weights float [T, K] and ``out`` of any float dtype; the routing as in
    ``BoundedRouting``; activation by name, one of ``kernels.bounded_gemm.EPILOGUES``.
    ``expected_tokens`` and ``num_experts`` (of all ranks) choose tiles and grids alone.
    """
    (T, H), K = hidden_states.shape, routing_map.shape[1]
    e, I = w2.shape[0], w2.shape[2]  # noqa: E741
    if T == 0:
        return
    act_kind = MoEActivation(activation)
    expected = max(1, min(expected_tokens, T))
    tiles = _tiles(expected, K, e, H, I, hidden_states, act_kind, num_experts)
    routing = BoundedRouting(routing_map.contiguous(), num_valid, first_expert, e)
    # No table, and a launch less, where slots are so few that two rarely share an expert.
    lone = expected * K * 4 <= e
    blocks = routing if lone else bounded_align(routing, tiles.gemm1.block_m, expected * K)
    act = hidden_states.new_empty(T * K, I)
    rows = hidden_states.new_empty(T * K, H)
    for a, b, c, tile, top_k, epilogue in (
        (hidden_states, w1, act, tiles.gemm1, K, act_kind),
        (act, w2, rows, tiles.gemm2, 1, None),
    ):
        programs = programs_for(expected * K, e, c.shape[1], tile, lone=lone)
        bounded_gemm(a, b, c, blocks, tile, top_k=top_k, programs=programs, activation=epilogue)
    bounded_sum(rows.view(T, K, H), topk_weights, routing, out, expected)


def _tiles(
    expected: int,
    K: int,
    e: int,
    H: int,
    I: int,  # noqa: E741
    like: torch.Tensor,
    activation: MoEActivation,
    num_experts: int,
) -> LayerTiles:
    """Tiles for the tokens' share that falls on ``e`` of ``num_experts`` experts."""
    share = min(1.0, e / max(1, num_experts))
    return layer_tiles(
        max(1, round(expected * share)),
        K,
        e,
        H,
        I,
        like.dtype,
        gated=activation.is_gated,
        shared_memory=shared_memory_of(like.device),
    )


bounded_experts_op = torch.library.custom_op(
    "fusedmoe::bounded_experts", bounded_experts, mutates_args=("out",)
)


@bounded_experts_op.register_fake
def _(*arguments: object) -> None:
    return None
