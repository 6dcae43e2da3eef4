"""The tiles that tuned tables are about, as records and as JSON.

    {"type": "tile", "block_m": 16, "block_n": 64, ...}
    {"type": "decode", "block": 8, "up": {"rows": 64, ...}, "down": {...}, "draws_up": false}

A record has its fields and its ``type``; the records inside it have none.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict, fields
from typing import Any, TypeVar, get_type_hints

from fusedmoe.tuning.hopper_tiles import DecodeTiles, DirectTiles, HopperTiles, PrefillTiles
from fusedmoe.tuning.json_fields import flag_of, integer_of, object_of, shown
from fusedmoe.tuning.tiles import TileConfig

Tile = TileConfig | HopperTiles

TILE_TYPES: dict[str, type[Tile]] = {
    "tile": TileConfig,
    "direct": DirectTiles,
    "decode": DecodeTiles,
    "prefill": PrefillTiles,
}
MAX_TILE = 4096

_Record = TypeVar("_Record")


def goes_with(tile: Tile) -> Hashable:
    """Tiles of one layer's stages must agree in this: one alignment serves both GEMMs."""
    return tile.block_m if isinstance(tile, TileConfig) else None


def tile_to_json(tile: Tile) -> dict[str, Any]:
    names = {cls: name for name, cls in TILE_TYPES.items()}
    return {"type": names[type(tile)], **asdict(tile)}


def tile_from_json(value: Any) -> Tile:
    """The tile record that ``value`` describes; its own constructor has the last word."""
    name = value.get("type") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in TILE_TYPES:
        raise ValueError(f"a tile's type must be one of {', '.join(TILE_TYPES)}, got {shown(name)}")
    return _read(TILE_TYPES[name], {key: one for key, one in value.items() if key != "type"})


def _read(cls: type[_Record], value: Any) -> _Record:
    kinds = _kinds(cls)
    record = object_of(value, "a tile", *kinds)
    return cls(**{name: _field(kind, record[name], name) for name, kind in kinds.items()})


def _field(kind: type, value: Any, name: str) -> Any:
    if kind is bool:
        return flag_of(value, name)
    return integer_of(value, name, MAX_TILE) if kind is int else _read(kind, value)


def _kinds(cls: Any) -> dict[str, type]:
    """The fields of a record and their types."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}
