"""Lists of layers that are not quantized, and checks of checkpoints with many tensors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from writers import CASES

from fusedmoe.checkpoint import read_checkpoint
from fusedmoe.quantization.dialects import read_quantization
from fusedmoe.quantization.dialects.patterns import LayerNames
from fusedmoe.weights.checkpoint_experts import CheckpointExperts

PARTS = st.sampled_from(["model", "layers", "0", "1", "mlp", "gate", "up_proj", "gate_up"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(st.lists(NAMES, max_size=3), NAMES)
def test_a_name_means_itself_what_is_below_it_and_itself_without_its_prefix(
    names: list[str], module: str
) -> None:
    wanted = any(f".{n}." in f".{module}." or n.endswith(f".{module}") for n in names)
    assert (module in LayerNames(names)) == wanted


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("re:.*mlp\\.gate$", True),
        ("re:model", True),
        ("re:mlp", False),
        ("*.gate", True),
        ("model.layers.?.mlp", True),
        ("model.layers.[12].mlp", False),
        ("", False),
    ],
)
def test_patterns_mean_whole_names(name: str, listed: bool) -> None:
    assert ("model.layers.0.mlp.gate" in LayerNames(["lm_head", name])) == listed


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("deepseek", "modules_to_not_convert"),
        ("deepseek", "ignored_layers"),
        ("mxfp8", "modules_to_not_convert"),
        ("fbgemm", "modules_to_not_convert"),
        ("ct w4a16", "ignore"),
        ("gptq", "modules_to_not_convert"),
        ("awq", "modules_to_not_convert"),
        ("modelopt fp8 channel", "exclude_modules"),
        ("modelopt fp8 channel", "ignore"),
        ("quark fp8", "exclude"),
        ("bitsandbytes int8", "llm_int8_skip_modules"),
    ],
)
def test_every_dialect_has_a_word_for_what_is_left_as_floats(case: str, key: str) -> None:
    config = CASES[case].config | {key: ["layers.1.mlp", "*.up_proj"]}
    listed = {
        name: read_quantization(config).scheme(f"model.layers.{name}") is None
        for name in ("0.mlp.down_proj", "1.mlp.down_proj", "0.mlp.up_proj", "11.mlp.down_proj")
    }
    assert list(listed.values()) == [False, True, True, False]


def test_lists_of_many_names_take_no_time() -> None:
    names = LayerNames(f"model.layers.{i}.self_attn.q_proj" for i in range(2000))
    start = time.perf_counter()
    assert not any(f"model.layers.3.mlp.experts.{e}.up_proj" in names for e in range(20000))
    assert time.perf_counter() - start < 10  # a second, where asking name by name takes minutes


@given(st.lists(st.one_of(NAMES, st.sampled_from(["*.gate", "re:.*up", "model.*"]))), NAMES)
def test_of_several_names_the_first_that_means_a_layer_counts(
    names: list[str], module: str
) -> None:
    wanted = next((name for name in names if module in LayerNames([name])), None)
    assert LayerNames(names).first(module) == wanted


EXPERTS = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(24) for e in range(128)]
FP8 = {"type": "float", "num_bits": 8, "strategy": "channel"}
BY_NAME: dict[str, dict[str, Any]] = {
    "modelopt": {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {name: {"quant_algo": "FP8"} for name in EXPERTS},
    },
    "quark": {
        "layer_quant_config": {
            name: {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}} for name in EXPERTS
        }
    },
    "auto-round": {
        **{"bits": 4, "group_size": 32, "sym": True},
        "extra_config": {name: {"bits": 8} for name in EXPERTS},
    },
    "compressed-tensors": {"config_groups": {"a": {"targets": EXPERTS, "weights": FP8}}},
}


@pytest.mark.parametrize("method", BY_NAME)
def test_settings_of_each_matrix_by_its_name_take_no_time(method: str) -> None:
    start = time.perf_counter()
    quantization = read_quantization({"quant_method": method} | BY_NAME[method])
    formats = {quantization.scheme(name).format.element for name in EXPERTS}
    assert formats == ({"int8"} if method == "auto-round" else {"e4m3"})
    assert time.perf_counter() - start < 10  # a second; name by name takes a minute, or an hour


def test_layers_of_many_experts_are_checked_in_passing(tmp_path: Path) -> None:
    weight, base = torch.zeros(1, 1), "model.layers.0.mlp.experts"
    names = [f"{base}.{e}.{p}_proj.weight" for e in range(5000) for p in ("gate", "up", "down")]
    save_file({name: weight.clone() for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    experts = CheckpointExperts.read(read_checkpoint(tmp_path))
    start = time.perf_counter()
    for layer in experts.layers.values():
        experts.check(layer, experts.schemes(layer))
    assert time.perf_counter() - start < 10  # far below a second; comparing all with all: minutes
