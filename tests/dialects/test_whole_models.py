"""A whole tiny model in every dialect: its logits and tokens are those of the dequantized model."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import (
    read_tensors,
    write_folder,
    write_folders,
    write_gpt_oss,
    write_with_one_scale,
)
from safetensors.torch import save_file
from writers import CASES, packed_integers

import fusedmoe
from fusedmoe.checkpoint import CheckpointError, read_checkpoint
from fusedmoe.cli import main
from fusedmoe.integrations.transformers.packed import PackedExperts
from fusedmoe.quantization import keys
from fusedmoe.weights.checkpoint_experts import CheckpointExperts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

PRESETS = ("tiny-qwen3-moe", "tiny-mixtral", "tiny-deepseek-v3", "tiny-olmoe")
REFERENCE = fusedmoe.MoEOptions(experts="torch_quantized")
PROMPT = torch.tensor([[1, 40, 77, 300, 12, 9, 211, 5]])
# Relative error of the logits where activations are quantized too.
ROUNDED = {"fp8": 0.08, "int8": 0.08, "mxfp4": 0.2, "nvfp4": 0.2, "mxfp8": 0.08}


def eager(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager", dtype=torch.float32
    ).eval()


@torch.inference_mode()
def compare(packed: Any, floats: Any, tolerance: float) -> None:
    ours, wanted = packed(PROMPT).logits, floats(PROMPT).logits
    assert ours.isfinite().all()
    error = float((ours - wanted).norm() / wanted.norm())
    assert error <= tolerance, error
    if tolerance < 1e-3:
        tokens = [
            model.generate(PROMPT, max_new_tokens=6, do_sample=False) for model in (packed, floats)
        ]
        assert torch.equal(*tokens)


def tolerance_of(model: Any) -> float:
    scheme = next(m.schemes for m in model.modules() if isinstance(m, PackedExperts))
    if scheme.activation is None:
        return 1e-5
    name = str(scheme.activation)
    return next(value for key, value in ROUNDED.items() if key in name.replace("float8", "fp8"))


@pytest.mark.parametrize("name", CASES)
def test_a_model_in_every_dialect(name: str, tmp_path: Path) -> None:
    index = list(CASES).index(name)
    preset, case = PRESETS[index % len(PRESETS)], CASES[name]
    linear_too = case.config["quant_method"] in ("gptq", "awq", "bitsandbytes")
    folders = write_folders(tmp_path, preset, case, linear_too=linear_too)
    model = fusedmoe.from_pretrained(folders.packed, options=REFERENCE)
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert packed
    assert {module.schemes.name for module in packed} == {case.format}
    compare(model, eager(folders.floats), tolerance_of(model))


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", ["deepseek", "ct w4a16 zero points", "awq", "quark mxfp6"])
def test_a_loaded_model_survives_a_pickle(name: str, accelerated: bool, tmp_path: Path) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES[name]).packed
    model = fusedmoe.from_pretrained(folder, options=REFERENCE)
    if accelerated:
        fusedmoe.accelerate(model)
    with torch.inference_mode():
        wanted = model(PROMPT).logits
    torch.save(model, tmp_path / "model")
    again = torch.load(tmp_path / "model", weights_only=False)
    with torch.inference_mode():
        assert torch.equal(again(PROMPT).logits, wanted)


def test_down_projections_may_have_a_format_of_their_own(tmp_path: Path) -> None:
    """And scales of a dtype of their own, which are not rounded to the others'."""
    four, eight = CASES["ct w4a16"], CASES["ct w8a16"]
    eight = replace(eight, write=packed_integers(8, -1, dtype=torch.float32))
    folders = write_folders(tmp_path, "tiny-qwen3-moe", four)
    group = eight.config["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"]}
    config = four.config | {"config_groups": four.config["config_groups"] | {"group_1": group}}
    tensors, floats = read_tensors(folders.packed), read_tensors(folders.floats)
    for name in [name for name in floats if name.endswith("down_proj.weight")]:
        stored, base = eight.write(floats[name]), name.removesuffix("weight")
        floats[name] = stored.values
        tensors |= {base + suffix: tensor for suffix, tensor in stored.tensors.items()}
    packed = write_folder(tmp_path / "mixed", folders.packed, tensors, quantization_config=config)
    model = fusedmoe.from_pretrained(packed, options=REFERENCE)
    schemes = model.model.layers[0].mlp.experts.schemes
    assert schemes.name == "int4_g32 + int8_channel"
    compare(
        model,
        eager(write_folder(tmp_path / "values", folders.packed, floats, quantization_config=None)),
        1e-5,
    )


def test_gpt_oss_in_its_own_form(tmp_path: Path) -> None:
    folders = write_gpt_oss(tmp_path)
    floats = eager(folders.floats)
    compare(fusedmoe.from_pretrained(folders.packed, options=REFERENCE), floats, 1e-5)
    compare(fusedmoe.from_pretrained(folders.packed), floats, 1e-2)


def test_experts_stay_at_their_size(tmp_path: Path) -> None:
    folders = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"])
    model = fusedmoe.from_pretrained(folders.packed)
    stored = sum(
        tensor.nbytes
        for name, tensor in read_tensors(folders.packed).items()
        if ".experts." in name and not name.endswith(("qzeros", "g_idx"))
    )
    held = sum(
        parameter.nbytes
        for module in model.modules()
        if isinstance(module, PackedExperts)
        for parameter in module.parameters()
    )
    assert held == stored


def test_layers_left_out_are_floats_and_unquantized_checkpoints_load(tmp_path: Path) -> None:
    case = CASES["awq"]
    folders = write_folders(tmp_path, "tiny-qwen3-moe", case)
    tensors = {
        name: tensor
        for name, tensor in read_tensors(folders.packed).items()
        if "layers.1.mlp.experts" not in name
    } | {
        name: tensor
        for name, tensor in read_tensors(folders.floats).items()
        if "layers.1.mlp.experts" in name
    }
    config = case.config | {"modules_to_not_convert": ["model.layers.1.mlp.experts"]}
    mixed = write_folder(tmp_path / "mixed", folders.packed, tensors, quantization_config=config)
    floats = eager(folders.floats)
    compare(fusedmoe.from_pretrained(mixed), floats, 1e-2)
    plain = fusedmoe.from_pretrained(folders.floats)
    assert set(plain.get_experts_implementation().values()) == {"fusedmoe"}
    compare(plain, floats, 1e-5)


LEAVE_OUT: dict[str, dict[str, Any]] = {
    "ct w4a16": {"ignore": ["lm_head", "re:.*experts.*", "re:.*mlp\\.gate$"]},
    "ct fp8 channel": {"ignore": ["lm_head", "re:.*experts.*", "re:.*mlp\\.gate$"]},
    "bitsandbytes nf4": {"llm_int8_skip_modules": ["lm_head", "experts"]},
    "bitsandbytes nf4 plain": {"llm_int8_skip_modules": ["lm_head", "experts"]},
    "gptq v2 zero points": {"modules_to_not_convert": ["experts"]},
    "fp8 per tensor by Transformers' names": {"modules_to_not_convert": ["experts", "gate"]},
    "modelopt nvfp4": {"exclude_modules": ["lm_head", "*experts*", "*mlp.gate"]},
}


@pytest.mark.parametrize("name", LEAVE_OUT)
def test_experts_may_be_floats_where_attention_is_packed(name: str, tmp_path: Path) -> None:
    """As where a quantizer passes over experts in one tensor."""
    case = CASES[name]
    folders = write_folders(tmp_path, "tiny-qwen3-moe", case, linear_too=True)
    tensors = {
        key: tensor
        for folder, of_experts in zip(folders, (False, True), strict=True)
        for key, tensor in read_tensors(folder).items()
        if (".experts." in key) == of_experts
    }
    config = case.config | LEAVE_OUT[name]
    packed = write_folder(tmp_path / "half", folders.packed, tensors, quantization_config=config)
    compare(fusedmoe.from_pretrained(packed), eager(folders.floats), 1e-5)
    rounded = fusedmoe.from_pretrained(packed, quantize="int8")
    assert rounded.model.layers[0].mlp.experts.schemes.name == "int8_channel"
    compare(rounded, eager(folders.floats), 0.05)


@pytest.mark.parametrize(
    ("experts", "attention"), [("ct w4a16", "ct w8a8"), ("ct w8a8", "ct w4a16")]
)
def test_each_group_of_layers_has_its_own_way_of_packing(
    experts: str, attention: str, tmp_path: Path
) -> None:
    groups, written = {}, {}
    for name, target in ((experts, "re:.*experts.*"), (attention, "re:.*self_attn.*")):
        case = CASES[name]
        group = case.config["config_groups"]["group_0"] | {"targets": [target]}
        groups[name] = group | {"format": case.config["format"]}
        written[name] = write_folders(tmp_path / name, "tiny-qwen3-moe", case, linear_too=True)
    config = CASES[experts].config | {
        "format": "mixed-precision", "config_groups": groups, "ignore": ["lm_head"]
    }  # fmt: skip
    tensors, floats = (
        {
            key: tensor
            for name, folders in written.items()
            for key, tensor in read_tensors(folders[which]).items()
            if (".self_attn." in key) == (name == attention)
        }
        for which in (0, 1)
    )
    like = written[experts].packed
    packed = write_folder(tmp_path / "packed", like, tensors, quantization_config=config)
    plain = write_folder(tmp_path / "plain", written[experts].floats, floats)
    model = fusedmoe.from_pretrained(packed, options=REFERENCE)
    compare(model, eager(plain), tolerance_of(model))


@pytest.mark.parametrize("case", ["ct w4a16", "deepseek"])
def test_layers_behind_the_last_may_be_stored_otherwise(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What guesses further tokens is often left as floats, and the model has no place for it."""
    folders = write_folders(tmp_path, "tiny-deepseek-v3", CASES[case])
    more = {
        name.replace("layers.1.", "layers.2."): tensor
        for name, tensor in read_tensors(folders.floats).items()
        if "layers.1." in name
    }
    longer = write_folder(tmp_path / "longer", folders.packed, read_tensors(folders.packed) | more)
    model, same = (fusedmoe.from_pretrained(f, options=REFERENCE) for f in (longer, folders.packed))
    with torch.inference_mode():
        assert torch.equal(model(PROMPT).logits, same(PROMPT).logits)
    assert main(["inspect", str(longer)]) == 0
    assert "would not load" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("quantize", "tolerance"),
    [("fp8", 0.08), ("int8", 0.05), ("int4_g32", 0.3), ("mxfp4", 0.35), ("fp8_block_32x32", 0.08)],
)
def test_floats_are_rounded_while_they_are_read(
    quantize: str, tolerance: float, tmp_path: Path
) -> None:
    folders = write_folders(tmp_path, "tiny-mixtral", CASES["awq"])
    seen = []
    model = fusedmoe.from_pretrained(
        folders.floats, quantize=quantize, progress=lambda *step: seen.append(step)
    )
    assert seen == [(0, 2, "model.layers.0.mlp.experts"), (1, 2, "model.layers.1.mlp.experts")]
    compare(model, eager(folders.floats), tolerance)
    with pytest.raises(CheckpointError, match=r"is quantized already \(awq\)"):
        fusedmoe.from_pretrained(folders.packed, quantize=quantize)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("fp8", keys.FP8_DYNAMIC_TOKEN), ("fp8_block_32x32", keys.fp8_dynamic_group(32))],
)
def test_rows_may_be_rounded_with_weights_that_were_floats(
    name: str, activation: keys.QuantKey, tmp_path: Path
) -> None:
    folder = write_folders(tmp_path, "tiny-mixtral", CASES["awq"]).floats
    online = fusedmoe.OnlineQuantization.of(name, activation=activation)
    model = fusedmoe.from_pretrained(folder, quantize=online)
    assert model.model.layers[0].mlp.experts.schemes.activation == activation
    compare(model, eager(folder), 0.08)


def broken(tmp_path: Path, **changes: Any) -> Path:
    """A GPTQ folder with tensors replaced, or left out (None)."""
    folders = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"], linear_too=True)
    tensors = read_tensors(folders.packed)
    for name, change in changes.items():
        full = next(n for n in tensors if n.endswith(name))
        tensor = tensors.pop(full)
        if change is not None:
            tensors[full] = change(tensor)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folders.packed / "model.safetensors",
    )
    return folders.packed


def other_numbers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float8_e4m3fn)


EXPERT = "layers.1.mlp.experts.2.up_proj"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing scale": ({f"{EXPERT}.scales": None}, r"lacks .*up_proj\.scales, which gptq"),
    "missing weight": ({f"{EXPERT}.qweight": None}, r"lacks .*up_proj\.qweight"),
    "group size": (
        {f"{EXPERT}.scales": lambda t: t[:1]},
        r"layers\.1\.mlp\.experts\.2\.up_proj\.scales: expected shape \(2, 64\) .*found \(1, 64\)",
    ),
    "truncated": (
        {f"{EXPERT}.qweight": lambda t: t[:, :-1]},
        r"up_proj\.qweight: expected shape \(8, 64\) .* found \(8, 63\)",
    ),
    "inf scale": (
        {f"{EXPERT}.scales": lambda t: t / 0},
        r"up_proj\.scales: expected finite scales, found (inf|nan)",
    ),
    "dtype": (
        {f"{EXPERT}.qweight": lambda t: t.long()},
        r"up_proj\.qweight: expected torch.int32, found torch.int64",
    ),
    "zero points of the other version": (
        {f"{EXPERT}.qzeros": lambda t: t + 0x11111111},
        r"up_proj\.qzeros: expected 8 everywhere .* found 9 \(is its checkpoint_format gptq_v2",
    ),
    "order of groups": (
        {f"{EXPERT}.g_idx": lambda t: t.flip(0)},
        r"up_proj\.g_idx: expected 0 at 0 as desc_act is false",
    ),
    "attention": (
        {"layers.0.self_attn.q_proj.scales": None},
        r"lacks .*q_proj\.scales beside",
    ),
    "a router of fewer experts": (
        {"layers.1.mlp.gate.weight": lambda t: t[:3]},
        r"layers\.1\.mlp\.gate\.weight: expected shape \(4, 64\), found \(3, 64\)",
    ),
    "truncated norm": (
        {"layers.0.input_layernorm.weight": lambda t: t[:-1]},
        r"layers\.0\.input_layernorm\.weight: expected shape \(64,\), found \(63,\)",
    ),
    "truncated attention": (
        {
            "layers.0.self_attn.k_proj.qweight": lambda t: t[:, :-8],
            "layers.0.self_attn.k_proj.scales": lambda t: t[:, :-8],
            "layers.0.self_attn.k_proj.qzeros": lambda t: t[:, :-1],
        },
        r"layers\.0\.self_attn\.k_proj\.weight: expected shape \(32, 64\), found \(24, 64\)",
    ),
    "attention without columns": (
        {"layers.0.self_attn.q_proj.qweight": lambda t: t.flatten()},
        r"the tensors of .*layers\.0\.self_attn\.q_proj, .*'qweight': \(\d+,\).*, hold no matrix",
    ),
    "a router in other numbers": (
        {"layers.1.mlp.gate.weight": other_numbers},
        r"layers\.1\.mlp\.gate\.weight is F8_E4M3, but config\.json names no",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_checkpoints_are_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        fusedmoe.from_pretrained(broken(tmp_path, **changes))


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("options", [None, REFERENCE])
def test_floats_of_another_shape_are_refused_by_name(
    quantize: str | None, options: Any, tmp_path: Path
) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"]).floats
    tensors = read_tensors(folder)
    for name in ("model.layers.0.input_layernorm.weight", "model.norm.weight"):
        tensors[name] = tensors[name][:-1]
    save_file(tensors, folder / "model.safetensors")
    message = r"layers\.0\.input_layernorm\.weight: expected shape \(64,\), found \(63,\) \(1 more"
    with pytest.raises(CheckpointError, match=message):
        fusedmoe.from_pretrained(folder, quantize=quantize, options=options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "spqr"}, "unknown quant_method 'spqr'"),
        ({"quant_method": "gptq", "bits": 4}, "group_size must be an integer, got None"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"(": {}}}, "no pattern"),
        ({"quant_method": "fp8"}, r"lacks .*down_proj\.weight, which fp8 fp8_tensor experts have"),
        ("gptq", "quantization_config is 'gptq'"),
    ],
)
def test_nonsense_in_the_config_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    folders = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"])
    path = folders.packed / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=message):
        fusedmoe.from_pretrained(folders.packed)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_floats_beside_which_something_is_packed_are_refused(
    quantize: str | None, tmp_path: Path
) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"]).floats
    tensors = read_tensors(folder)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = other_numbers(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"o_proj\.weight is F8_E4M3, but config\.json names"):
        fusedmoe.from_pretrained(folder, quantize=quantize)


def test_packed_weights_of_which_the_config_says_nothing_are_refused(tmp_path: Path) -> None:
    folders = write_folders(tmp_path, "tiny-qwen3-moe", CASES["modelopt nvfp4"])
    path = folders.packed / "config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if "quant" not in k})
    )
    with pytest.raises(CheckpointError, match=r"is (U8|F8_E4M3), but config\.json names no"):
        fusedmoe.from_pretrained(folders.packed)


@pytest.mark.parametrize(
    ("file", "case"),
    [
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
        ("hf_quant_config.json", "modelopt fp8"),
    ],
)
def test_the_quantization_may_stand_in_a_file_of_its_own(
    file: str, case: str, tmp_path: Path
) -> None:
    folders = write_folders(tmp_path, "tiny-qwen3-moe", CASES[case])
    path = folders.packed / "config.json"
    config = json.loads(path.read_text())
    own = config.pop("quantization_config")
    del own["quant_method"]
    path.write_text(json.dumps(config))
    beside = {"quantization": own} if "hf" in file else own
    (folders.packed / file).write_text(json.dumps(beside))
    model = fusedmoe.from_pretrained(folders.packed)
    compare(model, eager(folders.floats), max(1e-2, tolerance_of(model)))


def test_the_older_key_of_compressed_tensors(tmp_path: Path) -> None:
    folders = write_folders(tmp_path, "tiny-qwen3-moe", CASES["ct w4a16"])
    path = folders.packed / "config.json"
    config = json.loads(path.read_text())
    config["compression_config"] = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    compare(fusedmoe.from_pretrained(folders.packed), eager(folders.floats), 1e-2)


def check_a_layer_loads(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    layer = fusedmoe.FusedMoE(
        *(4, 2, 64, 64),
        params_dtype=torch.float32,
        quant_config=CheckpointExperts.read(checkpoint).quantization,
        prefix="model.layers.0.mlp.experts",
    )
    assert fusedmoe.load_local_experts(layer.routed_experts, checkpoint)


@pytest.mark.parametrize(
    ("name", "suffixes"),
    [
        ("deepseek", ("weight_scale_inv",)),
        ("fp8 per tensor by Transformers' names", ("weight_scale_inv", "activation_scale")),
    ],
)
def test_experts_in_one_tensor_under_bare_names(
    name: str, suffixes: tuple[str, ...], tmp_path: Path
) -> None:
    """``experts.gate_up_proj`` and ``experts.gate_up_proj_scale_inv``, gate and up joined."""
    folders = write_folders(tmp_path, "tiny-qwen3-moe", CASES[name])
    tensors = read_tensors(folders.packed)

    def joined(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.cat(pair) if pair[0].dim() else torch.stack(pair)

    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        for suffix in ("weight", *suffixes):
            tail = f"_{suffix}".removeprefix("_weight")
            taken = {
                name: [tensors.pop(f"{base}.{e}.{name}.{suffix}") for e in range(4)]
                for name in ("gate_proj", "up_proj", "down_proj")
            }
            pairs = zip(taken["gate_proj"], taken["up_proj"], strict=True)
            tensors[f"{base}.gate_up_proj{tail}"] = torch.stack([joined(p) for p in pairs])
            tensors[f"{base}.down_proj{tail}"] = torch.stack(taken["down_proj"])
    packed = write_folder(
        tmp_path / "stacked", folders.packed, tensors, quantization_config=CASES[name].config
    )
    model, same = fusedmoe.from_pretrained(packed), fusedmoe.from_pretrained(folders.packed)
    with torch.inference_mode():
        assert torch.equal(model(PROMPT).logits, same(PROMPT).logits)
    check_a_layer_loads(packed)


def test_one_scale_may_stand_for_all_experts_of_a_tensor(tmp_path: Path) -> None:
    folders = write_with_one_scale(tmp_path)
    models = [fusedmoe.from_pretrained(folder) for folder in folders]
    with torch.inference_mode():
        assert torch.equal(*(model(PROMPT).logits for model in models))
    check_a_layer_loads(folders.packed)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("down_proj_scales", None, "lacks {}, which gpt-oss mxfp4"),
        ("gate_up_proj_blocks", None, "lacks {}, which gpt-oss mxfp4"),
        ("down_proj_blocks", lambda t: t[:, :, :1], r"{}: expected shape \(64, 2, 16\)"),
        ("gate_up_proj_scales", lambda t: t | 255, "{}: expected finite scales, found nan"),
    ],
)
def test_tensors_under_bare_names_are_named_as_in_the_file(
    name: str, change: Any, message: str, tmp_path: Path
) -> None:
    folder = write_gpt_oss(tmp_path).packed
    tensors, full = read_tensors(folder), f"model.layers.1.mlp.experts.{name}"
    tensor = tensors.pop(full)
    if change is not None:
        tensors[full] = change(tensor).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message.format(re.escape(full))):
        fusedmoe.from_pretrained(folder)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_what_transformers_itself_quantized_and_saved(
    scale_fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer as Fp8

    # What it asks of the machine is for running, not for writing.
    monkeypatch.setattr(Fp8, "validate_environment", lambda self, *_, **__: None)
    monkeypatch.setattr(Fp8, "update_device_map", lambda self, device_map: device_map)
    plain = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"]).floats
    config = transformers.FineGrainedFP8Config(weight_block_size=(32, 32), scale_fmt=scale_fmt)
    transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.float32
    ).save_pretrained(tmp_path / "saved")
    values = read_tensors(tmp_path / "saved")
    for name in [name for name in values if name.endswith("_scale_inv")]:
        scale, weight = values.pop(name).float(), values[name.removesuffix("_scale_inv")].float()
        grid = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        values[name.removesuffix("_scale_inv")] = weight * grid
    model = fusedmoe.from_pretrained(tmp_path / "saved", options=REFERENCE)
    assert model.model.layers[0].mlp.experts.schemes.name == "fp8_block_32x32"
    floats = eager(write_folder(tmp_path / "values", plain, values))
    compare(model, floats, ROUNDED["fp8"])


def test_a_bad_scale_outside_the_experts_is_named(tmp_path: Path) -> None:
    name = "layers.0.self_attn.k_proj.scales"
    with pytest.raises(CheckpointError, match=r"self_attn\.k_proj\.scales: expected finite scales"):
        fusedmoe.from_pretrained(broken(tmp_path, **{name: lambda t: t / 0}))


def test_a_bad_state_of_nf4_outside_the_experts_is_named(tmp_path: Path) -> None:
    case = CASES["bitsandbytes nf4"]
    folder = write_folders(tmp_path, "tiny-qwen3-moe", case, linear_too=True).packed
    tensors = read_tensors(folder)
    name = "model.layers.1.self_attn.k_proj.weight.quant_state.bitsandbytes__nf4"
    tensors[name] = torch.tensor(list(b'{"shape": [3]}'), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: expected two sizes"):
        fusedmoe.from_pretrained(folder)


def test_rounding_holds_little_more_than_the_quantized_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the floats, no more than two layers' experts are alive at any time."""
    import gc
    import weakref

    from fusedmoe.integrations.transformers.sources import FolderSource

    folders = write_folders(
        tmp_path, "tiny-qwen3-moe", CASES["awq"], num_hidden_layers=4, num_experts=8
    )
    alive: dict[int, int] = {}
    highest = [0]
    original = FolderSource.read

    def counted(self: FolderSource, name: str, rows: range | None = None) -> torch.Tensor:
        tensor = original(self, name, rows)
        if ".experts." in name:
            storage = tensor.untyped_storage()
            key = len(alive)
            alive[key] = storage.nbytes()
            weakref.finalize(tensor, alive.__setitem__, key, 0)
            gc.collect(0)
            highest[0] = max(highest[0], sum(alive.values()))
        return tensor

    monkeypatch.setattr(FolderSource, "read", counted)
    fusedmoe.from_pretrained(folders.floats, quantize="int8")
    one_layer = 8 * 3 * 64 * 64 * 4
    assert 0 < highest[0] <= 2 * one_layer


def test_casts_copies_and_saving(tmp_path: Path) -> None:
    """A cast changes the activations and leaves the formats alone; saving is refused."""
    import copy

    folders = write_folders(tmp_path, "tiny-qwen3-moe", CASES["ct fp8 channel"])
    model = fusedmoe.from_pretrained(folders.packed, dtype=torch.bfloat16, options=REFERENCE)
    held = {n: p.dtype for n, p in model.named_parameters() if "routed_experts" in n}
    wanted = fusedmoe.from_pretrained(folders.packed, dtype=torch.float32, options=REFERENCE)
    twin = copy.deepcopy(model).to(torch.float32)
    assert {n: p.dtype for n, p in twin.named_parameters() if "routed_experts" in n} == held
    with torch.inference_mode():
        error = (twin(PROMPT).logits - wanted(PROMPT).logits).norm()
        assert error < 2e-2 * wanted(PROMPT).logits.norm()
        assert model(PROMPT).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="cannot be saved: keep the checkpoint"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"dtype": "fp7"}, "unsupported dtype 'fp7'"),
        ({"dtype": torch.int8}, r"dtype is that of rows and of layers of floats, got torch\.int8"),
        ({"device": "cudda"}, "unknown device 'cudda'"),
        ({"device": "meta"}, "unsupported device 'meta'"),
        ({"device": "cuda:99"}, "'cuda:99' is not there: torch sees"),
        ({"quantize": "int3"}, "unknown weight format 'int3'"),
        ({"quantize": "int4_g32_act_order"}, "the order of columns comes from a checkpoint"),
        ({"quantize": "int4_g128"}, "groups of 128 columns do not divide 64 columns"),
        ({"options": fusedmoe.MoEOptions(experts="nope")}, "no implementation is called 'nope'"),
    ],
)
def test_what_is_asked_for_is_checked_first(
    words: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"]).floats
    with pytest.raises(ValueError, match=message):
        fusedmoe.from_pretrained(folder, **words)


@pytest.mark.parametrize("packed", [False, True])
def test_a_dtype_may_be_a_name(packed: bool, tmp_path: Path) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"])[not packed]
    assert fusedmoe.from_pretrained(folder, dtype="bf16").dtype == torch.bfloat16
