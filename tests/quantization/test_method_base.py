"""What every format's method shares: parameters from specs, its kernel, sizes, properties."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from fusedmoe import FusedMoE, FusedMoEMethodBase, MoEOptions, RoutedExperts
from fusedmoe.modular_kernel import FusedMoEKernel, FusedMoEMonolithicKernel
from fusedmoe.quantization.config import FUSED_MOE_UNQUANTIZED_CONFIG
from fusedmoe.quantization.keys import PER_TENSOR, QuantKey
from fusedmoe.quantization.unquantized import UnquantizedFusedMoEMethod
from fusedmoe.weights.param_spec import INTERMEDIATE, ParamSpec
from toy_stages import AsyncMover, LogitsExperts, SlotExperts

E, K, H, I = 4, 2, 6, 8  # noqa: E741


class Config:
    """A checkpoint's words about its format: one method class for every layer."""

    def __init__(self, method: type[FusedMoEMethodBase]) -> None:
        self.method = method

    def get_quant_method(self, moe_config, prefix):
        return self.method(moe_config)


def layer(method=UnquantizedFusedMoEMethod, **arguments):
    arguments = {"options": MoEOptions(experts="torch")} | arguments
    return FusedMoE(E, K, H, I, torch.float32, quant_config=Config(method), **arguments)


def routed(method=UnquantizedFusedMoEMethod, **arguments) -> RoutedExperts:
    experts = layer(method, **arguments).routed_experts
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


class WithScales(UnquantizedFusedMoEMethod):
    """A format is its specs: fp32 scales beside the weights, one per row."""

    def param_specs(self):
        scales = ParamSpec(
            owner="w13",
            suffix="weight_scale",
            axes=(INTERMEDIATE,),
            fill=1.0,
            dtype=torch.float32,
        )
        return (*super().param_specs(), scales)


def test_parameters_are_made_from_specs_and_loaded_by_them():
    experts = routed(WithScales)
    assert experts.w13_weight_scale.shape == (E, 2 * I)
    assert not experts.w13_weight_scale.requires_grad
    experts.load_weights([("experts.2.up_proj.weight_scale", torch.full((I,), 3.0))])
    assert (experts.w13_weight_scale[2, I:] == 3).all()
    assert ("w13_weight_scale", "w1", 2) in experts.load_report().missing


def test_create_weights_sets_extra_attributes_and_the_given_sizes():
    experts = routed()
    target = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(target)
    target.sizes = experts.sizes
    experts.quant_method.create_weights(
        target, 2, H + 2, I + 8, torch.float16, device="meta", mark="kept"
    )
    assert target.w13_weight.shape == (2, 2 * (I + 8), H + 2)
    assert target.w2_weight.shape == (2, H + 2, I + 8)
    assert target.w2_weight.dtype is torch.float16
    assert target.w2_weight.is_meta
    assert target.w2_weight.mark == "kept"


def test_the_defaults_say_no():
    method = routed().quant_method
    parallel = method.moe_config.moe_parallel_config
    assert method.maybe_roundup_sizes(H, I, torch.float32, parallel) == (H, I)
    assert not method.uses_weight_scale_2_pattern()
    assert not method.has_unpadded_output
    assert not method.skip_forward_padding
    assert FusedMoEMethodBase.supports_eplb.fget(method) is False
    assert method.supports_eplb
    assert method.topk_indices_dtype is None
    assert not method.is_monolithic
    assert method.get_fused_moe_quant_config(routed()) is FUSED_MOE_UNQUANTIZED_CONFIG


def test_biases_are_the_layers_own():
    experts = routed(has_bias=True)
    quant = experts.quant_method.get_fused_moe_quant_config(experts)
    assert quant.w1_bias is experts.w13_bias
    assert quant.w2_bias is experts.w2_bias
    assert experts.w13_bias.shape == (E, 2 * I)
    assert experts.w2_bias.shape == (E, H)
    assert routed().w13_bias is None


def test_the_kernel_is_kept_until_the_weights_move():
    experts = routed(has_bias=True)
    method = experts.quant_method
    first = method.kernel(experts)
    assert isinstance(first, FusedMoEKernel)
    assert method.kernel(experts) is first
    experts.double()
    second = method.kernel(experts)
    assert second is not first
    assert second.experts.moe_config.in_dtype is torch.float64
    experts.w2_bias = torch.nn.Parameter(torch.zeros_like(experts.w2_bias))
    third = method.kernel(experts)
    assert third is not second
    assert third.experts.quant_config.w2_bias is experts.w2_bias


def test_on_meta_no_kernel_is_chosen():
    experts = layer(device="meta").routed_experts
    with pytest.raises(ValueError, match="no kernel is chosen yet"):
        experts.quant_method.is_monolithic  # noqa: B018
    experts.process_weights_after_loading()
    with pytest.raises(ValueError, match="'meta'"):
        experts.quant_method.kernel(experts)


def test_modular_and_monolithic_are_called_by_their_own_names():
    x, logits = torch.randn(3, H), torch.randn(3, E)
    weights, ids = torch.rand(3, K), torch.randint(0, E, (3, K), dtype=torch.int32)
    modular = routed()
    with pytest.raises(ValueError, match="torch takes ids and weights"):
        modular.forward_monolithic(x, logits)
    monolithic = routed(options=MoEOptions(experts=LogitsExperts))
    assert isinstance(monolithic.quant_method.kernel(monolithic), FusedMoEMonolithicKernel)
    assert monolithic.quant_method.is_monolithic
    with pytest.raises(ValueError, match="logits routes by itself"):
        monolithic.forward_modular(x, weights, ids)
    with pytest.raises(ValueError, match="router_logits, got None"):
        monolithic.forward_monolithic(x)
    monolithic.set_router(None)
    with pytest.raises(ValueError, match="no router"):
        monolithic.forward_monolithic(x, logits)


@pytest.mark.parametrize("own_input", [True, False])
def test_shared_experts_are_called_with_their_input_while_combining(own_input):
    experts = routed(options=MoEOptions(experts=SlotExperts, prepare_finalize=AsyncMover))
    assert experts.quant_method.combine_is_async(experts)
    x, other = torch.randn(3, H), torch.randn(3, H)
    seen = []
    weights, ids = torch.rand(3, K), torch.randint(0, E, (3, K))
    out = experts.forward_modular(x, weights, ids, seen.append, other if own_input else None)
    assert seen[0] is (other if own_input else x)
    assert torch.equal(out, experts.forward_modular(x, weights, ids))


class Unpadding(UnquantizedFusedMoEMethod):
    """Stores wider rows and pads and truncates by itself."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    def maybe_roundup_sizes(self, hidden_size, intermediate, act_dtype, parallel):
        return hidden_size + 2, intermediate

    @property
    def has_unpadded_output(self):
        return True

    @property
    def skip_forward_padding(self):
        return True

    def apply(self, layer, x, *rest):
        self.seen.append(tuple(x.shape))
        padded = torch.nn.functional.pad(x, (0, 2))
        return super().apply(layer, padded, *rest)[:, :H]


def test_a_method_may_pad_and_truncate_by_itself():
    built, plain = layer(Unpadding), layer()
    weights = [("gate_up_proj", torch.randn(E, 2 * I, H)), ("down_proj", torch.randn(E, H, I))]
    built.load_weights(weights)
    plain.load_weights(weights)
    x, logits = torch.randn(3, H), torch.randn(3, E)
    Unpadding.seen.clear()
    torch.testing.assert_close(built(x, logits), plain(x, logits))
    assert Unpadding.seen == [(3, H)]


class NoKernel(UnquantizedFusedMoEMethod):
    weight_key = QuantKey("int3", True, PER_TENSOR)


def test_a_format_nothing_runs_is_refused_when_the_layer_is_built():
    with pytest.raises(ValueError, match=r"torch: does not run weights .*int3"):
        layer(NoKernel)


class Unbalanced(UnquantizedFusedMoEMethod):
    supports_eplb = False


def test_load_balancing_needs_a_method_that_can():
    with pytest.raises(ValueError, match="Unbalanced cannot be balanced"):
        layer(Unbalanced, enable_eplb=True)
