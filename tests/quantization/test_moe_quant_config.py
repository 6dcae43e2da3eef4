"""FusedMoEQuantConfig: what each builder describes, and what the properties say of it."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig
from fusedmoe.quantization import keys
from fusedmoe.quantization.formats import format_named
from quantized_layers import draw

E, N, K = 3, 64, 128
FP8, INT8 = torch.float8_e4m3fn, torch.int8


def build(name: str, *args, **kwargs) -> FusedMoEQuantConfig:
    return getattr(fusedmoe, f"{name}_moe_quant_config")(*args, **kwargs)


def scales(format_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(draw(format_name, E, N, K, shards=shards, seed=shards).scale for shards in (2, 1))


@pytest.mark.parametrize(
    ("name", "arguments", "weights", "activations", "called"),
    [
        ("fp8_w8a8", {}, "fp8_tensor", keys.FP8_DYNAMIC_TENSOR, "fp8_w8a8"),
        (
            "fp8_w8a8",
            {"per_act_token_quant": True, "per_out_ch_quant": True},
            "fp8_channel",
            keys.FP8_DYNAMIC_TOKEN,
            "fp8_w8a8",
        ),
        (
            "fp8_w8a8",
            {"block_shape": [128, 128]},
            "fp8_block",
            keys.FP8_DYNAMIC_128,
            "fp8_w8a8",
        ),
        (
            "fp8_w8a8",
            {"a1_scale": torch.ones(1), "a2_scale": torch.ones(1)},
            "fp8_tensor",
            keys.FP8_STATIC_TENSOR,
            "fp8_w8a8",
        ),
        ("fp8_w8a16", {"block_shape": [128, 128]}, "fp8_block", None, "fp8_w8a16"),
        (
            "int8_w8a8",
            {"per_act_token_quant": True},
            "int8_channel",
            keys.INT8_DYNAMIC_TOKEN,
            "int8_w8a8",
        ),
        ("int8_w8a16", {}, "int8_channel", None, "int8_w8a16"),
        ("int8_w8a16", {"block_shape": [0, 64]}, "int8_g64", None, "int8_w8a16"),
        ("int4_w4a16", {"block_shape": [0, 32]}, "int4_g32", None, "int4_w4a16"),
        ("mxfp4_w4a16", {}, "mxfp4", None, "w_mxfp4"),
        ("mxfp4_mxfp8", {}, "mxfp4", keys.MXFP8_DYNAMIC, "w_mxfp4_a_mxfp8"),
        ("mxfp4_w4a8", {}, "mxfp4", keys.FP8_DYNAMIC_TENSOR, "w_mxfp4_a_fp8"),
        ("mxfp4", {}, "mxfp4", keys.MXFP4_DYNAMIC, "w_mxfp4_a_mxfp4"),
    ],
)
def test_builders(name, arguments, weights, activations, called):
    w1_scale, w2_scale = scales(weights)
    config = build(name, w1_scale, w2_scale, **arguments)
    fmt = format_named(weights)
    assert config.w1.format.key == config.w2.format.key == fmt.key
    assert config.w1.key == fmt.key
    assert config.a1.key == config.a2.key == activations
    assert config.w1_scale is w1_scale
    assert config.w2_scale is w2_scale
    assert config.is_quantized
    assert config.config_name(torch.bfloat16) == called
    q = draw(weights, E, N, K, shards=2, seed=2)
    again = config.w1.weight(q.data, torch.float32, shards=2)
    assert torch.equal(again.dequantize(), q.dequantize())


def test_which_scheme_it_is_is_said_by_one_property():
    flags = [name for name in dir(FusedMoEQuantConfig) if name.startswith("use_")]
    w1, w2 = scales("int4_g32")
    config = build("int4_w4a16", w1, w2, block_shape=[0, 32])
    assert [name for name in flags if getattr(config, name)] == ["use_int4_w4a16"]
    assert config.block_shape == [1, 32]
    assert config.quant_dtype is None
    assert config.weight_quant_dtype == "int4"
    config = build("fp8_w8a8", *scales("fp8_channel"), None, None, None, None, True, True)
    assert [name for name in flags if getattr(config, name)] == ["use_fp8_w8a8"]
    assert config.per_act_token_quant
    assert config.per_out_ch_quant
    assert not config.is_per_tensor
    assert config.block_shape is None
    assert not any(getattr(FUSED_MOE_UNQUANTIZED_CONFIG, name) for name in flags)
    assert FUSED_MOE_UNQUANTIZED_CONFIG.config_name(torch.float32) == "float32"
    assert FUSED_MOE_UNQUANTIZED_CONFIG.config_name(torch.bfloat16) is None


def test_shapes_of_activation_scales():
    block = build("fp8_w8a8", *scales("fp8_block"), block_shape=[128, 128])
    assert block.is_block_quantized
    assert block.scale_shape(7, 300) == (7, 3)
    assert block.batched_scale_shape(4, 7, 300) == (4, 7, 3)
    token = build("int8_w8a8", *scales("int8_channel"), per_act_token_quant=True)
    assert token.scale_shape(7, 300) == (7, 1)
    tensor = build("fp8_w8a8", *scales("fp8_tensor"))
    assert tensor.is_per_tensor
    assert tensor.scale_shape(7, 300) == (1, 1)
    plain = build("int8_w8a16", *scales("int8_channel"))
    assert plain.scale_shape(7, 300) is None
    assert plain.batched_scale_shape(4, 7, 300) is None


def test_one_scale_of_an_expert_stands_for_both_shards():
    q = draw("fp8_tensor", E, N, K)
    config = build("fp8_w8a8", q.scale.squeeze(1), q.scale.squeeze(1))
    again = config.w1.weight(q.data, torch.float32, shards=2)
    assert torch.equal(again.dequantize(), q.dequantize())


def test_gptq_names_its_bits():
    w1, w2 = scales("int4_g32_zp")
    q = draw("int4_g32_zp", E, N, K, shards=2, seed=2)
    config = build("gptq_marlin", w1, w2, 4, 32, q.zero_point, q.zero_point)
    assert config.w1.format.key == format_named("int4_g32_zp").key
    assert config.w1_zp is q.zero_point
    config = build("gptq_marlin", *scales("int8_channel"), 8, -1)
    assert config.w1.format == format_named("int8_channel")
    with pytest.raises(ValueError, match="weight_bits must be 4 or 8, got 3"):
        build("gptq_marlin", w1, w2, 3, 32)


def test_w4afp8_multiplies_group_and_channel_scales():
    q = draw("int4_g64", E, N, K)
    channel = torch.rand(E, N, 1) + 0.5
    config = build(
        "int4_w4afp8", q.scale, q.scale, channel, channel.squeeze(2), True, group_size=64
    )
    assert config.use_int4_w4afp8
    assert config.a1.key == keys.FP8_DYNAMIC_TOKEN
    got = config.w1.weight(q.data, torch.float32).dequantize()
    assert torch.allclose(got, q.dequantize() * channel)
    assert torch.equal(config.w1_scale, config.w2_scale)


def test_nvfp4_second_scales_come_out_of_the_products():
    q = draw("nvfp4", E, N, K, shards=2)
    a_scale = torch.tensor([0.5, 0.25, 0.125])
    config = build(
        "nvfp4",
        q.scale2 * a_scale[:, None],
        q.scale2[:, 0] * a_scale,
        1 / a_scale,
        1 / a_scale,
        q.scale,
        q.scale,
    )
    assert config.use_nvfp4_w4a4
    assert config.a1.key == keys.NVFP4_STATIC
    assert config.a1_scale.tolist() == [0.5]
    assert torch.allclose(config.w1.scale2, q.scale2)
    got = config.w1.weight(q.data, torch.float32, shards=2)
    assert torch.allclose(got.dequantize(), q.dequantize())
    alone = build("nvfp4_w4a16", q.scale2, q.scale2[:, 0], q.scale, q.scale)
    assert alone.use_nvfp4_w4a16
    assert torch.equal(alone.w1.scale2, q.scale2)


def test_ocp_mx_mixes_element_types():
    config = build("ocp_mx", "mxfp6_e3m2", *scales("mxfp6_e2m3"), "mxfp6_e2m3")
    assert config.ocp_mx_scheme == "w_mxfp6_e2m3_a_mxfp6_e3m2"
    assert config.a1.key == keys.MXFP6_E3M2_DYNAMIC
    assert config.config_name(torch.bfloat16) == config.ocp_mx_scheme


def test_contradictions_are_refused():
    w1, w2 = scales("fp8_block")
    with pytest.raises(ValueError, match=r"block_shape \[128, 128\] must be .* without"):
        build("fp8_w8a8", w1, w2, per_act_token_quant=True, block_shape=[128, 128])
    with pytest.raises(ValueError, match=r"w2_scale: .* weights need scales, found none"):
        FusedMoEQuantConfig.make(FP8, w1_scale=w1)
    with pytest.raises(ValueError, match="w1: nvfp4 weights need second scales"):
        FusedMoEQuantConfig.make(
            None, w1_scale=draw("nvfp4", E, N, K).scale, w2_scale=w2, weight_dtype="nvfp4"
        )
    with pytest.raises(ValueError, match="unknown weight dtype int3"):
        FusedMoEQuantConfig.make("int3", w1_scale=w1, w2_scale=w2)
    with pytest.raises(ValueError, match="no format describes unquantized weights"):
        FUSED_MOE_UNQUANTIZED_CONFIG.w1.weight(torch.ones(1, 2, 2), torch.float32)


def test_biases_and_gate_numbers_are_carried():
    bias = torch.ones(E, N)
    config = FusedMoEQuantConfig.make(
        w1_bias=bias, w2_bias=bias, gemm1_alpha=1.7, gemm1_beta=1.0, gemm1_clamp_limit=7.0
    )
    assert not config.is_quantized
    assert config.w1_bias is bias
    assert (config.gemm1_alpha, config.gemm1_beta, config.gemm1_clamp_limit) == (1.7, 1.0, 7.0)
