"""fused_experts with quantized weights, described by a FusedMoEQuantConfig."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe import MoEActivation, fused_experts
from fusedmoe.kernels.experts_reference import experts_reference
from quantized_layers import REFERENCE, draw

E, H, I, T, K = 4, 128, 64, 7, 2  # noqa: E741


def inputs(w13, w2):
    x, ids = torch.randn(T, H), torch.randint(-1, E, (T, K))
    weights = torch.rand(T, K)
    ref = experts_reference(
        x, w13.dequantize(torch.float32), w2.dequantize(torch.float32), weights, ids
    )
    return (x, w13.data, w2.data, weights, ids), ref


@pytest.mark.parametrize(
    ("name", "builder", "arguments"),
    [
        ("int4_g32", "int4_w4a16", {"block_shape": [0, 32]}),
        ("int8_channel", "int8_w8a16", {}),
        ("mxfp4", "mxfp4_w4a16", {}),
        ("fp8_block_32x16", "fp8_w8a16", {"block_shape": [32, 16]}),
        ("fp8_tensor", "fp8_w8a16", {}),
    ],
)
def test_weights_alone(name, builder, arguments):
    w13, w2 = draw(name, E, 2 * I, H, shards=2), draw(name, E, H, I, seed=1)
    config = getattr(fusedmoe, f"{builder}_moe_quant_config")(w13.scale, w2.scale, **arguments)
    tensors, ref = inputs(w13, w2)
    torch.testing.assert_close(fused_experts(*tensors, quant_config=config), ref)
    forced = fused_experts(*tensors, quant_config=config, options=REFERENCE)
    torch.testing.assert_close(forced, ref)
    assert fused_experts(
        *(t[:0] for t in tensors[:1]),
        *tensors[1:3],
        *(t[:0] for t in tensors[3:]),
        quant_config=config,
    ).shape == (0, H)


def test_quantized_activations_and_a_map():
    w13, w2 = draw("fp8_channel", E, 2 * I, H, shards=2), draw("fp8_channel", E, H, I, seed=1)
    config = fusedmoe.fp8_w8a8_moe_quant_config(
        w13.scale, w2.scale, per_act_token_quant=True, per_out_ch_quant=True
    )
    (x, a, b, weights, ids), ref = inputs(w13, w2)
    out = fused_experts(x, a, b, weights, ids, quant_config=config)
    assert 1e-3 < (out - ref).norm() / ref.norm() < 0.08
    table = torch.tensor([-1, 0, 1, -1, 2, 3], dtype=torch.int32)
    names = torch.tensor([1, 2, 4, 5, -1])[ids]
    mapped = fused_experts(x, a, b, weights, names, expert_map=table, quant_config=config)
    assert torch.equal(mapped, out)


def test_what_does_not_fit_is_refused():
    w13, w2 = draw("int4_g32", E, 2 * I, H, shards=2), draw("int4_g32", E, H, I)
    (x, a, b, weights, ids), _ = inputs(w13, w2)

    def run(x=x, a=a, b=b, weights=weights, ids=ids, columns=32, **rest):
        config = fusedmoe.int4_w4a16_moe_quant_config(w13.scale, w2.scale, block_shape=[0, columns])
        return fused_experts(x, a, b, weights, ids, quant_config=config, **rest)

    with pytest.raises(ValueError, match=r"scale of int4_g64 .*\[4, 128, 2\], found \[4, 128, 4\]"):
        run(columns=64)
    with pytest.raises(ValueError, match=r"do not go with hidden_states \[7, 64\]"):
        run(x=x[:, :64])
    with pytest.raises(ValueError, match="do not go with"):
        run(activation=MoEActivation.SILU_NO_MUL)
    with pytest.raises(ValueError, match="4 of 6 experts: an expert_map must say which"):
        run(global_num_experts=6)
    with pytest.raises(ValueError, match=r"topk_weights is \(7, 1\), topk_ids \(7, 2\)"):
        run(weights=weights[:, :1])
    with pytest.raises(ValueError, match="topk_ids"):
        run(ids=ids + 3)
    with pytest.raises(ValueError, match=r"expert_map is \(4,\), for 6 experts"):
        run(global_num_experts=6, expert_map=torch.arange(E, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"int32 or int64, got torch.float32"):
        run(ids=ids.float())
    with pytest.raises(ValueError, match="top-1 routing, got K = 2"):
        run(apply_router_weight_on_input=True)
    with pytest.raises(ValueError, match=r"expected .*uint8, found"):
        run(a=a.float())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compiled_it_is_the_same(scale_dtype):
    w13, w2 = draw("int4_g32_zp", E, 2 * I, H, shards=2), draw("int4_g32_zp", E, H, I, seed=1)
    scales = [w.scale.to(scale_dtype) for w in (w13, w2)]
    zeros = {"w1_zp": w13.zero_point, "w2_zp": w2.zero_point}
    config = fusedmoe.int4_w4a16_moe_quant_config(*scales, **zeros, block_shape=[0, 32])
    options = fusedmoe.MoEOptions(batch_invariant=True)
    tensors, _ = inputs(w13, w2)

    def run(x, *rest):
        return fused_experts(x, *rest, quant_config=config, options=options) * 2

    # backend="eager" would leave gradients switched off behind an error.
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), run(*tensors))
    with pytest.raises(ValueError, match=r"topk_ids lie in \[9, 9\]"):
        compiled(*tensors[:4], torch.full((T, K), 9))


def test_compiled_rows_keep_their_scales():
    key = {"per_act_token_quant": False, "per_out_ch_quant": False}
    w13, w2 = draw("fp8_tensor", E, 2 * I, H, shards=2), draw("fp8_tensor", E, H, I, seed=1)
    rows = torch.tensor([0.02]), torch.tensor([0.003])
    config = fusedmoe.fp8_w8a8_moe_quant_config(w13.scale, w2.scale, *rows, **key)
    tensors, _ = inputs(w13, w2)
    compiled = torch.compile(fused_experts, backend="eager", fullgraph=True)
    wanted = fused_experts(*tensors, quant_config=config)
    assert torch.equal(compiled(*tensors, quant_config=config), wanted)
