"""One call of ``fused_experts`` as a record, and what its two kinds of weights share.

T tokens, K picks, e local experts, H hidden, I intermediate.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.kernels.ids import check_expert_map
from fusedmoe.modular_kernel import ExpertsWork, FusedMoEExpertsModular, FusedMoEKernel
from fusedmoe.modular_kernel.checks import check_picks
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.selection import Selection, select
from fusedmoe.tuning.table_file import table_from_text

Keys = tuple[QuantKey | None, QuantKey | None]
"""Of the weights and the activations of one GEMM."""

_UNQUANTIZED: Keys = (None, None)


class ExpertsCall(NamedTuple):
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


OptionWords = tuple[bool, int | None, str | None, bool, bool, str | None]


def option_words(options: MoEOptions) -> OptionWords:
    """Options as an op's schema can hold them; ``options_of`` is the inverse."""
    assert not isinstance(options.experts, type)
    return (
        options.batch_invariant,
        options.max_workspace_bytes,
        options.experts,
        options.debug_checks,
        options.deterministic,
        None if options.table is None else options.table.text,
    )


def options_of(
    batch_invariant: bool,
    max_workspace_bytes: int | None,
    experts: str | None,
    debug_checks: bool,
    deterministic: bool,
    tuned_table: str | None,
) -> MoEOptions:
    """The options that ``option_words`` has turned into these."""
    return MoEOptions(
        batch_invariant=batch_invariant,
        max_workspace_bytes=max_workspace_bytes,
        experts=experts,
        debug_checks=debug_checks,
        deterministic=deterministic,
        tuned_table=None if tuned_table is None else table_from_text(tuned_table),
    )


def check_call(call: ExpertsCall, num_local: int) -> None:
    """Raise ValueError where ids, weights and expert map do not fit tokens and ``num_local``."""
    check_picks(call.hidden_states, call.topk_weights, call.topk_ids)
    if call.expert_map is None and call.num_experts != num_local:
        raise ValueError(
            f"w1 holds {num_local} of {call.num_experts} experts: an expert_map must say which"
        )
    given = call.expert_map
    if given is not None and given.shape != (call.num_experts,):
        raise ValueError(f"expert_map is {tuple(given.shape)}, for {call.num_experts} experts")
    check_expert_map(given, call.topk_ids)
    K = call.topk_ids.shape[1]
    if call.apply_router_weight_on_input and K != 1:
        raise ValueError(f"apply_router_weight_on_input needs top-1 routing, got K = {K}")


def selection_for(
    call: ExpertsCall,
    num_local: int,
    width: int,
    up_keys: Keys = _UNQUANTIZED,
    down_keys: Keys = _UNQUANTIZED,
) -> Selection:
    """What selection prefers for ``num_local`` experts of ``width`` = I in these formats."""
    return _select(
        call.num_experts,
        num_local,
        call.topk_ids.shape[1],
        call.hidden_states.shape[1],
        width,
        call.activation,
        call.activation_config,
        call.hidden_states.dtype,
        call.hidden_states.device,
        call.w1_bias is not None or call.w2_bias is not None,
        call.apply_router_weight_on_input,
        call.options,
        up_keys,
        down_keys,
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
    up_keys: Keys,
    down_keys: Keys,
) -> Selection:
    moe = FusedMoEConfig(
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
    return select(moe, *up_keys, down_keys=down_keys)


def run_selected(
    call: ExpertsCall, selection: Selection, quant_config: FusedMoEQuantConfig
) -> torch.Tensor:
    """The output [T, H], by a kernel made for this call."""
    kernel = selection.make_kernel(quant_config)
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


def run_opaque(experts: FusedMoEExpertsModular, name: str, work: ExpertsWork) -> None:
    """What the implementation ``name`` does, by the op that compiled code does not look into.

    For those whose way depends on which experts have rows, which is known only at run time.
    """
    from fusedmoe.experts.functional import fused_experts

    given = experts.moe_config.options
    options = MoEOptions(
        experts=name,
        batch_invariant=given.batch_invariant,
        max_workspace_bytes=given.max_workspace_bytes,
    )
    work.output.copy_(
        fused_experts(
            work.hidden_states,
            work.w1,
            work.w2,
            work.output_weights_or_ones,
            work.topk_ids,
            work.activation,
            expert_map=work.expert_map,
            quant_config=experts.quant_config,
            activation_config=experts.activation_config,
            options=options,
        )
    )
