"""Batched rows through the references: what Standard rows give; the rest unread."""

from __future__ import annotations

import pytest
import torch

from fusedmoe import FusedMoE, MoEActivation, MoEOptions, explain
from fusedmoe.modular_kernel import ExpertTokensMetadata
from fusedmoe.quantization import keys
from quantized_layers import make_layer

BATCHED = MoEOptions(experts="torch_quantized_batched")
T, H = 9, 128
CLOSE = {
    torch.float64: {"rtol": 1e-6, "atol": 1e-6},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("int4_g32_zp", None),
        ("fp8_tensor", keys.FP8_DYNAMIC_TENSOR),
        ("fp8_block", keys.FP8_DYNAMIC_128),
        ("int8_channel", keys.INT8_STATIC_TENSOR),
        ("nvfp4", keys.NVFP4_DYNAMIC),
    ],
    ids=str,
)
def test_batched_is_standard(name, activation):
    standard, _, _ = make_layer(name, activation, has_bias=True)
    batched, _, _ = make_layer(
        name, activation, has_bias=True, options=BATCHED, max_num_tokens=T + 3
    )
    assert explain(batched).prepare_finalize.name == "batched"
    batched.load_state_dict(standard.state_dict())
    batched.routed_experts.process_weights_after_loading()
    x, logits = torch.randn(T, H), torch.randn(T, 4)
    torch.testing.assert_close(batched(x, logits), standard(x, logits), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(batched, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, logits), batched(x, logits))


def test_rows_past_the_count_are_not_read():
    layer, _, _ = make_layer(
        "fp8_tensor", keys.FP8_DYNAMIC_TENSOR, options=BATCHED, max_num_tokens=T
    )
    experts = layer.routed_experts.quant_method.kernel(layer.routed_experts).experts
    counts = torch.tensor([2, 0, T, 1], dtype=torch.int32)
    rows = torch.randn(4, T, H)
    poisoned = rows.masked_fill(torch.arange(T)[:, None] >= counts[:, None, None], torch.nan)
    outs = []
    for x in (rows.masked_fill(poisoned.isnan(), 0), poisoned):
        out = torch.full((4, T, H), torch.nan)
        weights = (layer.routed_experts.w13_weight, layer.routed_experts.w2_weight)
        nothing = (None, None, None, None)
        experts.apply(
            *(out, x, *weights, torch.ones(T, 2), torch.zeros(T, 2), layer.moe_config.activation),
            *(4, None, *nothing, ExpertTokensMetadata(counts), False),
        )
        outs.append(out)
    assert torch.equal(*outs)
    assert (outs[0][1] == 0).all()
    assert outs[0].isfinite().all()
    with pytest.raises(
        ValueError, match=r"expert_num_tokens \[4\], got None, and as many batches, got 4"
    ):
        experts.apply(
            *(outs[0], rows, *weights, torch.ones(T, 2), torch.zeros(T, 2)),
            *(layer.moe_config.activation, 4, None, *nothing, None, False),
        )


def plain_layer(dtype: torch.dtype, options: MoEOptions | None = None, **how) -> FusedMoE:
    """Four experts, two picks, H 128, I 32, biased; the same numbers each time."""
    layer = FusedMoE(4, 2, H, 32, params_dtype=dtype, has_bias=True, options=options, **how)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.routed_experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) / 8
    layer.routed_experts.process_weights_after_loading()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", [MoEActivation.SILU, MoEActivation.SWIGLUOAI])
def test_unquantized_rows_may_come_in_batches_on_a_cpu(dtype, activation):
    standard = plain_layer(dtype, MoEOptions(experts="torch"), activation=activation)
    options = MoEOptions(prepare_finalize="batched")
    batched = plain_layer(dtype, options, activation=activation, max_num_tokens=T + 3)
    assert explain(batched).chosen.name == "torch_batched"
    for rows in (0, 1, T):
        x, logits = torch.randn(rows, H, dtype=dtype), torch.randn(rows, 4)
        logits[:, 3] -= 100  # an expert without rows
        # Rows are rounded to the dtype before they are summed over the picks.
        torch.testing.assert_close(batched(x, logits), standard(x, logits), **CLOSE[dtype])
    compiled = torch.compile(batched, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, logits), batched(x, logits))
