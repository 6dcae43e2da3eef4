"""Whole layers with quantized experts: all formats and schemes, loading, ranks, errors."""

from __future__ import annotations

import pytest
import torch

from fusedmoe import (
    FusedMoE,
    MoEOptions,
    OnlineQuantization,
    QuantizedFusedMoEMethod,
    explain,
    read_quantization,
)
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.quantization import keys
from fusedmoe.quantization.activations import fake_quantize
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.tensor import QuantizedTensor
from quantized_layers import FORMATS, REFERENCE, SCHEMES, SUFFIXES, Scheme, draw, fill, make_layer

T, E, K, H, I = 9, 4, 2, 128, 128  # noqa: E741


def routing(layer, logits):
    return layer.router.select_experts(torch.zeros(len(logits), 1), logits)


def expected(layer, w13, w2, x, logits, **more):
    return experts_reference(
        x.double(),
        w13.dequantize(torch.float64),
        w2.dequantize(torch.float64),
        *routing(layer, logits),
        compute_dtype=torch.float64,
        activation=layer.moe_config.activation,
        **more,
    )


def close(out: torch.Tensor, ref: torch.Tensor, bound: float) -> None:
    assert out.shape == ref.shape
    error = (out.double() - ref).norm() / ref.norm()
    assert error < bound, float(error)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_alone_quantized_are_their_dequantized_values(name):
    layer, w13, w2 = make_layer(name)
    x, logits = torch.randn(T, H), torch.randn(T, E)
    close(layer(x, logits), expected(layer, w13, w2, x, logits), 1e-6)


@pytest.mark.parametrize(("name", "activation"), SCHEMES, ids=lambda v: str(v).replace(" ", "-"))
def test_activations_are_rounded_before_both_products(name, activation):
    layer, w13, w2 = make_layer(name, activation)
    x, logits = torch.randn(T, H), torch.randn(T, E)
    weights, ids = routing(layer, logits)
    scales = {"w13": None, "w2": None}
    if activation.static:
        scales = {o: getattr(layer.routed_experts, f"{o}_input_scale").max() for o in scales}
    rounded = fake_quantize(x.double(), activation, scales["w13"])
    first, second = w13.dequantize(torch.float64), w2.dequantize(torch.float64)
    gate, up = torch.einsum("th,enh->ten", rounded, first).chunk(2, -1)
    middle = torch.nn.functional.silu(gate) * up
    picked = middle.gather(1, ids.long()[..., None].expand(-1, -1, I))
    picked = fake_quantize(picked.flatten(0, 1), activation, scales["w2"]).view(T, K, I)
    ref = torch.einsum("tki,tkhi,tk->th", picked, second[ids.long()], weights.double())
    # fp32 may round a value to the other side of a tie that fp64 sees.
    close(layer(x, logits), ref, 0.02 if activation.dtype in ("mxfp4", "nvfp4") else 5e-3)
    assert (layer(x, logits).double() - expected(layer, w13, w2, x, logits)).norm() > 0
    assert "emulated: activations" in str(explain(layer))


@pytest.mark.parametrize("activation", ["swigluoai", "relu2_no_mul", "gelu"])
@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_block_32x16", "int4_g32_act_order", "nvfp4"])
def test_shards_of_other_activations(name, activation):
    """Interleaved rows and experts without a gate find their own scales."""
    layer, w13, w2 = make_layer(name, act=activation, has_bias=True)
    x, logits = torch.randn(T, H), torch.randn(T, E)
    experts = layer.routed_experts
    biases = {"w1_bias": experts.w13_bias, "w2_bias": experts.w2_bias}
    close(layer(x, logits), expected(layer, w13, w2, x, logits, **biases), 1e-6)


def checkpoint(w13: QuantizedTensor, w2: QuantizedTensor) -> list[tuple[str, torch.Tensor]]:
    """One tensor per expert, projection and part, whole, under the canonical names."""
    tensors = []
    for e in range(w13.shape[0]):
        for weight, names in ((w13, ("gate_proj", "up_proj")), (w2, ("down_proj",))):
            one = weight[e]
            for part, tensor in one.parts().items():
                of_shards = part in ("scale2", "group_index") or tensor.dim() == 1
                shards = tensor.unbind(0) if of_shards else tensor.chunk(len(names), 0)
                for shard_name, shard in zip(names, shards, strict=True):
                    tensors.append((f"experts.{e}.{shard_name}.{SUFFIXES[part]}", shard))
    return tensors


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_in_our_names_loads(name):
    layer, w13, w2 = make_layer(name)
    x, logits = torch.randn(T, H), torch.randn(T, E)
    ref = layer(x, logits)
    other = FusedMoE(E, K, H, I, torch.float32, quant_config=Scheme(name), options=REFERENCE)
    other.routed_experts.load_weights(checkpoint(w13, w2))
    other.routed_experts.check_loaded()
    assert torch.equal(other(x, logits), ref)


@pytest.mark.parametrize(
    ("name", "width", "tp"),
    [
        ("fp8_block", 320, 2),  # 160 units a rank: blocks of 32
        ("fp8_block", 256, 4),  # 64: half a block
        ("fp8_block_32x16", 96, 4),  # 24 becomes 32
        ("int4_g128", 384, 4),  # 96: groups of 32
        ("int4_g64_zp", 192, 2),
        ("int4_g32", 96, 4),  # 24 becomes 32, and the last rank holds padding alone
        ("int4_g32_zp", 96, 4),
        ("int4_g32_act_order", 128, 4),
        ("int4_channel", 48, 3),
        ("int8_g64", 128, 4),
        ("fp8_tensor", 96, 3),
        ("mxfp4", 160, 2),  # five groups: 96 units and 64
        ("nvfp4", 96, 4),  # six groups: two, two, two, none
        ("mxfp6_e2m3", 96, 2),
        ("nf4", 128, 3),  # 43 becomes 64, and the last rank holds padding alone
        ("iq4_nl", 96, 4),
    ],
)
def test_ranks_add_up_to_the_whole(name, width, tp):
    """Where a rank cuts a group, its scales are refined; nothing is lost or counted twice."""
    w13, w2 = draw(name, E, 2 * width, H, shards=2), draw(name, E, H, width, seed=1)
    tensors = checkpoint(w13, w2)
    x, logits = torch.randn(T, H), torch.randn(T, E)
    whole = FusedMoE(E, K, H, width, torch.float32, quant_config=Scheme(name), options=REFERENCE)
    whole.routed_experts.load_weights(tensors)
    total = torch.zeros(T, H)
    for rank in range(tp):
        part = FusedMoE(
            E,
            K,
            H,
            width,
            torch.float32,
            quant_config=Scheme(name),
            tp_size=tp,
            tp_rank=rank,
            options=REFERENCE,
        )
        part.routed_experts.load_weights(tensors)
        total += part(x, logits)
    close(total, whole(x, logits).double(), 1e-5)


def test_the_largest_stored_activation_scale_is_used():
    layer, _, _ = make_layer("fp8_tensor", keys.FP8_STATIC_TENSOR)
    experts = layer.routed_experts
    experts.w13_input_scale.data[2, 1] = 3.0
    experts.process_weights_after_loading()
    config = experts.quant_method.kernel(experts).experts.quant_config
    assert config.a1_scale.tolist() == [3.0]
    assert config.a2_scale.item() < 1
    assert not experts.quant_method.supports_eplb
    assert make_layer("fp8_tensor")[0].routed_experts.quant_method.supports_eplb


def test_asking_for_the_config_again_gives_the_scale_that_runs():
    layer, _, _ = make_layer("fp8_tensor", keys.FP8_STATIC_TENSOR)
    experts = layer.routed_experts
    method = experts.quant_method
    runs = method.kernel(experts).experts.quant_config
    assert method.get_fused_moe_quant_config(experts).a2_scale.equal(runs.a2_scale)
    experts.w2_input_scale.data[1] = 5.0
    experts.process_weights_after_loading()
    for config in (runs, method.get_fused_moe_quant_config(experts)):
        assert config.a2_scale.tolist() == [5.0]


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.inf, torch.nan])
def test_activation_scales_must_be_positive(bad):
    with pytest.raises(ValueError, match="w13_input_scale: expected finite numbers above 0, found"):
        make_layer("fp8_tensor", keys.FP8_STATIC_TENSOR, input_scale=bad)


def test_a_scale_that_is_not_finite_is_an_error_before_anything_runs():
    layer, _, _ = make_layer("int4_g32", prefix="model.layers.3.mlp")
    experts = layer.routed_experts
    experts.w2_weight_scale.data[1, 2, 0] = torch.nan
    experts.quant_method.weights_changed()
    with pytest.raises(ValueError, match=r"model.layers.3.mlp.w2_weight: 1 of \d+ numbers of its"):
        layer(torch.randn(2, H), torch.randn(2, E))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, t: None if n.endswith("down_proj.weight_scale") else t, "misses 4 of 24 expert"),
        (
            lambda n, t: t[:, :2] if n == "experts.1.up_proj.weight_scale" else t,
            r"experts.1.up_proj.weight_scale: expected shape \(128, 4\), found \(128, 2\)",
        ),
        (
            lambda n, t: t[:, :-1] if n == "experts.2.down_proj.weight" else t,
            r"experts.2.down_proj.weight: expected shape \(128, 64\), found \(128, 63\)",
        ),
        (
            lambda n, t: t.char() if n == "experts.0.gate_proj.weight" else t,
            "experts.0.gate_proj.weight: found torch.int8, .* torch.uint8 of w13_weight",
        ),
    ],
)
def test_bad_checkpoints_are_refused_by_name(change, message):
    tensors = checkpoint(draw("int4_g32", E, 2 * I, H, shards=2), draw("int4_g32", E, H, I))
    changed = [(name, change(name, tensor)) for name, tensor in tensors]
    layer = FusedMoE(E, K, H, I, torch.float32, quant_config=Scheme("int4_g32"), options=REFERENCE)

    def load():
        layer.routed_experts.load_weights((n, t) for n, t in changed if t is not None)
        layer.routed_experts.check_loaded()

    with pytest.raises(ValueError, match=message):
        load()


def test_sizes_a_group_does_not_divide_are_refused_when_the_layer_is_built():
    with pytest.raises(ValueError, match="groups of 32 columns do not divide 72 columns"):
        FusedMoE(E, K, 72, I, torch.float32, quant_config=Scheme("int4_g32"), options=REFERENCE)
    with pytest.raises(ValueError, match="groups of 128 columns do not divide 96 columns"):
        FusedMoE(E, K, H, 96, torch.float32, quant_config=Scheme("int4_g128"))


def test_changing_the_dtype_of_a_layer_leaves_what_is_packed():
    layer, w13, w2 = make_layer("fp8_block")
    before = layer.routed_experts.w13_weight.data_ptr()
    layer.half()
    experts = layer.routed_experts
    assert experts.w13_weight.dtype == torch.float8_e4m3fn
    assert experts.w13_weight_scale.dtype == torch.float32
    assert experts.w13_weight.data_ptr() == before
    x, logits = torch.randn(T, H), torch.randn(T, E)
    got = layer(x.half(), logits)
    assert got.dtype == torch.float16
    close(got.float(), expected(layer, w13, w2, x.half().float(), logits), 2e-3)
    with pytest.raises(ValueError, match=r"compute in torch\.float16, hidden_states are torch\.fl"):
        layer(x, logits)


def test_state_dict_holds_what_was_quantized():
    layer, _, _ = make_layer("int4_g32_zp")
    names = {name.rpartition(".")[2] for name in layer.state_dict()}
    assert names >= {
        f"{owner}_weight{rest}" for owner in ("w13", "w2") for rest in ("", "_scale", "_zero_point")
    }
    other, _, _ = make_layer("int4_g32_zp")
    other.routed_experts.w13_weight.data.zero_()
    other.load_state_dict(layer.state_dict())
    other.routed_experts.process_weights_after_loading()
    x, logits = torch.randn(T, H), torch.randn(T, E)
    assert torch.equal(other(x, logits), layer(x, logits))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_of_the_rows(dtype):
    layer, w13, w2 = make_layer("int4_g32", dtype=dtype)
    x, logits = torch.randn(T, H).to(dtype), torch.randn(T, E)
    out = layer(x, logits)
    assert out.dtype == dtype
    bound = {torch.float64: 1e-12, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    close(out, expected(layer, w13, w2, x, logits), bound)


@pytest.mark.parametrize("name", ["int4_g32", "fp8_block"])
def test_batch_invariance_and_odd_batches(name):
    options = MoEOptions(batch_invariant=True, experts="torch_quantized")
    layer, _, _ = make_layer(name, options=options)
    x, logits = torch.randn(T, H), torch.randn(T, E)
    out = layer(x, logits)
    assert torch.equal(layer(x[3:4], logits[3:4]), out[3:4])
    assert layer(x[:0], logits[:0]).shape == (0, H)
    poisoned = x.clone()
    poisoned[2] = torch.nan
    got = layer(poisoned, logits)
    others = [0, 1, *range(3, T)]
    assert torch.equal(got[others], out[others])
    assert got[2].isnan().all()


def test_unequal_formats_of_gate_up_and_down():
    """A file may keep the down projection in more bits."""

    class Mixed:
        def get_quant_method(self, moe_config, prefix):
            return QuantizedFusedMoEMethod(
                moe_config, format_named("int4_g32"), format_named("int8_channel")
            )

    layer = FusedMoE(E, K, H, I, torch.float32, quant_config=Mixed(), options=REFERENCE)
    w13, w2 = draw("int4_g32", E, 2 * I, H, shards=2), draw("int8_channel", E, H, I)
    fill(layer, w13, w2)
    x, logits = torch.randn(T, H), torch.randn(T, E)
    close(layer(x, logits), expected(layer, w13, w2, x, logits), 1e-6)


def test_quantizing_a_matrix_by_ranks_is_quantizing_it_whole():
    weight = torch.randn(1, 64, 256)
    q = quantize(weight, format_named("int4_g32"))
    half = quantize(weight[..., :128], format_named("int4_g32"))
    assert torch.equal(half.data, q.data[..., :64])


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("int4_g32_act_order", None),
        ("fp8_block", keys.FP8_DYNAMIC_128),
        ("nvfp4", keys.NVFP4_STATIC),
    ],
    ids=str,
)
def test_compiled_layers_give_the_same_bits(name, activation):
    layer, _, _ = make_layer(name, activation, has_bias=True)
    x, logits = torch.randn(T, H), torch.randn(T, E)
    with torch.no_grad():
        eager = layer(x, logits)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, logits), eager)


@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 31)])
def test_joined_tensors_that_do_not_split_are_refused_by_name(activation, shape):
    layer = FusedMoE(
        *(8, 2, 16, 16),
        params_dtype=torch.float32,
        has_bias=True,
        activation=activation,
        quant_config=OnlineQuantization.of("int4_g16"),
    )
    with pytest.raises(ValueError, match="gate_up_proj_bias"):
        layer.load_weights([("gate_up_proj_bias", torch.zeros(shape))])


def test_alternating_rows_that_share_scales_are_refused_by_name():
    """A block of a joined tensor would have one scale for rows of gate and of up."""
    fp8 = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    layer = FusedMoE(
        *(2, 1, 128, 128),
        params_dtype=torch.float32,
        activation="swigluoai",
        quant_config=read_quantization(fp8),
    )
    joined = {
        "gate_up_proj": torch.zeros(2, 256, 128, dtype=torch.float8_e4m3fn),
        "gate_up_proj_scale_inv": torch.ones(2, 4, 2),
    }
    with pytest.raises(ValueError, match=r"gate_up_proj_scale_inv: .* one number for 64 rows"):
        layer.load_weights(joined)
