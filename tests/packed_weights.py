"""Weights of any format for tests, also of those that are read only or need a table of groups."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.formats.superblocks import CODECS, superblock_format
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor


def format_of(name: str) -> QuantFormat:
    """As ``format_named``; "iq4_nl@float32" has its scales in another dtype than usual."""
    name, _, scales = name.partition("@")
    fmt = format_named(name)
    return replace(fmt, scale_dtype=getattr(torch, scales)) if scales else fmt


def pack(
    values: torch.Tensor,
    name: str,
    *,
    shards: int = 1,
    interleaved: bool = False,
    seed: int = 0,
    one_order: bool = False,
) -> QuantizedTensor:
    """``values`` [e, N, K] in the format called ``name``; superblocks are drawn, as large as these.

    Act-order columns are in groups at random, in those of the first shard where ``one_order``.
    """
    if name in CODECS:
        return superblocks(name, values, shards=shards, interleaved=interleaved, seed=seed)
    fmt, K = format_of(name), values.shape[-1]
    index = None
    if fmt.act_order:
        gen = torch.Generator().manual_seed(seed)
        order = torch.rand(*values.shape[:-2], shards, K, generator=gen).argsort(-1)
        order = order[:, :1].expand_as(order) if one_order else order
        index = (order // fmt.group.col).int().contiguous().to(values.device)
    return quantize(values, fmt, shards=shards, interleaved=interleaved, group_index=index)


def superblocks(kind: str, values: torch.Tensor, *, seed: int = 0, **layout) -> QuantizedTensor:
    """Superblocks with numbers spread about zero, as ``values`` [e, N, K] are.

    Every byte of nibbles and bits is drawn; scales and minima keep each other's size, as in files.
    """
    gen = torch.Generator().manual_seed(seed)
    codec, (*lead, K) = CODECS[kind], values.shape
    blocks = (*lead, K // codec.columns)
    raw = torch.randint(0, 256, (*blocks, codec.nbytes), dtype=torch.uint8, generator=gen)
    size = float(values.float().std()) if values.numel() else 1.0
    largest = 2 ** int(kind[1])
    # Uniform integers below ``largest`` have a deviation of about 0.29 of it; groups' scales are
    # whole numbers of this size, blocks of 32 have none.
    usual = {"q2_k": 12, "q3_k": 24, "q4_1": 1, "q5_1": 1}.get(kind, 48)
    d = size / (0.29 * largest * usual) * (0.5 + torch.rand(*blocks, 1, generator=gen))
    if kind in ("q4_1", "q5_1"):
        least = -d * (largest / 2 + torch.randn(*blocks, 1, generator=gen))
        raw[..., codec.floats] = torch.cat([d, least], -1).half().view(torch.uint8)
    elif kind == "q2_k":
        scales = torch.randint(8, 16, (*blocks, 16), generator=gen)
        minima = (scales + torch.randint(-2, 3, (*blocks, 16), generator=gen)).clamp(0, 15)
        raw[..., :16] = scales | minima << 4
        raw[..., codec.floats] = torch.cat([d, d * 1.5], -1).half().view(torch.uint8)
    elif kind == "q3_k":
        # All bits of scales are drawn, too: they are less than 32 away from zero.
        raw[..., codec.floats] = d.half().view(torch.uint8)
    elif kind == "q6_k":
        signs = torch.randint(0, 2, (*blocks, 16), generator=gen) * 2 - 1
        scales = torch.randint(32, 64, (*blocks, 16), generator=gen) * signs
        raw[..., 192:208] = scales.to(torch.int8).view(torch.uint8)
        raw[..., codec.floats] = d.half().view(torch.uint8)
    else:
        scales = torch.randint(32, 64, (*blocks, 8), generator=gen)
        minima = (scales + torch.randint(-8, 9, (*blocks, 8), generator=gen)).clamp(0, 63)
        raw[..., codec.floats] = torch.cat([d, d * (largest - 1) / 2], -1).half().view(torch.uint8)
        raw[..., 4:16] = _sixths(scales, minima)
    return QuantizedTensor(
        format=superblock_format(kind),
        data=raw.flatten(-2).to(values.device),
        scale=None,
        shape=tuple(values.shape),
        dtype=values.dtype,
        **layout,
    )


def _sixths(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Eight of six bits each -> 12 bytes, as GGUF lays them."""
    low, high, least, more = *scales.split(4, -1), *minima.split(4, -1)
    first, second = low | (high >> 4 << 6), least | (more >> 4 << 6)
    return torch.cat([first, second, (high & 15) | ((more & 15) << 4)], -1).to(torch.uint8)
