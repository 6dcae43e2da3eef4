"""Checkpoint folders of tiny models, quantized in a dialect, and the same values as floats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from writers import CASES, Case, mxfp4

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


def write_with_one_scale(path: Path) -> Folders:
    """fp8 experts of a layer in one tensor with one scale for all, and each by itself (as
    ``floats``) with the same scale."""
    case, scale = CASES["fp8 per tensor by Transformers' names"], torch.tensor(2.0**-11)
    folder = write_folders(path, "tiny-qwen3-moe", case).packed
    single = {
        name: scale.clone() if ".experts." in name and not tensor.dim() else tensor
        for name, tensor in read_tensors(folder).items()
    }
    stacked = {name: tensor for name, tensor in single.items() if ".experts." not in name}
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([single[f"{base}.{e}.{name}.weight"] for e in range(4)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        for name, weight in (("gate_up_proj", torch.cat([gate, up], 1)), ("down_proj", down)):
            stacked |= {f"{base}.{name}": weight, f"{base}.{name}_scale_inv": scale.clone()}
            stacked[f"{base}.{name}_activation_scale"] = scale.clone()
    return Folders(
        write_folder(path / "stacked", folder, stacked, quantization_config=case.config),
        write_folder(path / "single", folder, single, quantization_config=case.config),
    )
