"""A checkpoint folder may come from anywhere: every broken or hostile one is refused by name."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

from fusedmoe.checkpoint import CheckpointError, read_checkpoint, read_header


def file_of(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with this header (a value, or raw bytes)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def folder_with(path: Path, **tensors: torch.Tensor) -> Path:
    """A folder that is fine: one file, one config."""
    path.mkdir(exist_ok=True)
    save_file(tensors or {"a": torch.ones(2, 3)}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "mixtral"}')
    return path


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are too few"),
    "seven bytes": (b"1234567", "7 bytes are too few"),
    "header past the end": (file_of({}, length=10_000), "truncated: the header ends at byte 10008"),
    "absurd header": (file_of({}, length=1 << 62), "claims a header of 4611686018427387904 bytes"),
    "not JSON": (file_of(b"{not json"), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not JSON"),
    "not an object": (file_of([1, 2]), "not a JSON object"),
    "deep nesting": (file_of(b'{"a":' + b"[" * 100_000), "not JSON"),
    "huge number": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "duplicate key": (
        file_of(b'{"w":' + json.dumps(tensor(0, 4)).encode() + b',"w":{}}', b"\0" * 4),
        "has the key 'w' twice",
    ),
    "metadata": (file_of({"__metadata__": {"format": 1}}), "__metadata__"),
    "metadata list": (file_of({"__metadata__": ["a"]}), "__metadata__"),
    "entry is a list": (file_of({"w": ["dtype", "shape", "data_offsets"]}), "'w' is not a dtype"),
    "extra field": (file_of({"w": tensor(0, 4) | {"x": 1}}, b"\0" * 4), "'w' is not a dtype"),
    "unknown dtype": (file_of({"w": tensor(0, 4, "Q4")}, b"\0" * 4), "unknown dtype 'Q4'"),
    "dtype no string": (file_of({"w": tensor(0, 4, [1])}, b"\0" * 4), r"unknown dtype \[1\]"),
    "negative size": (file_of({"w": tensor(0, 4, shape=[-1])}, b"\0" * 4), "has the shape"),
    "boolean size": (file_of({"w": tensor(0, 4, shape=[True])}, b"\0" * 4), "has the shape"),
    "fractional size": (file_of({"w": tensor(0, 4, shape=[1.0])}, b"\0" * 4), "has the shape"),
    "many dimensions": (file_of({"w": tensor(0, 4, shape=[1] * 65)}, b"\0" * 4), "has the shape"),
    "overflowing shape": (file_of({"w": tensor(0, 4, shape=[1 << 62] * 4)}, b"\0" * 4), "F32"),
    "wrong dtype size": (file_of({"w": tensor(0, 4, "F64", [1])}, b"\0" * 4), "'w' is F64"),
    "backward offsets": (file_of({"w": tensor(4, 0, shape=[0])}, b"\0" * 4), "data_offsets"),
    "negative offset": (
        file_of({"w": tensor(0, 4) | {"data_offsets": [-4, 0]}}, b"\0" * 4),
        "data_offsets",
    ),
    "three offsets": (
        file_of({"w": tensor(0, 4) | {"data_offsets": [0, 4, 8]}}, b"\0" * 4),
        "data_offsets",
    ),
    "truncated data": (file_of({"w": tensor(0, 8)}, b"\0" * 4), "truncated: 'w' ends at byte 8"),
    "overlap": (
        file_of({"v": tensor(0, 8), "w": tensor(4, 12)}, b"\0" * 12),
        "'w' overlaps 'v'",
    ),
    "same bytes twice": (
        file_of({"v": tensor(0, 8), "w": tensor(0, 8)}, b"\0" * 8),
        "'w' overlaps 'v'",
    ),
    "gap": (file_of({"v": tensor(0, 4), "w": tensor(8, 12)}, b"\0" * 12), "4 bytes between 'v'"),
    "bytes at the end": (file_of({"v": tensor(0, 4)}, b"\0" * 9), "5 bytes after 'v'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_with_file_and_reason(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = write(tmp_path / "model.safetensors", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_good_file_is_read_as_it_is(tmp_path: Path) -> None:
    tensors = {
        "w": torch.zeros(3, 5, dtype=torch.bfloat16),
        "scale": torch.zeros((), dtype=torch.float32),
        "empty": torch.zeros(0, 4, dtype=torch.int64),
        "fp8": torch.zeros(7, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "x.safetensors")
    assert {name: (e.dtype, e.shape, e.nbytes) for name, e in entries.items()} == {
        "w": ("BF16", (3, 5), 30),
        "scale": ("F32", (), 4),
        "empty": ("I64", (0, 4), 0),
        "fp8": ("F8_E4M3", (7,), 7),
    }


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_passes_the_checks_also_loads(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One byte of a good file changed: refused here, or readable by the safetensors package."""
    good = save({"w": torch.arange(6.0).reshape(2, 3), "v": torch.zeros(2, dtype=torch.int8)})
    position = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[position] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.getbasetemp() / "changed.safetensors", bytes(changed))
    try:
        read_header(path)
    except CheckpointError:
        return
    try:
        load(bytes(changed))
    except SafetensorError as error:
        pytest.fail(f"accepted here, refused by safetensors: {error}")


def test_a_good_folder(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(folder_with(tmp_path / "good"))
    assert checkpoint.config == {"model_type": "mixtral"}
    assert checkpoint.files == {"a": "model.safetensors"}
    assert checkpoint.nbytes == 24


def test_a_missing_folder_a_file_and_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a folder"):
        read_checkpoint(write(tmp_path / "file", b""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        read_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("config", ["[]", "{", "", '"x"', "\xff", '{"a": 1, "a": 2}'])
def test_a_broken_config(config: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "bad")
    (folder / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_checkpoint(folder)


def test_a_config_of_absurd_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "big")
    monkeypatch.setattr("fusedmoe.checkpoint.MAX_CONFIG_BYTES", 10)
    with pytest.raises(CheckpointError, match="over the limit of 10"):
        read_checkpoint(folder)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "x.safetensors")


class _Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_and_never_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folder_with(tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(CheckpointError, match=f"pickles .{name}.*never read"):
        read_checkpoint(folder)
    assert not (tmp_path / "unpickled").exists()


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        read_checkpoint(folder)


def sharded(path: Path, weight_map: Any) -> Path:
    """Two files, ``a`` and ``b``, under an index that says ``weight_map``."""
    folder = folder_with(path)
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_a_good_index(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(sharded(tmp_path / "good", {"a": ONE, "b": TWO}))
    assert checkpoint.files == {"a": ONE, "b": TWO}


@pytest.mark.parametrize(
    "target",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/secret.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        ".safetensors",
        "..safetensors",
        "model.bin",
        "model.safetensors\n",
        "model\0.safetensors",
        "",
        7,
        None,
    ],
)
def test_an_index_that_points_elsewhere(target: Any, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    folder = sharded(tmp_path / "escaping", {"a": target, "b": TWO})
    with pytest.raises(CheckpointError, match=r"not a .* file name inside the folder"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "weight_map is missing"),
        ([], "weight_map is missing"),
        ([ONE, TWO], "weight_map is missing"),
        ({"a": ONE, "b": "model-00003-of-00002.safetensors"}, "lacks model-00003"),
        ({"a": ONE, "b": TWO, "c": TWO}, "lacks 'c', which the index promises"),
        ({"a": TWO, "b": ONE}, "holds 'a', which is in model-00002"),
    ],
)
def test_an_index_that_does_not_fit_its_files(
    weight_map: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(sharded(tmp_path / "unfit", weight_map))


@pytest.mark.parametrize("index", [{"a": ONE, "b": TWO}, {"b": TWO, "c": ONE}])
def test_one_tensor_in_two_files(index: dict[str, str], tmp_path: Path) -> None:
    folder = sharded(tmp_path / "twice", index)
    save_file({"a": torch.ones(2), "c": torch.ones(1)}, folder / ONE)
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / TWO)
    with pytest.raises(CheckpointError, match="holds 'a', which is in model-00001"):
        read_checkpoint(folder)
