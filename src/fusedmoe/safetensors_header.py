"""The header of a safetensors file, read without trusting it: which tensors, and where they lie.

8 bytes        length n of the header, little-endian
n bytes        a JSON object: name -> dtype, shape, data_offsets; perhaps __metadata__
all the rest   the tensors' bytes, without gaps
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The format's own limit.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
_LENGTH_BYTES = 8

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or must not be; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """A tensor of some file: its name, its logical shape and its bytes [begin, end)."""

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class TensorEntry(StoredBytes):
    """One tensor of a safetensors file; its bytes count from the end of the header, as stated."""

    dtype: str


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, checked against the size of the file.

    Dtypes are known, shape x dtype is the stated number of bytes, and the byte ranges cover the
    data exactly: none overlaps another, leaves a gap or passes the end.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    size = os.path.getsize(path)
    with path.open("rb") as file:
        raw_length = file.read(_LENGTH_BYTES)
        if len(raw_length) < _LENGTH_BYTES:
            raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
        length = int.from_bytes(raw_length, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: claims a header of {length} bytes, over the limit of {MAX_HEADER_BYTES}"
            )
        if _LENGTH_BYTES + length > size:
            raise CheckpointError(
                f"{path}: truncated: the header ends at byte {_LENGTH_BYTES + length}, "
                f"the file at {size}"
            )
        header = parse_object(file.read(length), path, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    entries = {name: _tensor_entry(name, record, path) for name, record in header.items()}
    data_bytes = size - _LENGTH_BYTES - length
    check_ranges(entries.values(), data_bytes, path, "the start", gaps=False)
    return entries


def _tensor_entry(name: str, record: Any, path: Path) -> TensorEntry:
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name!r} is not a dtype, a shape and data_offsets")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{path}: {name!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: {name!r} has the shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name!r} has the data_offsets {offsets!r}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{path}: {name!r} is {dtype} of shape {shape}, but its data_offsets hold "
            f"{offsets[1] - offsets[0]} bytes"
        )
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1])


def _are_sizes(value: Any) -> bool:
    """A list of non-negative integers that fit 63 bits (booleans are not integers here)."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def check_ranges(
    tensors: Iterable[StoredBytes], size: int, path: Path, first: str, *, gaps: bool
) -> None:
    """CheckpointError where tensors overlap or pass byte ``size``, or, unless there may be
    ``gaps``, leave bytes to none of them. ``first`` is what they begin behind."""
    position, before = 0, first
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if tensor.end > size:
            raise CheckpointError(
                f"{path}: truncated: {tensor.name!r} ends at byte {tensor.end} of {size}"
            )
        if tensor.begin < position:
            raise CheckpointError(f"{path}: {tensor.name!r} overlaps {before}")
        if tensor.begin > position and not gaps:
            raise CheckpointError(
                f"{path}: {tensor.begin - position} bytes between {before} and {tensor.name!r} "
                "belong to no tensor"
            )
        position, before = tensor.end, repr(tensor.name)
    if position != size and not gaps:
        raise CheckpointError(f"{path}: {size - position} bytes after {before} belong to no tensor")


def parse_object(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys; every way of not being one is a CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for key, value in pairs:
            if key in record:
                raise CheckpointError(f"{path}: the {what} has the key {key!r} twice")
            record[key] = value
        return record

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: the {what} is not a JSON object")
    return value
