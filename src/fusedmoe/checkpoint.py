"""Reading a checkpoint folder without trusting it.

A folder is config.json plus safetensors files (one, or several under an index). Everything here
reads JSON and headers only; each check names the file and the tensor it failed on. Pickles are
refused. The safetensors package does the loading of tensors, after these checks.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
# Where some tools put what config.json would say under quantization_config.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_QUANTIZATION_METHODS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# The safetensors format's own limit for a header; other JSON files are far smaller in practice.
MAX_HEADER_BYTES = 100_000_000
MAX_CONFIG_BYTES = 16_000_000
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


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: its type, its shape and its bytes [begin, end) there.

    Offsets count from the end of the header, as the file states them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Checkpoint:
    """A validated folder: its configuration and every tensor with the file that holds it."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())


class TensorReader:
    """Tensors of a validated checkpoint, read from their files when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._open: dict[str, Any] = {}

    def slice(self, name: str) -> Any:
        """The tensor ``name`` unread: ``[...]`` reads it; its shape and dtype are known before."""
        from safetensors import safe_open

        file_name = self.checkpoint.files[name]
        if file_name not in self._open:
            path = self.checkpoint.folder / file_name
            self._open[file_name] = safe_open(path, framework="pt", device="cpu")
        return self._open[file_name].get_slice(name)

    def __call__(self, name: str) -> Any:
        """The tensor ``name``, on the CPU."""
        found = self.slice(name)
        return (
            found[...]
            if found.get_shape()
            else self._open[self.checkpoint.files[name]].get_tensor(name)
        )


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Validate a checkpoint folder; raises CheckpointError with the first thing that is wrong."""
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(
            f"{folder}: there is no such folder, and nothing is downloaded; "
            "huggingface_hub.snapshot_download gives one"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; give the checkpoint's folder")
    config = read_config(folder)
    tensors: dict[str, TensorEntry] = {}
    files: dict[str, str] = {}
    index = _read_index(folder)
    for file_name in sorted(set(index.values())) if index else [_single_file(folder)]:
        for name, entry in read_header(folder / file_name).items():
            promised = files.get(name) or index.get(name, file_name)
            if promised != file_name:
                raise CheckpointError(
                    f"{folder / file_name}: holds {name!r}, which is in {promised}"
                )
            tensors[name], files[name] = entry, file_name
    for name, file_name in index.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / file_name}: lacks {name!r}, which the index promises")
    return Checkpoint(folder, config, tensors, files)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds no {CONFIG_NAME}")
    return _read_json(path, MAX_CONFIG_BYTES)


def read_quantization_config(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The ``quantization_config`` of a checkpoint: in config.json, in a section of it, or beside.

    None where there is none; CheckpointError where it is no object.
    """
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        found = section.get("quantization_config")
        if found is None:
            continue
        if not isinstance(found, dict):
            raise CheckpointError(f"{folder / CONFIG_NAME}: quantization_config is {found!r}")
        return found
    for name in QUANTIZATION_FILES:
        if (folder / name).is_file():
            found = _read_json(folder / name, MAX_CONFIG_BYTES)
            method = _QUANTIZATION_METHODS.get(name)
            return {"quant_method": method} | found if method else found
    return None


def _single_file(folder: Path) -> str:
    """The one weights file of a folder without an index; pickles are named and refused."""
    if (folder / WEIGHTS_NAME).is_file():
        return WEIGHTS_NAME
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix.lower() in PICKLE_SUFFIXES
    )
    if pickles:
        raise CheckpointError(
            f"{folder}: has its weights as pickles ({pickles[0]}), which can run code when loaded "
            "and are never read; convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: holds neither {WEIGHTS_NAME} nor {INDEX_NAME}")


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty where the folder has no index."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    weight_map = _read_json(path, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing, empty or not an object")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_plain_file_name(file_name):
            raise CheckpointError(
                f"{path}: {name!r} points to {file_name!r}, which is not a .safetensors file name "
                "inside the folder"
            )
        if not (folder / file_name).is_file():
            raise CheckpointError(f"{folder}: lacks {file_name}, which the index names")
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    """Only a bare name: no separators, no drive, nothing hidden, no control characters."""
    return bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors", name))


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
        header = _parse_object(file.read(length), path, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    entries = {name: _tensor_entry(name, record, path) for name, record in header.items()}
    _check_layout(entries.values(), size - _LENGTH_BYTES - length, path)
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
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    """A list of non-negative integers that fit 63 bits (booleans are not integers here)."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _check_layout(entries: Iterable[TensorEntry], data_bytes: int, path: Path) -> None:
    position, before = 0, "the start"
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.end > data_bytes:
            raise CheckpointError(
                f"{path}: truncated: {entry.name!r} ends at byte {entry.end} of {data_bytes} bytes "
                "of data"
            )
        if entry.begin < position:
            raise CheckpointError(f"{path}: {entry.name!r} overlaps {before}")
        if entry.begin > position:
            raise CheckpointError(
                f"{path}: {entry.begin - position} bytes between {before} and {entry.name!r} "
                "belong to no tensor"
            )
        position, before = entry.end, repr(entry.name)
    if position != data_bytes:
        raise CheckpointError(
            f"{path}: {data_bytes - position} bytes after {before} belong to no tensor"
        )


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    size = os.path.getsize(path)
    if size > limit:
        raise CheckpointError(f"{path}: {size} bytes are over the limit of {limit}")
    return _parse_object(path.read_bytes(), path, "file")


def _parse_object(raw: bytes, path: Path, what: str) -> dict[str, Any]:
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
