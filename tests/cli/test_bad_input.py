"""Bad input costs one line on stderr and exit code 2, whatever it is."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedmoe.presets import find_preset, write_preset


def fails(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that has every one of ``words``."""
    code, out, err = result
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("fusedmoe")
    for word in words:
        assert word in err


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def without_experts(folder: Path) -> None:
    """The same tensors under the names of a dense model."""
    from safetensors.torch import load_file, save_file

    change_config(folder, model_type="llama", num_local_experts=0)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({k.replace(".experts.", ".dense."): v for k, v in tensors.items()}, path)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(".experts.", ".dense."))


def only_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def point_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"] = dict.fromkeys(record["weight_map"], "../../etc/x.safetensors")
    index.write_text(json.dumps(record))


VERBS = ["generate", "inspect", "explain", "balance"]


def only_an_adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text("{}")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "holds no config.json; give the folder that has it",
    ),
    "an adapter": (only_an_adapter, "holds no config.json; it is an adapter: merge it"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "truncated": (
        lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-5]),
        "truncated",
    ),
    "absurd header": (
        lambda f: first_shard(f).write_bytes(b"\xff" * 8 + first_shard(f).read_bytes()[8:]),
        "claims a header",
    ),
    "missing shard": (lambda f: first_shard(f).unlink(), "which the index names"),
    "index points outside": (point_outside, "inside the folder"),
    "pickles": (only_pickles, "never read"),
    "no experts": (without_experts, "no experts in this 'llama' model"),
    "top-k beyond the experts": (
        lambda f: change_config(f, num_experts_per_tok=9),
        "chooses 9 of 8 experts",
    ),
}


@pytest.fixture
def broken(mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixtral, tmp_path / "checkpoint"))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(cli, broken: Path, verb: str, case: str) -> None:
    break_it, message = BROKEN[case]
    break_it(broken)
    fails(cli(verb, broken), str(broken), message)


def drop_a_tensor(folder: Path) -> None:
    """Takes the router of layer 1 out of its file and out of the index."""
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.block_sparse_moe.gate.weight"
    index = folder / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    path = folder / record["weight_map"].pop(name)
    index.write_text(json.dumps(record))
    save_file({k: v for k, v in load_file(path).items() if k != name}, path)


def bring_code(folder: Path) -> None:
    """A model of the folder's own, whose code must not run."""
    code = "open('ran', 'w').close()\nclass Model: pass\n"
    (folder / "modeling_own.py").write_text(code)
    own = {"AutoConfig": "modeling_own.Model", "AutoModelForCausalLM": "modeling_own.Model"}
    change_config(folder, model_type="newcomer", auto_map=own)


NONSENSE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "more layers": (
        lambda f: change_config(f, num_hidden_layers=10**8),
        "promises 100000000 layers, the files have 2",
    ),
    "more experts": (
        lambda f: change_config(f, num_local_experts=10**8),
        "promises 100000000 experts, model.layers.0 has 8",
    ),
    "fewer experts": (lambda f: change_config(f, num_local_experts=4), "expected shape (4, "),
    "other width": (
        lambda f: change_config(f, hidden_size=128),
        "lm_head.weight: expected shape (448, 128), found (448, 64) (",
    ),
    "absurd width": (lambda f: change_config(f, hidden_size=10**9), "cannot load it"),
    "width of letters": (lambda f: change_config(f, hidden_size="wide"), "cannot load it"),
    "negative vocabulary": (lambda f: change_config(f, vocab_size=-1), "cannot load it"),
    "missing tensor": (
        drop_a_tensor,
        "1 tensors of the model are missing in the files, 'model.layers.1.mlp",
    ),
    "own code": (bring_code, "cannot load it: its model is code in the folder"),
    "unknown model": (lambda f: change_config(f, model_type="newcomer"), "cannot load it"),
}


@pytest.mark.parametrize("verb", ["generate", "balance"])
@pytest.mark.parametrize("case", NONSENSE)
def test_files_that_do_not_fit_their_config_are_not_run(
    cli, broken: Path, verb: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these would generate noise from uninitialised weights, run code, or take for ever."""
    break_it, message = NONSENSE[case]
    break_it(broken)
    monkeypatch.chdir(broken)
    fails(cli(verb, broken, "--max-new-tokens", "1"), str(broken), message)
    assert not (broken / "ran").exists()


def test_experts_without_elements(cli, broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({k: v[:0].clone() if ".experts." in k else v for k, v in tensors.items()}, path)
    assert cli("inspect", broken)[0] == 0
    fails(cli("generate", broken, "--device", "cpu"), "experts")
    assert cli("explain", broken, "--device", "cpu")[0] == 0


@pytest.mark.parametrize("verb", VERBS)
def test_a_missing_folder(cli, verb: str, tmp_path: Path) -> None:
    fails(cli(verb, tmp_path / "nowhere"), "nowhere", "no such folder")


@pytest.mark.parametrize("verb", ["generate", "explain", "balance"])
def test_an_unknown_activation(cli, broken: Path, verb: str) -> None:
    change_config(broken, hidden_act="swish_of_death")
    fails(cli(verb, broken), "unknown", "activation 'swish_of_death'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "a checkpoint folder or --preset"),
        (["generate", "folder", "--preset", "tiny-mixtral"], "a checkpoint folder or --preset"),
        (
            ["generate", "folder", "--write-to", "x", "--seed", "1"],
            "--write-to, --seed would have no",
        ),
        (["tune", "folder", "--show", "x", "--again"], "checkpoint, --again would have no effect"),
        (["generate", "--preset", "tiny-gpt-9"], "unknown preset 'tiny-gpt-9'; known: tiny-mix"),
        (["generate", "--preset", "qwen3-30b-layer"], "--large"),
        (["generate", "--preset", "tiny-mixtral", "--dtype", "int4"], "unsupported dtype 'int4'"),
        (["generate", "--preset", "tiny-mixtral", "--device", "tpu9"], "unknown device 'tpu9'"),
        (["generate", "--preset", "tiny-mixtral", "--device", "meta"], "unsupported device 'meta'"),
        (["generate", "--preset", "tiny-mixtral", "--device", "cuda:99"], "torch sees"),
        (["generate", "--preset", "tiny-mixtral", "--max-new-tokens", "0"], "at least 1, got 0"),
        (["generate", "--preset", "tiny-mixtral", "--max-new-tokens", "x"], "invalid int value"),
        (["generate", "--preset", "tiny-mixtral", "--prompt", ""], "the prompt has no tokens"),
        (
            ["explain", "--top-k", "2"],
            "not complete: give --num-experts, --hidden-size, --intermediate",
        ),
        (["bench", "--ep", "--scope", "experts", "--no-peers"], "--no-peers would have no effect"),
        (["bench", "--ep", "--tokens", "-3"], "token counts must be at least 1, got -3"),
        (["bench", "--max-workspace-bytes", "0"], "max_workspace_bytes must be positive, got 0"),
        ([], "VERB"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_bad_words(cli, words: list[str], message: str) -> None:
    fails(cli(*words), message)


LAYER = ["--num-experts", "8", "--top-k", "2", "--hidden-size", "64", "--intermediate-size", "32"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--activation", "blub"], "unknown MoE activation 'blub'; known: silu"),
        (["--dtype", "fp7"], "unsupported dtype 'fp7'"),
        (["--top-k", "9"], "experts_per_token 9"),
        (["--num-experts", "-3"], "num_experts must be at least 1, got -3"),
        (["--experts", "warp-drive"], "'warp-drive'; known:"),
    ],
)
def test_bad_layers(cli, words: list[str], message: str) -> None:
    fails(cli("explain", *LAYER, *words), message)


def test_a_preset_is_not_written_over_a_folder_in_use(cli, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    fails(
        cli("generate", "--preset", "tiny-mixtral", "--write-to", tmp_path),
        "not an empty folder",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_preset_is_written_once(tmp_path: Path) -> None:
    """README's first lines can be run again; another preset, or another seed, is not there."""
    folder = write_preset("tiny-olmoe", tmp_path / "model")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_preset("tiny-olmoe", folder) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    for name, seed in (("tiny-mixtral", 0), ("tiny-olmoe", 1)):
        with pytest.raises(ValueError, match="not an empty folder"):
            write_preset(name, folder, seed)


def test_a_seed_that_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64 bits, got 9223372036854775808"):
        write_preset("tiny-olmoe", tmp_path, 1 << 63)


def test_the_traceback_is_there_when_asked_for(cli, tmp_path: Path) -> None:
    _, _, err = cli("inspect", tmp_path, "--traceback")
    assert "Traceback" in err


def too_large() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def no_more() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 2 GiB")


@pytest.mark.parametrize("fill", [too_large, no_more])
def test_too_little_memory_is_one_line_too(
    cli, fill: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedmoe.cli.env.run", lambda args: fill())
    fails(cli("env"), "out of memory", "llocate")


def test_a_defect_of_ours_is_not_called_bad_input(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: Any) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr("fusedmoe.cli.env.run", run)
    with pytest.raises(RuntimeError, match="a defect"):
        cli("env")


def test_an_option_that_there_is_not_names_the_verb_that_has_none(cli) -> None:
    fails(cli("explain", "--formats", "int8"), "fusedmoe explain: error: unrecognized", "--help")


def test_a_config_that_fails_when_the_model_runs_is_bad_input(cli, tmp_path: Path) -> None:
    folder = write_preset("tiny-deepseek-v3", tmp_path / "checkpoint")
    change_config(folder, n_group=0)
    fails(cli("generate", folder, "--max-new-tokens", "1"), "the model that config.json describes")


def test_a_defect_of_our_experts_is_not_the_configs(cli, broken: Path, monkeypatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("a defect")

    monkeypatch.setattr("fusedmoe.modular_kernel.kernel.check_rows", fail)
    monkeypatch.setattr("fusedmoe.integrations.transformers.experts_function.fused_experts", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli("generate", broken, "--max-new-tokens", "1", "--route", "accelerate")


@pytest.mark.parametrize("options", [[], ["--compare"], ["--route", "accelerate"]])
def test_a_tensor_of_another_shape_is_named(cli, broken: Path, options: list[str]) -> None:
    from safetensors.torch import load_file, save_file

    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        name = "model.norm.weight"
        save_file(tensors | {n: t[:-1] for n, t in tensors.items() if n == name}, path)
    result = cli("generate", broken, "--max-new-tokens", "1", *options)
    fails(result, "model.norm.weight: expected shape (64,), found (63,)")


@pytest.mark.parametrize("verb", ["generate", "balance"])
def test_a_folder_without_a_tokenizer(cli, broken: Path, verb: str) -> None:
    """As ``model.save_pretrained`` leaves it."""
    for path in broken.glob("tokenizer*"):
        path.unlink()
    fails(cli(verb, broken, "--device", "cpu"), "holds no tokenizer; put that of the original")


def test_stacks_of_torchs_own_are_left_out(cli, broken: Path) -> None:
    change_config(broken, hidden_size=10**30)
    result = cli("generate", broken, "--max-new-tokens", "1")
    fails(result, "cannot load it")
    assert "c10::" not in result[2]


def test_find_preset_and_write_preset_say_what_is_known(tmp_path: Path) -> None:
    for call in (find_preset, lambda name: write_preset(name, tmp_path / "x")):
        with pytest.raises(ValueError, match="unknown preset 'nope'; known: tiny-mixtral"):
            call("nope")
