"""One launch that sorts slots and pairs rows does what the two do apart."""

import pytest
import torch

from fusedmoe.kernels.align import MoEAlignment, align_reference, padded_slots
from fusedmoe.kernels.align_pair import PairedOrder, align_and_pair, paired_reference
from fusedmoe.kernels.triton.align_pair import align_and_pair as launch
from fusedmoe.quantization.formats import format_named
from hopper_compiler import run_program

FORMATS = ["int4_g128", "mxfp4", "nvfp4", "int8_channel", "fp8_block"]


def rows(T=5, D=160):
    torch.manual_seed(0)
    return torch.randn(T, D)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_column_goes_where_its_weight_is_read(fmt):
    order, x = PairedOrder.of(format_named(fmt)), rows()
    paired, width = paired_reference(x, order), order.width
    for to in range(x.shape[1]):
        chunk, matrix, thread, half = to // (8 * width), to // 8 % width, to % 8 // 2, to % 2
        column = chunk * 8 * width + thread * 2 * width + half * width + matrix
        unit = 2.0 ** (order.odd if matrix % 2 else order.even)
        assert paired[:, to].equal(x[:, column] * unit)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_launch_is_both(fmt, mapped):
    order, x = PairedOrder.of(format_named(fmt)), rows()
    ids = torch.randint(-1, 7, (5, 3), dtype=torch.int32)
    expert_map = torch.tensor([1, -1, 0, -1, 2, -1], dtype=torch.int32) if mapped else None
    groups = 3 if mapped else 6
    P = padded_slots(ids.numel(), 8, groups, False)
    tables = MoEAlignment(
        *(torch.full((size,), -7, dtype=torch.int32) for size in (P, -(-P // 8), 1))
    )
    paired = torch.full_like(x, float("nan"))
    launch(x, paired, order, ids, expert_map, groups, 8, tables)
    expected, _ = align_reference(ids.flatten(), 8, groups, P, expert_map, mapped, False)
    for found, right in zip(tables, expected, strict=True):
        assert found.equal(right)
    assert paired.equal(paired_reference(x, order))
    paired.fill_(float("nan"))
    launch(x, paired, order)
    assert paired.equal(paired_reference(x, order))


COMPILES_BOTH = """
import torch
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.align_pair import PairedOrder
from fusedmoe.kernels.triton import align_pair
from fusedmoe.quantization.formats import format_named
from hopper_compiler import compile_as_launched

compile_it = compile_as_launched(align_pair.align_and_pair_kernel, lambda found: None, gluon=False)
align_pair._launch = lambda grid, tensors, numbers, constants, warps: compile_it(
    grid, (), tensors, numbers, (*constants, True), num_warps=warps
)
x, ids = torch.zeros(5, 160).bfloat16(), torch.zeros(5, 3, dtype=torch.int32)
order, table = PairedOrder.of(format_named("int4_g128")), torch.zeros(64, dtype=torch.int32)
align_pair.align_and_pair(x, x, order)
align_pair.align_and_pair(x, x, order, ids, None, 6, 8, MoEAlignment(table, table, table))
print("compiled")
"""


def test_it_compiles_with_slots_and_without():
    """The interpreter does not mind operations on tensors that are not there."""
    run_program(COMPILES_BOTH, gluon=False)


def test_rows_that_end_inside_a_chunk_are_refused():
    with pytest.raises(ValueError, match="150 columns"):
        align_and_pair(rows(D=150), PairedOrder(4, 0, 0), torch.zeros(5, 1).int(), 8, 1, None)
