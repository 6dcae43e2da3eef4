"""The rows: which family's files use which names. Model types are config.json's."""

from __future__ import annotations

from typing import Any

from fusedmoe.weights.families import CheckpointFamily


def _row(
    name: str,
    model_types: str,
    *,
    fused_in_out: bool = False,
    interleaved: bool = False,
    **paths: Any,
) -> CheckpointFamily:
    """``model_types`` with spaces between them; ``paths``: one or several for each part of
    ``CheckpointFamily.names``."""
    names = {part: (path,) if isinstance(path, str) else path for part, path in paths.items()}
    return CheckpointFamily(
        name=name,
        model_types=tuple(model_types.split()),
        names=names,  # type: ignore[arg-type]
        fused_in_out=fused_in_out,
        interleaved=interleaved,
    )


def _experts(at: str, gate: str, up: str, down: str) -> dict[str, Any]:
    """One tensor per expert and projection, or the fused form that Transformers keeps in memory."""
    return {
        "gate": f"{at}.{{e}}.{gate}",
        "up": f"{at}.{{e}}.{up}",
        "down": (f"{at}.{{e}}.{down}", f"{at}.down_proj"),
        "gate_up": f"{at}.gate_up_proj",
    }


def _projections(at: str) -> dict[str, Any]:
    return _experts(f"{at}.experts", "gate_proj", "up_proj", "down_proj")


def _mixtral_style(at: str) -> dict[str, Any]:
    return _experts(f"{at}.experts", "w1", "w3", "w2")


_MLP = _projections("mlp")
_SPARSE = _mixtral_style("block_sparse_moe")
_GATE = "mlp.gate.weight"
_GATE_BIAS = "mlp.gate.e_score_correction_bias"

FAMILIES: tuple[CheckpointFamily, ...] = (
    _row("mixtral", "mixtral minimax phimoe", **_SPARSE, router="block_sparse_moe.gate"),
    _row(
        "minimax_m2",
        "minimax_m2 minimax_m3_vl",
        **_SPARSE,
        router="block_sparse_moe.gate",
        correction_bias="block_sparse_moe.e_score_correction_bias",
        shared="block_sparse_moe.shared_experts",
    ),
    _row(
        "kimi_linear",
        "kimi_linear",
        **_SPARSE,
        router="block_sparse_moe.gate",
        correction_bias="block_sparse_moe.gate.e_score_correction_bias",
        shared="block_sparse_moe.shared_experts",
    ),
    _row(
        "grok1",
        "grok-1 grok1 grok",
        **_experts("moe_block.experts", "linear", "linear_v", "linear_1"),
        router="moe_block.gate",
    ),
    _row(
        "qwen_moe",
        "qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text "
        "qwen3_omni_moe qwen3_omni_moe_thinker qwen3_omni_moe_text qwen3_omni_moe_talker_text "
        "olmoe flex_olmo mellum cohere2_moe flint",
        **_MLP,
        router="mlp.gate",
        shared=("mlp.shared_expert", "mlp.shared_experts"),
        shared_gate="mlp.shared_expert_gate",
    ),
    _row(
        "qwen3_vl_moe",
        "qwen3_vl_moe qwen3_vl_moe_text",
        **_MLP,
        router="mlp.gate",
        fused_in_out=True,
    ),
    _row(
        "deepseek",
        "deepseek_v2 deepseek_v3 deepseek_v32 deepseek_ocr2 deepseek_ocr2_text deepseek_vl_v2 "
        "kimi_k2 kimi_k25 glm4_moe glm4_moe_lite glm4v_moe glm4v_moe_text glm_moe_dsa "
        "glm5_next glm5_next_text dots1 solar_open mistral4 mimo_v2_flash axk1 axk2 "
        "minimax_m3_vl_text exaone_moe hy_v4 beam dots3_note dots3_note_text unlimited_ocr "
        "unlimited_ocr_text",
        **_MLP,
        router="mlp.gate",
        correction_bias=(_GATE_BIAS, "mlp.e_score_correction_bias"),
        shared="mlp.shared_experts",
    ),
    _row(
        "bailing_hybrid",
        "bailing_hybrid",
        **_MLP,
        router="mlp.gate",
        correction_bias=("mlp.gate.expert_bias", _GATE_BIAS),
        shared="mlp.shared_experts",
    ),
    _row(
        "kolibri1",
        "kolibri1",
        **_MLP,
        router="mlp.gate",
        correction_bias=("moe.router.expert_bias", _GATE_BIAS),
        shared="mlp.shared_experts",
    ),
    _row(
        "mistral_large4",
        "mistral_large4 mistral_large4_text",
        **_experts("experts", "w1", "w3", "w2"),
        router="gate",
        shared="shared_experts",
    ),
    _row(
        "deepseek_v4",
        "deepseek_v4",
        **_mixtral_style("ffn"),
        router=_GATE.replace("mlp", "ffn"),
        correction_bias="ffn.gate.bias",
        hash_table="ffn.gate.tid2eid",
        shared="ffn.shared_experts",
    ),
    _row(
        "gpt_oss",
        "gpt_oss",
        **_MLP,
        router="mlp.router.weight",
        router_bias="mlp.router.bias",
        fused_in_out=True,
        interleaved=True,
    ),
    _row(
        "openai_privacy_filter",
        "openai_privacy_filter",
        gate_up="mlp.experts.gate_up_proj",
        down="mlp.experts.down_proj",
        router="mlp.router.weight",
        router_bias="mlp.router.bias",
        fused_in_out=True,
    ),
    _row(
        "llama4",
        "llama4 llama4_text",
        **_projections("feed_forward"),
        router="feed_forward.router",
        shared="feed_forward.shared_expert",
        fused_in_out=True,
    ),
    _row(
        "granitemoe",
        "granitemoe granitemoeshared granitemoehybrid granitemoe_swa",
        gate_up=("block_sparse_moe.input_linear", "block_sparse_moe.experts.gate_up_proj"),
        down=("block_sparse_moe.output_linear", "block_sparse_moe.experts.down_proj"),
        router="block_sparse_moe.router",
        shared="shared_mlp",
    ),
    _row("jamba", "jamba", **_projections("feed_forward"), router="feed_forward.router"),
    _row(
        "lfm2_moe",
        "lfm2_moe",
        **_mixtral_style("feed_forward"),
        router="feed_forward.gate",
        correction_bias="feed_forward.expert_bias",
    ),
    _row(
        "dbrx",
        "dbrx",
        gate="ffn.experts.mlp.w1",
        up="ffn.experts.mlp.v1",
        down="ffn.experts.mlp.w2",
        router="ffn.router.layer",
    ),
    _row(
        "jetmoe",
        "jetmoe",
        gate_up="mlp.input_linear",
        down="mlp.output_linear",
        router="mlp.router.layer",
    ),
    _row(
        "aria",
        "aria aria_text",
        gate_up="mlp.experts.fc1",
        down="mlp.experts.fc2",
        router="mlp.router",
        shared="mlp.shared_experts",
        fused_in_out=True,
    ),
    _row("hunyuan_v1_moe", "hunyuan_v1_moe", **_MLP, router="mlp.gate.wg", shared="mlp.shared_mlp"),
    _row(
        "hy_v3",
        "hy_v3",
        **_MLP,
        router=("mlp.router.gate", "mlp.gate"),
        correction_bias=("mlp.expert_bias", "mlp.e_score_correction_bias"),
        shared=("mlp.shared_mlp", "mlp.shared_experts"),
    ),
    _row(
        "ernie4_5_moe",
        "ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text",
        **_MLP,
        router=(_GATE, "mlp.gate.weight_1"),
        correction_bias=(
            "mlp.moe_statics.e_score_correction_bias",
            "mlp.gate.moe_statics.e_score_correction_bias",
        ),
        shared="mlp.shared_experts",
    ),
    _row(
        "nemotron_h",
        "nemotron_h",
        up=("mixer.experts.{e}.up_proj", "mixer.experts.up_proj"),
        down=("mixer.experts.{e}.down_proj", "mixer.experts.down_proj"),
        router="mixer.gate",
        correction_bias="mixer.gate.e_score_correction_bias",
        shared="mixer.shared_experts",
        latent=("mixer.fc1_latent_proj", "mixer.fc2_latent_proj"),
    ),
    _row(
        "longcat_flash",
        "longcat_flash",
        **_MLP,
        router="mlp.router.classifier",
        correction_bias="mlp.router.e_score_correction_bias",
    ),
    _row(
        "gemma4",
        "gemma4 gemma4_text diffusion_gemma diffusion_gemma_text",
        gate_up="experts.gate_up_proj",
        down="experts.down_proj",
        router="router.proj",
        router_scale="router.scale",
        per_expert_scale="router.per_expert_scale",
    ),
    _row(
        "afmoe",
        "afmoe",
        **_MLP,
        router="mlp.router.gate",
        correction_bias="mlp.expert_bias",
        shared="mlp.shared_experts",
    ),
    _row(
        "laguna",
        "laguna",
        **_MLP,
        router="mlp.gate",
        correction_bias=("mlp.experts.e_score_correction_bias", _GATE_BIAS),
        shared=("mlp.shared_expert", "mlp.shared_experts"),
    ),
    _row(
        "step3p7",
        "step3p7 step3p5",
        gate="moe.gate_proj",
        up="moe.up_proj",
        down="moe.down_proj",
        router="moe.gate.weight",
        correction_bias="moe.router_bias",
        shared="share_expert",
    ),
    _row(
        "inkling",
        "inkling_mm_model inkling2 inkling2_text",
        gate_up="mlp.experts.w13_weight",
        down="mlp.experts.w2_weight",
        router=_GATE,
        router_scale="mlp.gate.global_scale",
        correction_bias="mlp.gate.bias",
        shared="mlp.shared_experts",
        interleaved=True,
    ),
    _row(
        "inkling_text",
        "inkling_text",
        gate_up="mlp.experts.gate_up_proj",
        down="mlp.experts.down_proj",
        router=_GATE,
        router_scale="mlp.gate.global_scale",
        correction_bias=_GATE_BIAS,
        shared="mlp.shared_experts",
    ),
    _row(
        "zaya",
        "zaya",
        gate_up="mlp.experts.gate_up_proj",
        down="mlp.experts.down_proj",
        router=("mlp.gate.down_proj", "mlp.gate.router_mlp"),
        router_scale="mlp.gate.router_states_scale",
        correction_bias="mlp.gate.balancing_biases",
    ),
)
