"""What torch.compile sees of an accelerated block: one operator, where nothing else can be told."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import fusedmoe
from fusedmoe.integrations.transformers import compiled_block
from fusedmoe.integrations.transformers.accelerate import accelerated_blocks
from fusedmoe.runner import opaque

pytest.importorskip("transformers")
from hf import tiny_models

NAMES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "ernie4_5_vl_moe",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "nemotron_h",
    "phimoe",
]


def block_of(name="qwen3_moe"):
    model = fusedmoe.accelerate(tiny_models.build(tiny_models.by_name(name)))
    return model.get_submodule(next(iter(accelerated_blocks(model))))


class Graphs:
    """A backend that runs what it is given and keeps the names of the operators called."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, inputs):
        called = (node for node in module.graph.nodes if node.op == "call_function")
        self.calls.append([str(node.target) for node in called])
        return module

    @property
    def opaque(self):
        return sum("accelerated_block" in name for calls in self.calls for name in calls)


def compiled(block):
    graphs = Graphs()
    torch._dynamo.reset()
    return torch.compile(block, backend=graphs, fullgraph=True), graphs


def tensors_of(output):
    return output if isinstance(output, tuple) else (output,)


def assert_same(got, wanted):
    for ours, theirs in zip(tensors_of(got), tensors_of(wanted), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_block_is_one_operator_with_the_same_outputs(name):
    block = block_of(name)
    x = torch.randn(2, 3, 32)
    wanted = block(x)
    call, graphs = compiled(block)
    assert_same(call(x), wanted)
    assert graphs.opaque == 1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_shapes_and_dtypes_are_known_without_running(name):
    """Inductor plans memory by them; a wrong dtype of what is beside would be read as garbage."""
    for dtype in (torch.float32, torch.bfloat16):
        block = block_of(name).to(dtype)
        x = torch.randn(5, 32, dtype=dtype)
        forward = block.forward
        tensors = opaque.tensors_of(forward.owners, forward.names)
        torch.library.opcheck(
            compiled_block.accelerated_block,
            (x, tensors, forward.number),
            test_utils=("test_schema", "test_faketensor"),
        )


@torch.no_grad()
def test_experts_whose_weights_are_stacked_copies_are_traced():
    """They may have to be copied again before a call, which only a look at each of them tells."""
    block, x = block_of("dbrx"), torch.randn(2, 3, 32)
    call, graphs = compiled(block)
    assert_same(call(x), block(x))
    assert graphs.opaque == 0


@torch.no_grad()
def test_no_tokens():
    block = block_of()
    call, graphs = compiled(block)
    assert call(torch.randn(1, 0, 32)).shape == (1, 0, 32)
    assert graphs.opaque == 1


@torch.no_grad()
def test_a_copy_runs_its_own_weights():
    block = block_of()
    other = copy.deepcopy(block)
    for parameter in other.parameters():
        parameter.mul_(-1.5)
    x = torch.randn(4, 32)
    assert_same(compiled(other)[0](x), other(x))
    assert_same(compiled(block)[0](x), block(x))


@torch.no_grad()
def test_weights_given_for_a_call_are_used():
    block = block_of()
    given = {name: tensor * -1.5 for name, tensor in block.named_parameters()}
    x = torch.randn(4, 32)
    wanted = torch.func.functional_call(block, given, (x,))

    graphs = Graphs()
    torch._dynamo.reset()

    @torch.compile(backend=graphs, fullgraph=True)
    def call(tensors, x):
        return torch.func.functional_call(block, tensors, (x,))

    assert_same(call(given, x), wanted)
    assert graphs.opaque == 1
    kept = dict(block.named_parameters())
    assert all(kept[name] is not given[name] for name in given)


@torch.no_grad()
def test_new_weights_are_seen():
    block = block_of()
    call, _ = compiled(block)
    x = torch.randn(4, 32)
    call(x)
    for parameter in block.parameters():
        parameter.data = parameter.data * -1.5
    assert_same(call(x), block(x))


@torch.no_grad()
def test_weights_written_in_place_are_read_without_compiling_again():
    block = block_of()
    call, graphs = compiled(block)
    x = torch.randn(4, 32)
    call(x)
    for parameter in block.parameters():
        parameter.mul_(-1.5)
    block.load_state_dict({name: t * 0.5 for name, t in block.state_dict().items()})
    assert_same(call(x), block(x))
    assert len(graphs.calls) == 1


@torch.no_grad()
def test_a_block_that_went_to_another_dtype_is_compiled_for_it():
    block = block_of()
    call, _ = compiled(block)
    call(torch.randn(4, 32))
    x = torch.randn(4, 32, dtype=torch.float64)
    block.to(torch.float64)
    assert_same(call(x), block(x))
    assert call(x).dtype == torch.float64


@torch.no_grad()
def test_a_pickled_block_runs_as_one_operator_of_its_own():
    block = pickle.loads(pickle.dumps(block_of()))
    x = torch.randn(4, 32)
    call, graphs = compiled(block)
    assert_same(call(x), block(x))
    assert graphs.opaque == 1


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "deepseek_v3"])
@torch.no_grad()
def test_guards_of_a_block_are_skipped_until_a_dictionary_below_it_changes(name):
    """Which torch.compile does below a module if all there are modules, dictionaries and the like.

    They are checked before each call of a compiled model: those of 48 blocks took half a
    millisecond of a step.
    """
    holder = Holder(block_of(name))

    def call(holder, x):
        return holder.block(x)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        torch.compile(call, backend=Graphs(), fullgraph=True)(holder, torch.randn(4, 32))
        (entry,) = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(call.__code__)
        guards = [line for line in str(entry.guard_manager).splitlines() if ".forward" in line]
        path = "source=L['holder']._modules['block'],"
        (root,) = (g for g in str(entry.guard_manager).splitlines() if path in g)
    assert "tag_safe=(True, " in root
    assert len(guards) <= 40 + 10 * len(list(holder.block.modules()))


@torch.no_grad()
def test_a_listener_inside_hears_each_call():
    block = block_of()
    heard = []
    block.gate.register_forward_hook(lambda module, args, output: heard.append(output))
    graphs = Graphs()
    torch._dynamo.reset()
    torch.compile(block, backend=graphs)(torch.randn(4, 32))
    assert heard
    assert graphs.opaque == 0


@torch.no_grad()
def test_router_logits_asked_for_in_a_compiled_call_are_returned():
    """Transformers installs its hooks when they are first asked for, here while it is traced."""
    row = tiny_models.by_name("mixtral")
    inputs = {"input_ids": tiny_models.token_ids(), "output_router_logits": True}
    wanted = tiny_models.build(row)(**inputs).router_logits
    model = fusedmoe.accelerate(tiny_models.build(row))
    torch._dynamo.reset()
    call = torch.compile(model, backend="eager")
    call(input_ids=inputs["input_ids"])
    got = call(**inputs).router_logits
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert tiny_models.relative_error(ours, theirs) <= 1e-5


def test_with_gradients_autocast_or_noise_it_is_traced():
    block, x = block_of(), torch.randn(1, 4, 32)

    def opaque_calls():
        graphs = Graphs()
        torch._dynamo.reset()
        torch.compile(block, backend=graphs)(x)
        return graphs.opaque

    assert opaque_calls() == 0
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert opaque_calls() == 0
        block.train()
        assert opaque_calls() == 1
        block.forward.noisy = True
        assert opaque_calls() == 0
        block.eval()
        assert opaque_calls() == 1


@torch.no_grad()
def test_a_restored_model_runs_its_own_forward():
    model = fusedmoe.accelerate(tiny_models.build(tiny_models.by_name("qwen3_moe")))
    block = model.get_submodule(next(iter(accelerated_blocks(model))))
    graphs = Graphs()
    torch._dynamo.reset()
    call = torch.compile(block, backend=graphs)
    x = torch.randn(1, 4, 32)
    ours = call(x)
    fusedmoe.restore(model)
    torch.testing.assert_close(call(x), ours, rtol=1e-4, atol=1e-5)
    assert len(graphs.calls) > 1
    assert graphs.opaque == 1


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_an_exported_program_holds_no_number_of_this_process(strict):
    torch._dynamo.reset()
    program = torch.export.export(Holder(block_of()), (torch.randn(4, 32),), strict=strict)
    assert "accelerated_block" not in str(program.graph)


class Holder(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


def test_blocks_that_are_gone_are_forgotten():
    block = block_of()
    number = block.forward.number
    assert number in opaque._parts
    del block
    gc.collect()
    assert number not in opaque._parts
