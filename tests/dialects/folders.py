"""Checkpoint folders of tiny models, quantized in a dialect, and the same values as floats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from writers import Case, mxfp4

from fusedmoe.presets import write_preset

SIZES: dict[str, dict[str, Any]] = {
    "tiny-mixtral": {"intermediate_size": 64, "num_local_experts": 4},
    "tiny-qwen3-moe": {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "tiny-olmoe": {"intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "tiny-deepseek-v3": {
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_hidden_layers": 2,
    },
    "tiny-gpt-oss": {"num_local_experts": 4},
}
_EXPERT = re.compile(r".*\.experts\.\d+\.\w+\.weight")
_LINEAR = re.compile(r".*\.self_attn\.[qkvo]_proj\.weight")


class Folders(NamedTuple):
    """``packed`` and ``floats`` stand for the same numbers."""

    packed: Path
    floats: Path


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def write_folder(folder: Path, like: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """One file of ``tensors``, and the configuration and tokenizer of ``like``."""
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    for file in like.glob("*.json"):
        if file.name not in ("model.safetensors.index.json", "config.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    known = json.loads((like / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


def write_folders(
    path: Path, preset: str, case: Case, *, linear_too: bool = False, **overrides: Any
) -> Folders:
    """A preset's experts (``linear_too``: its attention as well) in the dialect of ``case``."""
    sizes = SIZES[preset] | {"initializer_range": 0.08, "dtype": "float32"} | overrides
    plain = write_preset(preset, path / "plain", **sizes)
    packed: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(plain).items():
        if _EXPERT.fullmatch(name) or (linear_too and _LINEAR.fullmatch(name)):
            stored = case.write(tensor)
            floats[name] = stored.values
            base = name.removesuffix("weight")
            packed |= {base + suffix: part for suffix, part in stored.tensors.items()}
        else:
            packed[name] = floats[name] = tensor
    return Folders(
        write_folder(path / "packed", plain, packed, quantization_config=case.config),
        write_folder(path / "floats", plain, floats),
    )


def write_gpt_oss(path: Path) -> Folders:
    """gpt-oss in its own form: all experts in one tensor, gate and up in alternate rows."""
    plain = write_preset("tiny-gpt-oss", path / "plain", **SIZES["tiny-gpt-oss"], dtype="float32")
    packed: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(plain).items():
        if not re.fullmatch(r".*\.experts\.(gate_up|down)_proj", name):
            packed[name] = floats[name] = tensor
            continue
        stored = [mxfp4(expert.T) for expert in tensor]  # in the files [E, K, N]
        floats[name] = torch.stack([one.values.T for one in stored])
        blocks = torch.stack([one.tensors["weight"] for one in stored])
        packed[f"{name}_blocks"] = blocks.unflatten(-1, (-1, 16))
        packed[f"{name}_scales"] = torch.stack([one.tensors["weight_scale"] for one in stored])
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return Folders(
        write_folder(path / "packed", plain, packed, quantization_config=config),
        write_folder(path / "floats", plain, floats),
    )
