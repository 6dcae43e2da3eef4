"""Checkpoint names: the per-expert table of the API reference, and the parser behind loading."""

from __future__ import annotations

import pytest
from torch import nn

from fusedmoe.weights.params_mapping import (
    ExpertNameParser,
    ExpertParamsTable,
    fused_moe_make_expert_params_mapping,
)
from fusedmoe.weights.routed_experts import RoutedExperts


def test_one_entry_per_expert_shard_and_copy():
    mapping = fused_moe_make_expert_params_mapping(None, "w1", "w2", "w3", 2, 1)
    assert mapping == [
        ("experts.routed_experts.w13_", "experts.0.w1.", 0, "w1"),
        ("experts.routed_experts.w2_", "experts.0.w2.", 0, "w2"),
        ("experts.routed_experts.w13_", "experts.0.w3.", 0, "w3"),
        ("experts.routed_experts.w13_", "experts.1.w1.", 1, "w1"),
        ("experts.routed_experts.w2_", "experts.1.w2.", 1, "w2"),
        ("experts.routed_experts.w13_", "experts.1.w3.", 1, "w3"),
        ("experts.routed_experts.w13_", "experts.0.w1.", 2, "w1"),
        ("experts.routed_experts.w2_", "experts.0.w2.", 2, "w2"),
        ("experts.routed_experts.w13_", "experts.0.w3.", 2, "w3"),
    ]
    assert RoutedExperts.make_expert_params_mapping(None, "w1", "w2", "w3", 2, 1) == mapping


@pytest.mark.parametrize("up", [None, ""])
def test_without_an_up_projection_only_two_shards_are_listed(up):
    mapping = fused_moe_make_expert_params_mapping(None, "up_proj", "down_proj", up, 1)
    assert [(entry.weight_name, entry.shard_id) for entry in mapping] == [
        ("experts.0.up_proj.", "w1"),
        ("experts.0.down_proj.", "w2"),
    ]


def test_the_prefix_is_used_where_the_model_has_it():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.w13_weight = nn.Parameter()
    (entry, *_) = fused_moe_make_expert_params_mapping(model, "w1", "w2", "w3", 1)
    assert entry.param_name == "experts.w13_"
    model.experts.inner = nn.Linear(1, 1)
    (entry, *_) = fused_moe_make_expert_params_mapping(
        model, "w1", "w2", "w3", 1, routed_experts_prefix="inner"
    )
    assert entry.param_name == "experts.inner.w13_"


@pytest.mark.parametrize("counts", [(0, 0), (2, -1)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match=str(min(counts))):
        fused_moe_make_expert_params_mapping(None, "w1", "w2", "w3", *counts)


USUAL = ("gate_proj", "down_proj", "up_proj")
NAMES = [
    (USUAL, True, "experts.7.gate_proj.weight", (7, ("w1",), "weight")),
    (USUAL, True, "model.layers.1.mlp.experts.7.up_proj.bias", (7, ("w3",), "bias")),
    (USUAL, True, "7.down_proj.weight_scale_inv", (7, ("w2",), "weight_scale_inv")),
    (USUAL, True, "experts.gate_up_proj", (None, ("w1", "w3"), "weight")),
    (USUAL, True, "experts.gate_up_proj_bias", (None, ("w1", "w3"), "bias")),
    (USUAL, True, "experts.down_proj_scales", (None, ("w2",), "scales")),
    (USUAL, True, "experts.3.gate_up_proj.weight", (3, ("w1", "w3"), "weight")),
    (USUAL, True, "gate_proj.weight", (None, ("w1",), "weight")),
    (USUAL, True, "experts.routed_experts.2.gate_proj.weight", (2, ("w1",), "weight")),
    (USUAL, True, "shared_experts.gate_proj.weight", None),
    (USUAL, True, "experts.3.gate_projection.weight", None),
    (USUAL, True, "experts.3.weight", None),
    (USUAL, True, "gate.weight", None),
    (("w1", "w2", "w3"), True, "block_sparse_moe.experts.0.w3.weight", (0, ("w3",), "weight")),
    (("mlp.w1", "mlp.w2", "mlp.v1"), True, "experts.mlp.v1", (None, ("w3",), "weight")),
    (("linear", "linear_1", "linear_v"), True, "experts.4.linear_1.weight", (4, ("w2",), "weight")),
    (("linear", "linear_1", "linear_v"), True, "experts.4.linear.weight", (4, ("w1",), "weight")),
    (
        ("input_linear", "output_linear", None),
        True,
        "input_linear.weight",
        (None, ("w1", "w3"), "weight"),
    ),
    (("up_proj", "down_proj", None), False, "experts.1.up_proj.weight", (1, ("w1",), "weight")),
    (("up_proj", "down_proj", None), False, "experts.1.down_proj.weight", (1, ("w2",), "weight")),
]


@pytest.mark.parametrize(("names", "gated", "name", "expected"), NAMES)
def test_names_are_read_as_they_are_meant(names, gated, name, expected):
    assert ExpertNameParser(names, gated).parse(name) == expected


def test_the_table_finds_every_copy_of_a_tensor():
    table = ExpertParamsTable(fused_moe_make_expert_params_mapping(None, "w1", "w2", "w3", 2, 1))
    found = table.find("model.layers.3.mlp.experts.0.w2.weight")
    assert [(entry.expert_id, parameter) for entry, parameter in found] == [
        (0, "w2_weight"),
        (2, "w2_weight"),
    ]
    assert table.find("model.layers.3.mlp.experts.00.w2.weight") == []
    assert table.find("model.layers.3.mlp.gate.weight") == []
