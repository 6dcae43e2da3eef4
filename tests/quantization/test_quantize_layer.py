"""quantize_layer: a layer of floats becomes one of a format, or stays as it was."""

from __future__ import annotations

import pytest
import torch

from fusedmoe import FusedMoE, MoEOptions, explain, quantize_layer
from fusedmoe.quantization import keys
from fusedmoe.quantization.formats import format_named, quantize
from quantized_layers import FORMATS

T, E, K, H, I = 5, 4, 2, 128, 128  # noqa: E741


def plain(**arguments):
    layer = FusedMoE(E, K, H, I, torch.float32, has_bias=True, **arguments)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.routed_experts.process_weights_after_loading()
    return layer


@pytest.mark.parametrize("act", ["silu", "swigluoai", "relu2_no_mul"])
@pytest.mark.parametrize("name", [name for name in FORMATS if "act_order" not in name])
def test_weights_become_what_quantize_makes_of_them(name, act):
    layer = plain(activation=act)
    experts, fmt = layer.routed_experts, format_named(name)
    S = layer.moe_config.w13_num_shards
    w13 = quantize(experts.w13_weight, fmt, shards=S, interleaved=experts.sizes.interleaved)
    w2 = quantize(experts.w2_weight, fmt)
    bias = experts.w2_bias
    quantize_layer(layer, name)
    weights = experts.quant_method.quantized_weights(experts)
    for got, expected in zip(weights, (w13, w2), strict=True):
        assert torch.equal(got.dequantize(torch.float32), expected.dequantize(torch.float32))
    assert experts.w2_bias is bias
    assert experts.w13_weight.dtype == fmt.dtype
    assert not experts.w13_weight.requires_grad
    out = layer(torch.randn(T, H), torch.randn(T, E))
    assert out.isfinite().all()


def test_outputs_stay_near_the_floats():
    layer = plain()
    x, logits = torch.randn(T, H), torch.randn(T, E)
    before = layer(x, logits)
    quantize_layer(layer, "fp8_block", activation=keys.FP8_DYNAMIC_128)
    after = layer(x, logits)
    assert 0.005 < (after - before).norm() / before.norm() < 0.1
    assert explain(layer).chosen.name == "torch_quantized"
    assert {n.rpartition(".")[2] for n in layer.state_dict()} >= {"w13_weight", "w13_weight_scale"}


def test_existing_tensors_are_replaced_not_written():
    tensors = {"w13_weight": torch.randn(E, 2 * I, H), "w2_weight": torch.randn(E, H, I)}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    layer = FusedMoE(E, K, H, I, torch.float32, routed_experts_args=tensors)
    quantize_layer(layer.routed_experts, format_named("int4_g32"))
    assert layer.routed_experts.w13_weight.dtype == torch.uint8
    assert all(torch.equal(tensors[name], copies[name]) for name in copies)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int4_g48"}, "groups of 48 columns do not divide 128"),
        ({"format": "int4_g32_act_order"}, "needs calibration"),
        ({"format": "fp8_tensor", "activation": keys.FP8_STATIC_TENSOR}, "needs calibration"),
        ({"format": "int3"}, "unknown weight format 'int3'"),
    ],
)
def test_what_cannot_be_done_changes_nothing(arguments, message):
    layer = plain()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        quantize_layer(layer, **arguments)
    assert state.keys() == layer.state_dict().keys()
    assert layer(torch.randn(T, H), torch.randn(T, E)).isfinite().all()


def test_weights_that_are_not_finite_are_named_before_anything_changes():
    layer = plain()
    layer.routed_experts.w2_weight.data[2, 1, 3] = torch.nan
    with pytest.raises(ValueError, match="w2_weight: 1 weights of local expert 2 are not finite"):
        quantize_layer(layer, "int8_channel")
    assert layer.routed_experts.w13_weight.dtype == torch.float32


def test_a_layer_that_would_not_run_keeps_its_floats():
    forced = plain(options=MoEOptions(experts="torch"))
    with pytest.raises(ValueError, match="torch: does not run weights"):
        quantize_layer(forced, "int8_channel")
    assert forced(torch.randn(T, H), torch.randn(T, E)).shape == (T, H)
    half = plain()
    with pytest.raises(ValueError, match="odd names no tensor"):
        half.load_weights([("experts.0.up_proj.weight", torch.ones(I, H)), ("odd", torch.ones(1))])
    with pytest.raises(ValueError, match="were not loaded: odd names no tensor"):
        quantize_layer(half, "int8_channel")
    for layer in (forced, half):
        assert layer.routed_experts.w13_weight.dtype == torch.float32


@pytest.mark.parametrize("strict", [False, True])
def test_a_state_of_integers_is_not_taken_for_floats(strict):
    """Both have the same shape."""
    floats, rounded = plain(), plain()
    state = floats.state_dict()
    quantize_layer(rounded, "int8_channel")
    for layer, given in ((floats, rounded.state_dict()), (rounded, state)):
        with pytest.raises(RuntimeError, match=r"w13_weight: found torch.*not converted silently"):
            layer.load_state_dict(given, strict=strict)
        with pytest.raises(ValueError, match=r"w13_weight: found torch.*not converted silently"):
            layer(torch.randn(T, H), torch.randn(T, E))


def test_quantizing_twice_is_refused():
    layer = plain()
    quantize_layer(layer, "int8_channel")
    with pytest.raises(ValueError, match="only unquantized ones can be quantized"):
        quantize_layer(layer, "int4_g32")
    with pytest.raises(ValueError, match="w13_weight is on 'meta'"):
        quantize_layer(FusedMoE(E, K, H, I, torch.float32, device="meta"), "int8_channel")


def test_a_short_name_is_a_format():
    from fusedmoe import OnlineQuantization
    from fusedmoe.quantization.formats import format_named

    for short, name in (("int8", "int8_channel"), ("int4", "int4_g128"), ("fp8", "fp8_channel")):
        assert format_named(short).name == name
        assert OnlineQuantization.of(short).format.name == name
