"""FusedMoE(): from a layer's arguments to the MoERunner that runs it.

In this order: where the rank stands among others, the router, which rank has which expert, the
config, the format's method, whether all ranks build the same layer, the weights, the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    MoEOptions,
    ParallelGroups,
    ParallelPlace,
    check_integers,
    shard_size,
)
from fusedmoe.distributed.agreement import built_together, check_layer_agreement
from fusedmoe.quantization.method_base import FusedMoEMethodBase, QuantizationConfig
from fusedmoe.quantization.unquantized import UnquantizedFusedMoEMethod
from fusedmoe.router.arguments import RoutingArguments
from fusedmoe.router.base import FusedMoERouter
from fusedmoe.router.routers import CustomRoutingFunction
from fusedmoe.router.substitution import ExpertSubstitution
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.runner.reduction import RankSum, commutes_with_sum
from fusedmoe.weights.expert_map import ExpertMapManager, Placement, determine_expert_counts
from fusedmoe.weights.params_mapping import DEFAULT_CHECKPOINT_NAMES, CheckpointNames
from fusedmoe.weights.routed_experts import RoutedExperts


@built_together
def FusedMoE(
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    params_dtype: torch.dtype | None = None,
    renormalize: bool = True,
    use_grouped_topk: bool = False,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    quant_config: QuantizationConfig | None = None,
    tp_size: int | None = None,
    dp_size: int | None = None,
    pcp_size: int | None = None,
    prefix: str = "",
    custom_routing_function: CustomRoutingFunction | None = None,
    router: FusedMoERouter | None = None,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    swiglu_limit: float | None = None,
    e_score_correction_bias: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    activation: str | MoEActivation = "silu",
    enable_eplb: bool = False,
    num_redundant_experts: int = 0,
    has_bias: bool = False,
    is_sequence_parallel: bool = False,
    expert_mapping: Sequence[tuple[str, str, int, str]] | None = None,
    n_shared_experts: int | None = None,
    router_logits_dtype: torch.dtype | None = None,
    gate: nn.Module | None = None,
    shared_experts: nn.Module | None = None,
    shared_expert_gate: nn.Module | None = None,
    routed_input_transform: nn.Module | None = None,
    routed_output_transform: nn.Module | None = None,
    apply_routed_scale_to_output: bool = False,
    zero_expert_type: str | None = None,
    hash_indices_table: torch.Tensor | None = None,
    runner_cls: type[MoERunner] | None = None,
    runner_args: dict[str, Any] | None = None,
    routed_experts_cls: type[RoutedExperts] | None = None,
    routed_experts_args: dict[str, Any] | None = None,
    *,
    parallel: ParallelGroups | None = None,
    options: MoEOptions | None = None,
    tp_rank: int | None = None,
    dp_rank: int | None = None,
    pcp_rank: int | None = None,
    expert_placement: Placement = "linear",
    swiglu_alpha: float | None = None,
    swiglu_beta: float | None = None,
    activation_situ_beta: float | None = None,
    activation_situ_linear_beta: float | None = None,
    reduce_results: bool = True,
    shared_experts_sharded: bool = False,
    ckpt_names: CheckpointNames = DEFAULT_CHECKPOINT_NAMES,
    is_fused_checkpoint_transposed: bool = False,
    is_fused_checkpoint_interleaved: bool | None = None,
    bias_vl: torch.Tensor | None = None,
    image_sentinel_lo: int = 0,
    skip_padding: bool = False,
    expert_substitution: ExpertSubstitution | None = None,
    max_num_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> MoERunner:
    """Build one Mixture-of-Experts layer.

    Sizes: ``num_experts`` of the model (E), ``top_k`` per token (K), ``hidden_size`` (H) that the
    experts read and write, ``intermediate_size`` (I) of one whole expert. ``params_dtype`` (None:
    torch's default) and ``device`` (may be "meta") are the weights'.

    Routing: ``scoring_func`` softmax, sigmoid or sqrtsoftplus; ``renormalize``; grouped top-k by
    ``use_grouped_topk`` with ``num_expert_group`` and ``topk_group``; ``e_score_correction_bias``
    [E] (the ``gate``'s own stays that, also where loading replaces it);
    ``hash_indices_table`` [vocab, K]; ``bias_vl`` [E] for tokens whose id lies in
    [``image_sentinel_lo``, + 5); ``zero_expert_type="identity"``, where the bias also covers the
    zero experts; ``skip_padding`` routes rows that forward's ``is_padding`` marks nowhere.
    ``expert_substitution`` has constants in the place of experts that were removed, of
    ``num_experts`` that are still routed to.
    ``custom_routing_function(hidden_states, logits, topk, renormalize)`` replaces the rule,
    ``router`` all of it. ``routed_scaling_factor`` multiplies the router's weights, or with
    ``apply_routed_scale_to_output`` the routed output and the zero experts' term.
    ``n_shared_experts`` appends that many experts which every token is routed to with weight 1.
    ``router_logits_dtype`` is what logits are converted to (and the gate asked for).

    Experts: ``activation`` by name, with ``swiglu_limit`` / ``_alpha`` / ``_beta`` and
    ``activation_situ_*`` as its numbers; ``has_bias``; ``apply_router_weight_on_input`` (K = 1).
    ``quant_config.get_quant_method(moe_config, prefix)`` gives another format than the plain one.

    Around them: ``gate`` computes the logits where forward gets none, ``shared_experts`` (times
    sigmoid of ``shared_expert_gate``) is added, ``routed_input_transform`` and
    ``routed_output_transform`` stand before and after the routed experts alone.

    Loading: ``ckpt_names`` (gate, down, up or None), or an explicit ``expert_mapping`` as
    ``make_expert_params_mapping`` makes it; ``is_fused_checkpoint_transposed`` for 3-D tensors
    stored [E, in, out]; ``is_fused_checkpoint_interleaved`` where joined gate and up alternate
    row by row (None: as the activation reads them). ``prefix`` is the layer's name there.

    Ranks: ``parallel`` holds the process groups. ``tp_size``, ``dp_size`` and ``pcp_size`` come
    from them or are 1; given without a group, with ``tp_rank`` and the like, they only choose what
    is stored here, and the output is this rank's summand. ``reduce_results=False`` leaves the sum
    to the caller as well. ``is_sequence_parallel``: the tensor-parallel ranks hold different
    tokens. Where groups are given, every rank of them builds the layer; ranks that build different
    layers, or of which one fails, get a ValueError naming the difference.
    ``shared_experts_sharded``: each rank's shared experts give one summand of theirs.
    ``enable_eplb`` allows ``set_eplb_state``, ``num_redundant_experts`` adds copies for it;
    ``expert_placement`` is linear or round_robin.

    ``runner_cls(..., **runner_args)`` and ``routed_experts_cls(..., **routed_experts_args)``
    replace or parametrise the two modules; ``options`` say how to run. ``max_num_tokens`` is how
    many tokens a forward brings at most, which the batched row format needs to know.

    Raises ValueError for arguments that contradict each other.
    """
    check_integers(
        {
            "num_experts": num_experts,
            "top_k": top_k,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
        }
    )
    groups, options = ParallelGroups.of(parallel), MoEOptions.of(options)
    place = ParallelPlace.of(
        groups,
        {"tp": tp_size, "dp": dp_size, "pcp": pcp_size},
        {"tp": tp_rank, "dp": dp_rank, "pcp": pcp_rank},
    )
    parallel_config = FusedMoEParallelConfig.around(place, groups, is_sequence_parallel)
    routing = RoutingArguments(
        top_k=top_k,
        num_experts=num_experts,
        renormalize=renormalize,
        use_grouped_topk=use_grouped_topk,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        scoring_func=scoring_func,
        n_shared_experts=n_shared_experts or 0,
        routed_scaling_factor=routed_scaling_factor,
        scale_on_output=apply_routed_scale_to_output,
        e_score_correction_bias=e_score_correction_bias,
        custom_routing_function=custom_routing_function,
        zero_expert_type=zero_expert_type,
        hash_indices_table=hash_indices_table,
        bias_vl=bias_vl,
        image_sentinel_lo=image_sentinel_lo,
        skip_padding=skip_padding,
    )
    layer_router = routing.make_router(router)
    around: dict[str, Any] = {
        "gate": gate,
        "shared_experts": shared_experts,
        "shared_expert_gate": shared_expert_gate,
        "shared_experts_sharded": shared_experts_sharded,
        "routed_input_transform": routed_input_transform,
        "routed_output_transform": routed_output_transform,
        "routed_scaling_factor": routed_scaling_factor if apply_routed_scale_to_output else 1.0,
        "expert_substitution": expert_substitution,
        "enable_eplb": enable_eplb,
        "prefix": prefix,
    }
    _check_shared(n_shared_experts, shared_experts, shared_experts_sharded, parallel_config)
    stored = num_experts
    if expert_substitution is not None:
        beside = {
            "enable_eplb": enable_eplb,
            "n_shared_experts": bool(n_shared_experts),
            "batch_invariant": options.batch_invariant,
        }
        stored = expert_substitution.left_of(num_experts, hidden_size, beside)
    counts = determine_expert_counts(stored, num_redundant_experts, n_shared_experts)
    ep = parallel_config.ep_size, parallel_config.ep_rank
    placement = ExpertMapManager(counts.physical, num_redundant_experts, *ep, expert_placement)
    act = MoEActivation.from_str(activation)
    dtype = params_dtype or torch.get_default_dtype()
    moe_config = FusedMoEConfig(
        num_experts=counts.physical,
        num_logical_experts=counts.logical,
        num_local_experts=placement.num_local_experts,
        num_zero_experts=routing.num_zero_experts,
        experts_per_token=top_k + counts.fused_shared,
        hidden_dim=hidden_size,
        intermediate_size_per_partition=shard_size(intermediate_size, parallel_config.tp_size),
        activation=act,
        activation_config=ApplyMoEActivationConfig.of_layer(
            act,
            swiglu_limit=swiglu_limit,
            swiglu_alpha=swiglu_alpha,
            swiglu_beta=swiglu_beta,
            activation_situ_beta=activation_situ_beta,
            activation_situ_linear_beta=activation_situ_linear_beta,
        ),
        in_dtype=dtype,
        device=torch.get_default_device() if device is None else torch.device(device),
        routing_method=layer_router.routing_method_type,
        router_logits_dtype=router_logits_dtype,
        moe_parallel_config=parallel_config,
        has_bias=has_bias,
        apply_router_weight_on_input=apply_router_weight_on_input,
        has_hash_routing=hash_indices_table is not None,
        max_num_tokens=max_num_tokens,
        require_modular=skip_padding
        or zero_expert_type is not None
        or routed_input_transform is not None
        or expert_substitution is not None,
        options=options,
    )
    method = _make_method(moe_config, quant_config, prefix, groups)
    _check_balancing(enable_eplb, num_redundant_experts, layer_router, method)
    stored_as = {"placement": expert_placement, "intermediate_size": intermediate_size}
    facts = around | stored_as | {"reduce_results": reduce_results}
    _check_ranks_agree(method, groups, layer_router, facts)
    routed_experts = (routed_experts_cls or RoutedExperts)(
        method.moe_config,
        method,
        params_dtype=dtype,
        intermediate_size=intermediate_size,
        expert_map_manager=placement,
        ckpt_names=ckpt_names,
        expert_mapping=expert_mapping,
        is_fused_checkpoint_transposed=is_fused_checkpoint_transposed,
        is_fused_checkpoint_interleaved=is_fused_checkpoint_interleaved,
        prefix=prefix,
        device=device,
        **(routed_experts_args or {}),
    )
    return (runner_cls or MoERunner)(
        method.moe_config,
        layer_router,
        routed_experts,
        router_logits_dtype=router_logits_dtype,
        num_router_logits=None if router is not None else routing.num_logits,
        rank_sum=RankSum.around(place, groups, is_sequence_parallel, enabled=reduce_results),
        skip_padding=skip_padding,
        **around,
        **(runner_args or {}),
    )


def _check_shared(
    n_shared_experts: int | None,
    shared_experts: nn.Module | None,
    sharded: bool,
    parallel: FusedMoEParallelConfig,
) -> None:
    if n_shared_experts and shared_experts is not None:
        raise ValueError(
            f"{n_shared_experts} shared experts as routed ids and a shared_experts module: "
            "give one of the two"
        )
    if sharded and parallel.is_sequence_parallel:
        raise ValueError(
            f"shared_experts_sharded gives a summand on each of {parallel.sp_size} ranks, but with "
            "is_sequence_parallel these hold different tokens"
        )


def _check_balancing(
    enable_eplb: bool,
    num_redundant_experts: int,
    router: FusedMoERouter,
    method: FusedMoEMethodBase,
) -> None:
    if num_redundant_experts and not enable_eplb:
        raise ValueError(f"{num_redundant_experts} redundant experts need enable_eplb")
    if enable_eplb and not hasattr(router, "set_eplb_state"):
        raise ValueError(f"{type(router).__name__} cannot be balanced: no set_eplb_state")
    if enable_eplb and not method.supports_eplb:
        raise ValueError(f"{type(method).__name__} cannot be balanced (enable_eplb)")


def _make_method(
    moe_config: FusedMoEConfig,
    quant_config: QuantizationConfig | None,
    prefix: str,
    groups: ParallelGroups,
) -> FusedMoEMethodBase:
    """The format's method, holding the config with the sizes that it stores."""
    if quant_config is not None and not hasattr(quant_config, "get_quant_method"):
        raise ValueError(
            f"quant_config is a {type(quant_config).__name__}, which has no get_quant_method; "
            "fusedmoe.read_quantization makes one of what a config.json says, and "
            'fusedmoe.OnlineQuantization.of("int4_g128") of a format'
        )
    method = None if quant_config is None else quant_config.get_quant_method(moe_config, prefix)
    method = method or UnquantizedFusedMoEMethod(moe_config)
    hidden, intermediate = method.maybe_roundup_sizes(
        moe_config.hidden_dim,
        moe_config.intermediate_size_per_partition,
        moe_config.in_dtype,
        moe_config.moe_parallel_config,
    )
    method.groups = groups if groups.connected else None
    method.moe_config = replace(
        moe_config, hidden_dim=hidden, intermediate_size_per_partition=intermediate
    )
    return method


def _check_ranks_agree(
    method: FusedMoEMethodBase,
    groups: ParallelGroups,
    router: FusedMoERouter,
    given: dict[str, Any],
) -> None:
    """Raise ValueError on every rank of ``groups`` where they were ``given`` different arguments:
    of modules it is compared whether there is one."""
    modules = (
        *("gate", "shared_experts", "shared_expert_gate"),
        *("routed_input_transform", "routed_output_transform"),
    )
    removed = given["expert_substitution"] and given["expert_substitution"].removed
    facts = given | {name: given[name] is not None for name in modules}
    facts |= {
        "router": repr(getattr(router, "spec", type(router).__name__)),
        "expert_substitution": removed,
        "transformed before the sum": commutes_with_sum(given["routed_output_transform"]),
    }
    prefix = given["prefix"]
    check_layer_agreement(method, groups, facts, f"the layer {prefix}" if prefix else "this layer")
