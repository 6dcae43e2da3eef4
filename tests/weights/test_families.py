"""The rows of checkpoint names against the files that Transformers itself writes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

from fusedmoe.weights.families import (
    EXPERT_PARTS,
    CheckpointFamily,
    config_value,
    family_of,
    read_sizes,
)
from fusedmoe.weights.family_table import FAMILIES

pytest.importorskip("transformers")
from hf import tiny_models

# Their experts are named in neither of the ways above, and capacity is not a matter of names.
ENCODER_DECODER = {"nllb_moe", "switch_transformers"}
# Its experts cannot be run here, whatever their names.
LEFT_ALONE = {"muse_spark"}
ROWS = [row for row in tiny_models.ROWS if row.name not in ENCODER_DECODER | LEFT_ALONE]
# Attention, not a feed-forward layer.
NOT_AN_MOE_LAYER = ".self_attention.experts."


def by_type(model_type: str) -> CheckpointFamily:
    family = family_of({"model_type": model_type})
    assert family is not None
    return family


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_saved_model_is_recognised(row: tiny_models.TinyModel, tmp_path: Path) -> None:
    tiny_models.build(row).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    family = family_of(config)
    assert family is not None
    sizes = read_sizes(config)
    elements: Counter[tuple[str, int]] = Counter()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            role = family.classify(name)
            if role is None:
                is_expert = "expert" in name and NOT_AN_MOE_LAYER not in name
                assert not is_expert, f"{name} is not recognised"
                continue
            if role.expert is not None:
                assert 0 <= role.expert < 2 * tiny_models.EXPERTS
            if role.part in EXPERT_PARTS and role.leaf in ("", "weight"):
                elements[role.prefix, role.layer] += file.get_tensor(name).numel()
    assert elements
    assert sizes.num_experts == tiny_models.EXPERTS
    assert None not in sizes[:4]
    assert sizes.intermediate_size is not None
    assert min(elements.values()) >= 2 * sizes.num_experts * sizes.intermediate_size * 16


def test_a_tensor_is_located() -> None:
    role = by_type("deepseek_v3").classify(
        "language_model.model.layers.12.mlp.experts.255.up_proj.weight_scale_inv"
    )
    assert role is not None
    assert role == ("up", 12, 255, "weight_scale_inv", "language_model.model.")


@pytest.mark.parametrize(
    ("model_type", "name", "part", "leaf"),
    [
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_blocks", "gate_up", "blocks"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias", "down", "bias"),
        ("gpt_oss", "model.layers.0.mlp.router.bias", "router_bias", ""),
        ("grok-1", "model.layers.1.moe_block.experts.3.linear_v.weight", "up", "weight"),
        ("grok-1", "model.layers.1.moe_block.experts.3.linear_1.weight", "down", "weight"),
        (
            "kimi_k2",
            "model.layers.1.mlp.experts.3.down_proj.weight_packed",
            "down",
            "weight_packed",
        ),
        ("dbrx", "transformer.blocks.7.ffn.experts.mlp.v1", "up", ""),
        ("deepseek_v4", "layers.0.ffn.gate.tid2eid", "hash_table", ""),
        ("deepseek_v4", "layers.3.ffn.gate.bias", "correction_bias", ""),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w2.qweight", "down", "qweight"),
        ("step3p5", "model.layers.5.moe.down_proj.weight_scale_inv", "down", "weight_scale_inv"),
    ],
)
def test_names_that_no_tiny_model_writes(model_type: str, name: str, part: str, leaf: str) -> None:
    role = by_type(model_type).classify(name)
    assert role is not None
    assert (role.part, role.leaf) == (part, leaf)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.gate_proj.weight",  # a dense layer
        "model.layers.1.mlp.experts.x.gate_proj.weight",
        "model.layers.1.mlp.gate_weight",
        "model.embed_tokens.weight",
        "mlp.experts.0.gate_proj.weight",
        "",
    ],
)
def test_what_is_not_a_moe_tensor(name: str) -> None:
    assert by_type("deepseek_v3").classify(name) is None


def test_no_model_type_has_two_rows() -> None:
    types = Counter(kind for family in FAMILIES for kind in family.model_types)
    assert [kind for kind, count in types.items() if count > 1] == []
    names = Counter(family.name for family in FAMILIES)
    assert max(names.values()) == 1


def test_sizes_are_found_under_their_many_names() -> None:
    dbrx = {
        "model_type": "dbrx",
        "d_model": 6144,
        "n_layers": 40,
        "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 10752},
    }
    assert read_sizes(dbrx) == (16, 4, 6144, 10752, None, 40)
    hunyuan = {"num_experts": [8, 16], "moe_topk": [1, 2], "hidden_size": 64}
    assert read_sizes(hunyuan, layer=1)[:2] == (16, 2)
    assert read_sizes(hunyuan, layer=9)[:2] == (16, 2)
    assert read_sizes({}) == (None,) * 6
    assert read_sizes({"num_experts": True, "top_k": "two"})[:2] == (None, None)


def test_the_text_section_wins_over_what_surrounds_it() -> None:
    omni = {
        "model_type": "qwen3_omni_moe",
        "hidden_size": 1,
        "thinker_config": {"text_config": {"hidden_size": 2048, "num_experts": 128}},
    }
    assert config_value(omni, ("hidden_size",)) == 2048
    assert read_sizes(omni).num_experts == 128
    assert family_of({"model_type": "llava"}) is None
    assert family_of({"text_config": {"model_type": "mixtral"}, "model_type": "llava"}) is not None
