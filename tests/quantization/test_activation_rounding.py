"""Activations rounded to a format: scales by the rules of the page, whatever the values are."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.quantization import keys
from fusedmoe.quantization.activations import fake_quantize, quantize_activation
from fusedmoe.quantization.formats.keys import ACTIVATION_KEYS

KEYS = [
    keys.FP8_DYNAMIC_TENSOR,
    keys.FP8_DYNAMIC_TOKEN,
    keys.FP8_DYNAMIC_128,
    keys.FP8_DYNAMIC_128_UE8M0,
    keys.INT8_DYNAMIC_TOKEN,
    keys.MXFP4_DYNAMIC,
    keys.MXFP8_DYNAMIC,
    keys.MXFP6_E3M2_DYNAMIC,
    keys.MXFP6_E2M3_DYNAMIC,
    keys.NVFP4_DYNAMIC,
]
ERRORS = {"mxfp4": 0.13, "nvfp4": 0.12, "mxfp6_e3m2": 0.06, torch.int8: 0.015}


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_error_and_shapes(key):
    x = torch.randn(7, 320)
    elements, scale = quantize_activation(x, key)
    groups = -(-320 // key.group_shape.col)
    assert elements.shape == x.shape
    assert scale.shape == {
        keys.PER_TENSOR: (1,),
        keys.PER_TOKEN: (7, 1),
    }.get(key.group_shape, (7, groups))
    error = fake_quantize(x, key) - x
    assert 0 < error.norm() / x.norm() < ERRORS.get(key.dtype, 0.035)
    # Rounded again with the same scales, nothing changes.
    twice = fake_quantize(fake_quantize(x.double(), key), key)
    assert torch.allclose(twice, fake_quantize(x.double(), key), rtol=1e-12, atol=0)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_odd_rows(key):
    x = torch.randn(5, 128)
    x[1] = 0
    x[2, 3] = torch.nan
    x[3] *= 1e-20
    clean = fake_quantize(x[:1], key)
    out = fake_quantize(x, key)
    assert (out[1] == 0).all()
    assert out[2].isnan().any()
    assert out[[0, 1, 3, 4]].isfinite().all()
    if key.group_shape != keys.PER_TENSOR:
        assert torch.equal(out[:1], clean)
    assert fake_quantize(x[:0], key).shape == (0, 128)


def test_scales_have_the_lower_bounds_of_their_rules():
    zeros = torch.zeros(2, 128)
    assert quantize_activation(zeros, keys.FP8_DYNAMIC_TOKEN)[1][0] == 1 / (448 * 512)
    assert quantize_activation(zeros, keys.FP8_DYNAMIC_128)[1][0] == torch.tensor(1e-10) / 448
    assert quantize_activation(zeros, keys.INT8_DYNAMIC_TOKEN)[1][0] == torch.tensor(1e-10) / 127


def test_power_of_two_scales_are_rounded_up():
    x = torch.zeros(3, 128)
    x[:, 0] = torch.tensor([448.0, 449.0, 447.0])
    scale = quantize_activation(x, keys.FP8_DYNAMIC_128_UE8M0)[1]
    assert scale.flatten().tolist() == [1.0, 2.0, 1.0]


def test_ties_and_saturation():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5]])
    elements, _ = quantize_activation(x, keys.INT8_DYNAMIC_TOKEN)
    assert elements.tolist() == [[127.0, 0.0, 2.0, -2.0]]
    one = torch.ones(1)
    elements, _ = quantize_activation(x * 10, keys.INT8_STATIC_TENSOR, one)
    assert elements.tolist() == [[127.0, 5.0, 15.0, -25.0]]
    elements, _ = quantize_activation(
        torch.tensor([[1e6, -torch.inf]]), keys.FP8_STATIC_TENSOR, one
    )
    assert elements.tolist() == [[448.0, -448.0]]


def test_per_tensor_scales_leave_out_what_is_not_finite():
    x = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]])
    elements, scale = quantize_activation(x, keys.FP8_DYNAMIC_TENSOR)
    assert scale == torch.tensor(2.0) / 448
    assert elements[0].tolist() == [224.0, 448.0]
    assert elements[1, 1] == 448


def test_the_given_second_scale_of_nvfp4_is_used():
    x = torch.randn(3, 64)
    second = torch.tensor([0.01])
    _, scale = quantize_activation(x, keys.NVFP4_STATIC, second)
    ratio = scale / 0.01
    assert torch.allclose(ratio, ratio.to(torch.float8_e4m3fn).float())


def test_static_needs_a_scale_and_dynamic_refuses_one():
    x = torch.ones(2, 128)
    with pytest.raises(ValueError, match="a scale belongs to static ones"):
        quantize_activation(x, keys.FP8_STATIC_TENSOR)
    with pytest.raises(ValueError, match="a scale belongs to static ones"):
        quantize_activation(x, keys.FP8_DYNAMIC_TOKEN, torch.ones(1))


def test_no_key_is_no_rounding():
    x = torch.randn(2, 3)
    assert fake_quantize(x, None) is x


def test_every_key_that_is_listed_is_computed():
    x = torch.randn(2, 128)
    for key in ACTIVATION_KEYS:
        if key.group_shape.col == keys.ANY:
            continue
        scale = torch.ones(1) if key.static else None
        assert fake_quantize(x, key, scale).shape == x.shape
