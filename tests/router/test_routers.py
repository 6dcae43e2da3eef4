"""Routers: what the factory makes of its arguments, and what every router does around a rule."""

import pytest
import torch
from routing_oracle import route_oracle
from torch import nn

import fusedmoe
from fusedmoe.config import RoutingMethodType
from fusedmoe.router.base import EplbState
from fusedmoe.router.factory import create_fused_moe_router
from fusedmoe.router.method_type import get_routing_method_type, routing_method_of
from fusedmoe.router.named import (
    GroupedTopk,
    fused_grouped_topk,
    fused_topk,
    fused_topk_bias,
    grouped_topk,
)
from fusedmoe.router.routers import CustomRouter, SpecRouter
from fusedmoe.router.spec import RoutingSpec, RoutingTensors

T, E = 6, 12


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(T, 5), torch.randn(T, E)


def agrees(result, logits, spec, tensors=None, **rows):
    weights, ids, _ = route_oracle(logits, spec, tensors, **rows)
    assert torch.equal(result[1].long(), ids)
    torch.testing.assert_close(result[0].double(), weights, rtol=2e-6, atol=1e-7)


def spec_of(top_k, **rule):
    return RoutingSpec(top_k=top_k, num_experts=E, **rule)


def best_sigmoids(hidden_states, gating_output, topk, renormalize):
    """Llama 4's rule, as somebody's own function."""
    logits, ids = gating_output.topk(topk)
    return logits.sigmoid(), ids


def test_factory_plain(x):
    router = create_fused_moe_router(3, E, scoring_func="sigmoid", routed_scaling_factor=2.0)
    assert isinstance(router, fusedmoe.FusedMoERouter)
    assert router.routing_method_type is RoutingMethodType.SigmoidRenorm
    spec = RoutingSpec(
        top_k=3,
        num_experts=E,
        score_function="sigmoid",
        renormalize=True,
        routed_scaling_factor=2.0,
    )
    agrees(router.route(*x), x[1], spec)


def test_factory_grouped_with_bias(x):
    bias = torch.randn(E)
    router = create_fused_moe_router(
        4,
        E,
        use_grouped_topk=True,
        num_expert_group=3,
        topk_group=2,
        scoring_func="sigmoid",
        e_score_correction_bias=bias,
    )
    assert router.routing_method_type is RoutingMethodType.DeepSeekV3
    spec = RoutingSpec(
        top_k=4,
        num_experts=E,
        score_function="sigmoid",
        renormalize=True,
        num_expert_group=3,
        topk_group=2,
        group_score="top2_sum",
    )
    agrees(router.route(*x), x[1], spec, RoutingTensors(correction_bias=bias))


def test_factory_zero_experts(x):
    """The logits cover real and identity experts; the bias tells how many of the latter."""
    bias = torch.randn(E) * 0.1
    router = create_fused_moe_router(
        4,
        9,
        renormalize=False,
        e_score_correction_bias=bias,
        zero_expert_type="identity",
        num_logical_experts=9,
    )
    result = router.route(*x)
    spec = RoutingSpec(top_k=4, num_experts=9, num_zero_experts=3)
    agrees(result, x[1], spec, RoutingTensors(correction_bias=bias))
    assert result.zero_expert_weight.shape == (T,)


def test_factory_hash_and_vision(x):
    table = torch.randint(0, E, (20, 3))
    vision = torch.randn(E)
    router = create_fused_moe_router(
        3,
        E,
        scoring_func="sqrtsoftplus",
        hash_indices_table=table,
        bias_vl=vision,
        image_sentinel_lo=30,
    )
    input_ids = torch.tensor([0, 30, 19, 34, 3, 4])
    spec = RoutingSpec(
        top_k=3,
        num_experts=E,
        score_function="sqrtsoftplus",
        renormalize=True,
        image_sentinel_lo=30,
    )
    tensors = RoutingTensors(hash_indices_table=table, vision_bias=vision)
    result = router.route(*x, input_ids=input_ids)
    agrees(result, x[1], spec, tensors, input_ids=input_ids)


def test_factory_shared_experts(x):
    router = create_fused_moe_router(2, E, num_fused_shared_experts=2, shared_expert_weight=0.5)
    result = router.route(*x)
    assert result.topk_ids[:, 2:].tolist() == [[E, E + 1]] * T
    assert result.topk_weights[:, 2:].tolist() == [[0.5, 0.5]] * T


def test_factory_custom(x):
    router = create_fused_moe_router(
        1,
        E,
        renormalize=False,
        custom_routing_function=best_sigmoids,
        routed_scaling_factor=3.0,
        num_fused_shared_experts=1,
    )
    assert isinstance(router, CustomRouter)
    assert router.routing_method_type is RoutingMethodType.Custom
    padding = torch.tensor([False, True] * 3)
    weights, ids = router.select_experts(*x, torch.int64, is_padding=padding)
    assert ids.dtype is torch.int64
    assert weights.dtype is torch.float32
    torch.testing.assert_close(weights[::2, 0], 3 * x[1].max(dim=1).values.sigmoid()[::2])
    assert ids[1::2].tolist() == [[-1, -1]] * 3
    assert ids[::2, 1].tolist() == [E] * 3
    assert weights[1::2].abs().sum() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scoring_func": "tanh"}, "'tanh'"),
        ({"use_grouped_topk": True}, "num_expert_group"),
        ({"use_grouped_topk": True, "num_expert_group": 5, "topk_group": 1}, "into 5 groups"),
        ({"zero_expert_type": "identity"}, "0 entries for 12"),
        ({"zero_expert_type": "copy"}, "'copy'"),
        (
            {"zero_expert_type": "identity", "e_score_correction_bias": torch.zeros(E)},
            "12 entries for 12",
        ),
        (
            {
                "custom_routing_function": best_sigmoids,
                "e_score_correction_bias": torch.zeros(E),
            },
            "excludes",
        ),
    ],
)
def test_factory_refuses_contradictions(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_fused_moe_router(2, E, **arguments)


@pytest.mark.parametrize("custom", [None, best_sigmoids])
def test_a_router_that_skips_padding_wants_the_mask(x, custom):
    router = create_fused_moe_router(2, E, custom_routing_function=custom, skip_padding=True)
    with pytest.raises(ValueError, match="is_padding"):
        router.route(*x)
    ids = router.route(*x, is_padding=torch.ones(T, dtype=torch.bool)).topk_ids
    assert (ids == -1).all()


def test_custom_function_results_are_checked(x):
    def wrong_shape(hidden_states, gating_output, topk, renormalize):
        return gating_output[:, :3], gating_output[:, :3].argsort()

    with pytest.raises(ValueError, match=r"\(6, 2\).*\(6, 3\)"):
        CustomRouter(wrong_shape, 2, E).route(*x)
    with pytest.raises(ValueError, match="uint8"):
        CustomRouter(best_sigmoids, 2, E).route(*x, torch.uint8)

    def ids_first(*given):
        weights, ids = best_sigmoids(*given)
        return ids, weights

    with pytest.raises(ValueError, match=r"weights, then ids, .*int64 and .*float32"):
        CustomRouter(ids_first, 2, E).route(*x)

    def stray(hidden_states, gating_output, topk, renormalize):
        ids = torch.tensor([[E, -5]] * len(gating_output))
        return torch.ones(ids.shape, dtype=torch.float64), ids

    result = CustomRouter(stray, 2, E).route(*x)
    assert (result.topk_ids == -1).all()
    assert (result.topk_weights == 0).all()


def test_spec_router_shares_the_owners_parameter():
    """The bias is the gate's: loaded, saved and moved there, and seen here."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(E))
            self.router = SpecRouter(
                RoutingSpec(top_k=1, num_experts=E), RoutingTensors(correction_bias=self.bias)
            )

    gate = Gate()
    assert list(gate.state_dict()) == ["bias"]
    assert len(list(gate.parameters())) == 1
    loaded = torch.zeros(E)
    loaded[7] = 9.0
    gate.load_state_dict({"bias": loaded})
    assert gate.router(torch.zeros(1, 2), torch.zeros(1, E)).topk_ids.item() == 7
    gate.double()
    assert gate.router.tensors.correction_bias is gate.bias
    assert gate.bias.dtype is torch.float64


def test_spec_router_moves_plain_tensors_and_reads_functions():
    spec = RoutingSpec(top_k=1, num_experts=E)
    router = SpecRouter(spec, RoutingTensors(correction_bias=torch.zeros(E)))
    assert router.to("meta").tensors.correction_bias.is_meta
    assert not router.state_dict()
    current = {"bias": torch.zeros(E)}
    router = SpecRouter(spec, lambda: RoutingTensors(correction_bias=current["bias"]))
    current["bias"] = torch.arange(E).float()
    assert router(torch.zeros(1, 2), torch.zeros(1, E)).topk_ids.item() == E - 1


def test_capture_sees_logical_ids_before_the_replicas(x):
    seen = []
    router = create_fused_moe_router(2, E)
    expected = router.route(*x).topk_ids
    router.set_capture_fn(seen.append)
    load = torch.zeros(2 * E, dtype=torch.int32)
    table = torch.stack((torch.arange(E), torch.arange(E) + E), dim=1)
    router.set_eplb_state(load, table, torch.full((E,), 2))
    physical = router.route(*x).topk_ids
    assert torch.equal(seen[0], expected)
    assert torch.equal(physical % E, expected)
    assert (physical >= E).any()
    assert load.sum() == 2 * T
    router.set_capture_fn(None)
    router.route(*x)
    assert len(seen) == 1


def test_eplb_state_is_checked():
    router = create_fused_moe_router(2, E, num_fused_shared_experts=1)
    load = torch.zeros(E, dtype=torch.int32)
    with pytest.raises(ValueError, match="12 rows for 13"):
        router.set_eplb_state(load, torch.zeros(E, 1, dtype=torch.int64), torch.ones(E))
    with pytest.raises(ValueError, match="float32"):
        EplbState(
            expert_load_view=load.float(),
            logical_to_physical_map=torch.zeros(3, 1, dtype=torch.int64),
            logical_replica_count=torch.ones(3, dtype=torch.int64),
        )


def test_compiled_router_with_capture_and_load_balancing(x):
    router = create_fused_moe_router(2, E, e_score_correction_bias=nn.Parameter(torch.randn(E)))
    load = torch.zeros(E, dtype=torch.int32)
    table = torch.arange(E).flip(0)[:, None]
    router.set_eplb_state(load, table, torch.ones(E, dtype=torch.int64))
    buffer = torch.zeros(T, 2, dtype=torch.int32)
    router.set_capture_fn(lambda ids: buffer.copy_(ids))
    expected = router.route(*x)
    captured, counted = buffer.clone(), load.clone()
    compiled = torch.compile(router.route, fullgraph=True, backend="aot_eager")
    result = compiled(*x)
    assert torch.equal(result.topk_ids, expected.topk_ids)
    assert torch.equal(buffer, captured)
    assert torch.equal(load, 2 * counted)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("softmax", 2, False, None, False), "Default"),
        (("softmax", 2, True, 0, False), "RenormalizeNaive"),
        (("sigmoid", 2, True, None, False), "SigmoidRenorm"),
        (("sigmoid", 2, False, None, False), "Sigmoid"),
        (("sigmoid", 8, True, 8, True), "DeepSeekV3"),
        (("sigmoid", 8, True, 1, True), "DeepSeekV3"),
        (("sigmoid", 8, True, 0, True), "MiniMax2"),
        (("sigmoid", 8, False, 8, True), "Unspecified"),
        (("softmax", 8, True, None, True), "Unspecified"),
        (("sqrtsoftplus", 6, True, None, True), "DeepseekV4"),
        (("sqrtsoftplus", 6, False, None, True), "Unspecified"),
        (("identity", 6, False, None, False), "Unspecified"),
    ],
)
def test_method_names(arguments, expected):
    assert get_routing_method_type(*arguments) is RoutingMethodType[expected]


@pytest.mark.parametrize(
    ("spec", "tensors", "expected"),
    [
        (spec_of(2, score_after_topk=True), {}, "Renormalize"),
        (spec_of(1, score_function="sigmoid", score_after_topk=True), {}, "Llama4"),
        (
            spec_of(2, score_function="sigmoid", score_after_topk=True, renormalize=True),
            {},
            "Unspecified",
        ),
        (spec_of(2, selection="sparsemixer"), {}, "Unspecified"),
        (spec_of(2, logit_softcap=30.0), {}, "Unspecified"),
        (spec_of(2, renormalize=True, renormalize_norm=2.0), {}, "Unspecified"),
        (spec_of(2, renormalize=True), {"per_expert_scale": torch.ones(E)}, "Unspecified"),
        (spec_of(2, num_expert_group=4, topk_group=2), {}, "Unspecified"),
        (
            spec_of(
                2,
                score_function="sigmoid",
                renormalize=True,
                renormalize_epsilon=1e-20,
                num_expert_group=4,
                topk_group=2,
                group_score="top2_sum",
            ),
            {"correction_bias": torch.ones(E)},
            "DeepSeekV3",
        ),
        (spec_of(2, score_function="identity"), {}, "TopK"),
        (spec_of(2, num_fused_shared_experts=1), {}, "Unspecified"),
    ],
)
def test_a_name_says_every_step_of_the_rule(spec, tensors, expected):
    """A kernel that is only told the name must compute the same."""
    assert routing_method_of(spec, RoutingTensors(**tensors)) is RoutingMethodType[expected]


def test_fused_topk(x):
    result = fused_topk(*x, 3, True, torch.int64, "sigmoid")
    spec = RoutingSpec(top_k=3, num_experts=E, score_function="sigmoid", renormalize=True)
    agrees(result, x[1], spec)
    assert result.topk_ids.dtype is torch.int64
    expected = torch.arange(3)[None, :] * T + torch.arange(T)[:, None]
    assert torch.equal(result.token_expert_indices, expected.int())


def test_fused_topk_bias(x):
    bias = torch.randn(E)
    spec = RoutingSpec(top_k=3, num_experts=E, routed_scaling_factor=2.0)
    result = fused_topk_bias(*x, bias, 3, False, routed_scaling_factor=2.0)
    agrees(result, x[1], spec, RoutingTensors(correction_bias=bias))
    table, tokens = torch.randint(0, E, (9, 3)), torch.arange(T)
    result = fused_topk_bias(
        *x, None, 3, False, "sqrtsoftplus", input_tokens=tokens, hash_indices_table=table
    )
    assert torch.equal(result.topk_ids.long(), table[:T])


@pytest.mark.parametrize("with_bias", [True, False])
def test_grouped_topk_in_its_three_forms(x, with_bias):
    bias = torch.randn(E) if with_bias else None
    spec = RoutingSpec(
        top_k=4,
        num_experts=E,
        score_function="sigmoid",
        renormalize=True,
        routed_scaling_factor=2.5,
        num_expert_group=4,
        topk_group=2,
        group_score="top2_sum" if with_bias else "max",
    )
    tensors = RoutingTensors(correction_bias=bias)
    agrees(grouped_topk(*x, 4, True, 4, 2, "sigmoid", 2.5, bias), x[1], spec, tensors)
    agrees(GroupedTopk(4, True, 4, 2, "sigmoid", 2.5)(*x, bias), x[1], spec, tensors)
    if with_bias:
        fused = fused_grouped_topk(*x, 4, True, bias, 4, 2, "sigmoid", 2.5)
        agrees(fused, x[1], spec, tensors)
    with pytest.raises(ValueError, match="into 5 groups"):
        GroupedTopk(4, True, 5, 2)(*x)


def test_named_functions_check_the_token_count(x):
    with pytest.raises(ValueError, match=r"\(5, 5\) and \(6, 12\)"):
        fused_topk(x[0][:5], x[1], 2, True)
