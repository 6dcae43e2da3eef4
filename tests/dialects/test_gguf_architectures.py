"""Every architecture whose GGUF files load: a tiny model gives the logits of the original."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from gguf_gemma_cases import GEMMA_CASES
from gguf_linear_cases import LINEAR_CASES
from gguf_llama_cases import LLAMA_CASES
from gguf_mamba_cases import MAMBA_CASES
from gguf_models import Case, all_keys, file_tensors, write_model
from gguf_sigmoid_cases import SIGMOID_CASES
from gguf_softmax_cases import SOFTMAX_CASES

import fusedmoe
from fusedmoe.checkpoint import CheckpointError
from fusedmoe.cli import main
from fusedmoe.integrations.transformers.gguf import GgufSource
from fusedmoe.integrations.transformers.gguf.rows import ARCHITECTURES

pytest.importorskip("transformers")
CASES = [*LLAMA_CASES, *SOFTMAX_CASES, *SIGMOID_CASES, *LINEAR_CASES, *MAMBA_CASES, *GEMMA_CASES]
PROMPT = torch.tensor([[1, 40, 77, 30, 12, 9, 21, 5]])


def check_logits(path: Path, original: Any, *, packed: bool) -> None:
    """``packed`` experts run by the reference, which rounds nothing more than the file has."""
    reference = fusedmoe.MoEOptions(experts="torch_quantized") if packed else None
    model = fusedmoe.from_pretrained(path, dtype=torch.float32, options=reference)
    with torch.inference_mode():
        ours, wanted = model(PROMPT).logits, original(PROMPT).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    frequencies = dict(model.named_buffers())
    for name, buffer in original.named_buffers():
        if name.endswith("inv_freq") and "visual" not in name:
            found = frequencies[name.replace("language_model.", "")]
            torch.testing.assert_close(found, buffer, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kinds", [("F32", "F32"), ("F16", "F16"), ("Q8_0", "MXFP4")], ids="-".join)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_the_original(
    case: Case, kinds: tuple[str, str], tmp_path: Path
) -> None:
    original = case.model()
    path = write_model(tmp_path / "model.gguf", case, original, *kinds)
    check_logits(path, original, packed=kinds[1] == "MXFP4")


def test_layers_that_guess_further_tokens_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = case_of("glm4moe with norms of heads")
    original = case.model()
    tensors = file_tensors(case, original, "F32", "Q8_0")
    behind = {name.replace("blk.2.", "blk.3."): one for name, one in tensors.items()}
    tensors |= behind | {"blk.3.nextn.eh_proj.weight": tensors["blk.2.attn_output.weight"]}
    keys = all_keys(case, original.config)
    path = write_gguf(tmp_path / "model.gguf", tensors, architecture="glm4moe", **keys)
    check_logits(path, original, packed=True)
    assert main(["inspect", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["moe_layers"]
    assert [row["layer"] for row in rows] == ["model.layers.1", "model.layers.2"]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_every_architecture_is_tested_and_documented() -> None:
    """qwen2moe, qwen3moe and olmoe have their models in test_gguf.py."""
    tested = {case.architecture for case in CASES} | {"qwen2moe", "qwen3moe", "olmoe"}
    assert tested == ARCHITECTURES.keys()
    page = Path(__file__).parents[2] / "docs" / "quantized-checkpoints.md"
    section = page.read_text().partition("## GGUF files")[2].partition("## A dialect")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert set(re.findall("`(.+?)`", " ".join(rows))) == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_that_the_package_publishes(architecture: str) -> None:
    """Tensors that a row renames, turns or joins exist in its architecture."""
    import gguf

    (found,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    published = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[found]}
    for row in ARCHITECTURES[architecture]:
        joined = [part for join in row.joined.values() for part in join.parts]
        for name in (*row.names, *row.whole, *row.turned, *joined):
            base = re.sub(r"\.(weight|bias|scale)$", "", name)
            assert {f"blk.{{bid}}.{base}", base} & published, name


def test_experts_may_have_a_tensor_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As files of before 2024-04 have them: ffn_gate.3 and not ffn_gate_exps."""
    case = case_of("llama")
    original = case.model()
    tensors = file_tensors(case, original, "F32", "Q8_0")
    for name in [name for name in tensors if "_exps." in name]:
        array, kind = tensors.pop(name)
        for expert, one in enumerate(array):
            tensors[name.replace("_exps.", f".{expert}.")] = (one, kind)
    keys = all_keys(case, original.config)
    path = write_gguf(tmp_path / "model.gguf", tensors, architecture="llama", **keys)
    check_logits(path, original, packed=True)
    assert main(["inspect", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["moe_layers"]
    assert [(row["experts"], row["format"]) for row in rows] == [(4, "int8_g32")] * 2
    assert main(["explain", str(path), "--device", "cpu", "--json"]) == 0
    layer = json.loads(capsys.readouterr().out)["layer"]
    sizes = {"experts": "4", "top-k": "2", "hidden": "64", "intermediate": "96"}
    assert layer.items() >= sizes.items()


@pytest.mark.parametrize(
    ("name", "activation", "biases"),
    [("gpt-oss", "swigluoai", True), ("afmoe", "silu", False)],
)
def test_explain_knows_what_is_between_the_products(
    name: str, activation: str, biases: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_model(tmp_path / "model.gguf", case_of(name), case_of(name).model(), "F32", "Q8_0")
    assert main(["explain", str(path), "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layer"]["activation"] == activation
    assert told["layer"]["bias"] == str(biases)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rope_factors_long.weight", "rope_factors_long.weight has no place in a mixtral model"),
        ("rope_freqs.weight", "rope_freqs.weight follows no rule of Llama's"),
        ("blk.1.attn_gate.weight", "blk.1.attn_gate.weight has no place in a mixtral model"),
        ("blk.1.attn_q.bias", "the model has no place for model.layers.1.self_attn.q_proj.bias"),
    ],
)
def test_what_has_no_place_is_refused(name: str, message: str, tmp_path: Path) -> None:
    """Left out, it would change what the model computes without a word."""
    case = case_of("llama")
    original = case.model()
    tensors = file_tensors(case, original, "F32", "F32")
    tensors[name] = (torch.linspace(1, 9, 64).numpy(), "F32")
    keys = all_keys(case, original.config)
    path = write_gguf(tmp_path / "model.gguf", tensors, architecture="llama", **keys)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        fusedmoe.from_pretrained(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", "eight"),
        ("rope.freq_base", float("nan")),
        ("attention.head_count", 0),
        ("rope.scaling.type", "longrope"),
        ("block_count", None),
        ("block_count", 1 << 31),
        ("nextn_predict_layers", 7),
    ],
)
def test_headers_that_make_no_model_are_refused(
    key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_key(tmp_path / "model.gguf", key, value)
    wrong = "block_count" if key == "nextn_predict_layers" else key
    with pytest.raises(CheckpointError, match=re.escape(f"llama.{wrong} is ")):
        fusedmoe.from_pretrained(path)
    main(["inspect", str(path)])
    told = capsys.readouterr()
    assert f"llama.{wrong} is " in told.out + told.err


@pytest.mark.parametrize("broken", ["lacks it", "is F32 (2, 4)"])
def test_vectors_of_the_configuration_are_checked(broken: str, tmp_path: Path) -> None:
    case = case_of("phimoe")
    original = case.model()
    tensors = file_tensors(case, original, "F32", "F32")
    array, kind = tensors.pop("rope_factors_short.weight")
    if broken != "lacks it":
        tensors["rope_factors_short.weight"] = (array.reshape(2, 4), kind)
    keys = all_keys(case, original.config)
    path = write_gguf(tmp_path / "model.gguf", tensors, architecture="phimoe", **keys)
    message = f"rope_factors_short.weight: {broken}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        fusedmoe.from_pretrained(path)


@pytest.mark.parametrize("key", ["attention.head_count", "attention.key_length"])
def test_counts_are_whole(key: str, tmp_path: Path) -> None:
    path = with_key(tmp_path / "model.gguf", key, 0.5, "minimax-m2")
    with pytest.raises(CheckpointError, match=re.escape(f"minimax-m2.{key} is 0.5")):
        GgufSource(path).config()


@pytest.mark.parametrize("key", ["expert_count", "feed_forward_length"])
def test_experts_have_the_sizes_that_the_header_says(key: str, tmp_path: Path) -> None:
    """Told before room is made for them."""
    path = with_key(tmp_path / "model.gguf", key, 1 << 31)
    with pytest.raises(CheckpointError, match="the header says 2147483648"):
        fusedmoe.from_pretrained(path)


def test_what_transformers_refuses_is_told(tmp_path: Path) -> None:
    path = with_key(tmp_path / "model.gguf", "expert_used_count", 1.5)
    with pytest.raises(
        CheckpointError, match=r"Transformers refuses it: (.|\n)*num_experts_per_tok"
    ):
        fusedmoe.from_pretrained(path)


def with_key(path: Path, key: str, value: Any, name: str = "llama") -> Path:
    """A file whose header says something else; None: nothing."""
    case = case_of(name)
    original = case.model()
    changed = {f"{case.architecture}.{key}".replace(".", "__"): value}
    keys = all_keys(case, original.config) | changed
    tensors = file_tensors(case, original, "F32", "F32")
    found = {name: one for name, one in keys.items() if one is not None}
    return write_gguf(path, tensors, architecture=case.architecture, **found)


def test_inspect_says_what_keeps_a_file_from_being_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = case_of("llama")
    original = case.model()
    tensors = file_tensors(case, original, "F32", "MXFP4")
    keys = all_keys(case, original.config)
    path = write_gguf(tmp_path / "x.gguf", tensors, architecture="llama", **keys)
    assert main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    assert "mixtral" in told
    assert "would not load" not in told
    tensors["blk.1.attn_v.weight"] = (np.zeros((64, 74), np.uint8), "IQ2_XS")
    path = write_gguf(tmp_path / "x.gguf", tensors, architecture="llama", **keys)
    assert main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    assert "would not load" in told
    assert "blk.1.attn_v.weight is stored as IQ2_XS" in told
