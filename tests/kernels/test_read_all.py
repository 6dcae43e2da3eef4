"""A read that leaves words out would overstate the memory's bandwidth."""

import pytest
import torch

from fusedmoe.kernels.read_all import BLOCK, read_all, read_all_reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_every_word_is_read(n):
    from fusedmoe.kernels.triton.read_all import read_all as launch

    words = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32, device=DEVICE)
    found = torch.full((-(-n // BLOCK),), 7, dtype=torch.int32, device=DEVICE)
    launch(words, found, BLOCK)
    assert torch.equal(found, read_all_reference(words))
    assert torch.equal(read_all(words.view(torch.float32)), found)


@pytest.mark.parametrize("bad", [torch.ones(3, dtype=torch.int64), torch.ones(4, 4).t()[:2]])
def test_other_tensors_are_refused(bad):
    with pytest.raises(ValueError, match="4-byte words"):
        read_all(bad)
