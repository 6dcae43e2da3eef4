"""Reading a checkpoint folder without trusting it.

A folder is config.json plus safetensors files (one, or several under an index). Only JSON and
headers (``safetensors_header.py``) are read here; each check names the file and the tensor it
failed on. Pickles are refused. The safetensors package loads the tensors, after these checks.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fusedmoe.safetensors_header import (
    MAX_HEADER_BYTES,
    CheckpointError,
    TensorEntry,
    parse_object,
    read_header,
)

__all__ = [
    "CONFIG_NAME",
    "Checkpoint",
    "CheckpointError",
    "TensorEntry",
    "TensorReader",
    "read_checkpoint",
    "read_config",
    "read_header",
    "read_quantization_config",
]

CONFIG_NAME = "config.json"
ADAPTER_NAME = "adapter_config.json"
# Files in which some tools put what belongs under quantization_config in config.json.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_QUANTIZATION_METHODS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

MAX_CONFIG_BYTES = 16_000_000  # far more than there are in practice; an index is longer


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
        what = "give the folder that has it and the .safetensors, or a GGUF file"
        if (folder / ADAPTER_NAME).is_file():
            what = "it is an adapter: merge it into its model and save that"
        raise CheckpointError(f"{folder}: holds no {CONFIG_NAME}; {what}")
    return _read_json(path, MAX_CONFIG_BYTES)


def read_quantization_config(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The ``quantization_config`` of a checkpoint: in config.json, in a section of it, or beside.

    Older files of compressed-tensors call it ``compression_config``. None where there is none;
    CheckpointError where it is no object.
    """
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for key, section in product(("quantization_config", "compression_config"), sections):
        found = section.get(key)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise CheckpointError(f"{folder / CONFIG_NAME}: {key} is {found!r}")
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


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    size = os.path.getsize(path)
    if size > limit:
        raise CheckpointError(f"{path}: {size} bytes are over the limit of {limit}")
    return parse_object(path.read_bytes(), path, "file")
