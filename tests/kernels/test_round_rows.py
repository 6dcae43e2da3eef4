"""Rows rounded to a format and back, Triton's body against the definition, to the bit."""

import pytest
import torch

from fusedmoe.kernels.column_orders import ordered
from fusedmoe.kernels.round_rows import round_rows, round_rows_reference
from fusedmoe.quantization.activations import fake_quantize
from fusedmoe.quantization.formats.keys import ACTIVATION_KEYS
from fusedmoe.quantization.keys import (
    ANY,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP4_DYNAMIC,
    MXFP6_E2M3_DYNAMIC,
    MXFP8_DYNAMIC,
    NVFP4_DYNAMIC,
    GroupShape,
    QuantKey,
    fp8_dynamic_group,
)
from quantized_bodies import triton_round

NAN = float("nan")
KEYS = [
    *(key for key in ACTIVATION_KEYS if key.group_shape.col != ANY),
    *(fp8_dynamic_group(64), fp8_dynamic_group(32, "e8m0")),
]


def given(key):
    return torch.tensor([0.02]) if key.static else None


@pytest.mark.parametrize("D", [64, 96, 5000])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_the_kernel_rounds_as_defined(key, D):
    """Sizes over many orders, a row of zeros, groups of zeros, columns cut off by the edge."""
    gen = torch.Generator().manual_seed(D)
    x = torch.randn(6, D, generator=gen) * torch.logspace(-6, 4, 6)[:, None]
    x[1] = 0
    x[2, 16:48] = 0
    expected = fake_quantize(x, key, given(key))
    out = triton_round(x, key, given(key))
    # Scales that are no powers of two may differ in their last bit, and so may a tie.
    assert torch.isclose(out, expected, rtol=1e-6, atol=0).float().mean() > 0.999
    if key.scale_kind == "e8m0":
        assert out.equal(expected)


@pytest.mark.parametrize("key", [MXFP4_DYNAMIC, MXFP6_E2M3_DYNAMIC], ids=str)
def test_ties_go_to_even(key):
    """Every multiple of a sixteenth up to the largest number, with the scale held at 1."""
    most = 6.0 if key.dtype == "mxfp4" else 7.5
    x = torch.arange(0, most, 1 / 16).repeat_interleave(31)
    x = torch.cat([x.view(-1, 31), torch.full((x.numel() // 31, 1), most)], 1).view(1, -1)
    assert triton_round(x, key).equal(fake_quantize(x, key))
    assert triton_round(-x, key).equal(fake_quantize(-x, key))


@pytest.mark.parametrize("key", [FP8_DYNAMIC_TOKEN, MXFP4_DYNAMIC, NVFP4_DYNAMIC], ids=str)
@pytest.mark.parametrize("order", ["halves", "units", "sixes", "blocks", "lanes"])
def test_orders_other_strides_and_16_bits(key, order):
    x = torch.randn(512, 5).half().t()
    expected = round_rows_reference(x, key)
    close = torch.isclose(triton_round(x, key, order=order), ordered(expected, order), rtol=1e-3)
    assert close.float().mean() > 0.99
    assert round_rows(x, key, order=order).equal(ordered(expected, order))
    assert triton_round(x[:0], key).shape == (0, 512)


@pytest.mark.parametrize("key", [MXFP8_DYNAMIC, INT8_STATIC_TENSOR], ids=str)
def test_large_fp16_rows_stay_finite(key):
    """The nearest number of the format may be one that fp16 has not."""
    x = torch.full((2, 32), 65504.0, dtype=torch.float16)
    x[1, :3] = torch.tensor([-65504.0, 1.0, NAN])
    scale = torch.tensor([592.0]) if key.static else None
    wide = fake_quantize(x.float(), key, scale)
    assert wide[0].max() > 65520
    for out in (triton_round(x, key, scale), round_rows(x, key, scale)):
        assert (out[0] == 65504).all()
        assert out[1, 2].isnan()


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_nan_stays_in_its_row(key):
    if key == FP8_DYNAMIC_TENSOR:
        pytest.skip("one scale for all rows, of the finite numbers: made outside the kernel")
    x = torch.randn(3, 64)
    clean = triton_round(x, key, given(key))
    x[1, 5] = NAN
    out = triton_round(x, key, given(key))
    assert out[1, 5].isnan()
    assert out[[0, 2]].equal(clean[[0, 2]])


def test_rows_of_no_expert_do_not_count_for_a_common_scale():
    x = torch.randn(4, 64)
    expected = round_rows(x[:3], FP8_DYNAMIC_TENSOR)
    x[3] = 1e6
    ids = torch.tensor([0, 1, 1, -1])
    out = round_rows(x, FP8_DYNAMIC_TENSOR, topk_ids=ids, num_local_experts=2)
    assert out[:3].equal(expected)


def test_what_cannot_be_rounded_is_named():
    x = torch.randn(3, 64)

    def refused(message, x=x, key=FP8_DYNAMIC_TOKEN, scale=None, **rest):
        with pytest.raises(ValueError, match=message):
            round_rows(x, key, scale, **rest)

    refused(r"\(3, 4, 16\)", x=x.view(3, 4, 16))
    refused("a multiple of 128", x=x, order="units")
    refused("int4", key=QuantKey("int4", False, GroupShape(1, 32)))
    refused("96", key=fp8_dynamic_group(96))
    refused("static key", scale=torch.ones(1))
    refused("4 ids", topk_ids=torch.zeros(4))
