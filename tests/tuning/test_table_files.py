"""Files of tiles from anywhere: what is read, what is refused in one line, how they are written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fusedmoe.config import MoEOptions
from fusedmoe.tuning import table_file
from fusedmoe.tuning.foreign import device_key, parse_name, read_table
from fusedmoe.tuning.table_file import MAX_BYTES, write_atomically
from fusedmoe.tuning.tiles import HOPPER_SHARED_MEMORY, TileConfig

TILE = {"type": "tile", "block_m": 16, "block_n": 64, "block_k": 128}
TILE |= {"group_m": 1, "num_warps": 4, "num_stages": 4}


def record(**changes: Any) -> dict[str, Any]:
    sound: dict[str, Any] = {
        "fusedmoe_tiles": 1,
        "device": "NVIDIA_H200",
        "kernel": "triton",
        "kernel_version": 1,
        "triton": "3.6.0",
        "layer": {"E": 8, "K": 2, "H": 64, "I": 32, "weights": "bf16", "form": "halves"},
        "tokens": [1, 16],
        "curves": [
            {"stage": stage, "tile": TILE, "us": [10, 20.5]} for stage in ("gemm1", "gemm2")
        ],
    }
    return sound | changes


def curve(**changes: Any) -> dict[str, Any]:
    return {"stage": "gemm1", "tile": TILE, "us": [1, 2]} | changes


def with_curve(**changes: Any) -> dict[str, Any]:
    return record(curves=[curve(**changes), curve(stage="gemm2")])


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(content: Any, name: str = "table.json") -> Path:
        path = tmp_path / name
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_sound_file_is_read_as_it_stands(file: Any) -> None:
    table = read_table(file(record()))
    assert table.tiles(4) == (TileConfig(16, 64, 128, 1, 4, 4),) * 2
    assert table.tokens == (1, 16)
    assert table.measured
    options = MoEOptions(tuned_table=file(record()))
    assert options.table == table
    assert MoEOptions(tuned_table=str(file(record()))) == options


DEEP = "[" * 100_000
HOSTILE: dict[str, Any] = {
    "not JSON": "{",
    "not text": b"\xff\xfe\x00",
    "a pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
    "too deep": DEEP,
    "too large": json.dumps(record()) + " " * MAX_BYTES,
    "a key twice": json.dumps(record()).replace('"E": 8', '"E": 8, "E": 8'),
    "a list": [],
    "a number": 7,
    "a key missing": {k: v for k, v in record().items() if k != "device"},
    "a key too many": record(extra=1),
    "another format": record(fusedmoe_tiles=2),
    "an unknown kernel": record(kernel="cutlass"),
    "a device with a path": record(device="../../etc/passwd"),
    "a version of words": record(kernel_version="one"),
    "a version of True": record(kernel_version=True),
    "no tokens": record(tokens=[]),
    "zero tokens": record(tokens=[0, 1]),
    "tokens that fall": record(tokens=[16, 1]),
    "tokens twice": record(tokens=[16, 16]),
    "tokens without end": record(tokens=list(range(1, 10_000))),
    "fractional tokens": record(tokens=[1.5, 2]),
    "a layer of nothing": record(layer={}),
    "a layer without experts": record(layer=record()["layer"] | {"E": 0}),
    "a layer of any size": record(layer=record()["layer"] | {"E": None}),
    "no curves": record(curves=[]),
    "curves that are none": record(curves=[1, 2]),
    "an unknown stage": with_curve(stage="gemm3"),
    "times missing": with_curve(us=[1]),
    "a negative time": with_curve(us=[1, -2]),
    "a time of True": with_curve(us=[1, True]),
    "a time in words": with_curve(us=[1, "fast"]),
    "NaN": json.dumps(with_curve(us=[1, float("nan")])),
    "infinity": '{"tokens": [1e999]}',
    "a huge time": json.dumps(with_curve(us=[1, 2])).replace("[1, 2]", "[1, 1e999]"),
    "a huge integer": json.dumps(record()).replace('"E": 8', '"E": 1' + "0" * 4000),
    "a larger integer": json.dumps(record()).replace('"E": 8', '"E": 1' + "0" * 9000),
    "no second stage": record(curves=[curve()]),
    "stages that do not go together": record(
        curves=[curve(), curve(stage="gemm2", tile=TILE | {"block_m": 32})]
    ),
    "a tile of another kernel": with_curve(tile=TILE | {"type": "decode"}),
    "a tile of no kind": with_curve(tile={k: v for k, v in TILE.items() if k != "type"}),
    "a tile that is a list": with_curve(tile=[16, 64, 128]),
    "a tile field missing": with_curve(tile={k: v for k, v in TILE.items() if k != "block_k"}),
    "a tile field too many": with_curve(tile=TILE | {"split_k": 2}),
    "no power of two": with_curve(tile=TILE | {"block_n": 48}),
    "a tile too small": with_curve(tile=TILE | {"block_m": 8}),
    "a tile too large": with_curve(tile=TILE | {"block_n": 8192}),
    "a fractional tile": with_curve(tile=TILE | {"block_n": 64.0}),
    "three warps": with_curve(tile=TILE | {"num_warps": 3}),
    "no stages": with_curve(tile=TILE | {"num_stages": 0}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_broken_file_is_one_clear_error(what: str, file: Any) -> None:
    path = file(HOSTILE[what])
    with pytest.raises(ValueError) as caught:
        read_table(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < len(str(path)) + 300
    assert "\n" not in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        MoEOptions(tuned_table=tmp_path / "none.json")
    with pytest.raises(ValueError, match="Is a directory"):
        read_table(tmp_path)


ENTRY = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
ENTRY |= {"num_warps": 4, "num_stages": 3}
LARGE = ENTRY | {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "num_warps": 8}
NAME = "E=128,N=768,device_name=NVIDIA_H200.json"


@pytest.mark.parametrize(
    ("name", "E", "N", "device", "weights"),
    [
        (NAME, 128, 768, "NVIDIA_H200", "16bit"),
        (
            "E=8,N=1792,device_name=NVIDIA_H200_NVL,dtype=int4_w4a16.json",
            *(8, 1792, "NVIDIA_H200", "int4_w4a16"),
        ),
        (
            "E=256,N=256,device_name=NVIDIA_H20-3e,dtype=fp8_w8a8,block_shape=[128,128].json",
            *(256, 256, "NVIDIA_H20-3e", "fp8_w8a8[128,128]"),
        ),
        (
            "E=16,N=1024,device_name=NVIDIA H100 SXM,dtype=fp8_w8a8,block_shape=[128, 64].json",
            *(16, 1024, "NVIDIA_H100_SXM", "fp8_w8a8[128,64]"),
        ),
        (
            "E=8,N=512,device_name=NVIDIA_B200,dtype=fp8_w8a8,per_channel_quant=True.json",
            *(8, 512, "NVIDIA_B200", "fp8_w8a8[channel]"),
        ),
        (
            "E=10,N=512,device_name=Intel(R)_Arc(TM)_Pro.json",
            *(10, 512, "Intel(R)_Arc(TM)_Pro", "16bit"),
        ),
    ],
)
def test_names_of_other_engines_tables(
    name: str, E: int, N: int, device: str, weights: str
) -> None:
    found = parse_name(name)
    assert (found.E, found.N, found.device, found.weights) == (E, N, device, weights)


@pytest.mark.parametrize(
    "name",
    [
        "E=8,N=7.json",
        "E=8,N=7,device_name=.json",
        "E=-8,N=7,device_name=x.json",
        "E=8,N=7,device_name=x,dtype=a b.json",
        "E=8,N=7,device_name=x,block_shape=[1].json",
        "E=8,N=7,device_name=x,oops=1.json",
    ],
)
def test_other_names_are_refused(name: str, file: Any) -> None:
    with pytest.raises(ValueError, match="is not named"):
        read_table(file({"1": ENTRY}, name))


@pytest.mark.parametrize("rest", ["", ",dtype=fp8_w8a8", ",dtype=fp8_w8a8,block_shape=[128, 128]"])
def test_tables_of_one_gemm_are_refused(rest: str, file: Any) -> None:
    """Their columns are those of the second one: as a whole table they would be misread."""
    with pytest.raises(ValueError, match="second GEMM alone"):
        read_table(file({"1": ENTRY}, f"E=8,N=512,device_name=NVIDIA_H200{rest}_down.json"))


def test_devices_have_one_name() -> None:
    assert device_key("NVIDIA H200") == device_key("NVIDIA_H200_NVL") == "NVIDIA_H200"
    assert device_key("NVIDIA  GeForce RTX 4090") == "NVIDIA_GeForce_RTX_4090"


def test_an_entry_serves_both_gemms_and_the_nearest_by_ratio_is_taken(file: Any) -> None:
    """The first GEMM's columns count gate and up there, the output's here."""
    table = read_table(file({"triton_version": "3.5.0", "1": ENTRY, "64": LARGE}, NAME))
    small, large = table.tiles(1), table.tiles(64)
    assert [tile.block_n for tile in (*small, *large)] == [32, 64, 128, 256]
    assert [tile.block_m for tile in (*small, *large)] == [16, 16, 128, 128]
    assert table.triton == "3.5.0"
    assert not table.measured
    assert [table.tiles(T) == small for T in (1, 7, 9, 10**5)] == [True, True, False, False]
    assert table.layer.mismatch(table.layer) is None


def test_a_foreign_table_survives_being_written(file: Any) -> None:
    table = read_table(file({"1": ENTRY, "2": LARGE, "9": ENTRY, "64": LARGE}, NAME))
    again = read_table(file(table.text))
    assert again == table
    assert not again.measured
    for T in (1, 2, 3, 4, 5, 20, 30):
        assert again.tiles(T) == table.tiles(T)


def test_stages_that_do_not_fit_are_left_out(file: Any) -> None:
    deep = LARGE | {"num_stages": 16, "BLOCK_SIZE_K": 64}
    for tile, weights in zip(read_table(file({"8": deep}, NAME)).tiles(8), (2, 1), strict=True):
        assert tile.shared_memory(2, weights) <= HOPPER_SHARED_MEMORY
        assert tile.num_stages > 1


FOREIGN: dict[str, Any] = {
    "no entries": {"triton_version": "3.5.0"},
    "a list": [ENTRY],
    "a key of words": {"many": ENTRY},
    "a key of zero": {"0": ENTRY},
    "a huge key": {"9" * 4000: ENTRY},
    "too many": {str(n): ENTRY for n in range(1, 300)},
    "an entry of nothing": {"1": {}},
    "an entry in words": {"1": "fast"},
    "an entry of a number": {"1": 3},
    "an unknown field": {"1": ENTRY | {"__reduce__": 1}},
    "a split depth": {"1": ENTRY | {"SPLIT_K": 4}},
    "no power of two": {"1": ENTRY | {"BLOCK_SIZE_N": 96}},
    "a fraction": {"1": ENTRY | {"BLOCK_SIZE_N": 64.5}},
    "True": {"1": ENTRY | {"num_stages": True}},
    "never fits": {"1": ENTRY | {"BLOCK_SIZE_N": 1024, "BLOCK_SIZE_K": 1024}},
    "warps": {"1": ENTRY | {"num_warps": 64}},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_broken_tables_of_other_engines_are_one_error(what: str, file: Any) -> None:
    path = file(FOREIGN[what], NAME)
    with pytest.raises(ValueError) as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "table.json"
    write_atomically(path, "first")
    assert path.read_text() == "first"

    def fail(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(table_file.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "second")
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["table.json"]
