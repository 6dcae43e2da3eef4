"""Rows quantized on the way to a product, against the definition of every key."""

import pytest
import torch

from fusedmoe.kernels.quantize import STORED, quantize_rows, quantize_rows_reference
from fusedmoe.quantization.activations import quantize_activation, spread
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_128_UE8M0,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP4_DYNAMIC,
    MXFP8_DYNAMIC,
    fp8_dynamic_group,
)

KEYS = [
    FP8_DYNAMIC_TOKEN,
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_128_UE8M0,
    fp8_dynamic_group(32),
    MXFP8_DYNAMIC,
    INT8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_STATIC_TENSOR,
]


def triton_rows(x, key, scale=None):
    from fusedmoe.kernels.triton.quantize import quantize

    group = None if key.group_shape.col == -1 else key.group_shape.col
    q = torch.empty(x.shape, dtype=STORED[key.dtype])
    groups = 1 if group is None else -(-x.shape[1] // group)
    out = torch.full((x.shape[0], groups), float("nan")) if scale is None else scale
    quantize(x, q, out, group, key.scale_kind == "e8m0", scale is not None)
    return q, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("D", [7, 128, 300])
def test_triton_agrees_with_the_definition(key, D, dtype):
    """Scales to the last bit; elements to one step of the format (the interpreter loses
    the carry when a mantissa rounds up to the next power of two: half the number)."""
    torch.manual_seed(0)
    x = (torch.randn(5, 2 * D) * torch.tensor([1e-6, 1e-2, 300.0, 1.0, 0.0])[:, None]).to(dtype)
    x = x[:, ::2]
    given = torch.tensor([0.03]) if key.static else None
    q, scale = triton_rows(x, key, given)
    expected, expected_scale = quantize_rows_reference(x, key, given)
    torch.testing.assert_close(
        *(found if key.static else found[:-1] for found in (scale, expected_scale)),
        rtol=1e-6,
        atol=0.0,
    )  # any scale serves a row of zeros
    steps = (q.float() - expected.float()).abs()
    allowed = 1.0 if key.dtype == torch.int8 else expected.float().abs() * 0.51 + 2.0**-8
    assert (steps <= allowed).all()
    assert (steps > 0).float().mean() < 0.2


@pytest.mark.parametrize("key", [FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_128, INT8_DYNAMIC_TOKEN], ids=str)
def test_a_nan_stays_in_its_row(key):
    x = torch.randn(4, 200)
    clean = triton_rows(x, key)
    x[2, 150] = float("nan")
    q, scale = triton_rows(x, key)
    value = q.float() * spread(scale, key, 200)
    assert value[2].isnan().any()
    others = [0, 1, 3]
    assert q[others].float().equal(clean[0][others].float())
    assert scale[others].equal(clean[1][others])


def test_one_scale_for_all_counts_only_rows_of_an_expert():
    x = torch.randn(4, 64)
    x[1] *= 1000.0
    ids = torch.tensor([0, -1, 1, 2])
    here = torch.tensor([0, 1, -1], dtype=torch.int32)
    _, scale = quantize_rows(x, FP8_DYNAMIC_TENSOR, topk_ids=ids, expert_map=here)
    assert scale.equal(quantize_activation(x[[0, 2]], FP8_DYNAMIC_TENSOR)[1])


def test_no_rows():
    q, scale = triton_rows(torch.zeros(0, 64), FP8_DYNAMIC_128)
    assert q.shape == (0, 64)
    assert scale.shape == (0, 1)


@pytest.mark.parametrize(
    ("x", "key", "scale", "message"),
    [
        (torch.zeros(2, 64), MXFP4_DYNAMIC, None, "mxfp4"),
        (torch.zeros(64), FP8_DYNAMIC_TOKEN, None, "rows, D"),
        (torch.zeros(2, 64), fp8_dynamic_group(48), None, "power of two"),
        (torch.zeros(2, 64), FP8_STATIC_TENSOR, None, "static"),
        (torch.zeros(2, 64), FP8_DYNAMIC_TOKEN, torch.ones(1), "static"),
        (torch.zeros(2, 64), FP8_STATIC_TENSOR, torch.ones(2), "one scale"),
    ],
)
def test_what_cannot_be_quantized_is_named(x, key, scale, message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(x, key, scale)
