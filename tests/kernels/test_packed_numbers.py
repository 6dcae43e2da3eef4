"""The inline assembly that makes numbers of superblocks and of six bits, run word by word."""

import pytest
import torch

from fusedmoe.quantization.formats.minifloat import E2M3, E3M2
from fusedmoe.quantization.formats.mxfp6 import unpack_sextets
from small_ptx import pair, run_ptx, words_of

triton = pytest.importorskip("triton")
superblocks = pytest.importorskip("fusedmoe.kernels.triton.superblocks")
sextets = pytest.importorskip("fusedmoe.kernels.triton.sextets")
sixes = pytest.importorskip("fusedmoe.kernels.triton.sixes")
word_tiles = pytest.importorskip("fusedmoe.kernels.triton.word_tiles")


def random_bytes(count):
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


def numbers(words):
    return torch.cat([pair(word) for word in words]).float()


@pytest.mark.parametrize("shift", [0, 2, 4, 6])
def test_fives(shift):
    source = superblocks._FIVES_ASM.value
    packed, more = random_bytes(64), random_bytes(64)
    for q, h, four, bits in zip(
        words_of(packed), words_of(more), packed.view(-1, 4), more.view(-1, 4), strict=True
    ):
        out = run_ptx(source, [q, h, shift, 0, 0, 0], 4)
        low = (four & 15) + (((bits >> shift) & 1) << 4)
        high = (four >> 4) + (((bits >> (shift + 1)) & 1) << 4)
        assert numbers(out[:2]).equal(low + 128.0)
        assert numbers(out[2:]).equal(high + 128.0)


def test_sixes():
    source = sixes._SIXES_ASM.value
    packed, more = random_bytes(64), random_bytes(64)
    for q, h, four, bits in zip(
        words_of(packed), words_of(more), packed.view(-1, 4), more.view(-1, 4), strict=True
    ):
        out = run_ptx(source, [q, h], 4)
        low = (four & 15) + ((bits & 3) << 4)
        high = (four >> 4) + (((bits >> 4) & 3) << 4)
        assert numbers(out[:2]).equal(low + 128.0)
        assert numbers(out[2:]).equal(high + 128.0)


def test_bytes_of_words():
    source, stored = word_tiles._BYTES_ASM.value, random_bytes(64) & 127
    for word, four in zip(words_of(stored), stored.view(-1, 4), strict=True):
        assert numbers(run_ptx(source, [word], 2)).equal(four + 128.0)


@pytest.mark.parametrize(("kind", "element", "short"), [(E3M2, "e3m2", 124), (E2M3, "e2m3", 126)])
def test_sextets(kind, element, short):
    """Every code at each of the sixteen places, subnormal ones included."""
    source = (sextets._E3M2_ASM if element == "e3m2" else sextets._E2M3_ASM).value
    words = words_of(random_bytes(12 * 200))
    for at in range(0, len(words), 3):
        unit = words[at : at + 3]
        found = numbers(run_ptx(source, unit, 8))
        stored = torch.tensor([word >> shift & 255 for word in unit for shift in (0, 8, 16, 24)])
        expected = kind.decode(unpack_sextets(stored.to(torch.uint8)), torch.float64)
        assert (found.double() * 2.0**short).equal(expected)
