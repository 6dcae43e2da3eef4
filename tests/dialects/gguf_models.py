"""Tiny models of Transformers as GGUF files, in the names and the order of llama.cpp's converter.

Names of tensors and keys are those that the gguf package publishes for an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_files import quantized, write_gguf

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
Stored = Iterable[tuple[str, torch.Tensor]]
Change = Callable[[Any, str, torch.Tensor], Stored]  # from (config, name, tensor)


def as_it_is(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    yield name, tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """``change`` is what the converter does to a tensor of the original, under names of that.

    ``keys`` are those beside what every converter writes, by the package's names for them;
    ``named`` are tensors that its map has no name for, by the end of their own. Experts of the
    original are [E, in, out] where ``transposed``, their gate and up rows ``alternating``; those of
    the file are one tensor where ``fused``. ``composite`` originals can see.
    ``plain`` tensors of a layer stay fp32.
    """

    architecture: str
    model_type: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    change: Change = as_it_is
    transposed: bool = False
    alternating: bool = False
    fused: bool = False
    composite: bool = False
    plain: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.architecture

    def model(self) -> Any:
        """With random weights everywhere, biases and norms too."""
        import transformers

        sizes, auto = {**SIZES, **self.sizes}, transformers.AutoModelForCausalLM
        if self.composite:
            sizes = {"text_config": sizes, "vision_config": VISION, "tie_word_embeddings": False}
            auto = transformers.AutoModelForImageTextToText
        config = transformers.CONFIG_MAPPING[self.model_type](**sizes)
        torch.manual_seed(1)
        model = auto.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
        for name, tensor in model.state_dict().items():
            spread = 0.3 if tensor.dim() < 2 or "bias" in name else 0.15
            tensor.normal_(1.0 if "norm" in name and tensor.dim() < 2 else 0.0, spread)
        return model


def pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head's two halves, in turns."""
    first, second = rows.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.stack([first, second], 2).flatten(0, 2)


def write_model(path: Path, case: Case, model: Any, dense: str, experts: str) -> Path:
    tensors = file_tensors(case, model, dense, experts)
    keys = all_keys(case, model.config)
    return write_gguf(path, tensors, architecture=case.architecture, **keys)


def file_tensors(
    case: Case, model: Any, dense: str, experts: str
) -> dict[str, tuple[np.ndarray, str]]:
    """The model's matrices get the values that the file has: ``dense`` ones, and ``experts``."""
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    config = model.config.get_text_config()
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in name and "visual" not in name:
            kind, change = experts, split_experts
        else:
            is_linear = tensor.dim() == 2 and "proj" in name
            kind, change = dense if is_linear else "F32", case.change
        if not name.endswith("bias"):
            stored = tensor.mT if change is split_experts and case.transposed else tensor
            stored.copy_(values_of(packed(stored, kind), stored.shape))
        for below, part in change(case if change is split_experts else config, name, tensor):
            short = file_name(case, below, config)
            plain = part.dim() < 2 or short.endswith("bias") or short.split(".")[-2] in case.plain
            tensors[short] = packed(part, "F32" if plain else kind)
    return tensors


def packed(tensor: torch.Tensor, kind: str) -> tuple[np.ndarray, str]:
    """As the package quantizes it: what it has rounded already keeps its values."""
    array = tensor.detach().float().contiguous().numpy()
    if kind in ("F32", "F16"):
        return array.astype(np.dtype({"F32": "f4", "F16": "f2"}[kind])), kind
    raw = quantized(array.reshape(-1, array.shape[-1]), kind)
    return raw.reshape(*array.shape[:-1], -1), kind


def values_of(stored: tuple[np.ndarray, str], shape: torch.Size) -> torch.Tensor:
    import gguf

    raw, kind = stored
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(values)).view(shape)


def split_experts(case: Case, name: str, tensor: torch.Tensor) -> Stored:
    """Gate and up apart, output features before input features."""
    stem, _, last = name.replace("language_model.", "").rpartition("experts.")
    part, is_bias, _ = last.partition("_bias")
    suffix = "bias" if is_bias else "weight"
    if case.transposed and not is_bias:
        tensor = tensor.mT
    if part in ("up_proj", "down_proj") or case.fused:
        yield f"{stem}experts.{part}.{suffix}", tensor
        return
    halves = (tensor[:, ::2], tensor[:, 1::2]) if case.alternating else tensor.chunk(2, dim=1)
    for half, found in zip(("gate", "up"), halves, strict=True):
        yield f"{stem}experts.{half}_proj.{suffix}", found


def file_name(case: Case, name: str, config: Any) -> str:
    """What the package calls a tensor of the original in this architecture."""
    import gguf

    architecture = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[case.architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers + 1)
    for end, short in case.named.items():
        if name.endswith(end):
            return f"blk.{name.split('.')[2]}.{short}"
    found = names.get_name(name.replace("correction_bias", "correction.bias"), (".weight", ".bias"))
    assert found is not None or name.startswith("rope_f"), name
    return found or name


def all_keys(case: Case, config: Any) -> dict[str, Any]:
    """The header: what every converter writes, and what this one does."""
    from gguf.constants import Keys

    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    names = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon")
    epsilon = next(getattr(config, name) for name in names if hasattr(config, name))
    common = {
        Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        Keys.LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        Keys.LLM.FEED_FORWARD_LENGTH: getattr(config, "intermediate_size", None),
        Keys.LLM.EXPERT_USED_COUNT: SIZES["num_experts_per_tok"],
        Keys.Attention.HEAD_COUNT: config.num_attention_heads,
        Keys.Attention.HEAD_COUNT_KV: {**SIZES, **case.sizes}["num_key_value_heads"],
        Keys.Attention.LAYERNORM_RMS_EPS: float(epsilon),
        Keys.Rope.FREQ_BASE: float(rope.get("rope_theta", 0)),
    }
    found = {**common, **{resolved(key): value for key, value in case.keys.items()}}
    return {
        key.format(arch=case.architecture).replace(".", "__"): value
        for key, value in found.items()
        if value is not None
    }


def resolved(path: str) -> str:
    """``LLM.EXPERT_COUNT`` as the package spells it."""
    from gguf.constants import Keys

    found: Any = Keys
    for part in path.split("."):
        found = getattr(found, part)
    return str(found)
