"""What TMA is told about a matrix, and how often Triton is asked to find a kernel's variant."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")
from fusedmoe.kernels.triton import hopper_launch
from fusedmoe.kernels.triton.hopper_launch import (
    HopperLauncher,
    matrix_descriptor,
    weight_views,
)

E, I, H = 3, 32, 48  # noqa: E741


def assert_views(descriptor, matrix):
    """The descriptor sees what this view of a tensor sees."""
    assert descriptor.base.data_ptr() == matrix.data_ptr()
    assert descriptor.base.dtype is matrix.dtype
    assert tuple(descriptor.shape) == tuple(matrix.shape)
    assert tuple(descriptor.strides) == matrix.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(
    ("shards", "interleaved", "halves"),
    [
        (2, False, lambda rows: (rows, rows[I:], 2 * I)),
        (2, True, lambda rows: (rows[0::2], rows[1::2], I)),
        (1, False, lambda rows: (rows, rows, I)),
    ],
)
def test_gate_and_up_have_the_same_row_number(shards, interleaved, halves, dtype):
    w1 = torch.empty(E, shards * I, H, dtype=dtype)
    gate, up, rows = weight_views(w1, shards, interleaved, (16, 32))
    first, second, expected = halves(w1.view(-1, H))
    assert rows == expected
    assert_views(gate, first)
    assert_views(up, second)
    assert gate.block_shape == [16, 32]


def test_bytes_are_viewed_as_words():
    w1 = torch.empty(E, 2 * I, H, dtype=torch.uint8)
    gate, up, _ = weight_views(w1, 2, True, (16, 4), torch.int32)
    words = w1.view(-1, H).view(torch.int32)
    assert_views(gate, words[0::2])
    assert_views(up, words[1::2])


def test_rows_further_apart_than_they_are_long():
    x = torch.empty(5, 64, dtype=torch.float16)[:, :48]
    assert_views(matrix_descriptor(x, 48, (8, 16), stride=x.stride(0)), x)


def test_nothing_holds_on_to_a_matrix():
    w = torch.empty(2, 16, 16, dtype=torch.bfloat16)
    alive = weakref.ref(w)
    kept = matrix_descriptor(w, 16, (8, 16))
    assert matrix_descriptor(w, 16, (8, 16)) is kept
    del w
    gc.collect()
    assert alive() is None


class Kernel:
    """Counts how it is launched: by way of Triton, or as the compiled variant itself."""

    def __init__(self):
        self.found, self.ran = [], []
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.found.append((grid, arguments, options))
            return self

        return launch

    def run(self, *arguments):
        self.ran.append(arguments)


def test_triton_is_asked_once_per_variant(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    kernel = Kernel()
    launch = HopperLauncher(kernel)
    x = torch.empty(8, 64, dtype=torch.bfloat16)
    matrix = matrix_descriptor(x, 64, (8, 16))
    for _ in range(3):
        launch(132, (matrix,), (None, x), (8, None), (64, "silu"), num_warps=4)
    options = {"num_warps": 4, "launch_pdl": True, "enable_fp_fusion": True}
    assert kernel.found == [((132,), (matrix, None, x, 8, None, 64, "silu"), options)]
    assert len(kernel.ran) == 2
    assert kernel.ran[0][:4] == (132, 1, 1, 7)
    assert kernel.ran[0][9:] == (matrix, None, x, 8, None, 64, "silu")
    other = matrix_descriptor(x, 64, (8, 32))
    half = x.half()
    for changed in (
        ((other,), (None, x), (8, None), (64, "silu")),
        ((matrix,), (None, half), (8, None), (64, "silu")),
        ((matrix,), (None, x), (16, None), (64, "silu")),
        ((matrix,), (None, x), (8, None), (64, "gelu")),
    ):
        launch(132, *changed, num_warps=4)
    launch(132, (matrix,), (None, x), (8, None), (64, "silu"), num_warps=8)
    assert len(kernel.found) == 6


def test_a_tensor_at_an_odd_address_goes_by_way_of_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel = Kernel()
    launch = HopperLauncher(kernel)
    odd = torch.empty(9, dtype=torch.bfloat16)[1:]
    for _ in range(2):
        launch(132, (), (odd,), (), ())
    assert len(kernel.found) == 2
    assert not launch._variants


def test_variants_are_bounded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(hopper_launch, "_MAX_VARIANTS", 3)
    launch = HopperLauncher(Kernel())
    for number in range(10):
        launch(132, (), (torch.empty(8),), (number,), ())
    assert 0 < len(launch._variants) <= 3
