"""``from_pretrained`` for models of every family, whose experts it rounds, or says why not."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusedmoe
from expert_layers import error
from fusedmoe.cli.models import with_fusedmoe
from fusedmoe.integrations.transformers.accelerate import accelerated_blocks
from fusedmoe.integrations.transformers.packed import PackedExperts

pytest.importorskip("transformers")
from hf import tiny_models

sys.path.append(str(Path(__file__).parents[1] / "dialects"))
from writers import CASES, fp8

REFUSED = {
    "dbrx": "experts laid out as 'rows' cannot be replaced",
    "diffusion_gemma": "PackedExperts has no attribute",
    "ernie4_5_vl_moe": r"experts\.10\..*: expert 10 of a layer that has 6",
    "inkling2": "cap gate and up softly",
    "jetmoe": "does more than apply experts in its own module",
    "muse_spark": "no family in the table has model_type",
    "nllb_moe": "no family in the table has model_type",
    "qwen3_omni_moe_talker": None,  # its outputs are no logits
    "switch_transformers": "no family in the table has model_type",
}
NAMES = [row.name for row in tiny_models.ROWS if REFUSED.get(row.name, "") is not None]


def logits(row, model):
    with torch.no_grad():
        return model(**tiny_models.INPUTS[row.inputs](model)).logits


@pytest.mark.parametrize("name", NAMES)
def test_experts_of_every_family_are_rounded_while_they_are_read(name, tmp_path, caplog):
    row = tiny_models.by_name(name)
    plain = tiny_models.build(row)
    plain.save_pretrained(tmp_path)
    if name in REFUSED:
        with pytest.raises(fusedmoe.CheckpointError, match=REFUSED[name]):
            fusedmoe.from_pretrained(tmp_path, quantize="int8", dtype="fp32")
        return
    wanted = logits(row, plain)
    model = fusedmoe.from_pretrained(tmp_path, quantize="int8", dtype="fp32")
    assert any(isinstance(module, PackedExperts) for module in model.modules())
    assert error(logits(row, model), wanted) < 0.15
    fusedmoe.accelerate(model)
    assert "nothing in this" not in caplog.text
    assert error(logits(row, model), wanted) < 0.15


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("accelerated", [False, True])
def test_packed_experts_say_that_they_cannot_be_trained(accelerated, training, tmp_path):
    tiny_models.build(tiny_models.by_name("mixtral")).save_pretrained(tmp_path)
    model = fusedmoe.from_pretrained(tmp_path, quantize="int8", dtype="fp32")
    if accelerated:
        fusedmoe.accelerate(model)
    loss = model.train(training)(input_ids=tiny_models.token_ids()).logits.sum()
    with pytest.raises(RuntimeError, match="no backward pass; packed weights have no gradients"):
        loss.backward()


@pytest.mark.parametrize("layout", ["out, in", "in, out", "in, out, fp8"])
def test_stacks_may_lie_either_way(layout, tmp_path):
    """Published files of the family have [E, in, out], those that Transformers saves may not."""
    row = tiny_models.by_name("qwen3_vl_moe")
    plain = tiny_models.build(row)
    plain.save_pretrained(tmp_path)
    file, tolerance, how = tmp_path / "model.safetensors", 1e-5, {}
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "down_proj"))]:
        weight = tensors[name]
        if layout == "in, out, fp8":
            stored = [fp8((8, 8), leaf="scale")(expert).tensors for expert in weight]
            weight = torch.stack([one["weight"] for one in stored])
            scale = torch.stack([one["scale"] for one in stored])
            tensors[f"{name}_scale_inv"] = scale.mT.contiguous()
        tensors[name] = weight if layout == "out, in" else weight.mT.contiguous()
    save_file(tensors, file)
    if layout == "in, out, fp8":
        path, tolerance = tmp_path / "config.json", 0.08
        config = json.loads(path.read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
        path.write_text(json.dumps(config))
    else:
        how, tolerance = {"quantize": "int8"}, 0.05
    model = fusedmoe.from_pretrained(tmp_path, dtype="fp32", **how)
    assert error(logits(row, model), logits(row, plain)) < tolerance


def blocks_that_do_more() -> list[str]:
    """Aria's experts are modules as all others once Transformers decorates them."""
    aria = tiny_models.by_name("aria")
    return ["llama4", "longcat_flash", *([] if aria.decorated else ["aria"])]


@pytest.mark.parametrize("name", blocks_that_do_more())
def test_blocks_that_do_more_run_as_a_whole(name, tmp_path):
    """Their packed experts have no forward of their own to go back to."""
    row = tiny_models.by_name(name)
    tiny_models.build(row).save_pretrained(tmp_path)
    model = fusedmoe.from_pretrained(tmp_path, quantize="int8", dtype="fp32")
    wanted = logits(row, model)
    assert torch.equal(logits(row, fusedmoe.restore(model)), wanted)
    assert torch.equal(logits(row, copy.deepcopy(model)), wanted)
    assert error(logits(row, model.to(torch.bfloat16)), wanted) < 0.1
    model.to(torch.float32).train()
    with pytest.raises(ValueError, match=r"run with their whole block alone: in eval mode"):
        model(**tiny_models.INPUTS[row.inputs](model))


@pytest.mark.parametrize("form", ["fbgemm stacks", "ct w8a16"])
def test_llama4_as_it_is_published(form, tmp_path):
    """fp8 stacks [E, in, out] with a scale per output feature; or a matrix per expert, packed."""
    row = tiny_models.by_name("llama4")
    plain = tiny_models.build(row)
    case = CASES["fbgemm" if "fbgemm" in form else form]
    path, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    plain.save_pretrained(tmp_path)
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts." in name]:
        base, _, leaf = name.rpartition(".")
        stored = [case.write(matrix.mT.contiguous()) for matrix in tensors.pop(name)]  # [out, in]
        values = torch.stack([one.values.mT for one in stored])
        plain.get_parameter(name).data.copy_(values)
        if case is CASES["fbgemm"]:
            tensors[name] = torch.stack([one.tensors["weight"].mT for one in stored])
            scale = torch.stack([one.tensors["weight_scale"] for one in stored])
            tensors[f"{name}_scale"] = scale.mT if leaf == "gate_up_proj" else scale
            continue
        for expert, matrix in enumerate(stored):
            parts = {leaf: matrix}
            if leaf == "gate_up_proj":
                halves = values[expert].T.contiguous().chunk(2)
                parts = dict(zip(("gate_proj", "up_proj"), map(case.write, halves), strict=True))
            for part, one in parts.items():
                for suffix, tensor in one.tensors.items():
                    tensors[f"{base}.{expert}.{part}.{suffix}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    quantization = case.config | {"modules_to_not_convert": ["self_attn", "router", "lm_head"]}
    quantization["modules_to_not_convert"] += ["shared_expert", "mlp"]
    if "ignore" in quantization:
        quantization["ignore"] += ["re:.*shared_expert.*", "re:.*router.*"]
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config))
    model = fusedmoe.from_pretrained(tmp_path, dtype="fp32")
    assert error(logits(row, model), logits(row, plain)) < 0.08


def test_gpt_oss_with_a_matrix_per_expert(tmp_path):
    """As LLM Compressor writes it: gate and up apart, which our rows have in turns."""
    row, case = tiny_models.by_name("gpt_oss"), CASES["ct w8a16"]
    plain = tiny_models.build(row)
    plain.save_pretrained(tmp_path)
    path, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts." in name]:
        stack, (base, _, leaf) = tensors.pop(name), name.rpartition(".")
        is_bias = leaf.endswith("_bias")
        leaf = leaf.removesuffix("_bias")
        for e, one in enumerate(stack):
            rows = one if is_bias else one.T
            parts = {leaf: rows}
            if leaf == "gate_up_proj":
                parts = {"gate_proj": rows[0::2], "up_proj": rows[1::2]}
            for i, (part, value) in enumerate(parts.items()):
                if is_bias:
                    tensors[f"{base}.{e}.{part}.bias"] = value
                    continue
                stored = case.write(value.contiguous())
                for suffix, tensor in stored.tensors.items():
                    tensors[f"{base}.{e}.{part}.{suffix}"] = tensor
                plain.get_parameter(name).data[e].T[i :: len(parts)] = stored.values
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    quantization = case.config | {"ignore": [*case.config["ignore"], "re:.*router.*"]}
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config))
    model = fusedmoe.from_pretrained(tmp_path, dtype="fp32")
    assert error(logits(row, model), logits(row, plain)) < 1e-3


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_options_hold_for_experts_that_stay_floats(name, tmp_path):
    """Modules of Transformers' have no place for them; ours raise where they cannot be kept."""
    row = tiny_models.by_name(name)
    plain = tiny_models.build(row)
    plain.save_pretrained(tmp_path)
    options = fusedmoe.MoEOptions(experts="torch", max_workspace_bytes=1 << 20)
    model = fusedmoe.from_pretrained(tmp_path, dtype="fp32", options=options)
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert packed
    for experts in packed:
        assert fusedmoe.explain(experts.routed_experts).chosen.name == "torch"
        assert experts.routed_experts.moe_config.options == options
    assert error(logits(row, model), logits(row, plain)) < 1e-5
    options = fusedmoe.MoEOptions(experts="triton", batch_invariant=True)
    with pytest.raises(ValueError, match="triton: runs on cuda, not cpu"):
        fusedmoe.from_pretrained(tmp_path, options=options)


def test_default_options_are_no_wish(tmp_path):
    tiny_models.build(tiny_models.by_name("qwen3_moe")).save_pretrained(tmp_path)
    model = fusedmoe.from_pretrained(tmp_path, options=fusedmoe.MoEOptions())
    assert not any(isinstance(module, PackedExperts) for module in model.modules())


def test_what_is_no_format_is_refused_before_anything_is_read(tmp_path):
    tiny_models.build(tiny_models.by_name("mixtral")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantize is a format's name .* not True"):
        fusedmoe.from_pretrained(tmp_path, quantize=True)
    with pytest.raises(ValueError, match=r"activation is a QuantKey .* not 'fp8'"):
        fusedmoe.OnlineQuantization.of("fp8", activation="fp8")


def test_a_model_without_experts_says_so(tmp_path, caplog):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama': it has no experts, or they are not known"):
        fusedmoe.from_pretrained(tmp_path, quantize="int8")
    fusedmoe.from_pretrained(tmp_path)
    assert "nothing in this model runs through fusedmoe" in caplog.text


@pytest.mark.parametrize(("name", "said"), [("mixtral", False), ("longcat_flash", True)])
def test_experts_that_take_no_implementation_are_told_of(name, said, tmp_path, caplog):
    tiny_models.build(tiny_models.by_name(name)).save_pretrained(tmp_path)
    fusedmoe.from_pretrained(tmp_path)
    assert ("nothing in this model runs through fusedmoe; accelerate" in caplog.text) is said


def test_generate_does_not_call_transformers_own_loop_fusedmoe():
    model = tiny_models.build(tiny_models.by_name("longcat_flash"))
    with pytest.raises(ValueError, match="cannot be replaced alone; --route accelerate"):
        with_fusedmoe(model, "experts", None)
    assert accelerated_blocks(with_fusedmoe(model, "accelerate", None))
