"""The rows: which family's files use which names. Model types are config.json's."""

from __future__ import annotations

from collections.abc import Mapping

from fusedmoe.weights.families import CheckpointFamily, Part

Names = Mapping[Part, tuple[str, ...]]


def _names(**paths: str | tuple[str, ...]) -> Names:
    return {part: (path,) if isinstance(path, str) else path for part, path in paths.items()}  # type: ignore[misc]


def _experts(at: str, gate: str, up: str, down: str) -> dict[str, str | tuple[str, ...]]:
    """One tensor per expert and projection, or the fused form that Transformers keeps in memory."""
    return {
        "gate": f"{at}.{{e}}.{gate}",
        "up": f"{at}.{{e}}.{up}",
        "down": (f"{at}.{{e}}.{down}", f"{at}.down_proj"),
        "gate_up": f"{at}.gate_up_proj",
    }


def _projections(at: str) -> dict[str, str | tuple[str, ...]]:
    return _experts(f"{at}.experts", "gate_proj", "up_proj", "down_proj")


def _mixtral_style(at: str) -> dict[str, str | tuple[str, ...]]:
    return _experts(f"{at}.experts", "w1", "w3", "w2")


_MLP = _projections("mlp")
_SPARSE = _mixtral_style("block_sparse_moe")
_GATE = "mlp.gate.weight"
_GATE_BIAS = "mlp.gate.e_score_correction_bias"

FAMILIES: tuple[CheckpointFamily, ...] = (
    CheckpointFamily(
        name="mixtral",
        model_types=("mixtral", "minimax", "phimoe"),
        names=_names(**_SPARSE, router="block_sparse_moe.gate"),
    ),
    CheckpointFamily(
        name="minimax_m2",
        model_types=("minimax_m2", "minimax_m3_vl"),
        names=_names(
            **_SPARSE,
            router="block_sparse_moe.gate",
            correction_bias="block_sparse_moe.e_score_correction_bias",
            shared="block_sparse_moe.shared_experts",
        ),
    ),
    CheckpointFamily(
        name="kimi_linear",
        model_types=("kimi_linear",),
        names=_names(
            **_SPARSE,
            router="block_sparse_moe.gate",
            correction_bias="block_sparse_moe.gate.e_score_correction_bias",
            shared="block_sparse_moe.shared_experts",
        ),
    ),
    CheckpointFamily(
        name="grok1",
        model_types=("grok-1", "grok1", "grok"),
        names=_names(
            **_experts("moe_block.experts", "linear", "linear_v", "linear_1"),
            router="moe_block.gate",
        ),
    ),
    CheckpointFamily(
        name="qwen_moe",
        model_types=(
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "qwen4_exp",
            "qwen4_exp_text",
            "qwen3_omni_moe",
            "qwen3_omni_moe_thinker",
            "qwen3_omni_moe_text",
            "qwen3_omni_moe_talker_text",
            "olmoe",
            "flex_olmo",
            "mellum",
            "cohere2_moe",
        ),
        names=_names(
            **_MLP,
            router="mlp.gate",
            shared=("mlp.shared_expert", "mlp.shared_experts"),
            shared_gate="mlp.shared_expert_gate",
        ),
    ),
    CheckpointFamily(
        name="qwen3_vl_moe",
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        names=_names(**_MLP, router="mlp.gate"),
        fused_in_out=True,
    ),
    CheckpointFamily(
        name="deepseek",
        model_types=(
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "deepseek_ocr2",
            "deepseek_ocr2_text",
            "deepseek_vl_v2",
            "kimi_k2",
            "kimi_k25",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm4v_moe_text",
            "glm_moe_dsa",
            "glm5_next",
            "glm5_next_text",
            "dots1",
            "solar_open",
            "mistral4",
            "mimo_v2_flash",
            "axk1",
            "axk2",
            "minimax_m3_vl_text",
            "exaone_moe",
            "hy_v4",
        ),
        names=_names(
            **_MLP,
            router="mlp.gate",
            correction_bias=(_GATE_BIAS, "mlp.e_score_correction_bias"),
            shared="mlp.shared_experts",
        ),
    ),
    CheckpointFamily(
        name="deepseek_v4",
        model_types=("deepseek_v4",),
        names=_names(
            **_mixtral_style("ffn"),
            router=_GATE.replace("mlp", "ffn"),
            correction_bias="ffn.gate.bias",
            hash_table="ffn.gate.tid2eid",
            shared="ffn.shared_experts",
        ),
    ),
    CheckpointFamily(
        name="gpt_oss",
        model_types=("gpt_oss",),
        names=_names(
            **_MLP,
            router="mlp.router.weight",
            router_bias="mlp.router.bias",
        ),
        fused_in_out=True,
        interleaved=True,
    ),
    CheckpointFamily(
        name="openai_privacy_filter",
        model_types=("openai_privacy_filter",),
        names=_names(
            gate_up="mlp.experts.gate_up_proj",
            down="mlp.experts.down_proj",
            router="mlp.router.weight",
            router_bias="mlp.router.bias",
        ),
        fused_in_out=True,
    ),
    CheckpointFamily(
        name="llama4",
        model_types=("llama4", "llama4_text"),
        names=_names(
            **_projections("feed_forward"),
            router="feed_forward.router",
            shared="feed_forward.shared_expert",
        ),
        fused_in_out=True,
    ),
    CheckpointFamily(
        name="granitemoe",
        model_types=("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
        names=_names(
            gate_up=("block_sparse_moe.input_linear", "block_sparse_moe.experts.gate_up_proj"),
            down=("block_sparse_moe.output_linear", "block_sparse_moe.experts.down_proj"),
            router="block_sparse_moe.router",
            shared="shared_mlp",
        ),
    ),
    CheckpointFamily(
        name="jamba",
        model_types=("jamba",),
        names=_names(**_projections("feed_forward"), router="feed_forward.router"),
    ),
    CheckpointFamily(
        name="lfm2_moe",
        model_types=("lfm2_moe",),
        names=_names(
            **_mixtral_style("feed_forward"),
            router="feed_forward.gate",
            correction_bias="feed_forward.expert_bias",
        ),
    ),
    CheckpointFamily(
        name="dbrx",
        model_types=("dbrx",),
        names=_names(
            gate="ffn.experts.mlp.w1",
            up="ffn.experts.mlp.v1",
            down="ffn.experts.mlp.w2",
            router="ffn.router.layer",
        ),
    ),
    CheckpointFamily(
        name="jetmoe",
        model_types=("jetmoe",),
        names=_names(
            gate_up="mlp.input_linear", down="mlp.output_linear", router="mlp.router.layer"
        ),
    ),
    CheckpointFamily(
        name="aria",
        model_types=("aria", "aria_text"),
        names=_names(
            gate_up="mlp.experts.fc1",
            down="mlp.experts.fc2",
            router="mlp.router",
            shared="mlp.shared_experts",
        ),
        fused_in_out=True,
    ),
    CheckpointFamily(
        name="hunyuan_v1_moe",
        model_types=("hunyuan_v1_moe",),
        names=_names(**_MLP, router="mlp.gate.wg", shared="mlp.shared_mlp"),
    ),
    CheckpointFamily(
        name="hy_v3",
        model_types=("hy_v3",),
        names=_names(
            **_MLP,
            router=("mlp.router.gate", "mlp.gate"),
            correction_bias=("mlp.expert_bias", "mlp.e_score_correction_bias"),
            shared=("mlp.shared_mlp", "mlp.shared_experts"),
        ),
    ),
    CheckpointFamily(
        name="ernie4_5_moe",
        model_types=("ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
        names=_names(
            **_MLP,
            router=(_GATE, "mlp.gate.weight_1"),
            correction_bias=(
                "mlp.moe_statics.e_score_correction_bias",
                "mlp.gate.moe_statics.e_score_correction_bias",
            ),
            shared="mlp.shared_experts",
        ),
    ),
    CheckpointFamily(
        name="nemotron_h",
        model_types=("nemotron_h",),
        names=_names(
            up=("mixer.experts.{e}.up_proj", "mixer.experts.up_proj"),
            down=("mixer.experts.{e}.down_proj", "mixer.experts.down_proj"),
            router="mixer.gate",
            correction_bias="mixer.gate.e_score_correction_bias",
            shared="mixer.shared_experts",
            latent=("mixer.fc1_latent_proj", "mixer.fc2_latent_proj"),
        ),
    ),
    CheckpointFamily(
        name="longcat_flash",
        model_types=("longcat_flash",),
        names=_names(
            **_MLP,
            router="mlp.router.classifier",
            correction_bias="mlp.router.e_score_correction_bias",
        ),
    ),
    CheckpointFamily(
        name="gemma4",
        model_types=("gemma4", "gemma4_text", "diffusion_gemma", "diffusion_gemma_text"),
        names=_names(
            gate_up="experts.gate_up_proj",
            down="experts.down_proj",
            router="router.proj",
            router_scale="router.scale",
            per_expert_scale="router.per_expert_scale",
        ),
    ),
    CheckpointFamily(
        name="afmoe",
        model_types=("afmoe",),
        names=_names(
            **_MLP,
            router="mlp.router.gate",
            correction_bias="mlp.expert_bias",
            shared="mlp.shared_experts",
        ),
    ),
    CheckpointFamily(
        name="laguna",
        model_types=("laguna",),
        names=_names(
            **_MLP,
            router="mlp.gate",
            correction_bias=("mlp.experts.e_score_correction_bias", _GATE_BIAS),
            shared=("mlp.shared_expert", "mlp.shared_experts"),
        ),
    ),
    CheckpointFamily(
        name="step3p7",
        model_types=("step3p7", "step3p5"),
        names=_names(
            gate="moe.gate_proj",
            up="moe.up_proj",
            down="moe.down_proj",
            router="moe.gate.weight",
            correction_bias="moe.router_bias",
            shared="share_expert",
        ),
    ),
    CheckpointFamily(
        name="inkling",
        model_types=("inkling_mm_model",),
        names=_names(
            gate_up="mlp.experts.w13_weight",
            down="mlp.experts.w2_weight",
            router=_GATE,
            router_scale="mlp.gate.global_scale",
            correction_bias="mlp.gate.bias",
            shared="mlp.shared_experts",
        ),
        interleaved=True,
    ),
    CheckpointFamily(
        name="inkling_text",
        model_types=("inkling_text",),
        names=_names(
            gate_up="mlp.experts.gate_up_proj",
            down="mlp.experts.down_proj",
            router=_GATE,
            router_scale="mlp.gate.global_scale",
            correction_bias=_GATE_BIAS,
            shared="mlp.shared_experts",
        ),
    ),
    CheckpointFamily(
        name="zaya",
        model_types=("zaya",),
        names=_names(
            gate_up="mlp.experts.gate_up_proj",
            down="mlp.experts.down_proj",
            router=("mlp.gate.down_proj", "mlp.gate.router_mlp"),
            router_scale="mlp.gate.router_states_scale",
            correction_bias="mlp.gate.balancing_biases",
        ),
    ),
)
