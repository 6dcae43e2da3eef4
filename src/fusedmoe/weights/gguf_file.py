"""Reading a GGUF file without trusting it: header by header field, tensors by memory map.

A file is a header of typed key-value pairs, a list of tensors, and their bytes (GGUF versions 2 and
3, little-endian). Every length is checked against the file before it is used. Shapes are turned
round: the last axis is the one that lies together in memory, as everywhere else here.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedmoe.safetensors_header import CheckpointError, StoredBytes, check_ranges
from fusedmoe.words import STORED_DTYPES, STORED_FLOATS

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_MAX_TENSORS = 1 << 20
_MAX_PAIRS = 1 << 16
_MAX_STRING = 1 << 24
_MAX_STRINGS = 1 << 24  # of one array; vocabularies are the longest there are
_MAX_DIMENSIONS = 4
_MAX_KEPT = 1024  # numbers of an array: what a header says of each layer
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


class GgufType(NamedTuple):
    """How numbers of a kind are stored: ``nbytes`` for ``values`` of them."""

    name: str
    values: int
    nbytes: int


TYPES: Mapping[int, GgufType] = {
    0: GgufType("F32", 1, 4),
    1: GgufType("F16", 1, 2),
    2: GgufType("Q4_0", 32, 18),
    3: GgufType("Q4_1", 32, 20),
    6: GgufType("Q5_0", 32, 22),
    7: GgufType("Q5_1", 32, 24),
    8: GgufType("Q8_0", 32, 34),
    10: GgufType("Q2_K", 256, 84),
    11: GgufType("Q3_K", 256, 110),
    12: GgufType("Q4_K", 256, 144),
    13: GgufType("Q5_K", 256, 176),
    14: GgufType("Q6_K", 256, 210),
    16: GgufType("IQ2_XXS", 256, 66),
    17: GgufType("IQ2_XS", 256, 74),
    18: GgufType("IQ3_XXS", 256, 98),
    19: GgufType("IQ1_S", 256, 50),
    20: GgufType("IQ4_NL", 32, 18),
    21: GgufType("IQ3_S", 256, 110),
    22: GgufType("IQ2_S", 256, 82),
    23: GgufType("IQ4_XS", 256, 136),
    24: GgufType("I8", 1, 1),
    25: GgufType("I16", 1, 2),
    26: GgufType("I32", 1, 4),
    27: GgufType("I64", 1, 8),
    28: GgufType("F64", 1, 8),
    29: GgufType("IQ1_M", 256, 56),
    30: GgufType("BF16", 1, 2),
    34: GgufType("TQ1_0", 256, 54),
    35: GgufType("TQ2_0", 256, 66),
    39: GgufType("MXFP4", 32, 17),
    40: GgufType("NVFP4", 64, 36),
}


@dataclass(frozen=True, kw_only=True)
class GgufTensor(StoredBytes):
    """One tensor of a GGUF file; its bytes count from the start of that."""

    type: GgufType

    @property
    def is_floats(self) -> bool:
        return self.type.name in STORED_FLOATS

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In bytes along the last axis; of floats, in numbers."""
        if self.is_floats:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // self.type.values * self.type.nbytes)


@dataclass(frozen=True)
class ArrayOf:
    """Stands for an array of the header, of which ``values`` are kept if they are few numbers."""

    count: int
    values: tuple[int | float | bool, ...] | None = None


class _Cursor:
    """A place in the mapped header that never passes the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path}: truncated: wants {count} bytes at {self.at} of {len(self.data)}"
            )
        start = self.at
        self.at += count
        return self.data[start : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > _MAX_STRING:
            raise CheckpointError(f"{self.path}: a string of {length} bytes at {self.at}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: a string at {self.at}: {error}") from None

    def value(self, kind: int) -> Any:
        """One value of the header."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: unknown value type {kind} at {self.at}")
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            code = _SCALARS[element]
            raw = self.take(count * struct.calcsize(f"<{code}"))
            if count <= _MAX_KEPT:
                return ArrayOf(count, struct.unpack(f"<{count}{code}", raw))
        elif element == _STRING:
            # A string takes eight bytes at least.
            if count > _MAX_STRINGS or count * 8 > len(self.data) - self.at:
                raise CheckpointError(f"{self.path}: an array of {count} strings at {self.at}")
            for _ in range(count):
                self.take(self.number("Q"))
        else:
            raise CheckpointError(f"{self.path}: an array of type {element} at {self.at}")
        return ArrayOf(count)


class GgufFile:
    """A checked file: ``metadata`` of its header, and ``tensors`` by name.

    Raises CheckpointError with the first thing that is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{self.path}: there is no such file")
        self.size = self.path.stat().st_size
        if self.size < 24:
            raise CheckpointError(f"{self.path}: {self.size} bytes are too few for a GGUF file")
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m,
        ):
            cursor = _Cursor(m, self.path)
            self.metadata, self.tensors = self._read(cursor)
        check_ranges(self.tensors.values(), self.size, self.path, "the header", gaps=True)
        self._bytes: torch.Tensor | None = None

    def _read(self, cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if cursor.take(4) != _MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file")
        version = cursor.number("I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self.path}: GGUF version {version}; known: 2 and 3")
        count, pairs = cursor.number("Q"), cursor.number("Q")
        if count > _MAX_TENSORS or pairs > _MAX_PAIRS:
            raise CheckpointError(f"{self.path}: claims {count} tensors and {pairs} header entries")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.string()
            if key in metadata:
                raise CheckpointError(f"{self.path}: the header has {key!r} twice")
            metadata[key] = cursor.value(cursor.number("I"))
        found = [self._entry(cursor) for _ in range(count)]
        alignment = metadata.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16 or alignment % 8:
            raise CheckpointError(f"{self.path}: {_ALIGNMENT} is {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for one in found:
            if one.name in tensors:
                raise CheckpointError(f"{self.path}: holds {one.name!r} twice")
            if one.begin % alignment:
                raise CheckpointError(
                    f"{self.path}: {one.name!r} begins at {one.begin}, no multiple of {alignment}"
                )
            tensors[one.name] = replace(one, begin=start + one.begin, end=start + one.end)
        return metadata, tensors

    def _entry(self, cursor: _Cursor) -> GgufTensor:
        """One tensor of the list; its bytes still count from where those of the first begin."""
        name, dimensions = cursor.string(), cursor.number("I")
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(f"{self.path}: {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        number, begin = cursor.number("I"), cursor.number("Q")
        kind = TYPES.get(number)
        if kind is None:
            raise CheckpointError(f"{self.path}: {name!r} has the unknown type {number}")
        if min(shape) < 1 or math.prod(shape) > 1 << 62 or shape[-1] % kind.values:
            raise CheckpointError(
                f"{self.path}: {name!r} has the shape {list(shape)}, which {kind.name} cannot store"
            )
        end = begin + math.prod(shape) // kind.values * kind.nbytes
        return GgufTensor(name=name, type=kind, shape=shape, begin=begin, end=end)

    def read(self, name: str) -> torch.Tensor:
        """A view of the mapped file: floats as they are, other types as bytes, ``stored_shape``."""
        tensor = self.tensors[name]
        if self._bytes is None:
            self._bytes = torch.from_file(str(self.path), size=self.size, dtype=torch.uint8)
        raw = self._bytes[tensor.begin : tensor.end]
        floats = raw.view(STORED_DTYPES[tensor.type.name]) if tensor.is_floats else raw
        return floats.view(tensor.stored_shape)
