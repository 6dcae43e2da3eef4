"""Small random checkpoints of real architectures, written in the real on-disk format.

A preset is a Transformers configuration: its folder holds config.json, sharded safetensors under
the family's published tensor names, and a tokenizer made here, so nothing is downloaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 448
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
BIAS_SCALE = 0.1
_RECORD = "fusedmoe_preset.json"

# What the tokenizer's merges are learnt from: enough English for generated text to look like text.
_CORPUS = (
    "A mixture of experts sends each token to a few experts out of many. The router scores the "
    "experts, the best few are chosen, and their outputs are weighted and added together. ",
    "Only the weights of the chosen experts are read, so a large model costs what a small one "
    "does for every token it writes, as long as those weights arrive in time. ",
    "Prepare the rows, run the two matrix products with the activation between them, and finalize "
    "the sum: this is the whole layer, and everything else is moving numbers about. ",
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One architecture at one size; a ``large`` one writes gigabytes, and only if asked to."""

    name: str
    model_type: str
    about: str
    config: dict[str, Any] = field(default_factory=dict)
    large: bool = False


_TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Wide enough that the logits of a random model are far apart, as a trained model's are.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}

_PRESETS = (
    Preset(
        name="tiny-mixtral",
        model_type="mixtral",
        about="8 experts, top-2, softmax over the chosen",
        config=_TINY | {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    Preset(
        name="tiny-qwen3-moe",
        model_type="qwen3_moe",
        about="16 small experts, top-4, renormalized softmax",
        config=_TINY
        | {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    Preset(
        name="tiny-deepseek-v3",
        model_type="deepseek_v3",
        about="sigmoid scores, correction bias, groups, a shared expert, one dense layer",
        config=_TINY
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    Preset(
        name="tiny-gpt-oss",
        model_type="gpt_oss",
        about="biases, the clamped interleaved activation, transposed weights",
        config=_TINY
        | {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
    ),
    Preset(
        name="tiny-olmoe",
        model_type="olmoe",
        about="16 experts, top-4, softmax without renormalizing",
        config=_TINY | {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 32},
    ),
    Preset(
        name="qwen3-30b-layer",
        model_type="qwen3_moe",
        about="one layer at the sizes of Qwen3-30B-A3B: 128 experts, top-8, 2048 x 768",
        large=True,
        config=_TINY
        | {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 1,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "initializer_range": 0.03,
            "dtype": "bfloat16",
        },
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _PRESETS}


def find_preset(name: str) -> Preset:
    """The preset called ``name``; ValueError lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_config(name: str, **overrides: Any) -> Any:
    """The Transformers configuration of a preset, fields of ``overrides`` replaced."""
    from transformers import CONFIG_MAPPING

    preset = find_preset(name)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return CONFIG_MAPPING[preset.model_type](**(preset.config | tokens | overrides))


def write_preset(name: str, folder: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Write the checkpoint of a preset into ``folder`` (made if missing) and return it.

    The same name, seed and overrides write the same numbers: a folder that has them already is left
    as it is, any other that is not empty is a ValueError. The caller's random state is kept.
    """
    from transformers import AutoModelForCausalLM

    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"a seed has 64 bits, got {seed}")
    folder = Path(folder)
    written = folder / _RECORD
    record = json.dumps({"preset": name, "seed": seed} | overrides, default=str)
    if written.is_file() and written.read_text() == record:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; a preset needs its own")
    config = preset_config(name, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        for key, tensor in model.state_dict().items():
            if key.endswith("bias"):
                # Transformers starts biases at zero, which would leave their path untested.
                tensor.normal_(0.0, BIAS_SCALE)
    model.save_pretrained(folder, max_shard_size="2GB" if PRESETS[name].large else "200KB")
    make_tokenizer().save_pretrained(folder)
    written.write_text(record)
    return folder


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of ``VOCABULARY`` tokens: any text goes in and comes back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )
