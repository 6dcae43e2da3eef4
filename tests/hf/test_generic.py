"""The replacement for models of no known family: anything called ``experts`` that we can run."""

import copy
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import fusedmoe
from fusedmoe.activation import MoEActivation
from fusedmoe.integrations.transformers.accelerate import _replacement, accelerated_blocks
from fusedmoe.integrations.transformers.generic import (
    TransformersFusedMoE,
    get_expert_mapping,
    recursive_replace,
    transformers_moe_forward,
)

E, K, H, I, T = 5, 2, 16, 24, 7  # noqa: E741
STYLES = {
    "gate_proj": ("gate_proj", "up_proj", "down_proj"),
    "w1": ("w1", "w3", "w2"),
    "linear": ("linear", "linear_v", "linear_1"),
    "no gate": (None, "up_proj", "down_proj"),
    "fc1": (None, "fc1", "fc2"),
}
ACTIVATIONS = {
    "silu": (nn.SiLU(), MoEActivation.SILU),
    "gelu": (nn.GELU(), MoEActivation.GELU),
    "gelu_tanh": (nn.GELU(approximate="tanh"), MoEActivation.GELU_TANH),
}


class Expert(nn.Module):
    """One expert, its layers named in one of the styles."""

    def __init__(self, style="gate_proj", act=ACTIVATIONS["silu"][0], bias=False, inner=I):
        super().__init__()
        self.names = STYLES[style]
        self.act = act
        for name in self.names[:2]:
            if name is not None:
                self.add_module(name, nn.Linear(H, inner, bias=bias))
        self.add_module(self.names[2], nn.Linear(inner, H, bias=bias))

    def forward(self, x):
        gate, up, down = (None if name is None else getattr(self, name) for name in self.names)
        return down(self.act(up(x)) if gate is None else self.act(gate(x)) * up(x))


class ExpertList(nn.ModuleList):
    """A list that is called with the router's choice."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for token in range(hidden_states.shape[0]):
            for expert, weight in zip(top_k_index[token], top_k_weights[token], strict=True):
                row = hidden_states[token : token + 1]
                output[token] += weight * self[int(expert)](row)[0]
        return output


class Stacked(nn.Module):
    """3-D parameters, in either orientation, with or without biases and a gate."""

    def __init__(self, transposed=False, bias=False, gated=True, hidden=H, inner=I):
        super().__init__()
        self.act_fn = nn.SiLU()
        self.transposed = transposed
        self.up_name = "gate_up_proj" if gated else "up_proj"
        shapes = {self.up_name: (inner * (1 + gated), hidden), "down_proj": (hidden, inner)}
        for name, shape in shapes.items():
            shape = shape[::-1] if transposed else shape
            self.register_parameter(name, nn.Parameter(torch.randn(E, *shape) * 0.3))
            if bias:
                rows = shapes[name][0]
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, rows)))

    def _linear(self, name, x, expert):
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias", None)
        weight = weight.T if self.transposed else weight
        return F.linear(x, weight, None if bias is None else bias[expert])

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for token in range(hidden_states.shape[0]):
            for expert, weight in zip(top_k_index[token], top_k_weights[token], strict=True):
                up = self._linear(self.up_name, hidden_states[token], expert)
                if self.up_name == "gate_up_proj":
                    gate, up = up.chunk(2, -1)
                    up = self.act_fn(gate) * up
                else:
                    up = self.act_fn(up)
                output[token] += weight * self._linear("down_proj", up, expert)
        return output


class Block(nn.Module):
    """A router of its own, and ``experts`` that it calls (or, a plain list, loops over)."""

    def __init__(self, experts):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = experts

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(K)
        if type(self.experts) is not nn.ModuleList:
            return self.experts(x, ids, weights)
        return ExpertList.forward(self.experts, x, ids, weights)


class Model(nn.Module):
    def __init__(self, *experts, **config):
        super().__init__()
        sizes = {"hidden_size": H, "num_experts_per_tok": K, "moe_intermediate_size": I}
        self.config = SimpleNamespace(**(config or sizes))
        self.layers = nn.ModuleList(Block(e) for e in experts)
        self.eval()

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def model_of(*experts, **config):
    return Model(*experts, **config)


def listed(kind=ExpertList, style="gate_proj", **settings):
    return kind(Expert(style, **settings) for _ in range(E))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(T, H)


def check(model, x, layers=None):
    """Replaced, the model gives what it gave; returns the new layers."""
    with torch.no_grad():
        wanted = model(x)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        replaced = recursive_replace(model)
        got = model(x)
    assert tiny_models.relative_error(got, wanted) <= 1e-5
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert len(replaced) == (len(model.layers) if layers is None else layers)
    return list(replaced.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", [ExpertList, nn.ModuleList])
def test_lists_in_every_naming_style(x, kind, style, bias):
    layers = check(model_of(*(listed(kind, style, bias=bias) for _ in range(2))), x)
    assert all(layer.settings.has_bias is bias for layer in layers)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_is_found_by_running_an_expert(x, name):
    act, activation = ACTIVATIONS[name]
    (layer,) = check(model_of(listed(act=act)), x)
    assert layer.gate.activation is activation


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_three_dimensional_containers(x, transposed, bias, gated):
    (layer,) = check(model_of(Stacked(transposed, bias, gated)), x)
    assert layer.weights.w13().data_ptr() == getattr(layer, layer.up_name).data_ptr()


@pytest.mark.parametrize("transposed", [False, True])
def test_an_orientation_that_only_the_config_tells(transposed):
    """Without a gate [E, I, H], [E, H, I] reads the same as [E, H, I], [E, I, H]."""
    experts = Stacked(transposed, gated=False)
    with pytest.raises(ValueError, match="two ways"):
        TransformersFusedMoE(experts, K)
    layer = TransformersFusedMoE(experts, K, hidden_size=H)
    assert layer.weights.w13().shape == (E, I, H)
    with pytest.raises(ValueError, match="two ways"):
        TransformersFusedMoE(Stacked(gated=False, inner=H), K, hidden_size=H)


def storage_bytes(model):
    return sum(
        {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
        }.values()
    )


def test_experts_that_cannot_be_checked_get_their_storage_back(monkeypatch):
    def fail(*args):
        raise ValueError("ours does not run here")

    model = model_of(listed())
    monkeypatch.setattr("fusedmoe.integrations.transformers.generic.disagreement", fail)
    assert not recursive_replace(model)
    parameters = list(model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)


def test_stacking_does_not_double_memory_and_keeps_the_parameters(x):
    model = model_of(listed(), listed())
    before, size = dict(model.named_parameters()), storage_bytes(model)
    check(model, x)
    assert storage_bytes(model) == size
    assert dict(model.named_parameters()) == before
    fusedmoe.restore(model)
    assert storage_bytes(model) == size
    assert dict(model.named_parameters()) == before


@pytest.mark.parametrize("experts", [listed, Stacked])
def test_casts_loads_and_copies_reach_the_experts(x, experts):
    model, other = model_of(experts()), model_of(experts())
    with torch.no_grad():
        wanted, wanted_64 = other(x), copy.deepcopy(other).double()(x.double())
        recursive_replace(model)
        for assign in (False, True):
            model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
            assert tiny_models.relative_error(model(x), wanted) <= 1e-5
        twin = copy.deepcopy(model)
        model.double()
        assert tiny_models.relative_error(model(x.double()), wanted_64) <= 1e-6
        for parameter in model.parameters():
            parameter.zero_()
        assert model(x.double()).eq(x).all()
        assert tiny_models.relative_error(twin(x), wanted) <= 1e-5


def test_a_safetensors_file_takes_the_stacked_parameters(x, tmp_path):
    model = model_of(listed())
    check(model, x)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_indexing_and_attributes_are_those_of_the_original(x):
    experts = listed()
    (layer,) = check(model_of(experts), x)
    assert layer[1] is experts[1]
    assert list(layer) == list(experts)
    assert len(layer) == E
    stacked = Stacked()
    (layer,) = check(model_of(stacked), x)
    assert layer.act_fn is stacked.act_fn
    assert layer.transposed is False
    with pytest.raises(AttributeError, match="nonsense"):
        _ = layer.nonsense


def test_leading_dimensions_extra_keywords_and_the_sentinel(x):
    experts = listed()
    layer = TransformersFusedMoE(experts, K)
    ids = torch.rand(T, E).topk(K).indices
    weights = torch.rand(T, K, dtype=torch.float64)
    with torch.no_grad():
        wanted = experts(x, ids, weights.float())
        got = layer(x.view(1, T, H), ids, weights, output_router_logits=True)
        torch.testing.assert_close(got, wanted.view(1, T, H))
        ids[3], weights[3] = E, 0
        assert layer(x, ids, weights)[3].eq(0).all()
        with pytest.raises(ValueError, match="7"):
            layer(x, ids.clone().fill_(7), weights)
        assert layer(x[:0], ids[:0], weights[:0]).shape == (0, H)


def test_training_runs_the_original_and_eval_refuses_a_backward_pass(x):
    experts = listed()
    layer = TransformersFusedMoE(experts, K)
    ids, weights = torch.rand(T, E).topk(K).indices, torch.rand(T, K)
    layer.train()(x, ids, weights).sum().backward()
    assert experts[int(ids[0, 0])].gate_proj.weight.grad.abs().sum() > 0
    torch._dynamo.reset()
    for call in (layer.eval(), torch.compile(layer, backend="aot_eager", fullgraph=True)):
        output = call(x.requires_grad_(), ids, weights)
        with pytest.raises(RuntimeError, match="no backward"):
            output.sum().backward()


def test_autocast_runs_the_original_where_it_has_a_forward(x):
    experts = listed().to(torch.bfloat16)
    layer = TransformersFusedMoE(experts, K)
    ids, weights = torch.rand(T, E).topk(K).indices, torch.rand(T, K)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x, ids, weights), experts(x, ids, weights))


class Odd(nn.Module):
    def forward(self, x):
        return torch.tanh(x) + 0.1


class Scaled(ExpertList):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 1.5 * super().forward(hidden_states, top_k_index, top_k_weights)


class OtherSignature(ExpertList):
    def forward(self, hidden_states):
        return hidden_states


def broken_gate_order():
    experts = Stacked()
    experts._apply_gate = lambda gate_up: F.silu(gate_up.chunk(2, -1)[1]) * gate_up.chunk(2, -1)[0]
    return experts


def unequal():
    experts = listed()
    experts[3] = Expert(inner=I + 1)
    return experts


def half_biased():
    experts = listed()
    experts[2].down_proj = nn.Linear(I, H)
    return experts


def with_extra_parameter():
    experts = Stacked()
    experts.scale = nn.Parameter(torch.ones(E))
    return experts


REFUSED = {
    "unknown activation": (lambda: listed(act=Odd()), "the activation of Expert is none of ours"),
    "unknown gate": (broken_gate_order, "the activation of Stacked is none of ours"),
    "another sum": (lambda: listed(Scaled), "on random rows our result differs by"),
    "another call": (lambda: listed(OtherSignature), "raises TypeError"),
    "unequal experts": (unequal, "experts differ"),
    "one bias": (half_biased, "experts differ"),
    "empty": (nn.ModuleList, "the list is empty"),
    "other layers": (lambda: nn.ModuleList(nn.Linear(H, H) for _ in range(E)), "linear layers of"),
    "no weights": (nn.Identity, "it is no list"),
    "more parameters": (with_extra_parameter, "parameters beyond"),
    "meta": (lambda: listed().to("meta"), "no storage yet"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_run_is_left_alone_and_named(x, what, caplog):
    make, reason = REFUSED[what]
    experts = make()
    model = model_of(experts)
    parameters = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="fusedmoe"):
        assert recursive_replace(model) == {}
    assert model.layers[0].experts is experts
    assert f"layers.0.experts ({type(experts).__name__}) is left as it is" in caplog.text
    assert reason in caplog.text
    assert "_apply" not in vars(experts)
    for key, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value, parameters[key])


def test_each_replacement_is_logged_with_its_path(x, caplog):
    with caplog.at_level(logging.INFO, logger="fusedmoe"):
        check(model_of(listed(), Stacked()), x)
    assert "layers.0.experts (ExpertList) is replaced" in caplog.text
    assert "layers.1.experts (Stacked) is replaced" in caplog.text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_experts_per_tok": 3, "norm_topk_prob": False}, {"top_k": 3, "renormalize": False}),
        ({"top_k": 1}, {"top_k": 1, "renormalize": False}),
        ({"num_experts_per_tok": 2}, {"renormalize": True, "num_expert_group": None}),
        (
            {"num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "n_shared_experts": 1},
            {"num_expert_group": 4, "topk_group": 2, "num_shared_experts": 1},
        ),
        ({"top_k": 2, "num_experts_shared": 3}, {"num_shared_experts": 3, "reduce_results": False}),
        ({"top_k": 2, "moe_num_shared_experts": 2}, {"num_shared_experts": 2}),
        (
            {"text_config": SimpleNamespace(num_experts_per_tok=4), "num_experts_per_tok": 9},
            {"top_k": 4},
        ),
    ],
)
def test_settings_come_from_the_text_config_under_any_name(config, expected):
    (layer,) = recursive_replace(model_of(listed(), **config)).values()
    for name, value in expected.items():
        assert getattr(layer.settings, name) == value
    assert (layer.settings.hidden_size, layer.settings.intermediate_size) == (H, I)


def test_shared_experts_are_seen_by_their_parameters_name():
    model = model_of(listed())
    assert next(iter(recursive_replace(copy.deepcopy(model)).values())).settings.reduce_results
    model.layers[0].shared_expert = nn.Linear(H, H)
    settings = next(iter(recursive_replace(model).values())).settings
    assert (settings.num_shared_experts, settings.reduce_results) == (1, False)


def test_restore_puts_everything_back(x):
    experts = listed(), Stacked()
    model = model_of(*experts)
    with torch.no_grad():
        wanted = model(x)
    check(model, x)
    fusedmoe.restore(model)
    assert [layer.experts for layer in model.layers] == list(experts)
    assert all("_apply" not in vars(module) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
        model.double()(x.double())


def test_accelerate_replaces_what_no_family_row_describes(x):
    model = model_of(listed(), Stacked())
    with torch.no_grad():
        wanted = model(x)
        assert fusedmoe.accelerate(model) is model
        assert len(accelerated_blocks(model)) == 2
        assert tiny_models.relative_error(model(x), wanted) <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gemma4", "qwen3_vl_moe", "nemotron_h"])
def test_transformers_own_experts(name):
    row = tiny_models.by_name(name)
    wanted, tokens = tiny_models.eager_results(name)
    model = tiny_models.build(row)
    assert len(recursive_replace(model)) == 2
    assert tiny_models.relative_error(tiny_models.logits(row, model), wanted) <= 1e-4
    assert torch.equal(tiny_models.greedy_tokens(row, model), tokens)


def grok_block():
    """A block as in the port that Grok-1's checkpoint is read with: a plain list, looped over."""

    class MoeBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts, self.top_k = E, K
            self.gate = nn.Linear(H, E, bias=False)
            self.experts = listed(nn.ModuleList, "linear", act=nn.GELU())

        def forward(self, hidden_states):
            x = hidden_states.view(-1, H)
            logits = self.gate(x)
            weights, ids = torch.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k)
            output = ExpertList.forward(self.experts, x, ids, weights)
            return output.reshape(hidden_states.shape), logits

    home = ModuleType("some_package.modeling_grok1")
    sys.modules[home.__name__] = home
    home.MoeBlock, MoeBlock.__module__, MoeBlock.__qualname__ = MoeBlock, home.__name__, "MoeBlock"
    return MoeBlock().eval()


@torch.no_grad()
def test_grok_1_has_a_row_of_its_own(x):
    block = grok_block()
    with torch.no_grad():
        wanted = block(x.view(1, T, H))
    keys = list(block.state_dict())
    fusedmoe.accelerate(block)
    assert _replacement(block) is not None
    _replacement(block).original = None
    for ours, theirs in zip(block(x.view(1, T, H)), wanted, strict=True):
        assert ours.shape == theirs.shape
        assert tiny_models.relative_error(ours, theirs) <= 1e-5
    assert list(block.state_dict()) == keys
    assert "experts.3.linear_v.weight" in keys
    block.double()
    assert tiny_models.relative_error(block(x.view(1, T, H).double())[0], wanted[0]) <= 1e-5


@torch.no_grad()
def test_a_block_that_loops_over_a_replaced_list_still_works(x):
    block = grok_block()
    wanted = block(x.view(1, T, H))[0]
    recursive_replace(block)
    assert isinstance(block.experts, TransformersFusedMoE)
    block.forward = lambda states: ExpertList.forward(
        block.experts,
        states.view(-1, H),
        *reversed(torch.softmax(block.gate(states.view(-1, H)), 1).topk(K)),
    )
    torch.testing.assert_close(block(x.view(1, T, H)).view_as(wanted), wanted)


def test_the_mapping_lists_every_naming_style():
    mapping = get_expert_mapping(2)
    assert len(mapping) == 3 * 2 * 3
    assert ("experts.w13_", "experts.1.linear_v.", 1, "w3") in mapping
    assert ("experts.w2_", "experts.0.linear_1.", 0, "w2") in mapping
    assert ("experts.w13_", "experts.1.w1.", 1, "w1") in mapping
    assert ("experts.w2_", "experts.0.down_proj.", 0, "w2") in mapping
    layer = TransformersFusedMoE(listed(), K)
    assert layer.get_expert_mapping() == get_expert_mapping(E)
    names = {f"experts.{name}" for name, _ in listed().named_parameters()}
    assert all(any(entry[1] in name for entry in layer.get_expert_mapping()) for name in names)


@pytest.mark.parametrize("bias", [False, True])
def test_the_custom_op_has_a_faithful_fake(x, bias):
    layer = TransformersFusedMoE(Stacked(bias=bias), K)
    weights = layer.weights
    tensors = [weights.w13(), weights.w2(), weights.w13_bias(), weights.w2_bias()]
    arguments = (
        x,
        torch.rand(T, E).topk(K).indices,
        torch.rand(T, K),
        *(None if tensor is None else tensor.detach() for tensor in tensors),
        "silu",
        layer.gate.config.numbers(),
    )
    torch.library.opcheck(
        torch.ops.fusedmoe.transformers_moe_forward.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("experts", [listed, Stacked])
@torch.no_grad()
def test_a_compiled_layer_is_one_graph(x, experts):
    layer = TransformersFusedMoE(experts(), K).eval()
    ids, weights = torch.rand(T, E).topk(K).indices, torch.rand(T, K)
    wanted = transformers_moe_forward(x, ids, weights, layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ids, weights), wanted)
