"""GGUF tensors: each has a type of its own, and all experts of a projection are one tensor.

    Q8_0     32 columns in 34 bytes: d fp16, 32 int8                    int8 in groups of 32
    Q5_0     22 bytes: d fp16, 32 fifth bits, then as Q4_0               int8 in groups of 32
    Q4_0     18 bytes: d fp16, columns 0-15 in low nibbles, 16-31 in high ones      int4
    IQ4_NL   as Q4_0, the nibbles index a table                         iq4_nl
    IQ4_XS   256 columns in 136 bytes: d fp16, 8 scales of 6 bits, nibbles of 32
             columns as IQ4_NL                          iq4_nl, d * (scale - 32) in fp32
    MXFP4    17 bytes: an e8m0 exponent, nibbles as Q4_0                mxfp4
    Q4_K, Q5_K, Q6_K   256 columns in one superblock, kept as it is (Q6_K padded)   q4_k, q5_k, q6_k

Tensors arrive as their bytes, uint8 [N, K / columns * bytes].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Matrix, Rule, Scheme
from fusedmoe.quantization.dialects.rules import check_exponents, check_finite, expect, make_scheme
from fusedmoe.quantization.formats.int4 import int4_group, pack_nibbles
from fusedmoe.quantization.formats.int8 import int8_group
from fusedmoe.quantization.formats.lookup import IQ4_NL
from fusedmoe.quantization.formats.mxfp4 import MXFP4
from fusedmoe.quantization.formats.superblocks import CODECS, superblock_format
from fusedmoe.quantization.tensor import QuantFormat

_COLUMNS = 32
_INT8 = int8_group(_COLUMNS, scale_dtype=torch.float16)
_INT4 = int4_group(_COLUMNS, scale_dtype=torch.float16)
# The product of 11 bits and 6 is exact.
_IQ4_XS = replace(IQ4_NL, scale_dtype=torch.float32)

Parts = tuple[torch.Tensor, torch.Tensor]


def _blocks(
    matrix: Matrix, nbytes: int, raw: torch.Tensor, columns: int = _COLUMNS
) -> torch.Tensor:
    """[N, K / columns, nbytes]"""
    expect(matrix, "weight", raw, (matrix.N, matrix.K // columns * nbytes), torch.uint8)
    return raw.unflatten(-1, (-1, nbytes))


def _bits(raw: torch.Tensor, count: int) -> torch.Tensor:
    """Bytes [..., n] -> the numbers of ``count`` bits in them, the lowest first: [..., n * 8 /
    count]."""
    shifts = torch.arange(0, 8, count, dtype=torch.uint8, device=raw.device)
    return (raw[..., None] >> shifts & (1 << count) - 1).flatten(-2)


def _scales(matrix: Matrix, blocks: torch.Tensor) -> torch.Tensor:
    """The fp16 number that each block begins with."""
    scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return check_finite(matrix, "weight", scale)


def _halves(nibbles: torch.Tensor) -> torch.Tensor:
    """16 bytes per block, columns 0-15 in the low nibbles -> the canonical pairs [N, K / 2]."""
    columns = torch.cat([nibbles & 15, nibbles >> 4], -1)
    return pack_nibbles(columns.flatten(-2))


def _q8_0(matrix: Matrix, raw: torch.Tensor) -> Parts:
    blocks = _blocks(matrix, 34, raw)
    return blocks[..., 2:].contiguous().view(torch.int8).flatten(-2), _scales(matrix, blocks)


def _q5_0(matrix: Matrix, raw: torch.Tensor) -> Parts:
    blocks = _blocks(matrix, 22, raw)
    low = torch.cat([blocks[..., 6:] & 15, blocks[..., 6:] >> 4], -1)
    return ((low | _bits(blocks[..., 2:6], 1) << 4).to(torch.int8) - 16).flatten(-2), _scales(
        matrix, blocks
    )


def _nibbles(matrix: Matrix, raw: torch.Tensor) -> Parts:
    blocks = _blocks(matrix, 18, raw)
    return _halves(blocks[..., 2:]), _scales(matrix, blocks)


def _iq4_xs(matrix: Matrix, raw: torch.Tensor) -> Parts:
    blocks = _blocks(matrix, 136, raw, 256)
    scales = _bits(blocks[..., 4:8], 4) | _bits(blocks[..., 2:4], 2) << 4
    d = _scales(matrix, blocks).float()
    nibbles = blocks[..., 8:].unflatten(-1, (-1, 16)).flatten(1, 2)
    return _halves(nibbles), (d[..., None] * (scales.float() - 32)).flatten(-2)


def _mxfp4(matrix: Matrix, raw: torch.Tensor) -> Parts:
    blocks = _blocks(matrix, 17, raw)
    return _halves(blocks[..., 1:]), check_exponents(matrix, "weight", blocks[..., 0].contiguous())


def _superblocks(kind: str, matrix: Matrix, raw: torch.Tensor) -> torch.Tensor:
    """The bytes as they are, their scales checked, each superblock padded to whole words."""
    blocks = _blocks(matrix, CODECS[kind].in_files, raw, 256)
    where = slice(208, 210) if kind == "q6_k" else slice(0, 4)
    scales = blocks[..., where].contiguous().view(torch.float16)
    check_finite(matrix, "weight", scales)
    return CODECS[kind].padded(blocks)


def _scheme(
    name: str, fmt: QuantFormat, convert: Callable[..., object], columns: int, nbytes: int
) -> Scheme:
    def size(shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[-2], shape[-1] // nbytes * columns

    gives = "weight" if fmt.scale_dtype is None else ("weight", "weight_scale")
    rule = Rule(needs=("weight",), gives=gives, convert=convert, size=size)
    return make_scheme(f"gguf {name}", fmt, rule)


SCHEMES: Mapping[str, Scheme] = {
    "Q8_0": _scheme("Q8_0", _INT8, _q8_0, 32, 34),
    "Q5_0": _scheme("Q5_0", _INT8, _q5_0, 32, 22),
    "Q4_0": _scheme("Q4_0", _INT4, _nibbles, 32, 18),
    "IQ4_NL": _scheme("IQ4_NL", IQ4_NL, _nibbles, 32, 18),
    "IQ4_XS": _scheme("IQ4_XS", _IQ4_XS, _iq4_xs, 256, 136),
    "MXFP4": _scheme("MXFP4", MXFP4, _mxfp4, 32, 17),
} | {
    kind.upper(): _scheme(
        kind.upper(), superblock_format(kind), partial(_superblocks, kind), 256, codec.in_files
    )
    for kind, codec in CODECS.items()
}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class GgufQuantization(CheckpointQuantization):
    """``types``: the type of each tensor, by its name without ".weight"."""

    dialect: str = "gguf"
    types: Mapping[str, str]

    def converted(self, module: str) -> Scheme | None:
        kind = self.types.get(module)
        if kind is None:
            raise ValueError(f"{module}: there is no such tensor")
        if kind in FLOATS:
            return None
        if kind not in SCHEMES:
            raise ValueError(
                f"{module}.weight is stored as {kind}; known: {', '.join((*SCHEMES, *FLOATS))}"
            )
        return SCHEMES[kind]
