"""A tiny randomly initialised model of every Mixture-of-Experts family of Transformers, as data.

One row per experts class. Each builds in milliseconds, runs in fp32 on a CPU and generates where
the family can; weights are large enough that a wrong expert changes every logit, routers are far
from ties, and the biases that only steer the selection are random.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

VOCAB = 96
EXPERTS = 6
TOP_K = 2

# Offered to every text config, which takes the keys it has fields for.
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_k": TOP_K,
    "moe_topk": TOP_K,
    "top_k_experts": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "mlp_layer_types": ["sparse", "sparse"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "sliding_window": 16,
}

# Multi-head latent attention: every head has its own key and value.
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
}
GROUPED = {"n_group": 3, "topk_group": 2}
SPARSE_ATTENTION = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "mrope_section": [1, 1, 2],
    }
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 8,
    "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0],
    "projection_intermediate_size": 16,
}
AUDIO = {
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "downsample_hidden_size": 8,
}
OCR_VISION = {
    "sam_config": {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "global_attn_indexes": [0],
        "downsample_channels": [8, 32],
    },
    "encoder_config": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
GEMMA_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 16,
}
STEP_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
# Past the vocabulary, so that no text token is taken for an image.
IMAGE_TOKENS = {
    "image_token_id": VOCAB + 1,
    "video_token_id": VOCAB + 2,
    "vision_start_token_id": VOCAB + 3,
}
NLLB = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
SWITCH = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """One row: which class, and what its config needs beyond ``COMMON``.

    ``family`` is the folder under ``transformers.models``, ``experts_class`` the module the row is
    there for. ``config`` belongs to the text config, which sits at ``text_at`` in the model's
    config (``""``: it is the model's config); ``outer`` are the keys beside it. ``cannot_generate``
    says why logits are all that can be compared.
    """

    family: str
    model_class: str
    experts_class: str
    decorated: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    text_at: str = ""
    outer: Mapping[str, Any] = field(default_factory=dict)
    inputs: str = "tokens"
    cannot_generate: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.family)

    @property
    def module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.family}.modeling_{self.family}")

    def make_config(self) -> Any:
        """A fresh config object of the row's model."""
        config_class = getattr(self.module, self.model_class).config_class
        text_class = config_class.sub_configs[self.text_at] if self.text_at else config_class
        known = {f.name for f in dataclasses.fields(text_class)}
        text = {key: value for key, value in COMMON.items() if key in known} | dict(self.config)
        return config_class(**({self.text_at: text} | dict(self.outer) if self.text_at else text))


def build(row: TinyModel, experts_implementation: str | None = "eager", seed: int = 0) -> Any:
    """The row's model in eval mode, fp32, on the CPU; the same weights for the same seed.

    ``experts_implementation`` reaches decorated families only.
    """
    model_class = getattr(row.module, row.model_class)
    chosen = {"experts_implementation": experts_implementation} if row.decorated else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(row.make_config(), dtype=torch.float32, **chosen)
        _randomise(model)
    return model.eval()


SELECTION_BIAS = re.compile(r"(correction_bias|expert_bias|balancing_biases|router_bias)$")


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Weights of size 1 / sqrt(fan in) and more, vectors moved off their constants."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=1.5 * min(parameter.shape[-2:]) ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for name, buffer in model.named_buffers():
        if SELECTION_BIAS.search(name):
            buffer.normal_(std=0.1)
        elif name.endswith("tid2eid"):
            ids = [torch.randperm(EXPERTS)[: buffer.shape[1]] for _ in range(buffer.shape[0])]
            buffer.copy_(torch.stack(ids))
    model.tie_weights()


def token_ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    """int64 [rows, length], away from the special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def _text(model: Any) -> dict[str, torch.Tensor]:
    ids = token_ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _encoder_decoder(model: Any) -> dict[str, torch.Tensor]:
    return _text(model) | {"decoder_input_ids": token_ids(2, 5)}


def _canvas(model: Any) -> dict[str, torch.Tensor]:
    return _text(model) | {"decoder_input_ids": token_ids(2, model.config.canvas_length)}


def _embeddings(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"inputs_embeds": torch.randn(2, 9, model.config.hidden_size, generator=generator)}


def _two_kinds(model: Any) -> dict[str, torch.Tensor]:
    """Some tokens go to the vision experts, without any image."""
    inputs = _text(model)
    return inputs | {"moe_mm_token_type_ids": (inputs["input_ids"] % 3 == 0).int()}


INPUTS: Mapping[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "tokens": _text,
    "encoder_decoder": _encoder_decoder,
    "canvas": _canvas,
    "embeddings": _embeddings,
    "two_kinds": _two_kinds,
}


@torch.no_grad()
def logits(row: TinyModel, model: Any) -> torch.Tensor:
    """fp32 logits [B, S, vocab] of the example input; the last hidden state of a bare model."""
    outputs = model(**INPUTS[row.inputs](model))
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


@torch.no_grad()
def greedy_tokens(row: TinyModel, model: Any, new_tokens: int = 32) -> torch.Tensor:
    """int64 [B, S + new_tokens]; the row must be able to generate."""
    inputs = _text(model)
    return model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )


@functools.cache
def by_name(name: str) -> TinyModel:
    return next(row for row in ROWS if row.name == name)


@functools.cache
def eager_results(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Transformers' own logits and 32 greedy tokens of a row (None where it cannot generate)."""
    row = by_name(name)
    model = build(row)
    return logits(row, model), None if row.cannot_generate else greedy_tokens(row, model)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference, in units of the largest wanted value; NaN counts as infinite."""
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    return float("inf") if error != error else error


def _causal(family: str, prefix: str, experts_class: str = "", **config: Any) -> TinyModel:
    """The usual case: ``<prefix>ForCausalLM`` with ``<prefix>Experts``."""
    return TinyModel(
        family=family,
        model_class=f"{prefix}ForCausalLM",
        experts_class=experts_class or f"{prefix}Experts",
        config=config,
    )


def _knows_implementations(family: str) -> bool:
    """Whether this release of Transformers has decorated the family's experts."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return "use_experts_implementation" in vars(module)


def _undecorated(family: str, model_class: str, experts_class: str, **config: Any) -> TinyModel:
    """A family whose experts know nothing of ``experts_implementation``, or did not always."""
    encoder_decoder = "ConditionalGeneration" in model_class
    return TinyModel(
        family=family,
        model_class=model_class,
        experts_class=experts_class,
        decorated=_knows_implementations(family),
        config=config,
        inputs="encoder_decoder" if encoder_decoder else "tokens",
    )


_ALWAYS_DECORATED: tuple[TinyModel, ...] = (
    _causal("afmoe", "Afmoe"),
    _causal("axk1", "AXK1", **MLA),
    _causal("axk2", "AXK2", **MLA, **SPARSE_ATTENTION),
    _causal("cohere2_moe", "Cohere2Moe", logit_scale=1.0),
    TinyModel(
        family="deepseek_ocr2",
        model_class="DeepseekOcr2ForConditionalGeneration",
        experts_class="DeepseekOcr2TextExperts",
        text_at="text_config",
        outer={"vision_config": OCR_VISION},
    ),
    _causal("deepseek_v2", "DeepseekV2", **MLA),
    _causal("deepseek_v3", "DeepseekV3", **MLA, **GROUPED),
    _causal("deepseek_v32", "DeepseekV32", **MLA, **SPARSE_ATTENTION),
    _causal(
        "deepseek_v4",
        "DeepseekV4",
        **SPARSE_ATTENTION,
        mlp_layer_types=["hash_moe", "moe"],
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        o_groups=2,
        o_lora_rank=16,
        hc_mult=2,
        swiglu_limit=1.5,
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rate_hca=8,
    ),
    TinyModel(
        family="diffusion_gemma",
        model_class="DiffusionGemmaForBlockDiffusion",
        experts_class="DiffusionGemmaTextExperts",
        text_at="text_config",
        config={"global_head_dim": 8, "final_logit_softcapping": 30.0},
        outer={"canvas_length": 6, "vision_config": GEMMA_VISION},
        inputs="canvas",
        cannot_generate="block diffusion samples a canvas at random; it has no greedy tokens",
    ),
    _causal("dots1", "Dots1"),
    _causal("ernie4_5_moe", "Ernie4_5_Moe", moe_layer_start_index=0),
    TinyModel(
        family="ernie4_5_vl_moe",
        model_class="Ernie4_5_VLMoeForConditionalGeneration",
        experts_class="Ernie4_5_VLMoeMoeExperts",
        text_at="text_config",
        config={"moe_intermediate_size": [24, 16]} | MROPE,
        inputs="two_kinds",
        outer={"vision_config": VISION} | IMAGE_TOKENS,
    ),
    _causal("exaone_moe", "ExaoneMoe"),
    _causal("flex_olmo", "FlexOlmo"),
    _causal(
        "gemma4",
        "Gemma4",
        experts_class="Gemma4TextExperts",
        enable_moe_block=True,
        global_head_dim=8,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
    ),
    _causal("glm4_moe", "Glm4Moe"),
    _causal("glm4_moe_lite", "Glm4MoeLite", **MLA),
    TinyModel(
        family="glm4v_moe",
        model_class="Glm4vMoeForConditionalGeneration",
        experts_class="Glm4vMoeTextExperts",
        text_at="text_config",
        config=MROPE,
        outer={"vision_config": VISION} | IMAGE_TOKENS,
    ),
    TinyModel(
        family="glm5_next",
        model_class="Glm5NextForConditionalGeneration",
        experts_class="Glm5NextTextExperts",
        text_at="text_config",
        config=MLA
        | SPARSE_ATTENTION
        | {
            "qk_rope_head_dim": 0,
            "index_kpool": 2,
            "layer_types": ["linear_attention", "deepseek_sparse_attention"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "hc_mult": 2,
            "swiglu_limit": 1.5,
        },
        outer={"vision_config": VISION} | IMAGE_TOKENS,
    ),
    _causal("glm_moe_dsa", "GlmMoeDsa", **MLA, **SPARSE_ATTENTION),
    _causal("gpt_oss", "GptOss"),
    _causal("granitemoe", "GraniteMoe"),
    _causal("granitemoe_swa", "GraniteMoeSWA"),
    _causal("granitemoehybrid", "GraniteMoeHybrid", **LINEAR_THEN_FULL, **MAMBA),
    _causal("granitemoeshared", "GraniteMoeShared"),
    _causal("hunyuan_v1_moe", "HunYuanMoEV1"),
    _causal("hy_v3", "HYV3"),
    _causal("hy_v4", "HYV4", **MLA, **SPARSE_ATTENTION, hc_mult=2, swiglu_limit=1.5),
    _causal(
        "inkling",
        "Inkling",
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=16,
        d_rel=4,
        rel_extent=16,
        logits_mup_width_multiplier=1.0,
        local_layer_ids=[0],
    ),
    _causal(
        "jamba",
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=1,
        expert_layer_offset=0,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
    _causal(
        "kimi_linear",
        "KimiLinear",
        **MLA,
        **LINEAR_THEN_FULL,
        linear_head_dim=8,
        linear_num_heads=4,
    ),
    _causal("laguna", "Laguna"),
    _causal("lfm2_moe", "Lfm2Moe", layer_types=["conv", "full_attention"]),
    _causal("mellum", "Mellum"),
    _causal("mimo_v2_flash", "MiMoV2Flash"),
    _causal("minimax", "MiniMax"),
    _causal("minimax_m2", "MiniMaxM2"),
    _causal("minimax_m3_vl", "MiniMaxM3VL", swiglu_limit=1.5),
    _causal("mistral4", "Mistral4", **MLA),
    _causal("mixtral", "Mixtral"),
    _causal(
        "nemotron_h",
        "NemotronH",
        layers_block_type=["mamba", "moe", "attention", "moe"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        moe_shared_expert_intermediate_size=24,
        moe_latent_size=16,
    ),
    _causal("olmoe", "Olmoe"),
    TinyModel(
        family="openai_privacy_filter",
        model_class="OpenAIPrivacyFilterForTokenClassification",
        experts_class="OpenAIPrivacyFilterExperts",
        cannot_generate="a bidirectional token classifier",
    ),
    _causal("phimoe", "Phimoe"),
    _causal("qwen2_moe", "Qwen2Moe"),
    _causal("qwen3_5_moe", "Qwen3_5Moe", **LINEAR_THEN_FULL),
    _causal("qwen3_moe", "Qwen3Moe"),
    _causal("qwen3_next", "Qwen3Next", **LINEAR_THEN_FULL),
    TinyModel(
        family="qwen3_omni_moe",
        name="qwen3_omni_moe_thinker",
        model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
        experts_class="Qwen3OmniMoeThinkerTextExperts",
        text_at="text_config",
        config=MROPE,
        outer={"vision_config": VISION, "audio_config": AUDIO, "audio_token_id": VOCAB + 9}
        | IMAGE_TOKENS,
    ),
    TinyModel(
        family="qwen3_omni_moe",
        name="qwen3_omni_moe_talker",
        model_class="Qwen3OmniMoeTalkerModel",
        experts_class="Qwen3OmniMoeTalkerTextExperts",
        config=MROPE | {"shared_expert_intermediate_size": 24},
        inputs="embeddings",
        cannot_generate="the talker speaks only inside the whole speech pipeline",
    ),
    TinyModel(
        family="qwen3_vl_moe",
        model_class="Qwen3VLMoeForConditionalGeneration",
        experts_class="Qwen3VLMoeTextExperts",
        text_at="text_config",
        config=MROPE,
        outer={"vision_config": VISION} | IMAGE_TOKENS,
    ),
    _causal(
        "qwen4_exp",
        "Qwen4Exp",
        experts_class="Qwen4ExpTextExperts",
        layer_types=["linear_attention", "qwen_sparse_attention"],
        hc_count=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=4,
        indexer_compress_ratio=2,
        hc_lowrank=8,
    ),
    _causal("solar_open", "SolarOpen"),
    _causal("zaya", "Zaya", num_experts_per_tok=1, router_hidden_size=16),
)

_NOT_ALWAYS: tuple[TinyModel, ...] = (
    _undecorated("aria", "AriaTextForCausalLM", "AriaExperts"),
    _undecorated(
        "dbrx",
        "DbrxForCausalLM",
        "DbrxExperts",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
    ),
    _undecorated("jetmoe", "JetMoeForCausalLM", "JetMoeMoE", kv_channels=8),
    _undecorated(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextExperts",
        num_experts_per_tok=1,
        intermediate_size_mlp=40,
    ),
    _undecorated(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        "LongcatFlashExperts",
        **MLA,
        num_layers=2,
        ffn_hidden_size=40,
        expert_ffn_hidden_size=24,
        zero_expert_num=2,
    ),
    _undecorated(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        "NllbMoeExperts",
        **NLLB,
    ),
    TinyModel(
        family="step3p7",
        model_class="Step3p7ForConditionalGeneration",
        experts_class="Step3p7Experts",
        decorated=False,
        text_at="text_config",
        config={
            "share_expert_dim": 24,
            "swiglu_limits": [1.5, None],
            "swiglu_limits_shared": [None, 1.5],
        },
        outer={"vision_config": STEP_VISION, "image_token_id": VOCAB + 1},
    ),
    _undecorated(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersExperts",
        **SWITCH,
    ),
)
# Families that Transformers has had since 5.18 or later.
_NEWER: tuple[TinyModel, ...] = (
    _causal(
        "bailing_hybrid",
        "BailingHybrid",
        **MLA,
        **GROUPED,
        **LINEAR_THEN_FULL,
    ),
    _causal("beam", "Beam", **GROUPED),
    _causal("dots3_note", "Dots3Note", "Dots3NoteExperts", **MLA),
    _causal("flint", "Flint", mlp_only_layers=[]),
    _causal(
        "inkling2",
        "Inkling2",
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=16,
        d_rel=4,
        rel_extent=16,
    ),
    _causal("kolibri1", "Kolibri1"),
    TinyModel(
        family="mistral_large4",
        model_class="MistralLarge4ForConditionalGeneration",
        experts_class="MistralLarge4TextExperts",
        text_at="text_config",
        config=MLA | GROUPED,
    ),
    TinyModel(
        family="muse_spark",
        model_class="MuseSparkTextModel",
        experts_class="MuseSparkExperts",
        config={"moe_hidden_size": 32},
        cannot_generate="a bare text model",
    ),
    TinyModel(
        family="unlimited_ocr",
        model_class="UnlimitedOcrForConditionalGeneration",
        experts_class="UnlimitedOcrTextExperts",
        text_at="text_config",
        outer={"vision_config": OCR_VISION},
    ),
)

ROWS = (
    _ALWAYS_DECORATED
    + _NOT_ALWAYS
    + tuple(row for row in _NEWER if find_spec(f"transformers.models.{row.family}"))
)
DECORATED = tuple(row for row in ROWS if row.decorated)
UNDECORATED = tuple(row for row in ROWS if not row.decorated)
