"""``accelerate`` runs whole blocks on experts that stay packed; ``restore`` undoes it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_folders, write_gpt_oss
from torch import nn
from writers import CASES, fp8

import fusedmoe
from expert_layers import error
from fusedmoe.integrations.transformers.accelerate import accelerated_blocks
from fusedmoe.presets import preset_config, write_preset

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

REFERENCE = fusedmoe.MoEOptions(experts="torch_quantized")
PROMPT = torch.tensor([[1, 40, 77, 300, 12, 9, 211, 5]])


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(PROMPT).logits


@pytest.mark.parametrize(
    ("preset", "case"),
    [
        ("tiny-qwen3-moe", "ct w4a16"),
        ("tiny-mixtral", "gptq"),
        ("tiny-olmoe", "awq"),
        ("tiny-deepseek-v3", "deepseek"),
        ("tiny-gpt-oss", None),
    ],
)
def test_whole_blocks_on_packed_experts(preset: str, case: str | None, tmp_path: Path) -> None:
    folders = (
        write_gpt_oss(tmp_path) if case is None else write_folders(tmp_path, preset, CASES[case])
    )
    model = fusedmoe.from_pretrained(folders.packed, options=REFERENCE)
    before, names = logits(model), set(model.state_dict())
    parameters = {name: p.data_ptr() for name, p in model.named_parameters()}
    fusedmoe.accelerate(model)
    blocks = accelerated_blocks(model)
    assert blocks
    assert all(isinstance(block, fusedmoe.MoERunner) for block in blocks.values())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == names
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == parameters
    fusedmoe.restore(model)
    assert accelerated_blocks(model) == {}
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_autocast_may_give_rows_another_dtype(whole_blocks: bool, tmp_path: Path) -> None:
    """Packed experts have no original to fall back to: they convert the rows."""
    folder = write_preset("tiny-mixtral", tmp_path / "model")
    model = fusedmoe.from_pretrained(folder, quantize="int8", dtype=torch.bfloat16)
    wanted = logits(model)
    if whole_blocks:
        fusedmoe.accelerate(model)
    with torch.autocast("cpu", dtype=torch.float16):
        got = logits(model)
    assert float((got - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("case", ["ct w4a16", "fp8 per tensor", "gptq act-order"])
def test_accelerated_blocks_follow_the_model(case: str, tmp_path: Path) -> None:
    """Casts, other weights and copies reach what runs the blocks, as they reach the model."""
    folders = write_folders(tmp_path, "tiny-qwen3-moe", CASES[case])
    model = fusedmoe.accelerate(fusedmoe.from_pretrained(folders.packed, dtype="fp32"))
    wanted, state = logits(model), copy.deepcopy(model.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def fill() -> None:
        """All values, of buffers too, which a state lacks."""
        model.load_state_dict(state)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])

    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert error(logits(model), wanted) < 0.03
    model.to(torch.float32)
    fill()
    assert torch.equal(logits(model), wanted)
    model.to("meta").to_empty(device="cpu")
    fill()
    assert torch.equal(logits(model), wanted)
    scales = [name for name in state if name.endswith(("_weight_scale", "_input_scale"))]
    other = state | {name: state[name] * 2 for name in scales}
    plain = fusedmoe.from_pretrained(folders.packed, dtype="fp32")
    plain.load_state_dict(other)
    assert error(logits(plain), wanted) > 0.1
    model.load_state_dict(other)
    assert error(logits(model), logits(plain)) < 1e-5
    twin = copy.deepcopy(model)
    model.load_state_dict(state)
    assert error(logits(twin), logits(plain)) < 1e-5
    fusedmoe.restore(fusedmoe.restore(twin).to(torch.bfloat16))
    assert error(logits(twin), logits(plain)) < 0.1
    compiled = torch.compile(model.to(torch.float16), backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert error(compiled(PROMPT, use_cache=False).logits, wanted) < 0.02


def with_fp8_experts() -> Any:
    """A model in which Transformers' fp8 quantizer has put its experts."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    config = preset_config("tiny-mixtral", intermediate_size=64, num_local_experts=4)
    fusedmoe.register()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="fusedmoe"
    ).eval()
    cls = type("FP8Experts", (FP8Experts,), {"__module__": FP8Experts.__module__})
    decorated = use_experts_implementation(experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)(cls)
    write = fp8((32, 32))
    for layer in model.model.layers:
        plain = layer.mlp.experts
        experts = decorated(model.config, block_size=(32, 32))
        for name in ("gate_up_proj", "down_proj"):
            stored = [write(matrix.detach()).tensors for matrix in getattr(plain, name)]
            weight = torch.stack([one["weight"] for one in stored])
            scale = torch.stack([one["weight_scale"] for one in stored])
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
            setattr(experts, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
        layer.mlp.experts = experts.eval()
    return model


def test_experts_that_transformers_keeps_in_fp8_stay_so() -> None:
    model = with_fp8_experts()
    before = logits(model)
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    fusedmoe.accelerate(model)
    blocks = accelerated_blocks(model)
    assert len(blocks) == 2
    block = blocks["model.layers.0.mlp"]
    assert isinstance(block, fusedmoe.MoERunner)
    assert block.routed_experts.w13_weight is weight
    assert weight.dtype == torch.float8_e4m3fn
    after = logits(model)
    # Ours rounds activations to fp8 as well, which the function it is compared with does not.
    assert (after - before).norm() < 0.1 * before.norm()
    fusedmoe.restore(model)
    assert torch.equal(logits(model), before)
