"""Experts for buffers of which the first rows count, how many being a number on the device.

    align -> GEMM1 with activation -> GEMM2 -> weighted sum over K

Every launch is sized for the tokens that are expected and right for any number of them, so one CUDA
graph serves all. The GEMMs are Hopper's own where it is one and can view the weights; else, and for
a handful of slots, those of Triton, which need no alignment where slots are few.

T rows of the buffers, K picks, e local experts, H hidden, I intermediate, R = T * K slots, S = 2
where gated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts.hopper_support import missing_gluon, readable, viewable
from fusedmoe.experts.triton import shared_memory_of
from fusedmoe.kernels.bounded_align import BoundedRouting, bounded_align
from fusedmoe.kernels.bounded_gemm import bounded_gemm, programs_for
from fusedmoe.kernels.bounded_sum import bounded_sum
from fusedmoe.kernels.device import device_of, multiprocessors_of
from fusedmoe.kernels.hopper_decode import ALIGNED_ELEMENTS, decode_table
from fusedmoe.kernels.hopper_prefill import PREFILL_BLOCK, prefill_rows
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.tuning.hopper_tiles import COUNTER_SLOTS, MAX_DECODE_MEAN, PrefillTiles, decode_tiles
from fusedmoe.tuning.tiles import layer_tiles


class Products(NamedTuple):
    """What the second GEMM leaves: rows [R or P, H], and position int32 [R], where a slot's row is
    (None: slot s is row s)."""

    rows: torch.Tensor
    position: torch.Tensor | None


class Expected(NamedTuple):
    """Tokens that the launches are sized for, and the share of their picks that falls here."""

    tokens: int
    share: float

    def slots_here(self, K: int) -> float:
        return self.tokens * K * self.share


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
    ``expected_tokens`` and ``num_experts`` (of all ranks) choose kernels, tiles and grids alone.
    """
    T, e = hidden_states.shape[0], w2.shape[0]
    if T == 0:
        return
    routing = BoundedRouting(routing_map.contiguous(), num_valid, first_expert, e)
    expected = Expected(max(1, min(expected_tokens, T)), min(1.0, e / max(1, num_experts)))
    # Measured on an H200: so few slots are faster without a table.
    few = expected.tokens * routing_map.shape[1] * 8 <= e
    on_hopper = not few and fits_hopper(hidden_states, w1, w2)
    products = hopper_products if on_hopper else triton_products
    rows, position = products(hidden_states, w1, w2, routing, MoEActivation(activation), expected)
    bounded_sum(rows, topk_weights, routing, out, position, expected.tokens)


def triton_products(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    routing: BoundedRouting,
    activation: MoEActivation,
    expected: Expected,
) -> Products:
    """Both GEMMs in Triton, on any GPU."""
    K, (e, H, I) = routing.routing_map.shape[1], w2.shape  # noqa: E741
    slots = expected.tokens * K
    tiles = layer_tiles(
        max(1, round(expected.tokens * expected.share)),
        K,
        e,
        H,
        I,
        x.dtype,
        gated=activation.is_gated,
        shared_memory=shared_memory_of(x.device),
    )
    # With so few slots, two rarely share an expert: blocks of one slot need no alignment.
    lone = slots * 4 <= e
    blocks = routing if lone else bounded_align(routing, tiles.gemm1.block_m, slots)
    act, rows = x.new_empty(routing.R, I), x.new_empty(routing.R, H)
    for a, b, c, tile, top_k, epilogue in (
        (x, w1, act, tiles.gemm1, K, activation),
        (act, w2, rows, tiles.gemm2, 1, None),
    ):
        programs = programs_for(slots, e, c.shape[1], tile, lone=lone)
        bounded_gemm(a, b, c, blocks, tile, top_k=top_k, programs=programs, activation=epilogue)
    return Products(rows, None)


def fits_hopper(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> bool:
    """Whether this is a Hopper GPU whose TMA can view the weights and whose rows can be gathered 16
    bytes at a time."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    even = not any(size % ALIGNED_ELEMENTS for size in w2.shape[1:])
    if not (even and viewable(w1, w2) and readable(x)) or missing_gluon() is not None:
        return False
    return torch.cuda.get_device_capability(x.device)[0] == 9


def hopper_products(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    routing: BoundedRouting,
    activation: MoEActivation,
    expected: Expected,
) -> Products:
    """Both GEMMs on Hopper's own units: weights streamed for few rows per expert, bound by the
    products for many. The two agree to the bit."""
    from fusedmoe.kernels.triton.hopper_decode import decode_gemms
    from fusedmoe.kernels.triton.hopper_prefill import prefill_gemms

    K, (e, H, I) = routing.routing_map.shape[1], w2.shape  # noqa: E741
    slots, here = expected.tokens * K, expected.slots_here(K)
    many = here > MAX_DECODE_MEAN * e
    P = prefill_rows(routing.R, e) if many else routing.R
    act, rows = x.new_empty(P, I), x.new_empty(P, H)
    ids, programs = routing.routing_map, multiprocessors_of(x.device)
    # Nothing is summed here, so ``out`` is not written: rows stand in for it.
    layer = LayerTensors(x, w1, w2, None, ids, rows, act, rows, programs, activation)
    with device_of(x):
        if many:
            position = torch.empty(routing.R, dtype=torch.int32, device=x.device)
            tables = bounded_align(routing, PREFILL_BLOCK, slots, spare_slots=COUNTER_SLOTS)
            prefill_gemms(layer, position, tables, PrefillTiles())
            return Products(rows, position)
        tiles = decode_tiles(max(1, round(here)), e, H, I)
        spare = decode_table(routing.R, tiles.block, e)[1]
        tables = bounded_align(routing, tiles.block, slots, spare_slots=spare)
        decode_gemms(layer, tables, tiles)
        return Products(rows, None)


bounded_experts_op = torch.library.custom_op(
    "fusedmoe::bounded_experts", bounded_experts, mutates_args=("out",)
)


@bounded_experts_op.register_fake
def _(*arguments: object) -> None:
    return None
