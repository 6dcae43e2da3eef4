"""``fused_experts``: the routed experts of one layer as a function of tensors.

T tokens, K picks, e local experts, H hidden, I intermediate, S = 2 where the activation is gated.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.experts.functional_quantized import quantized_fused_experts
from fusedmoe.experts.hopper import HopperExperts, hopper_experts, scratch_rows
from fusedmoe.experts.triton import TritonExperts, triton_experts
from fusedmoe.modular_kernel import FusedMoEKernel
from fusedmoe.modular_kernel.experts import merged_activation_config
from fusedmoe.modular_kernel.kernel import check_ids
from fusedmoe.quantization.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEQuantConfig,
    biased_moe_quant_config,
)
from fusedmoe.selection import Selection, select
from fusedmoe.tuning.choice import checked_table
from fusedmoe.tuning.hopper_tiles import hopper_tiles
from fusedmoe.tuning.table_file import table_from_text

_DEFAULT_OPTIONS = MoEOptions()
_DEFAULT_NUMBERS = ApplyMoEActivationConfig()


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation = MoEActivation.SILU,
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: torch.Tensor | None = None,
    quant_config: FusedMoEQuantConfig | None = None,
    *,
    activation_config: ApplyMoEActivationConfig | None = None,
    options: MoEOptions | None = None,
) -> torch.Tensor:
    """sum over k of topk_weights[t, k] * expert topk_ids[t, k] of hidden_states[t]: [T, H].

    hidden_states [T, H], w1 [e, S * I, H] and w2 [e, H, I] (any strides, the dtype of
    hidden_states), topk_weights float [T, K], topk_ids int [T, K]. Ids count from 0 to
    ``global_num_experts`` (default: those of ``expert_map``, else e); -1 is no expert.
    ``expert_map`` int32 [global_num_experts]: local expert of each id, -1 for one of another rank.
    ``quant_config`` carries biases [e, S * I] and [e, H], and describes w1 and w2 where they are
    quantized (packed as ``QuantizedTensor.data``; not in compiled code). Nothing is prepacked here:
    a layer is faster where kernels do.

    With ``apply_router_weight_on_input`` (K = 1) the input is weighted, not the output.
    ``options`` force an implementation, ask for batch invariance or bound the scratch memory.

    Raises ValueError where shapes or dtypes disagree, and for ids out of range: on a CPU always; on
    a GPU such ids count as -1, unless ``options.debug_checks``.
    """
    quant_config = quant_config or FUSED_MOE_UNQUANTIZED_CONFIG
    options = options or _DEFAULT_OPTIONS
    numbers = merged_activation_config(activation_config or _DEFAULT_NUMBERS, quant_config)
    if quant_config.is_quantized:
        count = w1.shape[0] if expert_map is None else expert_map.shape[0]
        return quantized_fused_experts(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            apply_router_weight_on_input,
            count if global_num_experts < 0 else global_num_experts,
            expert_map,
            quant_config,
            numbers,
            options,
        )
    call = _Call(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        apply_router_weight_on_input,
        global_num_experts,
        expert_map,
        quant_config.w1_bias,
        quant_config.w2_bias,
        numbers,
        options,
    )
    if torch.compiler.is_compiling() and not isinstance(options.experts, type):
        return _opaque(call)
    _check(call)
    if hidden_states.shape[0] == 0:
        return hidden_states.new_empty(hidden_states.shape)
    selection = _select(
        call.num_experts,
        w1.shape[0],
        topk_ids.shape[1],
        hidden_states.shape[1],
        w2.shape[2],
        activation,
        call.activation_config,
        hidden_states.dtype,
        hidden_states.device,
        call.w1_bias is not None or call.w2_bias is not None,
        apply_router_weight_on_input,
        options,
    )
    if selection.chosen is HopperExperts and options.max_workspace_bytes is None:
        return _on_hopper(call)
    return _on_triton(call) if selection.chosen is TritonExperts else _on_selected(call, selection)


class _Call(NamedTuple):
    """The arguments of ``fused_experts``, defaults resolved."""

    hidden_states: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    activation: MoEActivation
    apply_router_weight_on_input: bool
    global_num_experts: int
    expert_map: torch.Tensor | None
    w1_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    activation_config: ApplyMoEActivationConfig
    options: MoEOptions

    @property
    def num_experts(self) -> int:
        if self.global_num_experts >= 0:
            return self.global_num_experts
        return self.w1.shape[0] if self.expert_map is None else self.expert_map.shape[0]


def _on_hopper(call: _Call) -> torch.Tensor:
    """Straight to the kernels: building a layer around them would cost more than they do."""
    x, weights = call.hidden_states, call.topk_weights
    check_ids(call.topk_ids, call.num_experts, call.options.debug_checks)
    if call.apply_router_weight_on_input:
        x = x * weights.to(x.dtype)
    (T, H), K, (e, _, width) = x.shape, call.topk_ids.shape[1], call.w2.shape
    invariant = call.options.batch_invariant
    tiles = hopper_tiles(T, K, call.num_experts, e, H, width, batch_invariant=invariant)
    rows = scratch_rows(tiles, T * K, e)
    output = x.new_empty(T, H)
    hopper_experts(
        output,
        x,
        call.w1,
        call.w2,
        None if call.apply_router_weight_on_input else weights,
        call.topk_ids,
        call.activation,
        call.activation_config,
        call.num_experts,
        call.expert_map,
        call.w1_bias,
        call.w2_bias,
        x.new_empty(rows, width),
        x.new_empty(rows, H),
        batch_invariant=invariant,
        tiles=tiles,
    )
    return output


def _on_triton(call: _Call) -> torch.Tensor:
    """As ``_on_hopper``, in passes where the scratch memory is bounded."""
    x, weights = call.hidden_states, call.topk_weights
    check_ids(call.topk_ids, call.num_experts, call.options.debug_checks)
    if call.apply_router_weight_on_input:
        x = x * weights.to(x.dtype)
    (T, H), K, width = x.shape, call.topk_ids.shape[1], call.w2.shape[2]
    table = checked_table(
        call.options.table,
        K,
        call.w1.shape[0],
        H,
        width,
        x.dtype,
        call.activation,
        x.device,
    )
    limit = call.options.max_workspace_bytes
    chunk = T if limit is None else min(T, max(1, limit // (K * (H + width) * x.element_size())))
    output = x.new_empty(T, H)
    workspace13, workspace2 = x.new_empty(chunk, K, width), x.new_empty(chunk, K, H)
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        triton_experts(
            output[rows],
            x[rows],
            call.w1,
            call.w2,
            None if call.apply_router_weight_on_input else weights[rows],
            call.topk_ids[rows],
            call.activation,
            call.activation_config,
            call.expert_map,
            call.w1_bias,
            call.w2_bias,
            workspace13,
            workspace2,
            batch_invariant=call.options.batch_invariant,
            table=table,
        )
    return output


def _on_selected(call: _Call, selection: Selection) -> torch.Tensor:
    kernel = selection.make_kernel(biased_moe_quant_config(call.w1_bias, call.w2_bias))
    assert isinstance(kernel, FusedMoEKernel)
    return kernel.apply(
        call.hidden_states,
        call.w1,
        call.w2,
        call.topk_weights,
        call.topk_ids,
        activation=call.activation,
        global_num_experts=call.num_experts,
        expert_map=call.expert_map,
        apply_router_weight_on_input=call.apply_router_weight_on_input,
    )


@lru_cache(maxsize=1024)
def _select(
    num_experts: int,
    num_local: int,
    K: int,
    H: int,
    width: int,
    activation: MoEActivation,
    activation_config: ApplyMoEActivationConfig,
    dtype: torch.dtype,
    device: torch.device,
    has_bias: bool,
    apply_router_weight_on_input: bool,
    options: MoEOptions,
) -> Selection:
    """What selection prefers for a layer of these sizes on this device."""
    return select(
        FusedMoEConfig(
            num_experts=max(num_experts, K),  # a rank may hold fewer experts than a token picks
            num_local_experts=num_local,
            experts_per_token=K,
            hidden_dim=H,
            intermediate_size_per_partition=width,
            activation=activation,
            activation_config=activation_config,
            in_dtype=dtype,
            device=device,
            has_bias=has_bias,
            apply_router_weight_on_input=apply_router_weight_on_input,
            require_modular=True,
            options=options,
        )
    )


def _check(call: _Call) -> None:
    x, w1, w2, ids = call.hidden_states, call.w1, call.w2, call.topk_ids
    S = 2 if call.activation.is_gated else 1
    if (x.dim(), ids.dim(), w1.dim(), w2.dim()) != (2, 2, 3, 3):
        raise ValueError(
            f"hidden_states {tuple(x.shape)}, topk_ids {tuple(ids.shape)}, w1 {tuple(w1.shape)}, "
            f"w2 {tuple(w2.shape)} must have 2, 2, 3, 3 dimensions"
        )
    (T, H), K, (e, _, width) = x.shape, ids.shape[1], w2.shape
    wanted = (
        ("w1", w1, (e, S * width, H)),
        ("w2", w2, (e, H, width)),
        ("topk_ids", ids, (T, K)),
        ("topk_weights", call.topk_weights, (T, K)),
        ("w1_bias", call.w1_bias, (e, S * width)),
        ("w2_bias", call.w2_bias, (e, H)),
        ("expert_map", call.expert_map, (call.num_experts,)),
    )
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but hidden_states {tuple(x.shape)}, w2 "
                f"{tuple(w2.shape)}, topk_ids {tuple(ids.shape)} and {call.num_experts} experts "
                f"ask for {shape}"
            )
    if not x.dtype == w1.dtype == w2.dtype or not x.is_floating_point():
        raise ValueError(f"hidden_states, w1, w2 are {x.dtype}, {w1.dtype}, {w2.dtype}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids must be int32 or int64, got {ids.dtype}")
    if call.expert_map is None and call.num_experts != e:
        raise ValueError(
            f"w1 holds {e} of {call.num_experts} experts: an expert_map must say which"
        )
    if call.apply_router_weight_on_input and K != 1:
        raise ValueError(f"apply_router_weight_on_input needs top-1 routing, got K = {K}")


def _opaque(call: _Call) -> torch.Tensor:
    options = call.options
    return _fused_experts_op(
        call.hidden_states,
        call.w1,
        call.w2,
        call.topk_weights,
        call.topk_ids,
        call.activation.value,
        call.apply_router_weight_on_input,
        call.global_num_experts,
        call.expert_map,
        call.w1_bias,
        call.w2_bias,
        *call.activation_config.numbers(),
        options.batch_invariant,
        options.max_workspace_bytes,
        options.experts,
        options.debug_checks,
        None if options.table is None else options.table.text,
    )


@torch.library.custom_op("fusedmoe::fused_experts", mutates_args=())
def _fused_experts_op(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    clamp_limit: float | None,
    alpha: float | None,
    beta: float | None,
    situ_beta: float | None,
    situ_linear_beta: float | None,
    batch_invariant: bool,
    max_workspace_bytes: int | None,
    experts: str | None,
    debug_checks: bool,
    tuned_table: str | None = None,
) -> torch.Tensor:
    """``fused_experts`` as torch.compile sees it: opaque."""
    return fused_experts(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        MoEActivation(activation),
        apply_router_weight_on_input,
        global_num_experts,
        expert_map,
        biased_moe_quant_config(w1_bias, w2_bias),
        activation_config=ApplyMoEActivationConfig.from_numbers(
            clamp_limit, alpha, beta, situ_beta, situ_linear_beta
        ),
        options=MoEOptions(
            batch_invariant=batch_invariant,
            max_workspace_bytes=max_workspace_bytes,
            experts=experts,
            debug_checks=debug_checks,
            tuned_table=None if tuned_table is None else table_from_text(tuned_table),
        ),
    )


@_fused_experts_op.register_fake
def _(hidden_states: torch.Tensor, *arguments: object) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)
