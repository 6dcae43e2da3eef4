"""What is wrong with a call is said when it is made, with what was given."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import fusedmoe
from fusedmoe import FusedMoE, MoEOptions

E, K, H, I = 8, 2, 64, 96  # noqa: E741
layer = partial(FusedMoE, E, K, H, I, params_dtype=torch.float32)
NO_OPTIONS = {"experts": "torch"}


def experts(**changes: object) -> torch.Tensor:
    given = {
        "hidden_states": torch.randn(5, H),
        "w1": torch.randn(E, 2 * I, H),
        "w2": torch.randn(E, H, I),
        "topk_weights": torch.rand(5, K),
        "topk_ids": torch.randint(0, E, (5, K)),
    }
    return fusedmoe.fused_experts(**(given | changes))


CALLS = {
    "options of a layer": (partial(layer, options=NO_OPTIONS), "MoEOptions, got {'experts'"),
    "options of a call": (partial(experts, options=NO_OPTIONS), "MoEOptions, got {'experts'"),
    "options of a model": (
        lambda: fusedmoe.accelerate(nn.Linear(2, 2), options="torch"),
        "MoEOptions, got 'torch'",
    ),
    "options of a folder": (
        lambda: fusedmoe.from_pretrained("nowhere", options=3),
        "MoEOptions, got 3",
    ),
    "no model": (lambda: fusedmoe.accelerate("mixtral"), "takes a model, not a str"),
    "a format's bits": (partial(fusedmoe.quantize_layer, format=4), "'int4_g128', got 4"),
    "a model to quantize": (
        lambda: fusedmoe.quantize_layer(nn.Linear(2, 2), "int8"),
        "not a Linear; fusedmoe.from_pretrained",
    ),
    "a dtype of integers": (
        partial(layer, params_dtype=torch.int8),
        "floating point, got torch.int8",
    ),
    "names of a checkpoint": (partial(layer, ckpt_names=("w1", "w2")), r"\('w1', 'w2'\)"),
    "one name": (partial(layer, ckpt_names="w13"), "got 'w13'"),
    "a bias of other experts": (
        partial(layer, scoring_func="sigmoid", e_score_correction_bias=torch.zeros(7)),
        r"correction_bias must be \[8\], got \(7,\)",
    ),
    "a table of other picks": (
        partial(layer, hash_indices_table=torch.zeros(9, 3, dtype=torch.int32)),
        r"\[vocab, 2\], got \(9, 3\)",
    ),
    "a group in the place of groups": (
        partial(layer, parallel=object()),
        r"ParallelGroups\(tp=group\), got a object",
    ),
    "experts that are none": (
        partial(layer, options=MoEOptions(experts=int)),
        "names int, which is no FusedMoEExperts",
    ),
    "a mover that is none": (
        partial(layer, options=MoEOptions(prepare_finalize=nn.Linear)),
        "names Linear, which is no FusedMoEPrepareAndFinalize",
    ),
    "names without tensors": (
        lambda: layer().load_weights(["0.gate_proj.weight"]),
        r"\(name, tensor\) pairs, got a str",
    ),
    "a name with a number": (
        lambda: layer().routed_experts.load_weights([("0.gate_proj.weight", 3)]),
        "0.gate_proj.weight: expected a tensor, found a int",
    ),
    "an activation": (partial(experts, activation="sigh"), "'sigh'; known: silu"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_was_given_is_named(name):
    call, words = CALLS[name]
    arguments = (layer(),) if name == "a format's bits" else ()
    with pytest.raises(ValueError, match=words):
        call(*arguments)


def test_an_activation_may_be_given_by_its_name():
    torch.manual_seed(0)
    by_name = experts(activation="gelu")
    torch.manual_seed(0)
    assert torch.equal(by_name, experts(activation=fusedmoe.MoEActivation.GELU))


def test_no_options_are_the_defaults():
    assert MoEOptions.of(None) == MoEOptions()
