"""FusedMoE(): every argument has its effect or is refused, and the layer is the fp64 loop."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fusedmoe
from fusedmoe import (
    FusedMoE,
    MoEActivation,
    MoEOptions,
    MoERunner,
    ParallelGroups,
    RoutedExperts,
    RoutingSpec,
    SpecRouter,
    UnquantizedFusedMoEMethod,
)
from fusedmoe.activation import ApplyMoEActivationConfig
from fusedmoe.config import RoutingMethodType
from fusedmoe.router.base import FusedMoERouter
from fusedmoe.router.spec import RoutingResult
from fusedmoe.router.substitution import ExpertSubstitution
from layer_oracle import Experts, Rule, routed_oracle
from toy_stages import BatchedExperts

E, K, H, I = 6, 2, 8, 12  # noqa: E741
TORCH = MoEOptions(experts="torch")


def layer(experts: Experts | None = None, **arguments) -> MoERunner:
    """A small fp32 layer on the torch experts, loaded with ``experts``."""
    arguments = {
        "num_experts": E,
        "top_k": K,
        "hidden_size": H,
        "intermediate_size": I,
        "params_dtype": torch.float32,
        "options": TORCH,
    } | arguments
    runner = FusedMoE(**arguments)
    if experts is not None:
        runner.load_weights(experts.named())
        runner.routed_experts.check_loaded()
    return runner


def rows(T: int = 5, seed: int = 1, columns: int = E) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator)
    return x, torch.randn(T, columns, generator=generator) * 2


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-5)


def test_the_argument_list_is_that_of_the_reference():
    """In its order, with its defaults; everything beyond it is keyword-only with one."""
    parameters = list(inspect.signature(FusedMoE).parameters.values())
    positional = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert " ".join(positional) == (
        "num_experts top_k hidden_size intermediate_size params_dtype=None renormalize=True "
        "use_grouped_topk=False num_expert_group=None topk_group=None quant_config=None "
        "tp_size=None dp_size=None pcp_size=None prefix='' custom_routing_function=None "
        "router=None scoring_func='softmax' routed_scaling_factor=1.0 swiglu_limit=None "
        "e_score_correction_bias=None apply_router_weight_on_input=False activation='silu' "
        "enable_eplb=False num_redundant_experts=0 has_bias=False is_sequence_parallel=False "
        "expert_mapping=None n_shared_experts=None router_logits_dtype=None gate=None "
        "shared_experts=None shared_expert_gate=None routed_input_transform=None "
        "routed_output_transform=None apply_routed_scale_to_output=False zero_expert_type=None "
        "hash_indices_table=None runner_cls=None runner_args=None routed_experts_cls=None "
        "routed_experts_args=None"
    )
    assert all(p.default is not p.empty for p in parameters[4:])


def test_every_argument_has_a_test_here():
    """A name that this file never passes would be accepted and ignored unnoticed."""
    source = Path(__file__).read_text()
    for name in inspect.signature(FusedMoE).parameters:
        assert f"{name}=" in source or f'"{name}":' in source, name


ROUTING = st.fixed_dictionaries(
    {
        "scoring_func": st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
        "renormalize": st.booleans(),
        "scale": st.sampled_from([1.0, 2.5]),
        "has_correction": st.booleans(),
        "grouped": st.booleans(),
    }
)
ACTIVATIONS = [
    (MoEActivation.SILU, {}),
    (MoEActivation.SILU, {"swiglu_limit": 0.5}),
    (MoEActivation.GELU, {}),
    (MoEActivation.GELU_TANH, {}),
    (MoEActivation.SWIGLUOAI, {}),
    (MoEActivation.SWIGLUOAI, {"swiglu_limit": 0.5, "swiglu_alpha": 1.1, "swiglu_beta": 0.3}),
    (MoEActivation.SWIGLUOAI_UNINTERLEAVE, {"swiglu_limit": 2.0, "swiglu_alpha": 1.7}),
    (MoEActivation.SWIGLUSTEP, {}),
    (MoEActivation.SITU, {"activation_situ_beta": 2.0, "activation_situ_linear_beta": 1.5}),
    (MoEActivation.SILU_NO_MUL, {}),
    (MoEActivation.RELU2_NO_MUL, {}),
]
NUMBERS = {
    "swiglu_limit": "clamp_limit",
    "swiglu_alpha": "alpha",
    "swiglu_beta": "beta",
    "activation_situ_beta": "situ_beta",
    "activation_situ_linear_beta": "situ_linear_beta",
}


@settings(max_examples=60, deadline=None)
@given(
    routing=ROUTING,
    activation=st.sampled_from(ACTIVATIONS),
    top_k=st.sampled_from([1, 2, 4, 6]),
    bias=st.booleans(),
    scale_on_output=st.booleans(),
    with_shared=st.sampled_from([None, "plain", "gated", "fused"]),
    weight_on_input=st.booleans(),
    tokens=st.sampled_from([0, 1, 5]),
    implementation=st.sampled_from(["torch", "cpu", "cpu_monolithic", "grouped_mm", None]),
    seed=st.integers(0, 99),
)
def test_the_layer_is_the_loop(
    routing,
    activation,
    top_k,
    bias,
    scale_on_output,
    with_shared,
    weight_on_input,
    tokens,
    implementation,
    seed,
):
    act, numbers = activation
    weight_on_input = weight_on_input and top_k == 1 and with_shared != "fused"
    grouped = routing["grouped"] and top_k <= 4
    generator = torch.Generator().manual_seed(seed)
    correction = torch.rand(E, generator=generator) if routing["has_correction"] else None
    fused = 2 if with_shared == "fused" else 0
    experts = Experts.random(E + fused, H, I, gated=act.is_gated, bias=bias, seed=seed)
    shared = nn.Linear(H, H) if with_shared in ("plain", "gated") else None
    shared_gate = nn.Linear(H, 1) if with_shared == "gated" else None
    runner = layer(
        experts if act.is_gated else None,
        top_k=top_k,
        scoring_func=routing["scoring_func"],
        renormalize=routing["renormalize"],
        routed_scaling_factor=routing["scale"],
        apply_routed_scale_to_output=scale_on_output,
        e_score_correction_bias=correction,
        use_grouped_topk=grouped,
        num_expert_group=3 if grouped else None,
        topk_group=2 if grouped else None,
        activation=act.value,
        has_bias=bias,
        apply_router_weight_on_input=weight_on_input,
        shared_experts=shared,
        shared_expert_gate=shared_gate,
        n_shared_experts=fused or None,
        ckpt_names=("gate_proj", "down_proj", "up_proj")
        if act.is_gated
        else ("up_proj", "down_proj", None),
        options=MoEOptions(experts=implementation),
        **numbers,
    )
    if not act.is_gated:
        runner.load_weights(experts.named())
    x, logits = rows(tokens, seed)
    config = ApplyMoEActivationConfig(**{NUMBERS[k]: v for k, v in numbers.items()})
    rule = Rule(
        top_k,
        routing["scoring_func"],
        routing["renormalize"],
        routing["scale"] if not scale_on_output else 1.0,
        correction,
        3 if grouped else 0,
        2 if grouped else 0,
    )
    expected = routed_oracle(
        x,
        logits,
        experts,
        rule,
        activation=act,
        activation_config=config,
        weight_on_input=weight_on_input,
    )
    if scale_on_output:
        expected = expected * routing["scale"]
    for t in range(tokens):
        for e in range(E, E + fused):
            expected[t] += experts.run(e, x[t].double(), act, config)
    if shared is not None:
        term = x @ shared.weight.T + shared.bias
        if shared_gate is not None:
            term = term * torch.sigmoid(x @ shared_gate.weight.T + shared_gate.bias)
        expected = expected + term.double()
    close(runner(x, logits), expected)


def test_prefix_names_the_layer_in_checkpoints_and_errors():
    experts = Experts.random(E, H, I)
    runner = layer(prefix="model.layers.3.mlp")
    runner.load_weights((f"model.layers.3.mlp.{n}", t) for n, t in experts.named()[:-1])
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp misses 1 of 18"):
        runner.routed_experts.check_loaded()


def test_params_dtype_is_the_weights_and_torchs_default_without_one():
    assert layer(params_dtype=torch.bfloat16).routed_experts.w13_weight.dtype is torch.bfloat16
    assert layer(params_dtype=None).routed_experts.w2_weight.dtype is torch.get_default_dtype()


def test_device_may_be_meta_and_becomes_real_later():
    experts = Experts.random(E, H, I)
    runner = layer(device="meta")
    assert runner.routed_experts.w13_weight.is_meta
    with pytest.raises(ValueError, match="meta"):
        runner.load_weights(experts.named())
    runner.to_empty(device="cpu").load_weights(experts.named())
    x, logits = rows()
    close(runner(x, logits), routed_oracle(x, logits, experts, Rule(K)))


def test_meta_as_the_default_device_keeps_the_expert_maps():
    """As when a whole model is built without memory and filled afterwards."""
    torch.manual_seed(0)
    experts = Experts.random(E, H, I)
    x, logits = rows()
    total = torch.zeros_like(x)
    for rank in range(2):
        with torch.device("meta"):
            runner = layer(
                tp_size=2,
                tp_rank=rank,
                parallel=ParallelGroups(enable_expert_parallel=True),
            )
        assert runner.routed_experts.w13_weight.is_meta
        runner.to_empty(device="cpu").load_weights(experts.named())
        assert runner.expert_local_to_global.tolist() == list(range(3 * rank, 3 * rank + 3))
        total += runner(x, logits)
    close(total, routed_oracle(x, logits, experts, Rule(K)))


class FirstExperts(FusedMoERouter):
    """Everything to expert 0 and 1, half each."""

    routing_method_type = RoutingMethodType.Custom

    def select_experts(self, hidden_states, router_logits, topk_indices_dtype=None, **rows):
        T = hidden_states.shape[0]
        ids = torch.tensor([[0, 1]], dtype=torch.int32).expand(T, 2)
        return RoutingResult(torch.full((T, 2), 0.5), ids)


class APair(FirstExperts):
    """As the API reference has routers return it."""

    def select_experts(self, *args, **rows):
        return tuple(super().select_experts(*args, **rows))[:2]


@pytest.mark.parametrize("options", [MoEOptions(), MoEOptions(experts="cpu_monolithic")])
@pytest.mark.parametrize("router", [FirstExperts, APair])
def test_router_replaces_the_rule(router, options):
    experts = Experts.random(E, H, I)
    runner = layer(experts, router=router(), options=options)
    x, logits = rows(3)
    expected = torch.stack(
        [0.5 * (experts.run(0, row) + experts.run(1, row)) for row in x.double()]
    )
    close(runner(x, logits), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"renormalize": False},
        {"use_grouped_topk": True},
        {"num_expert_group": 2},
        {"topk_group": 1},
        {"scoring_func": "sigmoid"},
        {"routed_scaling_factor": 2.0},
        {"e_score_correction_bias": torch.zeros(E)},
        {"custom_routing_function": lambda *a: a},
        {"zero_expert_type": "identity"},
        {"hash_indices_table": torch.zeros(4, K, dtype=torch.int32)},
        {"bias_vl": torch.zeros(E)},
        {"image_sentinel_lo": 3},
    ],
    ids=lambda a: next(iter(a)),
)
def test_router_refuses_what_it_would_not_use(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        layer(router=FirstExperts(), **arguments)


def test_router_leaves_the_scale_on_the_output_to_the_layer():
    experts = Experts.random(E, H, I)
    x, logits = rows()
    plain = layer(experts, router=SpecRouter(RoutingSpec(top_k=K, num_experts=E)))(x, logits)
    scaled = layer(
        experts,
        router=SpecRouter(RoutingSpec(top_k=K, num_experts=E)),
        routed_scaling_factor=3.0,
        apply_routed_scale_to_output=True,
    )(x, logits)
    close(scaled, 3.0 * plain)


@pytest.mark.parametrize("scale_on_output", [False, True])
def test_n_shared_experts_are_routed_to_with_weight_one(scale_on_output):
    experts = Experts.random(E + 2, H, I)
    runner = layer(
        experts,
        n_shared_experts=2,
        routed_scaling_factor=3.0,
        apply_routed_scale_to_output=scale_on_output,
    )
    x, logits = rows()
    expected = routed_oracle(x, logits, experts, Rule(K, scale=3.0))
    for t, row in enumerate(x.double()):
        expected[t] += experts.run(E, row) + experts.run(E + 1, row)
    close(runner(x, logits), expected)
    assert runner.moe_config.experts_per_token == K + 2


def test_custom_routing_function_gets_the_layers_input_and_replaces_the_rule():
    seen = []

    def first(hidden_states, gating_output, topk, renormalize):
        seen.append((hidden_states.shape, topk, renormalize))
        T = hidden_states.shape[0]
        return torch.ones(T, topk), torch.arange(topk).expand(T, topk)

    experts = Experts.random(E, H, I)
    runner = layer(
        experts, custom_routing_function=first, renormalize=False, routed_scaling_factor=0.5
    )
    x, logits = rows(3)
    expected = torch.stack(
        [0.5 * (experts.run(0, row) + experts.run(1, row)) for row in x.double()]
    )
    close(runner(x, logits), expected)
    assert seen == [((3, H), K, False)]
    assert runner.router.routing_method_type is RoutingMethodType.Custom


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1},
        {"scoring_func": "sigmoid"},
        {"e_score_correction_bias": torch.zeros(E)},
        {"zero_expert_type": "identity"},
        {"hash_indices_table": torch.zeros(4, K, dtype=torch.int32)},
    ],
    ids=lambda a: next(iter(a)),
)
def test_custom_routing_function_refuses_what_it_would_not_use(arguments):
    with pytest.raises(ValueError, match="custom_routing_function"):
        layer(custom_routing_function=lambda *a: a, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_expert_group": 2}, "num_expert_group=2 would have no effect"),
        ({"topk_group": 2}, "topk_group=2 would have no effect"),
        ({"use_grouped_topk": True}, "num_expert_group"),
        ({"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}, "6 experts"),
        ({"use_grouped_topk": True, "num_expert_group": 0, "topk_group": 2}, "2 of no groups"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor nan"),
        (
            {"routed_scaling_factor": 0.0, "apply_routed_scale_to_output": True},
            "routed_scaling_factor 0.0",
        ),
        (
            {"routed_scaling_factor": float("inf"), "custom_routing_function": lambda *a: a},
            "routed_scaling_factor inf",
        ),
        ({"image_sentinel_lo": 4}, "image_sentinel_lo=4 would have no effect"),
        ({"scoring_func": "tanh"}, "tanh"),
        ({"top_k": 7}, "7"),
        ({"top_k": 0}, "0"),
        ({"activation": "swish2"}, "swish2"),
        ({"activation": "relu2"}, "relu2"),
        ({"activation": "silu", "swiglu_alpha": 1.0}, "silu has no swiglu_alpha"),
        ({"swiglu_limit": 0.0}, "limit must be positive, got 0.0"),
        ({"swiglu_limit": float("nan")}, "limit must be positive, got nan"),
        ({"activation": "swigluoai", "swiglu_alpha": float("inf")}, "alpha must be a finite"),
        ({"activation": "situ", "activation_situ_beta": 0.0}, "situ_beta is divided by"),
        ({"activation": "silu", "swiglu_beta": 1.0}, "silu has no swiglu_beta"),
        ({"activation": "silu", "activation_situ_beta": 1.0}, "activation_situ_beta"),
        ({"activation": "silu", "activation_situ_linear_beta": 1.0}, "situ_linear_beta"),
        ({"activation": "relu2_no_mul", "swiglu_limit": 1.0}, "relu2_no_mul has no swiglu_limit"),
        ({"apply_router_weight_on_input": True}, "top-1"),
        ({"num_redundant_experts": 2}, "enable_eplb"),
        ({"enable_eplb": True, "num_redundant_experts": -1}, "-1"),
        ({"shared_expert_gate": nn.Linear(H, 1)}, "shared_expert_gate needs shared_experts"),
        ({"shared_experts_sharded": True}, "shared_experts_sharded needs shared_experts"),
        ({"n_shared_experts": 1, "shared_experts": nn.Linear(H, H)}, "one of the two"),
        ({"zero_expert_type": "constant"}, "constant"),
        ({"zero_expert_type": "identity"}, "e_score_correction_bias"),
        ({"num_experts": 0}, "0"),
        ({"top_k": 2.0}, "top_k must be an integer, got 2.0"),
        ({"intermediate_size": 96.0}, "intermediate_size must be an integer, got 96.0"),
        ({"params_dtype": "bf16"}, "one of torch's, got 'bf16'"),
        ({"activation": 3}, "unknown MoE activation 3"),
        ({"router": 3}, "router is a int, which has no select_experts"),
        ({"hidden_size": 0}, "hidden_dim"),
        ({"intermediate_size": 0}, "intermediate"),
        ({"tp_size": 2, "tp_rank": 2}, "tp_rank 2"),
        ({"tp_size": 0}, "0"),
        ({"is_sequence_parallel": True, "tp_size": 2}, "is_sequence_parallel"),
        (
            {
                "is_sequence_parallel": True,
                "tp_size": 2,
                "parallel": ParallelGroups(enable_expert_parallel=True),
                "shared_experts": nn.Linear(H, H),
                "shared_experts_sharded": True,
            },
            "a summand on each of 2 ranks",
        ),
        ({"quant_config": object()}, "get_quant_method"),
        ({"options": MoEOptions(experts="no such")}, "no such"),
        ({"options": MoEOptions(prepare_finalize="no such")}, "no such"),
        ({"expert_placement": "zigzag"}, "zigzag"),
        (
            {
                "expert_placement": "round_robin",
                "enable_eplb": True,
                "num_redundant_experts": 2,
            },
            "round_robin",
        ),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(**arguments)


def test_is_sequence_parallel_ranks_hold_different_tokens():
    """The parallel config says so, and nothing is summed over them by the layer."""
    runner = layer(
        tp_size=2,
        tp_rank=1,
        is_sequence_parallel=True,
        parallel=ParallelGroups(enable_expert_parallel=True),
    )
    assert runner.moe_config.moe_parallel_config.sp_size == 2
    assert not runner.rank_sum.communicates


def test_hash_indices_table_routes_by_token_id():
    table = torch.randint(0, E, (11, K), generator=torch.Generator().manual_seed(3))
    experts = Experts.random(E, H, I)
    runner = layer(experts, hash_indices_table=table.int(), scoring_func="sqrtsoftplus")
    x, logits = rows()
    input_ids = torch.tensor([0, 10, 3, 3, 7])
    rule = Rule(K, "sqrtsoftplus", table=table)
    expected = routed_oracle(x, logits, experts, rule, input_ids=input_ids)
    close(runner(x, logits, input_ids), expected)
    with pytest.raises(ValueError, match="input_ids"):
        runner(x, logits)
    assert runner.moe_config.has_hash_routing


def test_bias_vl_chooses_for_image_tokens():
    vision = torch.tensor([0.0, 0, 0, 0, 9, 9])
    text = torch.tensor([9.0, 9, 0, 0, 0, 0])
    experts = Experts.random(E, H, I)
    runner = layer(
        experts,
        scoring_func="sigmoid",
        e_score_correction_bias=text,
        bias_vl=vision,
        image_sentinel_lo=100,
    )
    x, logits = rows(2)
    out = runner(x, logits, torch.tensor([99, 104]))
    for t, bias in ((0, text), (1, vision)):
        one = slice(t, t + 1)
        rule = Rule(K, "sigmoid", bias=bias)
        close(out[one], routed_oracle(x[one], logits[one], experts, rule))


@pytest.mark.parametrize("scale_on_output", [False, True])
def test_zero_experts_return_the_token(scale_on_output):
    """With the scale on the output their term is scaled too: it belongs to the routed sum."""
    bias = torch.rand(E + 3, generator=torch.Generator().manual_seed(4))
    experts = Experts.random(E, H, I)
    runner = layer(
        experts,
        top_k=4,
        zero_expert_type="identity",
        e_score_correction_bias=bias,
        routed_scaling_factor=2.0,
        apply_routed_scale_to_output=scale_on_output,
        renormalize=False,
    )
    x, logits = rows(7, columns=E + 3)
    rule = Rule(4, renormalize=False, scale=2.0, bias=bias)
    close(runner(x, logits), routed_oracle(x, logits, experts, rule))
    with pytest.raises(ValueError, match=rf"\[7, {E + 3}\]"):
        runner(x, logits[:, :E])


def test_zero_experts_and_an_input_transform_exclude_each_other():
    with pytest.raises(ValueError, match="routed_input_transform"):
        layer(
            zero_expert_type="identity",
            e_score_correction_bias=torch.zeros(E + 1),
            routed_input_transform=nn.Linear(H, H),
        )


def test_expert_substitution_gives_constants_for_removed_experts():
    """Its own tests are in router/test_substitution.py."""
    constants = torch.ones(E - 1, H)
    runner = layer(expert_substitution=ExpertSubstitution(E, range(1, E), constants), top_k=1)
    x, logits = rows()
    logits[:, 0] = -100.0
    close(runner(x, logits), torch.ones_like(x))


def test_skip_padding_routes_marked_rows_nowhere():
    experts = Experts.random(E, H, I)
    runner = layer(experts, skip_padding=True)
    x, logits = rows()
    x[1] = float("nan")
    padding = torch.tensor([False, True, False, True, False])
    out = runner(x, logits, is_padding=padding)
    expected = routed_oracle(x, logits, experts, Rule(K), is_padding=padding)
    close(out, expected)
    with pytest.raises(ValueError, match="is_padding"):
        runner(x, logits)
    with pytest.raises(ValueError, match="is_padding"):
        layer(experts)(x, logits, is_padding=padding)


def test_gate_computes_the_logits_where_none_are_given():
    experts = Experts.random(E, H, I)
    gate = nn.Linear(H, E, bias=False)
    runner = layer(experts, gate=gate)
    x, other = rows()
    close(runner(x), routed_oracle(x, x @ gate.weight.T, experts, Rule(K)))
    close(runner(x, other), routed_oracle(x, other, experts, Rule(K)))
    with pytest.raises(ValueError, match="no gate"):
        layer(experts)(x)


@pytest.mark.parametrize("kind", [nn.Linear, fusedmoe.GateLinear])
def test_batch_invariance_begins_at_the_gate(kind):
    """A token alone has the bits that it has among others, from its hidden state on."""
    hidden = 256  # one that CPUs multiply in another order where rows are many
    runner = FusedMoE(
        *(E, K, hidden, I, torch.float32),
        gate=kind(hidden, E),
        options=MoEOptions(batch_invariant=True),
    )
    for weight in runner.routed_experts.parameters():
        nn.init.normal_(weight, std=0.1)
    x = torch.randn(33, hidden)
    with torch.no_grad():
        whole = runner(x)
        for T in (1, 2, 7):
            assert torch.equal(runner(x[5 : 5 + T]), whole[5 : 5 + T])
            assert torch.equal(
                runner.compute_logits(x[5 : 5 + T]), runner.compute_logits(x)[5 : 5 + T]
            )


def test_a_gate_in_another_precision_reads_the_rows_in_its_own():
    experts = Experts.random(E, H, I)
    gate = nn.Linear(H, E, bias=False).double()
    x, _ = rows()
    close(layer(experts, gate=gate)(x), routed_oracle(x, gate(x.double()), experts, Rule(K)))


def test_router_logits_dtype_is_asked_of_the_gate_and_given_to_the_router():
    class Gate(nn.Linear):
        out_dtype = None

        def set_out_dtype(self, dtype):
            self.out_dtype = dtype

        def forward(self, x):
            return super().forward(x).to(self.out_dtype), None

    gate = Gate(H, E)
    seen = []

    def route(hidden_states, gating_output, topk, renormalize):
        seen.append(gating_output.dtype)
        return gating_output.float().topk(topk)

    runner = layer(
        Experts.random(E, H, I),
        gate=gate,
        router_logits_dtype=torch.float64,
        custom_routing_function=route,
    )
    x, logits = rows()
    runner(x)
    runner(x, logits)
    assert gate.out_dtype is torch.float64
    assert seen == [torch.float64, torch.float64]


def test_latent_experts_between_their_transforms():
    """The routed experts live in a smaller space; gate and shared experts read the full one."""
    width = 20
    down, up = nn.Linear(width, H), nn.Linear(H, width)
    shared, gate = nn.Linear(width, width), nn.Linear(width, E)
    experts = Experts.random(E, H, I)
    runner = layer(
        experts,
        gate=gate,
        shared_experts=shared,
        routed_input_transform=down,
        routed_output_transform=up,
        routed_scaling_factor=2.0,
        apply_routed_scale_to_output=True,
    )
    x = torch.randn(4, width)
    with torch.no_grad():
        latent = down(x)
        routed = 2.0 * routed_oracle(latent, gate(x), experts, Rule(K))
        expected = routed @ up.weight.T.double() + up.bias.double() + shared(x).double()
        close(runner(x), expected)
        assert runner.apply_routed_input_transform(x).shared_experts_input is x
        torch.testing.assert_close(runner.apply_routed_input_transform(x)[0], latent)
        torch.testing.assert_close(runner.apply_routed_output_transform(latent), up(latent))


def test_fp16_with_shared_experts_divides_them_instead_of_scaling_the_routed_output():
    """So that nothing overflows; the layer returns its output over the scale."""
    experts = Experts.random(E, H, I, dtype=torch.float16)
    shared = nn.Linear(H, H).half()
    arguments = {
        "params_dtype": torch.float16,
        "routed_scaling_factor": 4.0,
        "apply_routed_scale_to_output": True,
    }
    x, logits = rows()
    x = x.half()
    routed = routed_oracle(x, logits, experts, Rule(K))
    with torch.no_grad():
        both = layer(experts, shared_experts=shared, **arguments)(x, logits)
        torch.testing.assert_close(
            both.double(), routed + shared(x).double() / 4.0, rtol=5e-3, atol=5e-3
        )
        alone = layer(experts, **arguments)(x, logits)
    torch.testing.assert_close(alone.double(), 4.0 * routed, rtol=5e-3, atol=5e-3)


def test_expert_mapping_names_the_tensors():
    experts = Experts.random(E, H, I)
    mapping = [
        (
            "experts.w2_" if shard == "w2" else "experts.w13_",
            f"block.{e}.{name}.",
            e,
            shard,
        )
        for e in range(E)
        for shard, name in (("w1", "g"), ("w2", "d"), ("w3", "u"))
    ]
    runner = layer(expert_mapping=mapping)
    for e in range(E):
        runner.load_weights(
            [
                (f"block.{e}.g.weight", experts.gate[e]),
                (f"block.{e}.d.weight", experts.down[e]),
                (f"block.{e}.u.weight", experts.up[e]),
            ]
        )
    runner.routed_experts.check_loaded()
    x, logits = rows()
    close(runner(x, logits), routed_oracle(x, logits, experts, Rule(K)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_fused_checkpoints_in_either_orientation(transposed, interleaved):
    experts = Experts.random(E, H, I)
    joined = torch.stack(
        [
            torch.stack((g, u), 1).flatten(0, 1) if interleaved else torch.cat((g, u))
            for g, u in zip(experts.gate, experts.up, strict=True)
        ]
    )
    down = torch.stack(experts.down)
    if transposed:
        joined, down = joined.transpose(1, 2), down.transpose(1, 2)
    runner = layer(
        is_fused_checkpoint_transposed=transposed, is_fused_checkpoint_interleaved=interleaved
    )
    runner.load_weights([("experts.gate_up_proj", joined), ("experts.down_proj", down)])
    runner.routed_experts.check_loaded()
    x, logits = rows()
    close(runner(x, logits), routed_oracle(x, logits, experts, Rule(K)))


def test_runner_cls_and_args_and_routed_experts_cls_and_args():
    class Runner(MoERunner):
        pass

    class Weights(RoutedExperts):
        pass

    w13, w2 = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    runner = layer(
        runner_cls=Runner,
        runner_args={"shared_overlap_token_limit": 7},
        routed_experts_cls=Weights,
        routed_experts_args={"w13_weight": w13, "w2_weight": w2},
    )
    assert type(runner) is Runner
    assert runner.shared_overlap_token_limit == 7
    assert type(runner.routed_experts) is Weights
    assert runner.routed_experts.w13_weight is w13
    experts = Experts(list(w13[:, :I]), list(w13[:, I:]), list(w2))
    x, logits = rows()
    torch.testing.assert_close(
        runner(x, logits).double(), routed_oracle(x, logits, experts, Rule(K)), rtol=1e-4, atol=1e-3
    )


def test_quant_config_gives_the_method_by_the_layers_name():
    class Padded(UnquantizedFusedMoEMethod):
        def maybe_roundup_sizes(self, hidden_size, intermediate, act_dtype, parallel):
            return hidden_size + 3, intermediate + 5

    class Config:
        def get_quant_method(self, moe_config, prefix):
            return Padded(moe_config) if prefix == "padded" else None

    experts = Experts.random(E, H, I, bias=True)
    x, logits = rows()
    expected = routed_oracle(x, logits, experts, Rule(K))
    padded = layer(experts, quant_config=Config(), prefix="padded", has_bias=True)
    assert padded.routed_experts.w13_weight.shape == (E, 2 * (I + 5), H + 3)
    assert padded.routed_experts.w2_weight.shape == (E, H + 3, I + 5)
    close(padded(x, logits), expected)
    plain = layer(experts, quant_config=Config(), prefix="other", has_bias=True)
    assert type(plain.routed_experts.quant_method) is UnquantizedFusedMoEMethod
    close(plain(x, logits), expected)


@pytest.mark.parametrize(
    "place",
    [{"tp_size": 3, "tp_rank": 0}, {"dp_size": 3, "dp_rank": 0}, {"pcp_size": 3, "pcp_rank": 0}],
)
@pytest.mark.parametrize("ep", [False, True])
def test_sizes_without_groups_shard_the_weights_and_the_summands_add_up(place, ep):
    """tp_size with tp_rank (dp and pcp alike): every rank's output is its share of the sum."""
    size_name, rank_name = place
    experts = Experts.random(E, H, I, bias=True)
    x, logits = rows()
    total = torch.zeros_like(x)
    for rank in range(3):
        runner = layer(
            experts,
            has_bias=True,
            parallel=ParallelGroups(enable_expert_parallel=ep),
            **{size_name: 3, rank_name: rank},
        )
        weights = runner.routed_experts.w13_weight
        assert weights.shape == ((E // 3, 2 * I, H) if ep else (E, 2 * I // 3, H))
        total += runner(x, logits)
    close(total, routed_oracle(x, logits, experts, Rule(K)))


@pytest.mark.parametrize("tp_size", [2, 5])
def test_a_rank_alone_adds_what_is_whole_on_every_rank_once(tp_size):
    """Shared experts and zero experts; I = 12 over 5 ranks also leaves the last one short."""
    bias = torch.rand(E + 2, generator=torch.Generator().manual_seed(5))
    experts = Experts.random(E, H, I)
    shared = nn.Linear(H, H)
    x, logits = rows(columns=E + 2)
    arguments = {
        "shared_experts": shared,
        "zero_expert_type": "identity",
        "e_score_correction_bias": bias,
    }
    whole = layer(experts, **arguments)(x, logits)
    parts = [
        layer(experts, tp_size=tp_size, tp_rank=rank, reduce_results=False, **arguments)(x, logits)
        for rank in range(tp_size)
    ]
    close(sum(parts), whole)


@pytest.mark.parametrize("ep", [False, True])
def test_ranks_of_every_dimension_add_up_to_one_layer(ep):
    """Sizes without groups: dp 2 x pcp 1 x tp 2 summands, shared experts among them once."""
    experts, shared = Experts.random(E, H, I), nn.Linear(H, H)
    x, logits = rows()
    whole = layer(experts, shared_experts=shared)(x, logits)
    parallel = ParallelGroups(enable_expert_parallel=ep)
    parts = [
        layer(
            experts,
            shared_experts=shared,
            parallel=parallel,
            dp_size=2,
            tp_size=2,
            dp_rank=dp,
            tp_rank=tp,
        )(x, logits)
        for dp in range(2)
        for tp in range(2)
    ]
    close(sum(parts), whole)


def test_shared_experts_sharded_are_summands_too():
    experts = Experts.random(E, H, I)
    x, logits = rows()
    halves = [nn.Linear(H, H, bias=False) for _ in range(2)]
    parts = [
        layer(experts, shared_experts=half, shared_experts_sharded=True, tp_size=2, tp_rank=rank)(
            x, logits
        )
        for rank, half in enumerate(halves)
    ]
    expected = routed_oracle(x, logits, experts, Rule(K))
    expected = expected + sum(half(x).double() for half in halves)
    close(sum(parts), expected)


def test_a_rank_alone_cannot_apply_a_transform_that_does_not_commute_with_the_sum():
    with pytest.raises(ValueError, match="is_linear"):
        layer(tp_size=2, tp_rank=0, routed_output_transform=nn.Linear(H, H))
    layer(tp_size=2, tp_rank=0, routed_output_transform=nn.Linear(H, H, bias=False))


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_expert_placement(placement):
    experts = Experts.random(E, H, I)
    x, logits = rows()
    total = torch.zeros_like(x)
    for rank in range(4):
        runner = layer(
            experts,
            tp_size=4,
            tp_rank=rank,
            expert_placement=placement,
            parallel=ParallelGroups(enable_expert_parallel=True),
        )
        local = runner.expert_local_to_global.tolist()
        expected = {"linear": [[0, 1], [2, 3], [4], [5]], "round_robin": [[0, 4], [1, 5], [2], [3]]}
        assert local == expected[placement][rank]
        assert runner.expert_map_manager.local_row(local[0]) == 0
        assert sorted(runner.expert_physical_to_global.tolist()) == list(range(E))
        total += runner(x, logits)
    close(total, routed_oracle(x, logits, experts, Rule(K)))


def test_enable_eplb_routes_to_replicas_and_counts_their_load():
    experts = Experts.random(E, H, I)
    runner = layer(experts, enable_eplb=True, num_redundant_experts=2)
    P = E + 2
    assert runner.routed_experts.w13_weight.shape[0] == P
    x, logits = rows(16)
    expected = routed_oracle(x, logits, experts, Rule(K))
    close(runner(x, logits), expected)
    load = torch.zeros(3, P, dtype=torch.int32)
    table = torch.full((3, E, 2), -1, dtype=torch.int32)
    table[1, :, 0] = torch.arange(E)
    table[1, 0, 1], table[1, 1, 1] = E, E + 1
    count = torch.ones(3, E, dtype=torch.int32)
    count[1, :2] = 2
    runner.set_eplb_state(1, load, table, count)
    close(runner(x, logits), expected)
    assert load[1].sum() == 16 * K
    assert load[0].sum() == load[2].sum() == 0
    picked = logits.topk(K).indices
    per_logical = load[1, :E].clone()
    per_logical[:2] += load[1, E:]
    assert per_logical.tolist() == torch.bincount(picked.flatten(), minlength=E).tolist()
    unpadded = torch.tensor(5)
    runner.set_eplb_state(1, load.zero_(), table, count, num_unpadded_tokens=unpadded)
    close(runner(x, logits), expected)
    assert load[1].sum() == 5 * K
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        runner.set_eplb_state(3, load, table, count)
    with pytest.raises(ValueError, match="expert_load_view"):
        runner.set_eplb_state(1, load[:, :-1], table, count)
    with pytest.raises(ValueError, match="enable_eplb"):
        layer().set_eplb_state(1, load, table, count)


def test_max_num_tokens_is_the_room_of_the_batched_format():
    options = MoEOptions(experts=BatchedExperts, prepare_finalize="batched")
    with pytest.raises(ValueError, match="needs max_num_tokens"):
        layer(options=options)
    with pytest.raises(ValueError, match="got 0"):
        layer(options=options, max_num_tokens=0)
    experts = Experts.random(E, H, I)
    x, logits = rows(5)
    batched = layer(experts, options=options, max_num_tokens=5)
    close(batched(x, logits), routed_oracle(x, logits, experts, Rule(K)))
    with pytest.raises(ValueError, match="6"):
        batched(*rows(6))


def test_activation_may_be_a_member():
    assert layer(activation=MoEActivation.GELU).moe_config.activation is MoEActivation.GELU


def test_public_names():
    for name in ("FusedMoE", "MoERunner", "RoutedExperts", "explain"):
        assert hasattr(fusedmoe, name)
