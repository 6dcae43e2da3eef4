"""Tuned tables as JSON: reading without trusting, and writing in one stroke.

    {"fusedmoe_tiles": 1, "device": "NVIDIA_H200", "kernel": "triton", "kernel_version": 1,
     "triton": "3.6.0",
     "layer": {"E": 128, "K": 8, "H": 2048, "I": 768, "weights": "bf16", "form": "halves"},
     "tokens": [1, 16, 256],
     "curves": [{"stage": "gemm1", "tile": {"type": "tile", "block_m": 16, ...},
                 "us": [24.5, 131.0, 190.2]}, ...]}

``us`` has one time per entry of ``tokens``, null where the tile is not for so many. A table that
was not measured has ``ratio`` in its place; what that means stands in ``tuned_table``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fusedmoe.tuning.json_fields import integer_of, integers_of, object_of, shown, word_of
from fusedmoe.tuning.tile_records import TILE_TYPES, tile_from_json, tile_to_json
from fusedmoe.tuning.tuned_kernels import KERNELS, TunedKernel
from fusedmoe.tuning.tuned_table import Curve, LayerKey, TunedTable, gap

FORMAT = 1
MAX_BYTES = 1 << 20
MAX_TOKENS, MAX_CURVES = 256, 1024
MAX_COST = 1e12
_COST_KEYS = {True: "us", False: "ratio"}  # by whether the table was measured

Parsed = TypeVar("Parsed")


def read_json(path: str | os.PathLike[str], most: int = MAX_BYTES) -> Any:
    """The JSON value in a file of at most ``most`` bytes; ValueError for anything else.

    Keys that stand twice, NaN and infinities are refused.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if len(raw) > most:
        raise ValueError(f"{path}: larger than {most} bytes")
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON as expected: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs][:8]}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def named(path: str | os.PathLike[str], parse: Callable[[Any], Parsed]) -> Parsed:
    """``parse`` of the JSON in a file; what it raises names the file."""
    value = read_json(path)
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@lru_cache(maxsize=256)
def table_from_text(text: str) -> TunedTable:
    """The table whose ``text`` this is."""
    return table_from_json(json.loads(text))


def table_from_json(value: Any) -> TunedTable:
    """A table from parsed JSON; ValueError says what is wrong with it."""
    record = object_of(
        value,
        "the table",
        *("fusedmoe_tiles", "device", "kernel", "kernel_version", "triton"),
        *("layer", "tokens", "curves"),
    )
    if record["fusedmoe_tiles"] != FORMAT:
        raise ValueError(f"fusedmoe_tiles must be {FORMAT}, got {shown(record['fusedmoe_tiles'])}")
    tokens = integers_of(record["tokens"], "tokens", MAX_TOKENS)
    if list(tokens) != sorted(set(tokens)):
        raise ValueError(f"tokens must ascend, got {shown(list(tokens))}")
    curves = record["curves"]
    if not isinstance(curves, list) or not 0 < len(curves) <= MAX_CURVES:
        raise ValueError(f"curves must be a list of 1 to {MAX_CURVES} entries")
    measured = not (isinstance(curves[0], dict) and "ratio" in curves[0])
    kernel = _kernel(word_of(record["kernel"], "kernel"))
    read = tuple(_curve(curve, kernel, len(tokens), _COST_KEYS[measured]) for curve in curves)
    return make_table(
        device=word_of(record["device"], "device"),
        kernel=kernel.name,
        kernel_version=integer_of(record["kernel_version"], "kernel_version"),
        triton=None if record["triton"] is None else word_of(record["triton"], "triton"),
        layer=_layer(record["layer"]),
        tokens=tokens,
        curves=read,
        measured=measured,
    )


def make_table(
    *,
    device: str,
    kernel: str,
    kernel_version: int,
    triton: str | None,
    layer: LayerKey,
    tokens: tuple[int, ...],
    curves: tuple[Curve, ...],
    measured: bool = True,
) -> TunedTable:
    """A table with its text; ValueError where no tiles of its curves make a whole layer at some
    count, for tiles of another kernel, and for a kernel that has no tables."""
    known = _kernel(kernel)
    types = tuple(TILE_TYPES[name] for name in known.tiles)
    wrong = next((curve for curve in curves if not isinstance(curve.tile, types)), None)
    if wrong is not None:
        raise ValueError(f"{kernel} has tiles {', '.join(known.tiles)}, got {wrong.tile}")
    missing = gap(known.stages, tokens, curves)
    if missing is not None:
        raise ValueError(f"no tiles of {', '.join(known.stages)} go together at {missing} tokens")
    head = {
        "fusedmoe_tiles": FORMAT,
        "device": device,
        "kernel": kernel,
        "kernel_version": kernel_version,
        "triton": triton,
        "layer": asdict(layer),
        "tokens": list(tokens),
    }
    lines = [
        json.dumps(
            {
                "stage": stage,
                "tile": tile_to_json(tile),
                _COST_KEYS[measured]: [one if math.isfinite(one) else None for one in cost],
            }
        )
        for stage, tile, cost in curves
    ]
    text = json.dumps(head, indent=1).removesuffix("\n}")
    text += ',\n "curves": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    return TunedTable(device, kernel, kernel_version, triton, layer, tokens, curves, measured, text)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """The file has its old content or all of ``text``, whenever this is interrupted."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _kernel(name: str) -> TunedKernel:
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {name}")
    return KERNELS[name]


def _curve(value: Any, kernel: TunedKernel, count: int, cost_key: str) -> Curve:
    record = object_of(value, "a curve", "stage", "tile", cost_key)
    if record["stage"] not in kernel.stages:
        known = ", ".join(kernel.stages)
        raise ValueError(f"a curve's stage must be one of {known}, got {shown(record['stage'])}")
    costs = record[cost_key]
    if not isinstance(costs, list) or len(costs) != count:
        raise ValueError(f"a curve's {cost_key} must have {count} entries, one per token count")
    tile = tile_from_json(record["tile"])
    return Curve(record["stage"], tile, tuple(cost_of(one, cost_key) for one in costs))


def cost_of(value: Any, key: str) -> float:
    """A positive time, or infinity for null."""
    if value is None:
        return math.inf
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= MAX_COST:
        raise ValueError(f"{key} must be positive numbers or null, got {shown(value)}")
    return float(value)


def _layer(value: Any) -> LayerKey:
    record = object_of(value, "layer", "E", "K", "H", "I", "weights", "form")
    sizes = {
        name: None if record[name] is None and name in "KH" else integer_of(record[name], name)
        for name in "EKHI"
    }
    return LayerKey(
        **sizes,  # type: ignore[arg-type]
        weights=word_of(record["weights"], "weights"),
        form=None if record["form"] is None else word_of(record["form"], "form"),
    )
