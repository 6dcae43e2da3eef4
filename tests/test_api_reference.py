"""Names, arguments and their order are those of the API reference that this library keeps.

Someone who comes from there changes an import. What is added has a default, or is keyword-only.
"""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any

import pytest

import fusedmoe

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
    "num_redundant_experts routed_experts_prefix"
)

# FusedMoE itself is in test_layer.py, with a test for every argument.
CALLABLES = {
    "activation_without_mul": "activation",
    "apply_moe_activation": "activation output input",
    "fused_experts": "hidden_states w1 w2 topk_weights topk_ids activation "
    "apply_router_weight_on_input global_num_experts expert_map quant_config",
    "fused_moe_make_expert_params_mapping": _MAPPING,
    "moe_align_block_size": "topk_ids block_size num_experts expert_map pad_sorted_ids "
    "ignore_invalid_experts return_scatter_idx",
    "moe_permute": "hidden_states a1q_scale topk_ids n_expert n_local_expert expert_map "
    "permuted_hidden_states scratch",
    "moe_unpermute": "out permuted_hidden_states topk_weights inv_permuted_idx "
    "expert_first_token_offset",
    "moe_fused_mul_sum": "inputs topk_weights outputs topk_ids expert_map num_valid_tokens",
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
    "FusedMoEMethodBase.apply_monolithic": "layer x router_logits input_ids",
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
    "FusedMoEQuantConfig.make": "quant_dtype per_act_token_quant per_out_ch_quant block_shape "
    "w1_scale w2_scale a1_scale a2_scale g1_alphas g2_alphas a1_gscale a2_gscale w1_bias w2_bias "
    "w1_zp w2_zp weight_dtype is_scale_swizzled gemm1_alpha gemm1_beta gemm1_clamp_limit",
    "FusedMoEQuantConfig.scale_shape": "max_tokens hidden_dim",
    "FusedMoERouter.select_experts": "hidden_states router_logits topk_indices_dtype input_ids",
    "GateLinear.set_out_dtype": "out_dtype",
    "MoEActivation.from_str": "s",
    "MoEActivation.without_mul": "",
    "MoEPrepareAndFinalizeNaiveDPEPModular": "is_sequence_parallel num_dispatchers",
    "MoEPrepareAndFinalizeNaiveDPEPModular.finalize": _FINALIZE,
    "MoEPrepareAndFinalizeNaiveDPEPModular.prepare": _PREPARE,
    "MoEPrepareAndFinalizeNaiveDPEPModular.set_lora_context": "ctx",
    "MoEPrepareAndFinalizeNaiveDPEPMonolithic": "is_sequence_parallel num_dispatchers",
    "MoEPrepareAndFinalizeNaiveDPEPMonolithic.finalize": "fused_expert_output",
    "MoEPrepareAndFinalizeNaiveDPEPMonolithic.prepare": "a1 router_logits quant_config "
    "defer_input_quant",
    "MoERunner.apply_routed_input_transform": "hidden_states",
    "MoERunner.apply_routed_output_transform": "fused_output",
    "MoERunner.forward": "hidden_states router_logits input_ids",
    "MoERunner.set_eplb_state": "moe_layer_idx expert_load_view logical_to_physical_map "
    "logical_replica_count",
    "RoutedExperts.forward_modular": "x topk_weights topk_ids shared_experts shared_experts_input",
    "RoutedExperts.forward_monolithic": "x router_logits input_ids",
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
    ours, wanted = parameters(path), CALLABLES[path].split()
    assert [p.name for p in ours[: len(wanted)]] == wanted
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
