"""Integer weights on a CPU, packed: the reference's results, whatever the sizes and ids are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expert_layers import error
from fusedmoe import FusedMoE, MoEOptions, QuantizedFusedMoEMethod, explain
from fusedmoe.experts import cpu_int4, cpu_int8, cpu_quantized
from fusedmoe.experts.copies import Memory
from fusedmoe.quantization import keys
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.formats.act_order import sort_columns
from quantized_layers import Scheme, draw, fill, make_layer

pytestmark = pytest.mark.skipif(
    cpu_int8.unmet_int8() is not None or cpu_int4.unmet_int4(16, 32, 32) is not None,
    reason="this CPU has neither VNNI nor AVX-512",
)

E, H, I = 4, 128, 128  # noqa: E741
PLAIN = (
    *("int8_channel", "int8_channel_zp", "int8_g32", "int8_g64_zp"),
    *("int4_channel", "int4_channel_zp", "int4_g32", "int4_g32_zp", "int4_g64", "int4_g128"),
)
ACT_ORDER = (
    *("int4_g32_act_order", "int4_g64_zp_act_order"),
    *("int8_g32_act_order", "int8_g64_zp_act_order"),
)


def pair(name, activation=None, **arguments):
    """The layer as it is chosen, and the reference with the same weights."""
    layer, *_ = make_layer(name, activation, options=MoEOptions(), one_order=True, **arguments)
    assert explain(layer).chosen.name == "cpu_quantized"
    reference, *_ = make_layer(name, activation, **arguments | {"dtype": torch.float64})
    reference.load_state_dict(layer.state_dict())
    reference.routed_experts.process_weights_after_loading()
    return layer, lambda *inputs: reference(inputs[0].double(), *inputs[1:])


@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*PLAIN, *ACT_ORDER])
def test_weights_alone(name, dtype, T):
    torch.manual_seed(T)
    layer, reference = pair(name, dtype=dtype)
    x, logits = torch.randn(T, H).to(dtype), torch.randn(T, E)
    out = layer(x, logits)
    assert out.dtype == dtype
    # Rounding bf16 results is 1.6e-3 each; the int4 kernel does it after both products.
    limit = 2.5e-3 if name.startswith("int8") else 4e-3 if T == 33 else 6e-3
    assert error(out, reference(x, logits)) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["int4_channel_zp", "int4_g32", "int4_g128_zp"])
def test_scales_that_bf16_does_not_hold(name, scale_dtype, dtype):
    torch.manual_seed(0)
    fmt = replace(format_named(name), scale_dtype=scale_dtype)
    weights = [torch.randn(E, 2 * I, 2 * H) / 16, torch.randn(E, 2 * H, I) / 11]
    stored = [quantize(w, fmt, shards=n) for w, n in zip(weights, (2, 1), strict=True)]
    assert any((q.scale != q.scale.bfloat16()).any() for q in stored)

    class Given:
        def get_quant_method(self, moe_config, prefix):
            return QuantizedFusedMoEMethod(moe_config, fmt)

    x, logits = torch.randn(33, 2 * H).to(dtype), torch.randn(33, E)
    outs = []
    for forced, rows in ((None, x), ("torch_quantized", x.double())):
        options = MoEOptions(experts=forced)
        layer = FusedMoE(E, 2, 2 * H, I, rows.dtype, quant_config=Given(), options=options)
        fill(layer, *stored)
        outs.append(layer(rows, logits))
        assert forced or explain(layer).chosen.name == "cpu_quantized"
    assert error(*outs) < 4e-3


@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("activation", [keys.INT8_DYNAMIC_TOKEN, keys.INT8_STATIC_TENSOR], ids=str)
def test_int8_activations(activation, T):
    layer, reference = pair("int8_channel", activation)
    x, logits = torch.randn(T, H), torch.randn(T, E)
    # The same bytes are multiplied, up to one step where fp32 sums differ before rounding.
    assert error(layer(x, logits), reference(x, logits)) < 2e-3


@pytest.mark.parametrize("name", ["int8_channel", "int4_g32_zp"])
@pytest.mark.parametrize("act", ["swigluoai", "gelu", "relu2_no_mul"])
def test_activations_biases_and_odd_sizes(name, act):
    layer, reference = pair(name, H=160, I=96, act=act, has_bias=True, E=7, K=3)
    x, logits = torch.randn(11, 160), torch.randn(11, 7)
    assert error(layer(x, logits), reference(x, logits)) < 6e-3


@pytest.mark.parametrize("activation", [keys.INT8_DYNAMIC_TOKEN, keys.INT8_STATIC_TENSOR], ids=str)
def test_a_token_with_nan_is_nan_whatever_rounds_its_row(activation):
    layer, _ = pair("int8_channel", activation)
    x, logits = torch.randn(6, H), torch.randn(6, E)
    clean = layer(x, logits)
    x[4, 5] = torch.nan
    out = layer(x, logits)
    assert torch.equal(out[:4], clean[:4])
    assert out[4].isnan().all()
    assert layer(x[4:5], logits[4:5]).isnan().all()


@pytest.mark.parametrize("name", ["int8_channel", "int8_g32", "int4_g32_zp"])
def test_large_and_odd_rows(name):
    layer, reference = pair(name)
    x, logits = torch.randn(6, H), torch.randn(6, E)
    x[0] *= 1e4
    x[1] = 0
    x[2, 5] = 300.0
    clean = layer(x, logits)
    for row in range(6):
        if row != 1:
            # One value makes most of the row: its rounding is the row's error.
            assert error(clean[row], reference(x, logits)[row]) < 1e-2
    assert (clean[1] == 0).all()
    x[4] = torch.nan
    out = layer(x, logits)
    others = [0, 1, 2, 3, 5]
    assert torch.equal(out[others], clean[others])
    assert out[4].isnan().all()
    assert layer(x[:0], logits[:0]).shape == (0, H)


@pytest.mark.parametrize("name", ["int8_channel", "int4_g32_zp"])
def test_ids_maps_and_weights_on_the_input(name):
    layer, reference = pair(name)
    x = torch.randn(5, H)
    ids = torch.tensor([[0, -1], [3, 3], [-1, -1], [2, 1], [1, 1]], dtype=torch.int32)
    weights = torch.rand(5, 2)
    out = layer.routed_experts.forward_modular(x, weights, ids)
    first = layer(x, torch.eye(E)[[0, 3, 0, 2, 1]] * 100)
    assert error(out[4], first[4] * weights[4].sum()) < 5e-3
    assert error(out[1], first[1] * weights[1].sum()) < 5e-3
    assert error(out[0], first[0] * weights[0, 0]) < 5e-3
    assert (out[2] == 0).all()
    with pytest.raises(ValueError, match="topk_ids"):
        layer.routed_experts.forward_modular(x, weights, ids + 2)
    layer, reference = pair(name, K=1, apply_router_weight_on_input=True)
    logits = torch.randn(5, E)
    assert error(layer(x, logits), reference(x, logits)) < 5e-3


@pytest.mark.parametrize("name", ["int8_channel", "int4_g32"])
def test_batch_invariance(name):
    layer, _, _ = make_layer(name, options=MoEOptions(batch_invariant=True))
    assert explain(layer).chosen.name == "cpu_quantized"
    x, logits = torch.randn(9, H), torch.randn(9, E)
    out = layer(x, logits)
    assert all(
        torch.equal(layer(x[t : t + 1], logits[t : t + 1]), out[t : t + 1]) for t in range(9)
    )


def test_columns_that_make_no_order_are_read_by_their_table():
    """Gate and up that differ: their rows cannot follow both."""
    layer, *_ = make_layer("int4_g32_act_order", options=MoEOptions())
    reference, *_ = make_layer("int4_g32_act_order", dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())
    x, logits = torch.randn(3, H), torch.randn(3, E)
    assert error(layer(x, logits), reference(x.double(), logits)) < 1e-6


def test_columns_that_were_sorted_elsewhere():
    """As a GPU leaves them, with a table that says so: the numbers stay where they lie."""
    layer, reference = pair("int4_g32_zp_act_order")
    x, logits = torch.randn(3, H), torch.randn(3, E)
    first, experts = layer(x, logits), layer.routed_experts
    for weight in experts.quant_method.quantized_weights(experts):
        assert sort_columns(weight)
    experts.process_weights_after_loading()
    assert (experts.w13_weight_group_index < 0).all()
    assert torch.equal(layer(x, logits), first)
    assert error(layer(x, logits), reference(x, logits)) < 6e-3


def test_weights_of_two_kinds():
    class Mixed:
        def get_quant_method(self, moe_config, prefix):
            formats = format_named("int4_g32"), format_named("int8_channel")
            return QuantizedFusedMoEMethod(moe_config, *formats)

    w13, w2 = draw("int4_g32", E, 2 * I, H, shards=2), draw("int8_channel", E, H, I)
    x, logits = torch.randn(3, H), torch.randn(3, E)
    outs = []
    for forced in (None, "torch_quantized"):
        options = MoEOptions(experts=forced)
        layer = FusedMoE(E, 2, H, I, torch.float32, quant_config=Mixed(), options=options)
        fill(layer, w13, w2)
        outs.append(layer(x, logits))
    assert explain(layer).chosen.name == "torch_quantized"
    assert error(*outs) < 5e-3


def test_the_second_format_counts_too():
    class Mixed:
        def get_quant_method(self, moe_config, prefix):
            formats = format_named("int4_g32"), format_named("mxfp4")
            return QuantizedFusedMoEMethod(moe_config, *formats)

    layer = FusedMoE(E, 2, H, I, torch.float32, quant_config=Mixed())
    assert explain(layer).chosen.name == "torch_quantized"


def test_zero_points_are_exact_where_rows_have_a_mean():
    """What is added for a zero point sums up over a row: rounding it would be seen."""
    torch.manual_seed(0)
    q = draw("int4_g32_zp", 1, 64, 1024)
    x = torch.ones(8, 1024) + torch.randn(8, 1024) / 8
    out = torch.empty(8, 64)
    weight = cpu_int4.int4_weights(q)[0]
    cpu_int4.int4_linear(cpu_quantized.row_encoder(q, exact=False)(x), weight, out)
    without = weight._replace(offset=None)
    rounded = torch.empty(8, 64)
    cpu_int4.int4_linear(cpu_quantized.row_encoder(q, exact=False)(x), without, rounded)
    ref = x.double() @ q.dequantize(torch.float64)[0].T
    assert error(out, ref) < 5e-3
    assert error(rounded, ref) > 1.4 * error(out, ref)


def test_weights_written_to_since_are_read_as_they_are():
    layer, _ = pair("int8_channel")
    x, logits = torch.randn(3, H), torch.randn(3, E)
    before = layer(x, logits)
    with torch.no_grad():
        layer.routed_experts.w2_weight_scale.mul_(2)
    assert error(layer(x, logits), 2 * before) < 1e-3
    layer.routed_experts.process_weights_after_loading()
    assert error(layer(x, logits), 2 * before) < 1e-6


def test_without_memory_to_spare_the_reference_runs(monkeypatch):
    """It is wanted where somebody else has the weights too: packing gives up nothing there."""
    memory = Memory(1 << 30, 1 << 20)
    monkeypatch.setattr("fusedmoe.experts.copies.host_memory", lambda: memory)
    layer, reference = pair("int8_channel")
    view = layer.routed_experts.w2_weight[0]
    layer.routed_experts.process_weights_after_loading()
    x, logits = torch.randn(3, H), torch.randn(3, E)
    assert error(layer(x, logits), reference(x, logits)) < 1e-6
    del view
    layer.routed_experts.process_weights_after_loading()
    assert 1e-6 < error(layer(x, logits), reference(x, logits)) < 1e-3


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("int4_g32", {"H": 96, "I": 72}, None),
        ("int4_channel", {"H": 104}, "32 the columns"),
        ("int8_channel", {"H": 33, "I": 7}, ""),
    ],
)
def test_what_the_kernels_cannot_take_is_said(name, sizes, reason):
    if reason is None:
        with pytest.raises(ValueError, match="groups of 32 columns do not divide 72"):
            make_layer(name, options=MoEOptions(), **sizes)
        return
    selection = explain(make_layer(name, options=MoEOptions(), **sizes)[0])
    assert (selection.chosen.name == "cpu_quantized") == (reason == "")
    assert reason in str(selection)


def test_sixteen_bit_rows_hold_the_row():
    x = torch.randn(3, 64)
    x[1, 0] = -500.0
    rows = cpu_int8.half_rows(x)
    again = rows.joined(rows.codes.float() - 128) * rows.scale
    assert ((again - x).abs() <= x.abs().amax(-1, keepdim=True) / 65000).all()


def test_a_scheme_written_by_hand_is_enough():
    layer = FusedMoE(E, 2, H, I, torch.bfloat16, quant_config=Scheme("int4_g32"))
    assert explain(layer).chosen.name == "cpu_quantized"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", [*PLAIN, "int8_by_int8"])
def test_products_collected_are_products_one_by_one(name, rows):
    """A row for each weight, or one for all, also where both are one."""
    torch.manual_seed(rows)
    q = draw(name.replace("_by_int8", "_channel"), 3, 48, 128)
    x = torch.randn(rows, 128)
    encode = cpu_int8.byte_rows if "_by_" in name else cpu_quantized.row_encoder(q, exact=False)
    if q.format.element == "int8":
        weights, linear, linears = (
            cpu_int8.int8_weights(q),
            cpu_int8.int8_linear,
            cpu_int8.int8_linears,
        )
    else:
        weights, linear, linears = (
            cpu_int4.int4_weights(q),
            cpu_int4.int4_linear,
            cpu_int4.int4_linears,
        )
    for some in (weights, weights[:1]) if rows == 1 else (weights,):
        expected = torch.empty(len(some), 48)
        for k, weight in enumerate(some):
            linear(encode(x[k : k + 1] if rows > 1 else x), weight, expected[k : k + 1])
        torch.testing.assert_close(linears(encode(x), some), expected, rtol=1e-6, atol=1e-6)


def test_packed_experts_of_a_layer_share_an_allocation():
    """One each, between the large tensors that packing takes, left holes five times as large."""
    weights = cpu_int4.int4_weights(draw("int4_g32", 3, 48, 128))
    assert len({weight.packed.untyped_storage().data_ptr() for weight in weights}) == 1
    assert weights[0].packed.untyped_storage().nbytes() == 3 * 48 * 64
