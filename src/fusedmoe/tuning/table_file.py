"""Tuned tables as JSON: reading without trusting, and writing in one stroke.

    {"fusedmoe_tiles": 1, "device": "NVIDIA_H200", "kernel": "triton", "kernel_version": 1,
     "triton": "3.6.0",
     "layer": {"E": 128, "K": 8, "H": 2048, "I": 768, "weights": "bf16", "form": "halves"},
     "tokens": [1, 16, 256],
     "curves": [{"stage": "gemm1", "tile": {"type": "tile", "block_m": 16, ...},
                 "us": [24.5, 131.0, 190.2]}, ...]}

``us`` has one time per entry of ``tokens``. A table that was not measured has ``ratio`` in its
place; what that means stands in ``tuned_table``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fusedmoe.tuning.tiles import TileConfig
from fusedmoe.tuning.tuned_kernels import TRITON
from fusedmoe.tuning.tuned_table import Curve, LayerKey, TunedTable

FORMAT = 1
MAX_BYTES = 1 << 20
MAX_TOKENS, MAX_CURVES = 256, 1024
MAX_SIZE = 1 << 24
MAX_TILE = 4096
MAX_COST = 1e12
_TILE = "tile"
_COST_KEYS = {True: "us", False: "ratio"}  # by whether the table was measured
_WORD = re.compile(r"[\w.+()\[\],-]{1,120}")

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
    record = _record(
        value,
        "the table",
        *("fusedmoe_tiles", "device", "kernel", "kernel_version", "triton"),
        *("layer", "tokens", "curves"),
    )
    if record["fusedmoe_tiles"] != FORMAT:
        raise ValueError(f"fusedmoe_tiles must be {FORMAT}, got {_shown(record['fusedmoe_tiles'])}")
    tokens = _numbers(record["tokens"], "tokens", MAX_TOKENS)
    if list(tokens) != sorted(set(tokens)):
        raise ValueError("tokens must ascend")
    curves = record["curves"]
    if not isinstance(curves, list) or not 0 < len(curves) <= MAX_CURVES:
        raise ValueError(f"curves must be a list of 1 to {MAX_CURVES} entries")
    measured = not (isinstance(curves[0], dict) and "ratio" in curves[0])
    read = tuple(_curve(curve, len(tokens), _COST_KEYS[measured]) for curve in curves)
    return make_table(
        device=_word(record["device"], "device"),
        kernel=_word(record["kernel"], "kernel"),
        kernel_version=_number(record["kernel_version"], "kernel_version"),
        triton=None if record["triton"] is None else _word(record["triton"], "triton"),
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
    """A table with its text; ValueError where no tiles of its curves make a whole layer, and for
    another kernel than ``TRITON``."""
    if kernel != TRITON.name:
        raise ValueError(f"kernel must be {TRITON.name}, got {kernel}")
    stages: dict[int, set[str]] = {}
    for curve in curves:
        stages.setdefault(curve.tile.block_m, set()).add(curve.stage)
    if not any(found == set(TRITON.stages) for found in stages.values()):
        raise ValueError(f"no tiles of {', '.join(TRITON.stages)} go together")
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
        json.dumps({"stage": stage, "tile": tile_to_json(tile), _COST_KEYS[measured]: list(cost)})
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


def tile_to_json(tile: TileConfig) -> dict[str, Any]:
    return {"type": _TILE, **asdict(tile)}


def tile_from_json(value: Any) -> TileConfig:
    """The tile record that ``value`` describes; its own constructor has the last word."""
    names = [field.name for field in fields(TileConfig)]
    record = _record(value, "a tile", "type", *names)
    if record["type"] != _TILE:
        raise ValueError(f"a tile's type must be {_TILE}, got {_shown(record['type'])}")
    return TileConfig(**{name: _number(record[name], name, MAX_TILE) for name in names})


def _curve(value: Any, count: int, cost_key: str) -> Curve:
    record = _record(value, "a curve", "stage", "tile", cost_key)
    if record["stage"] not in TRITON.stages:
        known = ", ".join(TRITON.stages)
        raise ValueError(f"a curve's stage must be one of {known}, got {_shown(record['stage'])}")
    costs = record[cost_key]
    if not isinstance(costs, list) or len(costs) != count:
        raise ValueError(f"a curve's {cost_key} must have {count} entries, one per token count")
    for cost in costs:
        number = isinstance(cost, (int, float)) and not isinstance(cost, bool)
        if not number or not 0 < cost <= MAX_COST:
            raise ValueError(f"{cost_key} must be positive numbers, got {_shown(cost)}")
    tile = tile_from_json(record["tile"])
    return Curve(record["stage"], tile, tuple(float(cost) for cost in costs))


def _layer(value: Any) -> LayerKey:
    record = _record(value, "layer", "E", "K", "H", "I", "weights", "form")
    sizes = {
        name: None if record[name] is None and name in "KH" else _number(record[name], name)
        for name in "EKHI"
    }
    return LayerKey(
        **sizes,  # type: ignore[arg-type]
        weights=_word(record["weights"], "weights"),
        form=None if record["form"] is None else _word(record["form"], "form"),
    )


def _record(value: Any, what: str, *names: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(names):
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{what} must have the keys {', '.join(names)}, got {keys!s:.120}")
    return value


def _numbers(value: Any, what: str, most: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= most:
        raise ValueError(f"{what} must be a list of 1 to {most} entries")
    return tuple(_number(one, what) for one in value)


def _number(value: Any, what: str, most: int = MAX_SIZE) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{what} must be an integer of 1 to {most}, got {_shown(value)}")
    return value


def _word(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise ValueError(f"{what} must be a word, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """At most 40 characters; an integer of thousands of digits has no text at all."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a huge integer"
    return f"{value!r:.40}"
