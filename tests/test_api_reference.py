"""Names, arguments and their order are those of the API reference that this library keeps.

Someone who comes from there changes an import. What is added has a default, or is keyword-only.
"""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any

import pytest

import fusedmoe
import fusedmoe.integrations.megatron

_FINALIZE = (
    "output fused_expert_output topk_weights topk_ids apply_router_weight_on_input "
    "weight_and_reduce_impl"
)
_PREPARE = (
    "a1 topk_weights topk_ids num_experts expert_map apply_router_weight_on_input quant_config "
    "defer_input_quant"
)
_MAPPING = (
    "model ckpt_gate_proj_name ckpt_down_proj_name ckpt_up_proj_name num_experts "
    "num_redundant_experts=0 routed_experts_prefix='routed_experts'"
)

_BOUNDED = "integrations.megatron."

# FusedMoE itself is in test_layer.py, with a test for every argument. "=" is a default.
CALLABLES = {
    _BOUNDED + "vllm_fused_moe": "hidden_states probs fc1_weight fc2_weight activation_type "
    "num_local_experts local_expert_start valid_tokens routing_map out=None num_tokens_hint=None",
    _BOUNDED + "_get_default_config": "M E top_k",
    _BOUNDED + "_moe_align_block_size_cuda_graphable": "routing_map block_size num_local_experts "
    "local_expert_start valid_tokens",
    _BOUNDED + "_invoke_fused_moe_kernel": "A B C topk_weights sorted_token_ids expert_ids "
    "num_tokens_post_padded mul_routed_weight top_k config grid_size fuse_squared_relu=False",
    _BOUNDED + "_moe_sum": "input topk_weights max_tokens topk K valid_tokens routing_map "
    "local_expert_start num_local_experts out=None",
    "activation_without_mul": "activation",
    "apply_moe_activation": "activation output input",
    "fused_experts": "hidden_states w1 w2 topk_weights topk_ids activation=MoEActivation.SILU "
    "apply_router_weight_on_input=False global_num_experts=-1 expert_map=None quant_config=None",
    "fused_moe_make_expert_params_mapping": _MAPPING,
    "moe_align_block_size": "topk_ids block_size num_experts expert_map=None pad_sorted_ids=False "
    "ignore_invalid_experts=False return_scatter_idx=False",
    "moe_permute": "hidden_states a1q_scale topk_ids n_expert n_local_expert=-1 expert_map=None "
    "permuted_hidden_states=None scratch=None",
    "moe_unpermute": "out permuted_hidden_states topk_weights inv_permuted_idx "
    "expert_first_token_offset=None",
    "moe_fused_mul_sum": "inputs topk_weights outputs=None topk_ids=None expert_map=None "
    "num_valid_tokens=None",
    "count_expert_num_tokens": "topk_ids num_local_experts expert_map",
    "remap_topk_to_local": "topk_ids expert_map",
    "BatchedDeepGemmExperts": "moe_config quant_config max_num_tokens num_dispatchers",
    "BatchedDeepGemmExperts.supports_packed_ue8m0_act_scales": "",
    "FusedMoEExpertsModular.adjust_N_for_activation": "N activation",
    "FusedMoEExpertsModular.apply": "output hidden_states w1 w2 topk_weights topk_ids activation "
    "global_num_experts expert_map a1q_scale a2_scale workspace13 workspace2 expert_tokens_meta "
    "apply_router_weight_on_input",
    "FusedMoEExpertsModular.moe_problem_size": "a1 w1 w2 topk_ids",
    "FusedMoEExpertsModular.workspace_dtype": "act_dtype",
    "FusedMoEExpertsModular.workspace_shapes": "M N K topk global_num_experts local_num_experts "
    "expert_tokens_meta activation",
    "FusedMoEMethodBase.apply": "layer x topk_weights topk_ids shared_experts shared_experts_input",
    "FusedMoEMethodBase.apply_monolithic": "layer x router_logits input_ids=None",
    "FusedMoEMethodBase.maybe_roundup_sizes": "hidden_size intermediate_size_per_partition "
    "act_dtype moe_parallel_config",
    "FusedMoEMethodBase.uses_weight_scale_2_pattern": "",
    "FusedMoEParallelConfig.make": "tp_size_ pcp_size_ dp_size_ sp_size_ vllm_parallel_config",
    "FusedMoEParallelConfig.make_no_parallel": "",
    "FusedMoEPrepareAndFinalizeModular.finalize": _FINALIZE,
    "FusedMoEPrepareAndFinalizeModular.finalize_async": _FINALIZE,
    "FusedMoEPrepareAndFinalizeModular.prepare": _PREPARE,
    "FusedMoEPrepareAndFinalizeModular.prepare_async": _PREPARE,
    "FusedMoEQuantConfig.batched_scale_shape": "num_experts max_tokens hidden_dim",
    "FusedMoEQuantConfig.config_name": "dtype",
    "FusedMoEQuantConfig.make": "quant_dtype=None per_act_token_quant=False "
    "per_out_ch_quant=False block_shape=None w1_scale=None w2_scale=None a1_scale=None "
    "a2_scale=None g1_alphas=None g2_alphas=None a1_gscale=None a2_gscale=None w1_bias=None "
    "w2_bias=None w1_zp=None w2_zp=None weight_dtype=None is_scale_swizzled=True "
    "gemm1_alpha=None gemm1_beta=None gemm1_clamp_limit=None",
    "FusedMoEQuantConfig.scale_shape": "max_tokens hidden_dim",
    "FusedMoERouter.select_experts": "hidden_states router_logits topk_indices_dtype=None "
    "input_ids=None",
    "GateLinear.set_out_dtype": "out_dtype",
    "MoEActivation.from_str": "s",
    "MoEActivation.without_mul": "",
    "MoEPrepareAndFinalizeNaiveDPEPModular": "is_sequence_parallel=False num_dispatchers=1",
    "MoEPrepareAndFinalizeNaiveDPEPModular.finalize": _FINALIZE,
    "MoEPrepareAndFinalizeNaiveDPEPModular.prepare": f"{_PREPARE}=False",
    "MoEPrepareAndFinalizeNaiveDPEPModular.set_lora_context": "ctx",
    "MoEPrepareAndFinalizeNaiveDPEPMonolithic": "is_sequence_parallel=False num_dispatchers=1",
    "MoEPrepareAndFinalizeNaiveDPEPMonolithic.finalize": "fused_expert_output",
    "MoEPrepareAndFinalizeNaiveDPEPMonolithic.prepare": "a1 router_logits quant_config "
    "defer_input_quant=False",
    "MoERunner.apply_routed_input_transform": "hidden_states",
    "MoERunner.apply_routed_output_transform": "fused_output",
    "MoERunner.forward": "hidden_states router_logits input_ids=None",
    "MoERunner.set_eplb_state": "moe_layer_idx expert_load_view logical_to_physical_map "
    "logical_replica_count",
    "RoutedExperts.forward_modular": "x topk_weights topk_ids shared_experts=None "
    "shared_experts_input=None",
    "RoutedExperts.forward_monolithic": "x router_logits=None input_ids=None",
    "RoutedExperts.make_expert_params_mapping": _MAPPING,
    "TransformersFusedMoE.forward": "hidden_states top_k_index top_k_weights",
}
PROPERTIES = (
    "FusedMoEMethodBase.has_unpadded_output",
    "FusedMoEMethodBase.skip_forward_padding",
    "MoEActivation.custom_op_name",
    "MoEActivation.is_gated",
    "MoERunner.expert_local_to_global",
    "MoERunner.expert_map_manager",
    "MoERunner.expert_physical_to_global",
)
OTHER_NAMES = (
    *("BatchedTritonExperts", "TritonExperts", "TritonOrDeepGemmExperts", "DeepGemmExperts"),
    *("CutlassExpertsFp8", "CutlassBatchedExpertsFp8", "GroupedTopk", "UnquantizedFusedMoEMethod"),
    *("FusedMoEActivationFormat", "recursive_replace"),
)


def found(path: str) -> Any:
    return attrgetter(path)(fusedmoe)


def parameters(path: str) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(found(path)).parameters.values() if p.name != "self"]


@pytest.mark.parametrize("path", CALLABLES)
def test_arguments_are_those_of_the_reference(path: str) -> None:
    ours = parameters(path)
    wanted = [word.partition("=") for word in CALLABLES[path].split()]
    assert [p.name for p in ours[: len(wanted)]] == [name for name, _, _ in wanted]
    for parameter, (_, has_one, default) in zip(ours, wanted, strict=False):
        assert not has_one or default in (str(parameter.default), repr(parameter.default)), (
            parameter
        )
    for added in ours[len(wanted) :]:
        has_default = added.default is not inspect.Parameter.empty
        assert has_default or added.kind is inspect.Parameter.VAR_KEYWORD, added


@pytest.mark.parametrize("path", PROPERTIES)
def test_properties_are_those_of_the_reference(path: str) -> None:
    assert isinstance(found(path), property)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_are_those_of_the_reference(name: str) -> None:
    assert name in fusedmoe.__all__
    assert getattr(fusedmoe, name) is not None
