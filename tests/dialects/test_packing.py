"""Bits out of words, for any sizes, as the formats' own packages put them in."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedmoe.quantization.dialects.packing import (
    integers,
    offset_to_int8,
    pack_nibbles,
    swap_nibbles,
    unpack_awq,
    unpack_words,
)
from fusedmoe.quantization.formats.int4 import unpack_nibbles

few = settings(max_examples=40, deadline=None)


def numbers(seed: int, rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)


@few
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 70), st.integers(1, 8))
def test_dense_words(seed: int, rows: int, columns: int, bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    wanted = numbers(seed, rows, columns, bits)
    packed = pack_to_int32(offset_to_int8(wanted, bits), bits)
    assert torch.equal(unpack_words(packed, bits, columns), wanted)
    turned = pack_to_int32(offset_to_int8(wanted.T, bits), bits, packed_dim=0)
    assert torch.equal(unpack_words(turned.T.contiguous(), bits, columns), wanted)


@few
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 6))
def test_words_of_awq(seed: int, rows: int, words: int) -> None:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(1 << 31), 1 << 31, (rows, words), generator=generator).int()
    theirs, _ = AutoAWQConverter.unpack_awq(packed, None, 4)
    theirs, _ = AutoAWQConverter.reverse_awq_order(theirs, None, 4)
    assert torch.equal(unpack_awq(packed, 8 * words), (theirs & 15).to(torch.uint8))


@few
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 30), st.integers(2, 8))
def test_integers_keep_their_values(seed: int, rows: int, pairs: int, bits: int) -> None:
    raw = numbers(seed, rows, 2 * pairs, bits)
    wanted = raw.int() - (1 << (bits - 1))
    packed = integers(raw, bits)
    found = packed.int() if bits > 4 else unpack_nibbles(packed).int() - 8
    assert torch.equal(found, wanted)


@few
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 30))
def test_pairs_of_nibbles(seed: int, rows: int, pairs: int) -> None:
    wanted = numbers(seed, rows, 2 * pairs, 4)
    packed = pack_nibbles(wanted)
    assert torch.equal(unpack_nibbles(packed), wanted)
    assert torch.equal(swap_nibbles(swap_nibbles(packed)), packed)
    assert torch.equal(
        unpack_nibbles(swap_nibbles(packed)).unflatten(1, (-1, 2)).flip(-1),
        wanted.unflatten(1, (-1, 2)),
    )
