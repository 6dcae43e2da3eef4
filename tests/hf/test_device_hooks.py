"""Models whose modules carry Accelerate's device hooks: several devices, or weights offloaded."""

import pytest
import tiny_models
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules

import fusedmoe
from fusedmoe.integrations.transformers.accelerate import _replacement, accelerated_blocks

# A stack of experts, modules in a list, experts apart from their block, and no known family.
NAMES = ("mixtral", "jamba", "gemma4")


def is_right(row, model):
    wanted, _ = tiny_models.eager_results(row.name)
    return tiny_models.relative_error(tiny_models.logits(row, model), wanted) <= 1e-4


def forbid_originals(model, patch):
    def refuse(*args, **kwargs):
        raise AssertionError("the original forward was called")

    for replacement in filter(None, map(_replacement, model.modules())):
        patch.setattr(replacement, "original", refuse)


def with_device_hooks(model):
    """As ``device_map="auto"`` leaves a model on several GPUs: on all that holds tensors."""
    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_that_only_move_inputs_are_no_obstacle(name, monkeypatch):
    row = tiny_models.by_name(name)
    plain = fusedmoe.accelerate(tiny_models.build(row))
    model = with_device_hooks(tiny_models.build(row))
    assert sum("_hf_hook" in vars(module) for module in model.modules()) > 9
    with monkeypatch.context() as patch:
        forbid_originals(fusedmoe.accelerate(model), patch)
        assert accelerated_blocks(model).keys() == accelerated_blocks(plain).keys() != set()
        assert is_right(row, model)
    assert not accelerated_blocks(fusedmoe.restore(model))
    assert is_right(row, model)


@pytest.mark.parametrize("name", NAMES)
def test_offloaded_blocks_are_left_alone_and_named(name, caplog):
    row = tiny_models.by_name(name)
    model = cpu_offload(tiny_models.build(row), "cpu")
    fusedmoe.accelerate(model)
    assert not accelerated_blocks(model)
    assert "its weights are offloaded" in caplog.text
    assert is_right(row, model)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_are_offloaded_afterwards_step_aside_until_they_are_not(name, monkeypatch):
    row = tiny_models.by_name(name)
    model = fusedmoe.accelerate(tiny_models.build(row))
    assert is_right(row, cpu_offload(model, "cpu"))
    remove_hook_from_submodules(model)
    assert is_right(row, model)
    forbid_originals(fusedmoe.accelerate(model), monkeypatch)
    assert is_right(row, model)


def test_hooks_that_were_removed_leave_nothing_in_the_way():
    row = tiny_models.by_name("mixtral")
    model = with_device_hooks(tiny_models.build(row))
    remove_hook_from_submodules(model)
    assert accelerated_blocks(fusedmoe.accelerate(model))
    assert is_right(row, model)


def test_the_experts_function_takes_offloaded_weights():
    row = tiny_models.by_name("mixtral")
    model = cpu_offload(tiny_models.build(row, "fusedmoe"), "cpu")
    assert is_right(row, model)


def test_packed_experts_say_that_they_cannot_be_offloaded(tmp_path):
    row = tiny_models.by_name("mixtral")
    tiny_models.build(row).save_pretrained(tmp_path)
    model = cpu_offload(fusedmoe.from_pretrained(tmp_path, quantize="int8"), "cpu")
    with pytest.raises(ValueError, match=r"0\.mlp\.experts: packed experts cannot be offloaded"):
        tiny_models.logits(row, model)


def test_blocks_under_device_hooks_run_restored_under_them():
    """Hooks may come before ``accelerate`` or after it."""
    row = tiny_models.by_name("mixtral")
    wanted, _ = tiny_models.eager_results("mixtral")
    for order in (with_device_hooks, fusedmoe.accelerate), (fusedmoe.accelerate, with_device_hooks):
        model = tiny_models.build(row)
        for step in order:
            step(model)
        assert all(_replacement(layer.mlp) is not None for layer in model.model.layers)
        names = model.state_dict().keys()
        fusedmoe.restore(model)
        assert all(_replacement(layer.mlp) is None for layer in model.model.layers)
        assert torch.equal(tiny_models.logits(row, model), wanted)
        assert names == model.state_dict().keys()
