"""Tile tables that other engines' tuners wrote, read as ours.

Their name says what they are for and their keys are token counts:

    E=128,N=768,device_name=NVIDIA_H200[,dtype=fp8_w8a8][,block_shape=[128,128]]
        [,per_channel_quant=True].json
    {"triton_version": "3.5.0", "1": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128,
     "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 4}, "2": ...}

N is the intermediate size per rank (of int4 weights too, whose packed rows are half as long). One
entry serves both GEMMs there, and its columns count gate and up of the first one together; ours
are those of the output, so the first GEMM gets half of them. Such a table has no times: what an
entry costs at T tokens is how many times T is larger or smaller than its key, so that the entry
nearest by ratio is chosen.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from fusedmoe.tuning.json_fields import MAX_SIZE
from fusedmoe.tuning.table_file import MAX_TOKENS, make_table, named, table_from_json
from fusedmoe.tuning.tiles import HOPPER_SHARED_MEMORY, TileConfig
from fusedmoe.tuning.tuned_kernels import TRITON
from fusedmoe.tuning.tuned_table import SIXTEEN_BIT, Curve, LayerKey, TunedTable

_NAME = re.compile(
    r"E=(?P<E>\d{1,6}),N=(?P<N>\d{1,8}),device_name=(?P<device>[^,=/\\]{1,80})"
    r"(,dtype=(?P<dtype>\w{1,32}))?(,block_shape=\[(?P<n>\d{1,5}), ?(?P<k>\d{1,5})\])?"
    r"(?P<channel>,per_channel_quant=True)?\.json"
)
_OF_ONE_GEMM = "_down.json"
_SIZES = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
_NEEDED = (*_SIZES, "num_warps", "num_stages")
# Settings of other GPUs and other kernels, which no tile here has.
_IGNORED = ("waves_per_eu", "matrix_instr_nonkdim", "kpack", "SPLIT_K")
_VERSION_KEY = "triton_version"
_SIXTEEN_BIT_BYTES = 2


class ForeignName(NamedTuple):
    """What a file's name says; ``dtype`` None: 16-bit weights."""

    E: int
    N: int
    device: str
    dtype: str | None
    block_shape: tuple[int, int] | None
    per_channel: bool = False

    @property
    def weights(self) -> str:
        """The format as ``LayerKey.weights`` has it."""
        if self.block_shape is None:
            return (self.dtype or SIXTEEN_BIT) + "[channel]" * self.per_channel
        n, k = self.block_shape
        return f"{self.dtype or 'block'}[{n},{k}]"


def device_key(name: str) -> str:
    """A device's name as tables have it: no spaces, and one name for all kinds of H200."""
    name = "_".join(name.split())
    return "NVIDIA_H200" if "H200" in name.split("_") else name


def parse_name(name: str) -> ForeignName:
    """ValueError where a file is not named like a tile table of both GEMMs."""
    if name.endswith(_OF_ONE_GEMM):
        raise ValueError(f"{name!r:.100} has tiles for the second GEMM alone: give the other table")
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{name!r:.100} is not named E=..,N=..,device_name=..[,dtype=..][,block_shape=[n,k]]"
            "[,per_channel_quant=True].json"
        )
    block = None if found["n"] is None else (int(found["n"]), int(found["k"]))
    return ForeignName(
        int(found["E"]),
        int(found["N"]),
        device_key(found["device"]),
        found["dtype"],
        block,
        found["channel"] is not None,
    )


def read_table(path: str | os.PathLike[str]) -> TunedTable:
    """A table from a file: ours, or another engine's by its name, whose stages are reduced until
    they fit into a Hopper GPU's shared memory.

    Raises ValueError for a file that is neither, or is broken.
    """
    if not Path(path).name.startswith("E="):
        return named(path, table_from_json)
    name = parse_name(Path(path).name)
    return named(path, lambda value: foreign_table(name, value))


def foreign_table(name: ForeignName, value: Any) -> TunedTable:
    """Our table from another engine's, already parsed."""
    if not isinstance(value, dict):
        raise ValueError(f"must be an object of token counts, is {type(value).__name__}")
    entries = {key: entry for key, entry in value.items() if key != _VERSION_KEY}
    if not 0 < len(entries) <= MAX_TOKENS:
        raise ValueError(f"must have 1 to {MAX_TOKENS} token counts, has {len(entries)}")
    by_tokens: dict[int, tuple[TileConfig, TileConfig]] = {}
    for key, entry in entries.items():
        if not re.fullmatch(r"[1-9]\d{0,7}", key) or int(key) > MAX_SIZE:
            raise ValueError(f"keys must be token counts of 1 to {MAX_SIZE}, got {key!r:.40}")
        try:
            by_tokens[int(key)] = _tiles(entry)
        except ValueError as error:
            raise ValueError(f"at {key} tokens: {error}") from None
    tokens = tuple(sorted(by_tokens))
    version = value.get(_VERSION_KEY)
    return make_table(
        device=name.device,
        kernel=TRITON.name,
        kernel_version=TRITON.version,
        triton=version if isinstance(version, str) and re.fullmatch(r"[\w.+]+", version) else None,
        layer=LayerKey(E=name.E, I=name.N, weights=name.weights),
        tokens=tokens,
        curves=tuple(
            Curve(stage, tile, tuple(_ratio(token, own) for token in tokens))
            for place, stage in enumerate(TRITON.stages)
            for tile, own in _keys_by_tile(by_tokens, place).items()
        ),
        measured=False,
    )


def _keys_by_tile(
    by_tokens: dict[int, tuple[TileConfig, TileConfig]], place: int
) -> dict[TileConfig, list[int]]:
    found: dict[TileConfig, list[int]] = {}
    for tokens, tiles in sorted(by_tokens.items()):
        found.setdefault(tiles[place], []).append(tokens)
    return found


def _ratio(tokens: int, keys: list[int]) -> float:
    return min(max(tokens / key, key / tokens) for key in keys)


def _tiles(entry: Any) -> tuple[TileConfig, TileConfig]:
    """Both GEMMs' tiles of one entry."""
    if not isinstance(entry, dict):
        raise ValueError(f"an entry must be an object, is {type(entry).__name__}")
    wrong = set(entry) - {*_NEEDED, *_IGNORED} or set(_NEEDED) - set(entry)
    if wrong:
        raise ValueError(f"an entry has {', '.join(_NEEDED)}; unknown or missing: {sorted(wrong)}")
    for key in _NEEDED:
        number = entry[key]
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 1024:
            raise ValueError(f"{key} must be an integer of 1 to 1024, got {number!r:.40}")
    if entry.get("SPLIT_K", 1) != 1:
        raise ValueError(f"SPLIT_K must be 1, got {entry['SPLIT_K']!r:.40}")
    m, n, k, group = (entry[key] for key in _SIZES)
    rest = m, k, group, entry["num_warps"], entry["num_stages"]
    return (
        _fitting(max(16, n // 2), 2, *rest),
        _fitting(n, 1, *rest),
    )


def _fitting(
    block_n: int,
    weight_tiles: int,
    block_m: int,
    block_k: int,
    group_m: int,
    num_warps: int,
    num_stages: int,
) -> TileConfig:
    """The tile with as many of its stages as fit."""
    for stages in range(num_stages, min(num_stages, 2) - 1, -1):
        tile = TileConfig(block_m, block_n, block_k, group_m, num_warps, stages)
        if tile.shared_memory(_SIXTEEN_BIT_BYTES, weight_tiles) <= HOPPER_SHARED_MEMORY:
            return tile
    raise ValueError(
        f"{block_m} x {block_n} x {block_k} needs more than {HOPPER_SHARED_MEMORY} bytes of shared "
        "memory"
    )
