"""What torch.compile sees of a layer: its router and experts as one operator, where that is all."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fusedmoe import FusedMoE, quantize_layer
from fusedmoe.runner.inputs import TokenBatch
from fusedmoe.runner.opaque import can_be_opaque, tensors_of
from fusedmoe.runner.operator import routed_experts

E, K, H, I = 6, 2, 16, 8  # noqa: E741


def layer_of(**arguments):
    layer = FusedMoE(E, K, H, I, torch.float32, **arguments)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.eval().requires_grad_(False)


def whole_layer():
    """With everything that a caller may put around router and experts."""
    return layer_of(
        gate=nn.Linear(H, E),
        shared_experts=nn.Sequential(nn.Linear(H, H), nn.SiLU()),
        shared_expert_gate=nn.Linear(H, 1),
        routed_input_transform=nn.Linear(H, H),
        routed_output_transform=nn.Linear(H, H),
        routed_scaling_factor=2.5,
        apply_routed_scale_to_output=True,
        use_grouped_topk=True,
        num_expert_group=2,
        topk_group=1,
        scoring_func="sigmoid",
        e_score_correction_bias=torch.randn(E),
        router_logits_dtype=torch.float32,
    )


class Graphs:
    """A backend that runs what it is given and counts the operators called."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, inputs):
        self.calls.append([str(node.target) for node in module.graph.nodes])
        return module

    @property
    def operators(self):
        return sum("fusedmoe.routed_experts" in name for calls in self.calls for name in calls)


def compiled(layer, **arguments):
    graphs = Graphs()
    torch._dynamo.reset()
    return torch.compile(layer, backend=graphs, fullgraph=True, **arguments), graphs


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_the_question_is_marked_as_torch_marks_constants():
    marked = torch.compiler.assume_constant_result(lambda number: True)
    assert vars(marked)
    assert vars(marked).items() <= vars(can_be_opaque).items()


@pytest.mark.parametrize("dynamic", [False, True])
def test_router_and_experts_are_one_operator(dynamic):
    layer = whole_layer()
    call, graphs = compiled(layer, dynamic=dynamic)
    for T in (4, 7, 1, 0):
        x = torch.randn(2, T, H)
        torch.testing.assert_close(call(x), layer(x))
    assert graphs.operators == len(graphs.calls)
    assert not dynamic or len(graphs.calls) < 4


def quantized_layer(name, **arguments):
    layer = FusedMoE(E, K, 64, 32, torch.float32, gate=nn.Linear(64, E), **arguments)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    quantize_layer(layer, name)
    return layer.eval()


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_block_32x32", "mxfp4", "nvfp4"])
def test_experts_of_a_format_are_in_it(name):
    """They run as they do in eager code, kernels that a compiler cannot look into among them."""
    layer = quantized_layer(name)
    call, graphs = compiled(layer)
    for T in (4, 0):
        x = torch.randn(T, 64)
        assert torch.equal(call(x), layer(x))
    assert graphs.operators == len(graphs.calls)
    scale, x = layer.routed_experts.w13_weight_scale, torch.randn(4, 64)
    before = call(x)
    scale.copy_(scale.clone().flip(0))
    assert torch.equal(call(x), layer(x))
    assert not torch.equal(call(x), before)


@pytest.mark.parametrize("name", ["int4_g32", "int8"])
def test_weights_in_a_kernels_order_are_not_given_to_it(name):
    """A compiler would read them as they were loaded."""
    layer = quantized_layer(name)
    call, graphs = compiled(layer)
    x = torch.randn(4, 64)
    torch.testing.assert_close(call(x), layer(x))
    assert graphs.operators == 0


def test_given_scales_are_used_for_a_call():
    layer = quantized_layer("fp8_channel")
    given = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
    given["routed_experts.w2_weight_scale"] *= 3
    x = torch.randn(4, 64)
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def call(tensors, x):
        return torch.func.functional_call(layer, tensors, (x,))

    method = layer.routed_experts.quant_method
    kernel = method.kernel(layer.routed_experts)
    torch.testing.assert_close(call(given, x), 3 * layer(x))
    assert method.kernel(layer.routed_experts) is kernel


def test_padding_and_given_logits_go_into_it():
    layer = layer_of(skip_padding=True)
    call, graphs = compiled(layer)
    x, logits = torch.randn(5, H), torch.randn(5, E)
    is_padding = torch.tensor([False, True, False, False, True])
    got = call(x, logits, is_padding=is_padding)
    torch.testing.assert_close(got, layer(x, logits, is_padding=is_padding))
    assert (got[is_padding] == 0).all()
    assert graphs.operators == 1


def test_inductor_runs_it_on_rows_that_are_not_contiguous():
    layer = whole_layer()
    x = torch.randn(H, 5).t()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_it_passes_opcheck():
    layer = layer_of(e_score_correction_bias=torch.randn(E), scoring_func="sigmoid")
    for x in (torch.randn(5, H), torch.randn(H, 5).t(), torch.randn(0, H)):
        batch = list(TokenBatch(x, torch.randn(x.shape[0], E), None, None))
        arguments = (x, batch, tensors_of(layer.owners, layer.names), layer.number)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(routed_experts, arguments, test_utils=checks)


def test_guards_of_a_layer_are_skipped_until_a_dictionary_below_it_changes():
    layer = layer_of()

    def call(layer, x, logits):
        return layer(x, logits)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        rows = torch.randn(4, H), torch.randn(4, E)
        torch.compile(call, backend="eager", fullgraph=True)(layer, *rows)
        (entry,) = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(call.__code__)
        guards = str(entry.guard_manager).splitlines()
    (root,) = (guard for guard in guards if "source=L['layer'], " in guard)
    assert "tag_safe=(True, True)" in root
    assert sum("L['layer']" in guard for guard in guards) < 180


def test_new_values_are_read_without_compiling_again():
    layer = whole_layer()
    call, graphs = compiled(layer)
    x = torch.randn(4, H)
    call(x)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.mul_(-0.7)
    torch.testing.assert_close(call(x), layer(x))
    for parameter in layer.parameters():
        parameter.data = parameter.data * 0.5
    torch.testing.assert_close(call(x), layer(x))
    assert len(graphs.calls) == 1


def test_a_moved_layer_is_compiled_for_where_it_is():
    layer = whole_layer()
    call, _ = compiled(layer)
    call(torch.randn(4, H))
    layer.to(torch.bfloat16)
    x = torch.randn(4, H, dtype=torch.bfloat16)
    torch.testing.assert_close(call(x), layer(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_runs_its_own_weights(copied):
    layer = whole_layer()
    other = copied(layer)
    for parameter in other.parameters():
        parameter.mul_(-1.5)
    x = torch.randn(4, H)
    for one in (other, layer):
        call, graphs = compiled(one)
        torch.testing.assert_close(call(x), one(x))
        assert graphs.operators == 1


def test_weights_given_for_a_call_are_used():
    layer = layer_of()
    given = {name: tensor * -1.5 for name, tensor in layer.named_parameters()}
    rows = torch.randn(4, H), torch.randn(4, E)
    graphs = Graphs()
    torch._dynamo.reset()

    @torch.compile(backend=graphs, fullgraph=True)
    def call(tensors, *rows):
        return torch.func.functional_call(layer, tensors, rows)

    wanted = torch.func.functional_call(layer, given, rows)
    torch.testing.assert_close(call(given, *rows), wanted)
    assert graphs.operators == 1
    assert all(tensor is not given[name] for name, tensor in layer.named_parameters())


def test_what_watches_the_router_from_later_on_is_told():
    layer = layer_of(enable_eplb=True)
    call, graphs = compiled(layer)
    rows = torch.randn(4, H), torch.randn(4, E)
    wanted = call(*rows)
    load = torch.zeros(1, E, dtype=torch.int32)
    table = torch.arange(E).view(1, E, 1)
    layer.set_eplb_state(0, load, table, torch.ones(1, E, dtype=torch.int64))
    torch.testing.assert_close(call(*rows), wanted)
    assert load.sum() == 4 * K
    assert graphs.operators == 1
    assert len(graphs.calls) == 2


def test_with_gradients_autocast_or_listeners_it_is_traced():
    layer = layer_of()
    rows = torch.randn(4, H), torch.randn(4, E)

    def operators():
        call, graphs = compiled(layer)
        call(*rows)
        return graphs.operators

    assert operators() == 1
    with torch.enable_grad():
        assert operators() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert operators() == 0
    layer.routed_experts.register_forward_hook(lambda *_: None)
    assert operators() == 0


def test_zero_experts_are_traced():
    layer = layer_of(zero_expert_type="identity", e_score_correction_bias=torch.randn(E + 2))
    call, graphs = compiled(layer)
    rows = torch.randn(4, H), torch.randn(4, E + 2)
    torch.testing.assert_close(call(*rows), layer(*rows))
    assert graphs.operators == 0


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_no_number_of_this_process(strict):
    torch._dynamo.reset()
    rows = torch.randn(4, H), torch.randn(4, E)
    program = torch.export.export(layer_of(), rows, strict=strict)
    assert "routed_experts" not in {str(node.target) for node in program.graph.nodes}
