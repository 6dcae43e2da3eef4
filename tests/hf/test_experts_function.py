"""``experts_implementation="fusedmoe"``: every decorated family gives what its own experts give."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import fusedmoe
from fusedmoe.activation import MoEActivation
from fusedmoe.integrations.transformers import experts_function
from fusedmoe.integrations.transformers.gates import forget_gate, gate_of

NAMES = [row.name for row in tiny_models.DECORATED]
# Their experts compute what no activation here does: Transformers' own function runs them.
NOT_OURS = {"inkling2", "muse_spark"}


def experts_of(model, row):
    return [m for m in model.modules() if type(m).__name__ == row.experts_class]


def tiny_experts(name):
    """The first experts module of a row, float32, with fresh random tensors around it."""
    row = tiny_models.by_name(name)
    return experts_of(tiny_models.build(row), row)[0]


def routed(experts, T=11, K=2, seed=0):
    """hidden_states [T, H], distinct ids [T, K], weights [T, K] for a module."""
    generator = torch.Generator().manual_seed(seed)
    H = experts_function.expert_tensors(experts).w13.shape[2]
    E = experts.num_experts
    ids = torch.rand(T, E, generator=generator).topk(K).indices
    return (
        torch.randn(T, H, generator=generator),
        ids,
        torch.rand(T, K, generator=generator).softmax(-1),
    )


@torch.no_grad()
def eager(experts, *inputs):
    experts.config._experts_implementation = "eager"
    return experts(*inputs)


@torch.no_grad()
def ours(experts, *inputs):
    experts.config._experts_implementation = "fusedmoe"
    return experts(*inputs)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_those_of_eager(name, monkeypatch):
    calls = []
    run = experts_function.run_experts
    monkeypatch.setattr(
        experts_function, "run_experts", lambda *args: calls.append(1) or run(*args)
    )
    row = tiny_models.by_name(name)
    wanted, tokens = tiny_models.eager_results(name)
    model = tiny_models.build(row, experts_implementation="fusedmoe")
    assert tiny_models.relative_error(tiny_models.logits(row, model), wanted) <= 1e-4
    assert bool(calls) != (name in NOT_OURS)
    assert name in NOT_OURS or len(calls) >= len(experts_of(model, row))
    if tokens is not None:
        assert torch.equal(tiny_models.greedy_tokens(row, model), tokens)


def test_the_switch_works_at_run_time():
    row = tiny_models.by_name("mixtral")
    model = tiny_models.build(row)
    wanted, _ = tiny_models.eager_results("mixtral")
    for name in ("fusedmoe", "eager", "fusedmoe"):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        assert tiny_models.relative_error(tiny_models.logits(row, model), wanted) <= 1e-4


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "deepseek_v3"])
def test_from_pretrained_takes_the_name(name, tmp_path):
    row = tiny_models.by_name(name)
    tiny_models.build(row).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="fusedmoe")
    assert model.config._experts_implementation == "fusedmoe"
    wanted, _ = tiny_models.eager_results(name)
    assert tiny_models.relative_error(tiny_models.logits(row, model.eval()), wanted) <= 1e-4


def test_registering_again_changes_nothing():
    before = ALL_EXPERTS_FUNCTIONS["fusedmoe"]
    fusedmoe.register()
    assert ALL_EXPERTS_FUNCTIONS["fusedmoe"] is before is experts_function.experts_forward


def test_without_transformers_register_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match=r"fusedmoe\[hf\]"):
        fusedmoe.register()


def test_transformers_is_not_imported_before_it_is_used():
    code = (
        "import sys, fusedmoe.integrations.transformers; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


GATES = {
    "mixtral": (MoEActivation.SILU, None),
    "gemma4": (MoEActivation.GELU_TANH, None),
    "nemotron_h": (MoEActivation.RELU2_NO_MUL, None),
    "gpt_oss": (MoEActivation.SWIGLUOAI, 7.0),
    "openai_privacy_filter": (MoEActivation.SWIGLUOAI_UNINTERLEAVE, 7.0),
    "minimax_m3_vl": (MoEActivation.SWIGLUOAI_UNINTERLEAVE, 1.5),
    "deepseek_v4": (MoEActivation.SILU, 1.5),
    "hy_v4": (MoEActivation.SILU, 1.5),
    "glm5_next": (MoEActivation.SILU, 1.5),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_recognised_by_its_values(name):
    gate = gate_of(tiny_experts(name))
    assert (gate.activation, gate.config.clamp_limit) == GATES[name]


def test_the_undecorated_step3p7_gate_is_recognised_with_and_without_its_limit():
    row = tiny_models.by_name("step3p7")
    limited, plain = experts_of(tiny_models.build(row), row)
    for module in (limited, plain):
        module.has_gate = True
    assert gate_of(limited).activation is MoEActivation.SWIGLUSTEP
    assert gate_of(limited).config.clamp_limit == 1.5
    assert gate_of(plain).activation is MoEActivation.SILU


@use_experts_implementation
class OddExperts(nn.Module):
    """A plain experts module whose gate is given from outside."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, 2 * 12, 16) * 0.4)
        self.down_proj = nn.Parameter(torch.randn(4, 16, 12) * 0.4)
        self.gate = config.gate

    def _apply_gate(self, gate_up):
        return self.gate(*gate_up.chunk(2, -1))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for token, (ids, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                gate_up = self.gate_up_proj[expert] @ hidden_states[token]
                output[token] += weight * (self.down_proj[expert] @ self._apply_gate(gate_up))
        return output


def odd_experts(gate):
    torch.manual_seed(0)
    config = SimpleNamespace(_experts_implementation="fusedmoe", gate=gate)
    return OddExperts(config).eval()


UNKNOWN = {
    "another function": lambda gate, up: torch.tanh(gate) * up + 0.1,
    "a clamp that shows far out": lambda gate, up: nn.functional.silu(gate.clamp(max=100)) * up,
    "up and gate swapped": lambda gate, up: nn.functional.silu(up) * gate,
    "almost silu": lambda gate, up: gate * torch.sigmoid(1.001 * gate) * up,
    "one up for all": lambda gate, up: nn.functional.silu(gate) * up[..., :1],
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_an_unknown_gate_is_run_by_itself_and_never_taken_for_another(what):
    experts = odd_experts(UNKNOWN[what])
    assert gate_of(experts).activation is None
    inputs = routed(experts)
    torch.testing.assert_close(ours(experts, *inputs), eager(experts, *inputs))


def test_a_gate_of_another_width_is_unknown():
    def twice(gate, up):
        return torch.cat([nn.functional.silu(gate) * up] * 2, -1)

    assert gate_of(odd_experts(twice)).activation is None


def test_a_gate_that_cannot_be_asked_is_unknown():
    def refuse(gate, up):
        raise RuntimeError("only on the moon")

    assert gate_of(odd_experts(refuse)).activation is None


def test_a_limit_that_the_gate_does_not_read_is_not_applied():
    experts = odd_experts(lambda gate, up: nn.functional.silu(gate) * up)
    experts.limit = 0.5
    assert gate_of(experts).config.clamp_limit is None


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_that_no_gate_can_have_leaves_it_unknown(limit):
    experts = odd_experts(lambda gate, up: torch.tanh(gate) * up)
    experts.limit = limit
    assert gate_of(experts).activation is None


def test_a_changed_gate_is_seen_after_forget_gate():
    experts = odd_experts(lambda gate, up: nn.functional.silu(gate) * up)
    assert gate_of(experts).activation is MoEActivation.SILU
    experts.gate = lambda gate, up: nn.functional.gelu(gate) * up
    forget_gate(experts)
    assert gate_of(experts).activation is MoEActivation.GELU


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("ranks", [2, 6])
def test_the_ranks_of_expert_parallelism_add_up(name, ranks):
    """Each rank holds E / ranks experts; slots of the others carry id E / ranks, weight 0."""
    whole = tiny_experts(name)
    x, ids, weights = routed(whole)
    wanted = eager(whole, x, ids, weights)
    local = whole.num_experts // ranks
    total = torch.zeros_like(x)
    for rank in range(ranks):
        part = tiny_experts(name)
        part.num_experts = local
        for key, value in list(part.named_parameters()):
            setattr(part, key, nn.Parameter(value[rank * local : (rank + 1) * local].clone()))
        mine = ids // local == rank
        total += ours(
            part, x, (ids % local).masked_fill(~mine, local), weights.masked_fill(~mine, 0)
        )
    assert tiny_models.relative_error(total, wanted) <= 1e-5


@pytest.mark.parametrize("wrong", [-2, 7])
def test_an_id_that_no_rank_has_is_refused(wrong):
    experts = tiny_experts("mixtral")
    x, ids, weights = routed(experts)
    ids[2, 1] = wrong
    with pytest.raises(ValueError, match=str(wrong)):
        ours(experts, x, ids, weights)


def test_a_token_with_no_expert_here_gives_zero_even_if_it_is_nan():
    experts = tiny_experts("mixtral")
    x, ids, weights = routed(experts)
    x[3] = float("nan")
    ids[3], weights[3] = experts.num_experts, 0
    output = ours(experts, x, ids, weights)
    assert output[3].eq(0).all()
    assert output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_router_weights_may_have_any_dtype(dtype, id_dtype):
    experts = tiny_experts("qwen3_moe")
    x, ids, weights = routed(experts)
    weights = weights.to(dtype)
    wanted = eager(experts, x, ids, weights.float())
    got = ours(experts, x, ids.to(id_dtype), weights)
    assert got.dtype == x.dtype
    assert tiny_models.relative_error(got, wanted) <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_no_tokens(name):
    experts = tiny_experts(name)
    x, ids, weights = routed(experts)
    assert ours(experts, x[:0], ids[:0], weights[:0]).shape == (0, x.shape[1])


def test_bf16_is_close_to_fp32():
    experts = tiny_experts("olmoe")
    x, ids, weights = routed(experts)
    wanted = eager(experts, x, ids, weights)
    got = ours(experts.to(torch.bfloat16), x.bfloat16(), ids, weights)
    assert got.dtype == torch.bfloat16
    assert tiny_models.relative_error(got.float(), wanted) <= 2e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_module_that_never_ran_can_be_exported(name):
    experts = tiny_experts(name).eval()
    inputs = routed(experts)
    wanted = eager(experts, *inputs)
    experts.config._experts_implementation = "fusedmoe"
    program = torch.export.export(experts, inputs, strict=False)
    assert any("fused_experts" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), wanted, rtol=1e-4, atol=1e-5)


def test_training_mode_has_gradients_and_eval_mode_refuses_to_pretend():
    experts = tiny_experts("mixtral")
    inputs = routed(experts)
    experts.config._experts_implementation = "fusedmoe"
    experts.train()(*inputs).sum().backward()
    got = experts.down_proj.grad.clone()
    experts.zero_grad()
    experts.config._experts_implementation = "eager"
    experts(*inputs).sum().backward()
    torch.testing.assert_close(got, experts.down_proj.grad)

    experts.config._experts_implementation = "fusedmoe"
    torch._dynamo.reset()
    compiled = torch.compile(experts.eval(), backend="aot_eager")
    with torch.no_grad():
        wanted = experts(*inputs)
    for call in (experts, compiled):
        output = call(inputs[0].requires_grad_(), *inputs[1:])
        torch.testing.assert_close(output, wanted)
        with pytest.raises(RuntimeError, match="no backward"):
            output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_left_to_transformers(dtype):
    """Rows in fp32 between layers in bf16: no dtype that experts of ours could agree on."""
    experts = tiny_experts("mixtral").to(torch.bfloat16)
    x, ids, weights = routed(experts)
    with torch.autocast("cpu", dtype=dtype):
        got = ours(experts, x.float(), ids, weights)
        experts.config._experts_implementation = "grouped_mm"
        assert torch.equal(got, experts(x.float(), ids, weights))


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_dtensor_parameters_are_read_locally(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    experts = tiny_experts("gpt_oss")
    inputs = routed(experts)
    wanted = eager(experts, *inputs)
    mesh = init_device_mesh("cpu", (1,))
    for key, value in list(experts.named_parameters()):
        setattr(experts, key, nn.Parameter(distribute_tensor(value.data, mesh, [Shard(0)])))
    assert tiny_models.relative_error(ours(experts, *inputs), wanted) <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_compiled_model_has_no_graph_break(name):
    row = tiny_models.by_name(name)
    model = tiny_models.build(row, experts_implementation="fusedmoe")
    wanted, _ = tiny_models.eager_results(name)
    if torch.__version__ < "2.13":  # there a gate is not recognised while a graph is traced
        torch.compile(model, backend="eager")(input_ids=tiny_models.token_ids(), use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ids = tiny_models.token_ids()
        got = compiled(input_ids=ids, use_cache=False).logits
    assert tiny_models.relative_error(got, wanted) <= 1e-4
