"""GGUF files for tests, written by the format's own package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fusedmoe.quantization.formats.superblocks import CODECS


def blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a type [rows, ...] with small finite scales."""
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    values, nbytes = gguf.GGML_QUANT_SIZES[type_]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, columns // values, nbytes), dtype=np.uint8)
    scale = (generator.random((rows, columns // values, 2)) * 2e-3).astype(np.float16)
    bytes_of = scale.view(np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = generator.integers(118, 123, raw.shape[:2])
    elif kind == "NVFP4":
        raw[..., 0:4] = generator.integers(0, 32, (*raw.shape[:2], 4))
        raw[0, 0, 3] = 127  # for 0
    elif kind.lower() in CODECS:
        where = CODECS[kind.lower()].floats
        raw[..., where] = bytes_of[..., : where.stop - where.start]
        if kind == "Q6_K":
            raw[..., where] //= 8
    else:
        raw[..., 0:2] = bytes_of[..., :2]
    return raw.reshape(rows, -1)


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **metadata: Any) -> Path:
    """A file of the package's own writer; arrays are bytes of the named type, or floats."""
    import gguf

    parts = metadata.pop("tensors_per_part", 0)
    writer = gguf.GGUFWriter(
        path, metadata.pop("architecture", "qwen3moe"), split_max_tensors=parts
    )
    for key, value in metadata.items():
        name = key.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, (array, kind) in tensors.items():
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, array, raw_dtype=None if kind in ("F32", "F16") else type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(weight: np.ndarray, kind: str) -> np.ndarray:
    """A matrix [N, K] as the package writes it; types that it only reads get random bytes."""
    import gguf

    if kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_1", "MXFP4"):
        return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    return blocks(kind, *weight.shape, seed=int(abs(weight[0, 0]) * 1e6))
