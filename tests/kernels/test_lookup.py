"""Tables in registers: the entries of the definition, by selection and by permuting bytes."""

import pytest
import torch

from fusedmoe.quantization.formats.lookup import CODECS
from small_ptx import pair, run_ptx, words_of

triton = pytest.importorskip("triton")
tl = triton.language
lookup = pytest.importorskip("fusedmoe.kernels.triton.lookup")
looked_up = lookup.looked_up


@triton.jit
def looked_up_kernel(nibble_ptr, out_ptr, ELEMENT: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(out_ptr + at, looked_up(tl.load(nibble_ptr + at), ELEMENT, tl.float32))


@pytest.mark.parametrize("element", CODECS)
def test_every_nibble_by_selection(element):
    out = torch.empty(16)
    looked_up_kernel[(1,)](torch.arange(16, dtype=torch.int32), out, element)
    assert out.equal(torch.tensor(CODECS[element].table))


@pytest.mark.parametrize("element", CODECS)
def test_every_byte_by_permutation(element):
    is_nf4 = element == "nf4"
    source = (lookup._NF4_ASM if is_nf4 else lookup._IQ4_NL_ASM).value
    lift = lookup.NF4_LIFT.value if is_nf4 else 1.0
    table = (lift * torch.tensor(CODECS[element].table, dtype=torch.float64)).bfloat16()
    every = torch.arange(256, dtype=torch.uint8)[torch.randperm(256)]
    for word, four in zip(words_of(every), every.view(-1, 4).long(), strict=True):
        low0, low1, high0, high1 = map(pair, run_ptx(source, [word], 4))
        assert torch.cat([low0, low1]).equal(table[four & 15])
        assert torch.cat([high0, high1]).equal(table[four >> 4])
