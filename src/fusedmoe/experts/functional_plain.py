"""``fused_experts`` for unquantized weights: checks, and the shortest way to the kernels.

T tokens, K picks, e local experts, H hidden, I intermediate, S = 2 where the activation is gated.
"""

from __future__ import annotations

import torch

from fusedmoe.experts.cpu import CpuExperts
from fusedmoe.experts.cpu_core import cpu_fused_experts
from fusedmoe.experts.cpu_packed import CpuPackedExperts
from fusedmoe.experts.cpu_run import scratch_rows as scratch_rows_on_cpu
from fusedmoe.experts.functional_call import ExpertsCall, check_call, run_selected, selection_for
from fusedmoe.experts.hopper import HopperExperts, hopper_experts, scratch_rows
from fusedmoe.experts.triton import TritonExperts, triton_experts
from fusedmoe.modular_kernel import ExpertsWork
from fusedmoe.modular_kernel.checks import check_ids, check_weights
from fusedmoe.modular_kernel.passes import passes
from fusedmoe.quantization.config import biased_moe_quant_config
from fusedmoe.tuning.choice import PlainLayer, checked_table, hopper_table, hopper_tiles_for


def plain_fused_experts(call: ExpertsCall) -> torch.Tensor:
    """As ``fused_experts``: the output [T, H] by what selection prefers for the call."""
    x, w2 = call.hidden_states, call.w2
    check_weights(x, call.w1, w2, call.activation, call.w1_bias, call.w2_bias)
    e, _, width = w2.shape
    check_call(call, e)
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    selection = selection_for(call, e, width)
    if selection.chosen is HopperExperts and call.options.max_workspace_bytes is None:
        return _on_hopper(call)
    if selection.chosen is TritonExperts:
        return _on_triton(call)
    if selection.chosen in (CpuExperts, CpuPackedExperts):
        return _on_cpu(call)
    return run_selected(call, selection, biased_moe_quant_config(call.w1_bias, call.w2_bias))


def _on_hopper(call: ExpertsCall) -> torch.Tensor:
    """Straight to the kernels: building a layer around them would cost more than they do."""
    x, options = call.hidden_states, call.options
    (T, H), K, (e, _, width) = x.shape, call.topk_ids.shape[1], call.w2.shape
    layer = PlainLayer(K, e, H, width, x.dtype, call.activation)
    table = hopper_table(options.table, layer, x.device)
    invariant, sizes = options.batch_invariant, (T, K, call.num_experts, e, H, width)
    tiles = hopper_tiles_for(*sizes, batch_invariant=invariant, table=table)
    rows = scratch_rows(tiles, T * K, e)
    work = _work(call, (rows, width), (rows, H))
    numbers, biases = call.activation_config, (call.w1_bias, call.w2_bias)
    hopper_experts(work, numbers, *biases, batch_invariant=invariant, tiles=tiles)
    return work.output


def _on_triton(call: ExpertsCall) -> torch.Tensor:
    """As ``_on_hopper``, in passes where the scratch memory is bounded."""
    x, options = call.hidden_states, call.options
    (T, H), K, (e, _, width) = x.shape, call.topk_ids.shape[1], call.w2.shape
    layer = PlainLayer(K, e, H, width, x.dtype, call.activation)
    table = checked_table(options.table, layer, x.device)
    limit = options.max_workspace_bytes
    chunk = T if limit is None else min(T, max(1, limit // (K * (H + width) * x.element_size())))
    work = _work(call, (chunk, K, width), (chunk, K, H))
    numbers, biases = call.activation_config, (call.w1_bias, call.w2_bias)
    invariant = options.batch_invariant
    for part in passes(work, chunk):
        triton_experts(part, numbers, *biases, batch_invariant=invariant, table=table)
    return work.output


def _work(call: ExpertsCall, first: tuple[int, ...], second: tuple[int, ...]) -> ExpertsWork:
    """All rows, checked and weighted where they enter so, with workspaces of these shapes."""
    x = call.hidden_states
    check_ids(call.topk_ids, call.num_experts, call.options.debug_checks)
    if call.apply_router_weight_on_input:
        x = x * call.topk_weights.to(x.dtype)
    return ExpertsWork(
        x.new_empty(x.shape),
        x,
        call.w1,
        call.w2,
        call.topk_weights,
        call.topk_ids,
        call.activation,
        call.num_experts,
        call.expert_map,
        workspace13=x.new_empty(first),
        workspace2=x.new_empty(second),
        apply_router_weight_on_input=call.apply_router_weight_on_input,
    )


def _on_cpu(call: ExpertsCall) -> torch.Tensor:
    """As ``_on_hopper``; what ``CpuPackedExperts`` gain by packing first is no use for one call."""
    x, K, options = call.hidden_states, call.topk_ids.shape[1], call.options
    scratch = None
    if options.max_workspace_bytes is not None:
        rows = scratch_rows_on_cpu(x.shape[0], K, x.shape[1], options.max_workspace_bytes)
        scratch = x.new_empty(rows, x.shape[1], dtype=torch.float32)
    return cpu_fused_experts(
        x,
        call.w1,
        call.w2,
        call.topk_weights,
        call.topk_ids,
        activation=call.activation,
        activation_config=call.activation_config,
        w1_bias=call.w1_bias,
        w2_bias=call.w2_bias,
        expert_map=call.expert_map,
        global_num_experts=call.num_experts,
        apply_router_weight_on_input=call.apply_router_weight_on_input,
        batch_invariant=options.batch_invariant,
        scratch=scratch,
    )
