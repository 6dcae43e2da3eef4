"""GGUF: files of the gguf package are read to its own values; broken ones are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import blocks, quantized, write_gguf

import fusedmoe
from fusedmoe.checkpoint import CheckpointError
from fusedmoe.cli import main
from fusedmoe.presets import write_preset
from fusedmoe.quantization.dialects import Matrix
from fusedmoe.quantization.dialects.base import read_matrix
from fusedmoe.quantization.dialects.gguf import SCHEMES, GgufQuantization
from fusedmoe.quantization.formats.superblocks import CODECS
from fusedmoe.weights.gguf_file import TYPES, ArrayOf, GgufFile
from fusedmoe.weights.gguf_parts import GgufParts


def test_types_are_the_package_s() -> None:
    import gguf

    for number, kind in TYPES.items():
        found = gguf.GGMLQuantizationType(number)
        assert found.name == kind.name
        assert gguf.GGML_QUANT_SIZES[found] == (kind.values, kind.nbytes)


@pytest.mark.parametrize("kind", SCHEMES)
def test_one_matrix_has_its_values(kind: str) -> None:
    import gguf

    raw = blocks(kind, 6, 512)
    matrix = Matrix(name="blk.0.ffn_up_exps", N=6, K=512)
    found = read_matrix(SCHEMES[kind], {"weight": torch.from_numpy(raw)}, matrix)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    torch.testing.assert_close(
        found.dequantize(torch.float32), torch.from_numpy(wanted), rtol=0, atol=0
    )
    assert SCHEMES[kind].size({"weight": raw.shape}) == (6, 512)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up_exps\.weight: expected shape"):
        read_matrix(SCHEMES[kind], {"weight": torch.from_numpy(raw[:5])}, matrix)


def test_a_scale_beside_nvfp4_multiplies_it() -> None:
    raw = {"weight": torch.from_numpy(blocks("NVFP4", 4, 128)), "scale": torch.tensor([0.375])}
    quantization = GgufQuantization(
        types=dict.fromkeys(("up", "down"), "NVFP4"), scaled=frozenset(("up",))
    )
    matrix = Matrix(name="up", N=4, K=128)
    scaled, alone = (quantization.scheme(name) for name in ("up", "down"))
    assert scaled is not None
    assert alone is not None
    weight = {"weight": raw["weight"]}
    wanted = read_matrix(alone, weight, matrix).dequantize(torch.float32) * 0.375
    assert read_matrix(scaled, raw, matrix).dequantize(torch.float32).equal(wanted)
    calibrated = raw | {"input_scale": torch.tensor([7.0])}
    assert read_matrix(scaled, calibrated, matrix).dequantize(torch.float32).equal(wanted)
    with pytest.raises(ValueError, match=r"up\.scale: missing beside weight"):
        read_matrix(scaled, weight, matrix)
    with pytest.raises(ValueError, match=r"up\.scale: unexpected"):
        read_matrix(alone, raw, matrix)
    raw["weight"][2, 38] = 0x81
    with pytest.raises(ValueError, match=r"without a sign, found e4m3 0x81 at \[2, 6\]"):
        read_matrix(scaled, raw, matrix)


@pytest.mark.parametrize("kind", ["Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_1", "Q6_K", "MXFP4"])
def test_scales_that_are_no_numbers_are_refused(kind: str) -> None:
    raw = blocks(kind, 2, 256)
    codec, own = CODECS.get(kind.lower()), slice(0, 1 if kind == "MXFP4" else 2)
    raw[1, own if codec is None else codec.floats] = 255
    matrix = Matrix(name="blk.0.ffn_up_exps", N=2, K=256)
    with pytest.raises(ValueError, match=r"_exps\.weight: expected finite .*found nan.* at \[1, 0"):
        read_matrix(SCHEMES[kind], {"weight": torch.from_numpy(raw)}, matrix)


def small_file(path: Path) -> Path:
    return write_gguf(
        path,
        {
            "blk.0.ffn_up_exps.weight": (blocks("Q4_K", 6, 256).reshape(2, 3, -1), "Q4_K"),
            "norm.weight": (np.arange(5, dtype=np.float32), "F32"),
        },
        qwen3moe__expert_count=2,
        tokenizer__ggml__tokens=["a", "bc", "d"],
        qwen3moe__attention__sliding_window_pattern=[True, False],
        tokenizer__ggml__scores=[0.5] * 2000,
    )


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = GgufFile(small_file(tmp_path / "x.gguf"))
    assert file.metadata["general.architecture"] == "qwen3moe"
    assert file.metadata["qwen3moe.expert_count"] == 2
    assert file.metadata["tokenizer.ggml.tokens"] == ArrayOf(3)
    assert file.metadata["tokenizer.ggml.scores"] == ArrayOf(2000)
    pattern = file.metadata["qwen3moe.attention.sliding_window_pattern"]
    assert pattern == ArrayOf(2, (True, False))
    experts = file.tensors["blk.0.ffn_up_exps.weight"]
    assert (experts.type.name, experts.shape) == ("Q4_K", (2, 3, 256))
    found = file.read("blk.0.ffn_up_exps.weight")
    assert np.array_equal(found.numpy(), blocks("Q4_K", 6, 256).reshape(2, 3, -1))
    assert torch.equal(file.read("norm.weight"), torch.arange(5.0))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "x.gguf").read_bytes()
    end = max(t.end for t in GgufFile(tmp_path / "x.gguf").tensors.values())
    for length in [*range(0, 400, 7), end - 1]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GgufFile(path)


def header(*, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def entry(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    raw = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
    return raw + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


BAD: dict[str, tuple[bytes, str]] = {
    "magic": (header(magic=b"GGML"), "not a GGUF file"),
    "version": (header(version=1), "GGUF version 1"),
    "counts": (header(tensors=1 << 60), "claims 1152921504606846976 tensors"),
    "key length": (header(pairs=1) + struct.pack("<Q", 1 << 40), "a string of 1099511627776"),
    "not UTF-8": (header(pairs=1) + struct.pack("<Q", 2) + b"\xff\xff" + bytes(8), "utf-8"),
    "value type": (header(pairs=1) + pair("a", 77, b""), "unknown value type 77"),
    "nested array": (
        header(pairs=1) + pair("a", 9, struct.pack("<IQ", 9, 3)),
        "an array of type 9",
    ),
    "endless array": (
        header(pairs=1) + pair("a", 9, struct.pack("<IQ", 8, 1 << 60)),
        "an array of 1152921504606846976 strings",
    ),
    "huge array": (
        header(pairs=1) + pair("a", 9, struct.pack("<IQ", 4, 1 << 61)),
        "truncated: wants",
    ),
    "key twice": (header(pairs=2) + 2 * pair("a", 0, b"1"), "the header has 'a' twice"),
    "alignment": (
        header(pairs=1) + pair("general.alignment", 4, struct.pack("<I", 0)),
        "general.alignment is 0",
    ),
    "type": (header(tensors=1) + entry("w", (4,), 99, 0) + bytes(64), "the unknown type 99"),
    "dimensions": (header(tensors=1) + entry("w", (), 0, 0) + bytes(64), "has 0 dimensions"),
    "cut block": (header(tensors=1) + entry("w", (33,), 8, 0) + bytes(99), "Q8_0 cannot store"),
    "overflow": (
        header(tensors=1) + entry("w", (1 << 40, 1 << 40), 0, 0) + bytes(64),
        "F32 cannot store",
    ),
    "past the end": (
        header(tensors=1) + entry("w", (64,), 0, 0) + bytes(64),
        "truncated: 'w' ends",
    ),
    "odd offset": (header(tensors=1) + entry("w", (4,), 0, 3) + bytes(64), "no multiple of 32"),
    "overlap": (
        header(tensors=2) + entry("v", (16,), 0, 0) + entry("w", (4,), 0, 32) + bytes(200),
        "'w' overlaps 'v'",
    ),
    "twice": (
        header(tensors=2) + 2 * entry("w", (4,), 0, 0) + bytes(200),
        "holds 'w' twice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_hostile_files_are_refused(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ("Q4_K", "Q6_K"),
        ("IQ4_NL", "Q8_0"),
        ("Q5_K", "IQ4_XS"),
        ("Q4_0", "NVFP4"),
        ("Q3_K", "Q2_K"),
        ("Q4_1", "Q5_1"),
    ],
)
def test_a_layer_loads_stacked_experts(up: str, down: str) -> None:
    import gguf

    E, H, I = 2, 256, 512  # noqa: E741
    raw = {
        "gate_proj": blocks(up, E * I, H, 1).reshape(E, I, -1),
        "up_proj": blocks(up, E * I, H, 2).reshape(E, I, -1),
        "down_proj": blocks(down, E * H, I, 3).reshape(E, H, -1),
    }
    kinds = {"gate_proj": up, "up_proj": up, "down_proj": down}
    quantization = GgufQuantization(
        types={f"blk.0.experts.0.{name}": kind for name, kind in kinds.items()}
    )
    for rank in range(2):
        layer = fusedmoe.FusedMoE(
            num_experts=E,
            top_k=1,
            hidden_size=H,
            intermediate_size=I,
            params_dtype=torch.float32,
            quant_config=quantization,
            prefix="blk.0.experts",
            tp_size=2,
            tp_rank=rank,
        )
        layer.load_weights((f"{n}.weight", torch.from_numpy(array)) for n, array in raw.items())
        layer.routed_experts.check_loaded()
        experts = layer.routed_experts
        w13, w2 = experts.quant_method.quantized_weights(experts)
        values = {
            name: torch.from_numpy(
                gguf.quants.dequantize(array, gguf.GGMLQuantizationType[kinds[name]])
            )
            for name, array in raw.items()
        }
        mine = slice(rank * I // 2, (rank + 1) * I // 2)
        wanted = torch.cat([values["gate_proj"][:, mine], values["up_proj"][:, mine]], 1)
        torch.testing.assert_close(w13.dequantize(torch.float32), wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            w2.dequantize(torch.float32), values["down_proj"][..., mine], rtol=1e-6, atol=1e-7
        )


def test_types_that_are_not_known_are_refused() -> None:
    quantization = GgufQuantization(types={"blk.0.ffn_up_exps": "IQ2_XS"})
    with pytest.raises(ValueError, match="stored as IQ2_XS; known: Q8_0"):
        quantization.scheme("blk.0.ffn_up_exps")


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


def write_model(
    path: Path,
    model: Any,
    architecture: str,
    up: str,
    down: str,
    dense: str = "Q8_0",
    **options: int,
) -> Path:
    """``model`` as llama.cpp's converter would write it; its weights become what the file holds.

    ``dense`` is the type of matrices outside of the experts. Beside those in NVFP4 lies a scale.
    """
    import gguf

    tensors: dict[str, tuple[np.ndarray, str]] = {}
    config = model.config

    def put(name: str, parameter: torch.Tensor, kind: str) -> None:
        array = parameter.detach().float().numpy()
        if kind == "F32":
            tensors[name] = (array, kind)
            return
        raw = quantized(array.reshape(-1, array.shape[-1]), kind)
        tensors[name] = (raw.reshape(*array.shape[:-1], -1), kind)
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        parameter.data.copy_(torch.from_numpy(values).view(parameter.shape))
        if kind == "NVFP4":
            scale = torch.linspace(0.5, 2.0, len(array) if array.ndim == 3 else 1)
            parameter.data.mul_(scale.view(-1, *[1] * (array.ndim - 1)))
            for suffix in ("scale", "input_scale"):
                tensors[name.removesuffix("weight") + suffix] = scale.numpy(), "F32"

    put("token_embd.weight", model.model.embed_tokens.weight, "F32")
    put("output_norm.weight", model.model.norm.weight, "F32")
    put("output.weight", model.lm_head.weight, "Q8_0")
    for number, layer in enumerate(model.model.layers):
        for theirs, ours in NAMES.items():
            try:
                module = layer.get_submodule(theirs)
            except AttributeError:
                continue
            for suffix, parameter in module.named_parameters():
                is_matrix = parameter.dim() == 2 and theirs.endswith("proj")
                name = f"blk.{number}.{ours}.{suffix}"
                put(name, parameter, dense if is_matrix else "F32")
        experts = layer.mlp.experts
        gate, half = experts.gate_up_proj.data.chunk(2, dim=1)
        put(f"blk.{number}.ffn_gate_exps.weight", gate, up)
        put(f"blk.{number}.ffn_up_exps.weight", half, up)
        put(f"blk.{number}.ffn_down_exps.weight", experts.down_proj, down)
    keys = {
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.hidden_size // config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "context_length": 512,
        "feed_forward_length": config.intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": 256,
        "expert_shared_feed_forward_length": 256,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    found = {f"{architecture}__{k.replace('.', '__')}": v for k, v in keys.items()}
    return write_gguf(path, tensors, architecture=architecture, **found, **options)


def tiny_model(architecture: str, model_type: str) -> Any:
    """Three experts, sizes that superblocks fit into."""
    import transformers

    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "vocab_size": 96,
        "norm_topk_prob": architecture == "qwen3moe",
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = transformers.CONFIG_MAPPING[model_type](**sizes)
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="eager"
    ).eval()


@pytest.mark.parametrize(
    ("architecture", "model_type", "up", "down"),
    [
        ("qwen3moe", "qwen3_moe", "Q4_K", "Q6_K"),
        ("qwen3moe", "qwen3_moe", "Q2_K", "Q3_K"),
        ("qwen3moe", "qwen3_moe", "Q4_1", "Q5_1"),
        ("qwen2moe", "qwen2_moe", "Q8_0", "Q5_K"),
        ("qwen2moe", "qwen2_moe", "NVFP4", "NVFP4"),
        ("olmoe", "olmoe", "IQ4_NL", "Q4_0"),
        ("qwen3moe", "qwen3_moe", "IQ4_XS", "IQ4_NL"),
        ("qwen3moe", "qwen3_moe", "MXFP4", "Q8_0"),
    ],
)
def test_a_whole_model(
    architecture: str, model_type: str, up: str, down: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    plain = tiny_model(architecture, model_type)
    dense = "NVFP4" if up == "NVFP4" else "Q8_0"
    path = write_model(tmp_path / "model.gguf", plain, architecture, up, down, dense)
    reference = fusedmoe.MoEOptions(experts="torch_quantized")
    model = fusedmoe.from_pretrained(path, dtype=torch.float32, options=reference)
    prompt = torch.tensor([[1, 40, 77, 30, 12, 9, 21, 5]])
    with torch.inference_mode():
        ours, wanted = model(prompt).logits, plain(prompt).logits
    assert (ours - wanted).norm() < 1e-4 * wanted.norm()
    tokens = [m.generate(prompt, max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*tokens)
    assert fusedmoe.from_pretrained(tmp_path, dtype=torch.float32) is not None


def test_a_model_in_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny_model("qwen3moe", "qwen3_moe")
    (folder := tmp_path / "parts").mkdir()
    write_model(folder / "x.gguf", plain, "qwen3moe", "Q4_K", "Q6_K", tensors_per_part=11)
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == [f"x-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    prompt = torch.tensor([[1, 40, 77, 30]])
    reference = fusedmoe.MoEOptions(experts="torch_quantized")
    for path in (folder, parts[0], parts[2]):
        model = fusedmoe.from_pretrained(path, dtype=torch.float32, options=reference)
        with torch.inference_mode():
            ours, wanted = model(prompt).logits, plain(prompt).logits
        assert (ours - wanted).norm() < 1e-4 * wanted.norm()
    assert main(["inspect", str(folder)]) == 0
    assert "q4_k + q6_k" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one, two: two.unlink(), r"lacks x-00002-of-00002\.gguf, a part of the model"),
        (lambda one, two: two.write_bytes(one.read_bytes()), r"expected part 1 of 2, found 0 of 2"),
        (lambda one, two: two.write_bytes(two.read_bytes()[:-40]), r"00002\.gguf: truncated"),
    ],
)
def test_parts_that_are_none_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    tensors = {name: (np.ones(64, np.float32), "F32") for name in ("a", "b", "c")}
    write_gguf(tmp_path / "x.gguf", tensors, tensors_per_part=2)
    one, two = sorted(tmp_path.iterdir())
    assert GgufParts(two).tensors.keys() == tensors.keys()
    change(one, two)
    with pytest.raises(CheckpointError, match=message):
        GgufParts(one)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ("pqa", r"x-00002-of-00002\.gguf: holds 'a', as x-00001-of-00002\.gguf does"),
        ("pqcr", r"expected 3 tensors in all parts, found 4"),
    ],
)
def test_a_part_of_another_model_is_refused(others: str, message: str, tmp_path: Path) -> None:
    for name, tensors in (("x", "abc"), ("y", others)):
        (folder := tmp_path / name).mkdir()
        arrays = {tensor: (np.ones(64, np.float32), "F32") for tensor in tensors}
        write_gguf(folder / f"{name}.gguf", arrays, tensors_per_part=2)
    wrong = tmp_path / "y/y-00002-of-00002.gguf"
    wrong.replace(tmp_path / "x/x-00002-of-00002.gguf")
    with pytest.raises(CheckpointError, match=message):
        GgufParts(tmp_path / "x/x-00001-of-00002.gguf")


def test_a_file_is_there_and_its_name_is_true(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.gguf: there is no such file"):
        GgufParts(tmp_path / "x.gguf")
    arrays = {tensor: (np.ones(64, np.float32), "F32") for tensor in "abc"}
    write_gguf(tmp_path / "x.gguf", arrays, tensors_per_part=2)
    alone = tmp_path / "x-00001-of-00001.gguf"
    (tmp_path / "x-00001-of-00002.gguf").replace(alone)
    with pytest.raises(CheckpointError, match="is part of 2, its name says of 1"):
        GgufParts(alone)


def test_models_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    path = small_file(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"layers\.0 has no down projection"):
        fusedmoe.from_pretrained(path)
    with pytest.raises(CheckpointError, match=r"is quantized already \(gguf\)"):
        fusedmoe.from_pretrained(path, quantize="int8")
    assert main(["explain", str(path), "--device", "cpu"]) == 2
    other = write_gguf(
        tmp_path / "y.gguf", {"a": (np.ones(4, np.float32), "F32")}, architecture="t5"
    )
    with pytest.raises(CheckpointError, match=r"the architecture is 't5'; known: llama"):
        fusedmoe.from_pretrained(other)


def test_inspect_names_formats_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        f"blk.{layer}.ffn_{name}_exps.weight": (blocks(kind, 512, 256).reshape(2, 256, -1), kind)
        for layer in range(2)
        for name, kind in (("gate", "Q4_K"), ("up", "Q4_K"), ("down", "Q6_K"))
    }
    tensors["blk.2.ffn_up_exps.weight"] = tensors["blk.0.ffn_up_exps.weight"]
    path = write_gguf(tmp_path / "x.gguf", tensors)
    assert main(["inspect", str(path), "--json"]) == 0
    *rows, last = json.loads(capsys.readouterr().out)["moe_layers"]
    assert [row["format"] for row in rows] == ["q4_k + q6_k"] * 2
    assert {row["dialect"] for row in rows} == {"gguf Q4_K + gguf Q6_K"}
    assert {row["experts"] for row in rows} == {2}
    assert "layers.2 has no down projection" in last["problem"]
    assert main(["inspect", str(path)]) == 0
    assert "q4_k + q6_k" in capsys.readouterr().out


def test_inspect_names_formats_of_models_that_are_not_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        f"blk.0.ffn_{name}_exps.weight": (blocks("MXFP4", 64, 64).reshape(2, 32, -1), "MXFP4")
        for name in ("gate", "up", "down")
    }
    path = write_gguf(tmp_path / "x.gguf", tensors, architecture="grok")
    assert main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["architecture"] == "grok"
    assert [(row["format"], row["dialect"]) for row in told["moe_layers"]] == [
        ("mxfp4", "gguf MXFP4")
    ]
    assert "the architecture is 'grok'; known: " in told["moe_layers"][0]["problem"]
    assert main(["explain", str(path), "--device", "cpu"]) == 2
    assert "the architecture is 'grok'" in capsys.readouterr().err


def test_commands_take_a_file_or_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer beside the file serves where Transformers reads none out of it."""
    pytest.importorskip("transformers")
    folder = write_preset("tiny-qwen3-moe", tmp_path / "preset")
    plain = tiny_model("olmoe", "olmoe")
    place = tmp_path / "model"
    place.mkdir()
    path = write_model(place / "model.gguf", plain, "olmoe", "Q8_0", "Q4_K")
    for given in (path, place):
        capsys.readouterr()
        assert main(["explain", str(given), "--device", "cpu", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["experts"] == "torch_quantized"
        sizes = {"experts": "3", "top-k": "2", "hidden": "256", "intermediate": "256"}
        assert told["layer"].items() >= (sizes | {"activation": "silu"}).items()
        assert main(["inspect", str(given), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["architecture"] == "olmoe"
        words = ["generate", str(given), "--device", "cpu", "--max-new-tokens", "2"]
        assert main(words) == 2
        told = capsys.readouterr().err
        assert "cannot load it" in told
        assert "put the tokenizer.json" in told
    for file in folder.glob("tokenizer*.json"):
        (place / file.name).write_bytes(file.read_bytes())
    assert main([*words, "--prompt", "A", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"][-1]["tokens"]) == 2
