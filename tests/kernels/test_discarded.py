"""Which rows a sum gives up in the L2: as many as are still there, and whole lines of them."""

import pytest
import torch

from fusedmoe.kernels.triton.discarded import LEAST_BYTES, MOST_BYTES, may_discard


def rows(H, dtype=torch.bfloat16, shift=0):
    """[4, H], so many numbers after the beginning of a line."""
    memory = torch.empty(5 * H + 128, dtype=dtype)
    first = -memory.data_ptr() % 128 // memory.element_size() + shift
    return memory[first : first + 4 * H].view(4, H)


@pytest.mark.parametrize("H", [64, 2880, 4096])
def test_so_many_bytes(H):
    least, most = -(-LEAST_BYTES // (2 * H)), MOST_BYTES // (2 * H)
    assert may_discard(rows(H), least)
    assert may_discard(rows(H), most)
    assert not may_discard(rows(H), least - 1)
    assert not may_discard(rows(H), most + 1)


def test_only_whole_lines_of_16_bit_numbers():
    slots = 20_000
    assert may_discard(rows(1024), slots)
    assert not may_discard(rows(1040), slots)
    assert not may_discard(rows(1024, torch.float32), slots)
    assert not may_discard(rows(1024, shift=8), slots)
