"""What config.json leaves out, nests or spells in its own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusedmoe.checkpoint import Checkpoint, CheckpointError, TensorEntry, read_checkpoint
from fusedmoe.cli.facts import check_activation, model_facts
from fusedmoe.cli.layers import check_counts, moe_layers
from hf import tiny_models

FOLDER = Path("somewhere")


def checkpoint(config: dict[str, Any], *tensors: tuple[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint of bf16 tensors that nobody has to write."""
    entries, position = {}, 0
    for name, shape in tensors:
        size = 2
        for extent in shape:
            size *= extent
        entries[name] = TensorEntry(
            name=name, dtype="BF16", shape=shape, begin=position, end=position + size
        )
        position += size
    return Checkpoint(FOLDER, config, entries, dict.fromkeys(entries, "model.safetensors"))


def mixtral(layers: int = 1, experts: int = 2) -> list[tuple[str, tuple[int, ...]]]:
    at = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    shapes = {"w1": (8, 4), "w2": (4, 8), "w3": (8, 4)}
    return [
        (at.format(layer, expert, name), shape)
        for layer in range(layers)
        for expert in range(experts)
        for name, shape in shapes.items()
    ]


def test_sizes_that_config_leaves_to_the_model_stay_unknown() -> None:
    facts = model_facts(checkpoint({"model_type": "mixtral"}, *mixtral()))
    assert facts.sizes.num_experts is None
    assert facts.sizes.top_k is None
    assert facts.activation is None
    check_activation(facts, FOLDER)
    layer = moe_layers(checkpoint({}, *mixtral()), facts)[0]
    assert layer.experts == 2
    assert layer.bytes_per_token(facts.sizes.top_k) is None


@pytest.mark.parametrize("known", [{"num_local_experts": 2}, {"num_experts_per_tok": 2}])
def test_top_k_is_only_compared_with_a_known_number_of_experts(known: dict[str, int]) -> None:
    model_facts(checkpoint({"model_type": "mixtral"} | known, *mixtral()))


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_top_k_outside_the_experts(top_k: int) -> None:
    config = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": top_k}
    with pytest.raises(CheckpointError, match=f"chooses {top_k} of 2 experts"):
        model_facts(checkpoint(config, *mixtral()))


@pytest.mark.parametrize("model_type", [None, 7, ["mixtral"]])
def test_a_config_without_a_model_type(model_type: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: has no model_type"):
        model_facts(checkpoint({"model_type": model_type}, *mixtral()))


def test_a_nested_text_config_and_its_quantization() -> None:
    config = {
        "model_type": "picture_book",
        "quantization_config": {"quant_method": "fp8"},
        "text_config": {"model_type": "mixtral", "num_local_experts": 2, "hidden_act": "gelu"},
    }
    facts = model_facts(checkpoint(config, *mixtral()))
    assert facts.family is not None
    assert facts.family.name == "mixtral"
    assert (facts.sizes.num_experts, facts.activation, facts.quant_method) == (2, "gelu", "fp8")


def test_an_activation_that_is_a_record() -> None:
    config = {
        "model_type": "dbrx",
        "ffn_config": {"ffn_act_fn": {"name": "silu"}, "moe_num_experts": 2, "moe_top_k": 1},
    }
    tensors = [(f"transformer.blocks.0.ffn.experts.mlp.{w}", (16, 4)) for w in ("w1", "v1", "w2")]
    facts = model_facts(checkpoint(config, *tensors))
    assert facts.activation == "silu"
    layer = moe_layers(checkpoint(config, *tensors), facts)[0]
    assert (layer.experts, layer.expert_bytes) == (2, 3 * 16 * 4 * 2)
    assert layer.bytes_per_token(1) == 3 * 8 * 4 * 2
    uncounted = checkpoint({"model_type": "dbrx"}, *tensors)
    layer = moe_layers(uncounted, model_facts(uncounted))[0]
    assert (layer.experts, layer.bytes_per_token(1)) == (0, None)


def test_experts_that_config_promises_and_files_lack() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 8}
    with pytest.raises(CheckpointError, match="counts 8, and no tensor has the name of one"):
        model_facts(checkpoint(config, ("model.embed_tokens.weight", (4, 4))))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 9}, "promises 9 layers, the files have 2"),
        ({"num_local_experts": 9}, "promises 9 experts, model.layers.0 has 2"),
        ({"num_hidden_layers": 8, "num_local_experts": 8}, None),
        ({"num_hidden_layers": 1, "num_local_experts": 1}, None),
        ({}, None),
    ],
)
def test_counts_far_beyond_the_files(config: dict[str, Any], message: str | None) -> None:
    files = checkpoint({"model_type": "mixtral"} | config, *mixtral(layers=2))
    facts = model_facts(files)
    if message is None:
        check_counts(files, facts)
        return
    with pytest.raises(CheckpointError, match=message):
        check_counts(files, facts)


@pytest.mark.parametrize("row", tiny_models.ROWS, ids=lambda row: row.name)
def test_every_family_of_transformers(row: Any, tmp_path: Path) -> None:
    """What each family writes is read back: both its layers, all its experts."""
    tiny_models.build(row).save_pretrained(tmp_path)
    files = read_checkpoint(tmp_path)
    if row.name == "switch_transformers":
        with pytest.raises(CheckpointError, match="no tensor has the name of one"):
            model_facts(files)
        return
    facts = model_facts(files)
    check_activation(facts, tmp_path)
    check_counts(files, facts)
    layers = moe_layers(files, facts)
    # Ernie's layers hold experts for text and for pictures, LongCat's two that return their input.
    more = {"ernie4_5_vl_moe": tiny_models.EXPERTS, "longcat_flash": 2}.get(row.name, 0)
    assert {layer.experts for layer in layers} == {tiny_models.EXPERTS + more}
    assert all(layer.format == "f32" and layer.router_bytes > 0 for layer in layers)
    assert len(layers) == (4 if row.name == "nllb_moe" else 2)  # an encoder and a decoder


def test_experts_outside_any_layer_are_not_understood() -> None:
    config = {"model_type": "newcomer", "num_experts": 2}
    with pytest.raises(CheckpointError, match="no tensor has the name of one"):
        model_facts(checkpoint(config, ("stack.h0.experts.0.w1.weight", (4, 4))))
