"""Scales of superblocks as numbers: with them, integers become the values of the format."""

import pytest
import torch

from fusedmoe.kernels.superblock_scales import (
    ADDED,
    superblock_scales,
    superblock_scales_reference,
)
from packed_weights import pack

pytest.importorskip("triton")
from fusedmoe.kernels.triton.superblock_scales import launch


def weights(kind):
    return pack(torch.randn(3, 10, 512), kind)


def test_integers_times_scales_plus_terms_are_the_values():
    w = weights("q4_k")
    scale, term = superblock_scales(w)
    runs = w.data.unflatten(-1, (2, 144))[..., 16:].unflatten(-1, (4, 32))
    integers = torch.stack([runs & 15, runs >> 4], -2).flatten(2).unflatten(-1, (16, 32))
    values = (integers.double() + ADDED) * scale.double()[..., None] + term.double()[..., None]
    exact = w.dequantize(torch.float64)
    assert (values.flatten(-2) - exact).abs().max() < 2e-5 * exact.abs().max()


@pytest.mark.parametrize(("kind", "nbytes"), [("q4_k", 144), ("q5_k", 176)])
def test_the_kernel_is_as_defined(kind, nbytes):
    w = weights(kind).to("cuda" if torch.cuda.is_available() else "cpu")
    expected = superblock_scales_reference(w)
    found = [torch.full_like(part, float("nan")) for part in expected]
    launch(w.data, *found, nbytes)
    for part, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match="q6_k"):
        superblock_scales(weights("q6_k"))
    w = weights("q4_k")
    object.__setattr__(w, "data", w.data.transpose(0, 1))
    with pytest.raises(ValueError, match="contiguous"):
        superblock_scales(w)
