"""Bytes and scales that torchao makes mean here what they mean there."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.quantization.formats import MXFP4, MXFP8, NVFP4
from fusedmoe.quantization.formats.lookup import NF4_TABLE
from fusedmoe.quantization.tensor import QuantizedTensor

N, K = 24, 128


def random_weight(seed: int) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("fmt", "element"), [(MXFP4, torch.float4_e2m1fn_x2), (MXFP8, torch.float8_e4m3fn)]
)
def test_microscaling(fmt, element) -> None:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    theirs = MXTensor.to_mx(random_weight(0), element, 32)
    ours = QuantizedTensor(
        format=fmt,
        data=theirs.qdata,
        scale=theirs.scale.view(torch.uint8),
        shape=(N, K),
    )
    assert torch.equal(ours.dequantize(torch.float32), theirs.dequantize(torch.float32))


@pytest.mark.parametrize("second", [1.0, 0.037])
def test_two_level_scales(second: float) -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    scale2 = torch.tensor(second)
    given = None if second == 1.0 else scale2
    theirs = NVFP4Tensor.to_nvfp4(random_weight(1), per_tensor_scale=given)
    ours = QuantizedTensor(
        format=NVFP4,
        data=theirs.qdata,
        scale=theirs.scale.view(N, K // 16),
        scale2=scale2.view(1),
        shape=(N, K),
    )
    torch.testing.assert_close(
        ours.dequantize(torch.float32), theirs.dequantize(torch.float32), rtol=1e-6, atol=0
    )


def test_the_table_of_nf4() -> None:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor

    theirs = NF4Tensor.from_tensor(random_weight(2), 64, 4)
    # Theirs is written with four digits.
    torch.testing.assert_close(theirs.nf4.float(), torch.tensor(NF4_TABLE), rtol=0, atol=6e-5)
