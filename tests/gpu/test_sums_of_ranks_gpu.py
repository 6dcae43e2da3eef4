"""Parts of a sum over ranks, added up by one launch."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.distributed.collectives import sum_in_order

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_the_bits_of_the_cpu(dtype, tokens):
    parts = torch.randn(4, tokens, 300).to(dtype)
    assert torch.equal(sum_in_order(parts.cuda()).cpu(), sum_in_order(parts))
