"""GGUF's block formats and tables: the bytes of the gguf package are read to its own values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusedmoe.quantization.formats import NF4, dequantize, quantize
from fusedmoe.quantization.formats.lookup import IQ4_NL, IQ4_NL_TABLE
from fusedmoe.quantization.formats.superblocks import CODECS, superblock_format
from fusedmoe.quantization.tensor import QuantizedTensor


def random_blocks(kind: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes [rows, blocks * size] whose fp16 scales are finite."""
    codec = CODECS[kind]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, blocks, codec.in_files), dtype=np.uint8)
    scales = generator.normal(size=(rows, blocks, 2)).astype(np.float16)
    where = codec.floats
    raw[..., where] = scales.view(np.uint8)[..., : where.stop - where.start]
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", CODECS)
def test_every_byte_is_read_as_the_package_reads_it(kind: str) -> None:
    import gguf

    raw, columns = random_blocks(kind, 6, 3), 3 * CODECS[kind].columns
    quantized = QuantizedTensor(
        format=superblock_format(kind),
        data=CODECS[kind].padded(torch.from_numpy(raw).unflatten(1, (3, -1)))[None],
        scale=None,
        shape=(1, 6, columns),
    )
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()])
    found = dequantize(quantized)[0]
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=0, atol=0)
    assert raw.nbytes <= quantized.nbytes <= 1.02 * raw.nbytes


def test_the_table_of_iq4_nl_is_the_package_s() -> None:
    import gguf

    assert tuple(map(float, gguf.quants.IQ4_NL.kvalues)) == IQ4_NL_TABLE
    assert IQ4_NL.name == "iq4_nl"


def test_nf4_rounds_to_the_nearest_of_sixteen() -> None:
    weight = torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(3))
    quantized = quantize(weight, NF4)
    assert quantized.format.name == "nf4"
    assert quantized.scale is not None
    torch.testing.assert_close(quantized.scale, weight.unflatten(-1, (2, 64)).abs().amax(-1))
    error = (quantized.dequantize(torch.float32) - weight).norm() / weight.norm()
    assert error < 0.12
    again = quantize(quantized.dequantize(torch.float32), NF4, like=quantized)
    assert torch.equal(again.data, quantized.data)


def test_superblocks_are_not_written() -> None:
    with pytest.raises(ValueError, match="read, not written"):
        quantize(torch.zeros(1, 2, 256), superblock_format("q4_k"))
