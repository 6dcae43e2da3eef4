"""fusedmoe: the Mixture-of-Experts inference layer as a library of its own.

Public names are imported on first use, so that ``import fusedmoe`` needs neither a GPU, nor
Triton, nor Transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "MoEActivation": "fusedmoe.activation",
    "ApplyMoEActivationConfig": "fusedmoe.activation",
    "activation_without_mul": "fusedmoe.activation",
    "apply_moe_activation": "fusedmoe.activation",
    "FusedMoEConfig": "fusedmoe.config",
    "FusedMoEParallelConfig": "fusedmoe.config",
    "MoEOptions": "fusedmoe.config",
    "ParallelGroups": "fusedmoe.config",
    "RoutingMethodType": "fusedmoe.config",
    "FusedMoEActivationFormat": "fusedmoe.modular_kernel",
    "FusedMoEExpertsModular": "fusedmoe.modular_kernel",
    "FusedMoEExpertsMonolithic": "fusedmoe.modular_kernel",
    "FusedMoEPrepareAndFinalizeModular": "fusedmoe.modular_kernel",
    "FusedMoEPrepareAndFinalizeMonolithic": "fusedmoe.modular_kernel",
    "FUSED_MOE_UNQUANTIZED_CONFIG": "fusedmoe.quantization.config",
    "FusedMoEQuantConfig": "fusedmoe.quantization.config",
    "FusedMoEQuantDesc": "fusedmoe.quantization.config",
    "QuantFormat": "fusedmoe.quantization.tensor",
    "QuantizedTensor": "fusedmoe.quantization.tensor",
    "QuantizedFusedMoEMethod": "fusedmoe.quantization.quantized",
    "quantize_layer": "fusedmoe.quantization.quantize_layer",
    "biased_moe_quant_config": "fusedmoe.quantization.config",
    "fp8_w8a8_moe_quant_config": "fusedmoe.quantization.schemes",
    "fp8_w8a16_moe_quant_config": "fusedmoe.quantization.schemes",
    "int8_w8a8_moe_quant_config": "fusedmoe.quantization.schemes",
    "int8_w8a16_moe_quant_config": "fusedmoe.quantization.schemes",
    "int4_w4a16_moe_quant_config": "fusedmoe.quantization.schemes",
    "int4_w4afp8_moe_quant_config": "fusedmoe.quantization.schemes",
    "gptq_marlin_moe_quant_config": "fusedmoe.quantization.schemes",
    "mxfp4_w4a16_moe_quant_config": "fusedmoe.quantization.schemes",
    "mxfp4_mxfp8_moe_quant_config": "fusedmoe.quantization.schemes",
    "mxfp4_w4a8_moe_quant_config": "fusedmoe.quantization.schemes",
    "mxfp4_moe_quant_config": "fusedmoe.quantization.schemes",
    "ocp_mx_moe_quant_config": "fusedmoe.quantization.schemes",
    "nvfp4_moe_quant_config": "fusedmoe.quantization.schemes",
    "nvfp4_w4a16_moe_quant_config": "fusedmoe.quantization.schemes",
    "FusedMoERouter": "fusedmoe.router.base",
    "create_fused_moe_router": "fusedmoe.router.factory",
    "route": "fusedmoe.router.functional",
    "RoutedExpertsCapturer": "fusedmoe.router.capture",
    "GateLinear": "fusedmoe.router.gate",
    "RoutingSimulator": "fusedmoe.router.simulator",
    "get_routing_method_type": "fusedmoe.router.method_type",
    "GroupedTopk": "fusedmoe.router.named",
    "fused_grouped_topk": "fusedmoe.router.named",
    "fused_topk": "fusedmoe.router.named",
    "fused_topk_bias": "fusedmoe.router.named",
    "grouped_topk": "fusedmoe.router.named",
    "CustomRouter": "fusedmoe.router.routers",
    "ExpertSubstitution": "fusedmoe.router.substitution",
    "SpecRouter": "fusedmoe.router.routers",
    "RoutingResult": "fusedmoe.router.spec",
    "RoutingSpec": "fusedmoe.router.spec",
    "RoutingTensors": "fusedmoe.router.spec",
    "register": "fusedmoe.integrations.transformers",
    "accelerate": "fusedmoe.integrations.transformers.accelerate",
    "CheckpointError": "fusedmoe.checkpoint",
    "from_pretrained": "fusedmoe.integrations.transformers.from_pretrained",
    "restore": "fusedmoe.integrations.transformers.accelerate",
    "TransformersFusedMoE": "fusedmoe.integrations.transformers.generic",
    "recursive_replace": "fusedmoe.integrations.transformers.generic",
    "BatchedTritonExperts": "fusedmoe.experts.triton_batched",
    "TritonExperts": "fusedmoe.experts.triton",
    "HopperExperts": "fusedmoe.experts.hopper",
    "DeepGemmExperts": "fusedmoe.experts.deep_gemm",
    "BatchedDeepGemmExperts": "fusedmoe.experts.deep_gemm",
    "TritonOrDeepGemmExperts": "fusedmoe.experts.triton_or_deep_gemm",
    "CutlassExpertsFp8": "fusedmoe.experts.cutlass_fp8",
    "CutlassBatchedExpertsFp8": "fusedmoe.experts.cutlass_fp8",
    "make_deep_ep_buffer": "fusedmoe.distributed.deep_ep",
    "TritonQuantizedExperts": "fusedmoe.experts.triton_quantized",
    "BatchedTritonQuantizedExperts": "fusedmoe.experts.triton_quantized_batched",
    "TritonEmulatedExperts": "fusedmoe.experts.triton_quantized",
    "BatchedTritonEmulatedExperts": "fusedmoe.experts.triton_quantized_batched",
    "HopperQuantizedExperts": "fusedmoe.experts.hopper_quantized",
    "HopperEmulatedExperts": "fusedmoe.experts.hopper_quantized",
    "fused_experts": "fusedmoe.experts.functional",
    "moe_align_block_size": "fusedmoe.kernels.align",
    "moe_permute": "fusedmoe.kernels.permute",
    "moe_unpermute": "fusedmoe.kernels.permute",
    "moe_fused_mul_sum": "fusedmoe.kernels.mul_sum",
    "count_expert_num_tokens": "fusedmoe.kernels.counts",
    "remap_topk_to_local": "fusedmoe.kernels.counts",
    "FusedMoE": "fusedmoe.layer",
    "MoERunner": "fusedmoe.runner.moe_runner",
    "RoutedExperts": "fusedmoe.weights.routed_experts",
    "FusedMoEMethodBase": "fusedmoe.quantization.method_base",
    "QuantizationConfig": "fusedmoe.quantization.method_base",
    "OnlineQuantization": "fusedmoe.quantization.dialects.online",
    "read_quantization": "fusedmoe.quantization.dialects",
    "UnquantizedFusedMoEMethod": "fusedmoe.quantization.unquantized",
    "fused_moe_make_expert_params_mapping": "fusedmoe.weights.params_mapping",
    "explain": "fusedmoe.selection",
    "TunedTable": "fusedmoe.tuning.tuned_table",
    "ExpertMapManager": "fusedmoe.weights.expert_map",
    "determine_expert_map": "fusedmoe.weights.expert_map",
    "load_local_experts": "fusedmoe.weights.from_disk",
    "EPLBConfig": "fusedmoe.eplb.balancer",
    "ExpertBalancer": "fusedmoe.eplb.balancer",
    "rebalance_experts": "fusedmoe.eplb.planner",
    "reshard_experts": "fusedmoe.eplb.executor",
    "make_transfer_plan": "fusedmoe.eplb.transfer",
    "PeerLayout": "fusedmoe.kernels.peer_layout",
    "PeerMemory": "fusedmoe.distributed.peer_memory",
    "PeerTimeoutError": "fusedmoe.distributed.peer_memory",
    "RanksDisagreeError": "fusedmoe.distributed.agreement",
    "MoEPrepareAndFinalizeNaiveDPEPModular": "fusedmoe.prepare_finalize.naive_dp_ep",
    "MoEPrepareAndFinalizeNaiveDPEPMonolithic": "fusedmoe.prepare_finalize.naive_dp_ep",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
