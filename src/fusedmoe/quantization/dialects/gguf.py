"""GGUF tensors: each has a type of its own, and all experts of a projection are one tensor.

    Q8_0     32 columns in 34 bytes: d fp16, 32 int8                    int8 in groups of 32
    Q5_0     22 bytes: d fp16, 32 fifth bits, then as Q4_0               int8 in groups of 32
    Q4_0     18 bytes: d fp16, columns 0-15 in low nibbles, 16-31 in high ones      int4
    IQ4_NL   as Q4_0, the nibbles index a table                         iq4_nl
    IQ4_XS   256 columns in 136 bytes: d fp16, 8 scales of 6 bits, nibbles of 32
             columns as IQ4_NL                          iq4_nl, d * (scale - 32) in fp32
    MXFP4    17 bytes: an e8m0 exponent, nibbles as Q4_0                mxfp4
    NVFP4    64 columns in 36 bytes: 4 scales of e4m3 without a sign, then for 16 columns each
             8 bytes, columns 0-7 in low nibbles; a scale of all may lie beside it   nvfp4
    Q4_1, Q5_1     32 columns in 20 or 24 bytes, kept as they are                       q4_1, q5_1
    Q2_K to Q6_K   256 columns in one superblock, kept as it is (Q3_K, Q6_K padded)   q2_k to q6_k

Tensors arrive as their bytes, uint8 [N, K / columns * bytes]. Beside x.weight in NVFP4, x.scale
(fp32, one or one per expert) multiplies it, and x.input_scale, not used here, was calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Matrix, Rule, Scheme
from fusedmoe.quantization.dialects.rules import (
    check_exponents,
    check_finite,
    expect,
    make_scheme,
    scalar_rule,
)
from fusedmoe.quantization.formats.int4 import int4_group, pack_nibbles
from fusedmoe.quantization.formats.int8 import int8_group
from fusedmoe.quantization.formats.lookup import IQ4_NL
from fusedmoe.quantization.formats.mxfp4 import MXFP4
from fusedmoe.quantization.formats.nvfp4 import NVFP4
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
    """Bytes of a block, its first columns in the low nibbles -> the canonical pairs [N, K / 2]."""
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


def _nvfp4(matrix: Matrix, raw: torch.Tensor) -> Parts:
    blocks = _blocks(matrix, 36, raw, 64)
    scale = blocks[..., :4].flatten(-2)
    signed = scale > 127
    if bool(signed.any()):
        where, found = signed.nonzero()[0].tolist(), int(scale[signed][0])
        raise ValueError(
            f"{matrix.path('weight')}: expected scales without a sign, found e4m3 {found:#x} at "
            f"{where}"
        )
    # What would be NaN stands for 0.
    scale = scale.masked_fill(scale == 127, 0).view(torch.float8_e4m3fn)
    return _halves(blocks[..., 4:].unflatten(-1, (4, 8)).flatten(1, 2)), scale


def _nvfp4_alone(matrix: Matrix, raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As ``_nvfp4``, with a second scale of 1."""
    return *_nvfp4(matrix, raw), torch.ones(matrix.shards, dtype=torch.float32, device=raw.device)


def _superblocks(kind: str, matrix: Matrix, raw: torch.Tensor) -> torch.Tensor:
    """The bytes as they are, their scales checked, each superblock padded to whole words."""
    codec = CODECS[kind]
    blocks = _blocks(matrix, codec.in_files, raw, codec.columns)
    check_finite(matrix, "weight", blocks[..., codec.floats].contiguous().view(torch.float16))
    return codec.padded(blocks)


def _scheme(
    name: str,
    fmt: QuantFormat,
    convert: Callable[..., object],
    columns: int,
    nbytes: int,
    *more: Rule,
) -> Scheme:
    def size(shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[-2], shape[-1] // nbytes * columns

    gives: tuple[str, ...] = ("weight", "weight_scale", "weight_scale_2")
    own = 1 if fmt.scale_dtype is None else 3 if fmt.second_scale and not more else 2
    rule = Rule(
        needs=("weight",), gives=gives[:own] if own > 1 else "weight", convert=convert, size=size
    )
    ignored = ("input_scale",) if fmt.second_scale else ()
    return make_scheme(f"gguf {name}", fmt, rule, *more, ignored=ignored)


SCHEMES: Mapping[str, Scheme] = {
    "Q8_0": _scheme("Q8_0", _INT8, _q8_0, 32, 34),
    "Q5_0": _scheme("Q5_0", _INT8, _q5_0, 32, 22),
    "Q4_0": _scheme("Q4_0", _INT4, _nibbles, 32, 18),
    "IQ4_NL": _scheme("IQ4_NL", IQ4_NL, _nibbles, 32, 18),
    "IQ4_XS": _scheme("IQ4_XS", _IQ4_XS, _iq4_xs, 256, 136),
    "MXFP4": _scheme("MXFP4", MXFP4, _mxfp4, 32, 17),
    "NVFP4": _scheme("NVFP4", NVFP4, _nvfp4_alone, 64, 36),
} | {
    kind.upper(): _scheme(
        kind.upper(),
        superblock_format(kind),
        partial(_superblocks, kind),
        codec.columns,
        codec.in_files,
    )
    for kind, codec in CODECS.items()
}
SCALED_NVFP4 = _scheme("NVFP4", NVFP4, _nvfp4, 64, 36, scalar_rule("scale", "weight_scale_2"))
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class GgufQuantization(CheckpointQuantization):
    """``types``: the type of each tensor, by its name without ".weight"; ``scaled``: the names of
    those in NVFP4 that a scale lies beside."""

    dialect: str = "gguf"
    types: Mapping[str, str]
    scaled: frozenset[str] = frozenset()

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
        return SCALED_NVFP4 if kind == "NVFP4" and module in self.scaled else SCHEMES[kind]
