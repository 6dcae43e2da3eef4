"""The comparison and the poison: they must fail when they should."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fusedmoe.testing import (
    TOLERANCES,
    assert_close,
    assert_no_worse,
    format_name,
    nan_poison,
    relative_error,
)


def test_what_is_close_returns_its_error():
    ref = torch.randn(40, 8, dtype=torch.float64)
    error = assert_close("x", ref.float(), ref)
    assert 0 < error.frobenius < 1e-7
    assert relative_error(ref, ref) == (0.0, 0.0)


def test_a_small_error_everywhere_and_a_large_one_somewhere_both_fail():
    ref = torch.randn(1000, 10)
    with pytest.raises(AssertionError, match=r"layer: relative error 1\.00e-04 \(Frobenius\)"):
        assert_close("layer", ref * 1.0001, ref)
    spike = ref.clone()
    spike[3, 4] += 5e-5 * ref.abs().max()
    assert relative_error(spike, ref).frobenius < TOLERANCES["fp32"].frobenius
    with pytest.raises(AssertionError, match="maximum"):
        assert_close("layer", spike, ref)
    assert_close("layer", ref * 1.0001, ref, "bf16")
    assert_close("layer", ref * 1.0001, ref, factor=100)


def test_bounds_follow_the_dtype_or_the_name():
    ref = torch.ones(4)
    assert_close("x", torch.full((4,), 1.004).bfloat16(), ref)
    with pytest.raises(AssertionError):
        assert_close("x", torch.full((4,), 1.004).bfloat16(), ref, torch.float16)
    with pytest.raises(KeyError):
        assert_close("x", ref, ref, "int3")
    assert format_name(torch.bfloat16) == "bf16"
    with pytest.raises(ValueError, match="int8"):
        format_name(torch.int8)


def test_shapes_and_values_that_are_not_finite_must_agree():
    ref = torch.tensor([1.0, float("nan"), float("inf")])
    assert_close("x", ref.clone(), ref)
    for wrong, message in (
        (torch.tensor([float("nan"), 1.0, float("inf")]), r"first is at \[0\]"),
        (torch.tensor([1.0, 2.0, float("inf")]), r"1 of 3.*\[1\]"),
        (torch.tensor([1.0, float("nan"), -float("inf")]), "infinities"),
        (torch.tensor([1.0, float("inf"), float("nan")]), "NaN"),
        (torch.ones(2), r"\(2,\), expected \(3,\)"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_close("x", wrong, ref)


def test_nothing_is_close_to_nothing_and_zero_to_zero():
    assert_close("none", torch.empty(0, 4), torch.empty(0, 4))
    assert_close("zero", torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError, match="inf"):
        assert_close("not zero", torch.full((3,), 1e-30), torch.zeros(3))


def test_poison_is_in_every_new_tensor_and_gone_afterwards():
    like = torch.ones(2)
    with nan_poison():
        fresh = [
            torch.empty(3, 2),
            torch.empty(3, dtype=torch.bfloat16),
            torch.empty_like(like),
            torch.empty_strided((2, 2), (1, 2)),
            torch.empty_permuted((2, 2), (1, 0)),
            like.new_empty(4),
            like.new_empty_strided((2,), (1,)),
        ]
        ints = torch.empty(3, dtype=torch.int64)
    assert all(bool(tensor.isnan().all()) for tensor in fresh)
    assert ints.dtype is torch.int64
    assert not is_poisoned()


def is_poisoned() -> bool:
    torch.zeros(64)  # what the next tensor of its size is then made of
    return bool(torch.empty(64).isnan().all())


def test_poison_is_gone_after_an_error_too():
    with pytest.raises(RuntimeError), nan_poison():
        raise RuntimeError
    assert not is_poisoned()


def test_poison_leaves_nothing_behind():
    """torch remembers which functions make tensors; if it were to meet others in their place,
    ``torch.device`` as a context would stop working for the rest of the process."""
    code = (
        "import torch\n"
        "from fusedmoe.testing import nan_poison\n"
        "with nan_poison(), torch.device('meta'):\n"
        "    assert torch.empty(1).is_meta\n"
        "with nan_poison():\n"
        "    torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1))\n"
        "with torch.device('meta'):\n"
        "    assert torch.empty(1).is_meta\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_worse_than_the_same_steps_in_torch():
    exact = torch.ones(100)
    computed = exact + 0.02
    assert assert_no_worse("ok", exact + 0.0209, computed, exact) == pytest.approx((0.0209, 0.02))
    assert_no_worse("better", exact, computed, exact)
    with pytest.raises(AssertionError, match=r"out: relative error 3.00e-02, .* have 2.00e-02"):
        assert_no_worse("out", exact + 0.03, computed, exact)
    with pytest.raises(AssertionError, match="nan"):
        assert_no_worse("nan", exact * torch.nan, computed, exact)
