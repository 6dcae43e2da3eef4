"""One table chooses, every loser has its reason, options force by name or class."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedmoe import FusedMoE, MoEActivation, MoEOptions, ParallelGroups, explain
from fusedmoe.config import FusedMoEConfig, FusedMoEParallelConfig
from fusedmoe.modular_kernel import FusedMoEActivationFormat
from fusedmoe.quantization.keys import PER_TENSOR, QuantKey
from fusedmoe.selection import select
from toy_stages import CPU, AsyncMover, BatchedExperts, LogitsExperts, SlotExperts


def config(options: MoEOptions | None = None, **changes) -> FusedMoEConfig:
    return FusedMoEConfig(
        **{
            "num_experts": 4,
            "experts_per_token": 1,
            "hidden_dim": 8,
            "intermediate_size_per_partition": 8,
            "num_local_experts": 4,
            "activation": MoEActivation.SILU,
            "in_dtype": torch.float32,
            "device": torch.device("cpu"),
            "options": options or MoEOptions(),
        }
        | changes
    )


LIMITED = replace(
    CPU,
    activations=frozenset({MoEActivation.SILU}),
    bias=False,
    expert_map=False,
    apply_router_weight_on_input=False,
    batch_invariant=False,
    hash_routing=False,
)
FP8 = QuantKey(torch.float8_e4m3fn, True, PER_TENSOR)


@pytest.mark.parametrize(
    ("changes", "keys", "reason"),
    [
        ({}, (None, None), None),
        ({"device": torch.device("cuda")}, (None, None), "runs on cpu, not cuda"),
        ({"in_dtype": torch.bfloat16}, (None, None), "torch.bfloat16"),
        ({"activation": MoEActivation.GELU}, (None, None), "activation gelu"),
        ({"has_bias": True}, (None, None), "expert biases"),
        ({"num_local_experts": 2}, (None, None), "an expert map"),
        ({"apply_router_weight_on_input": True}, (None, None), "router weights on the input"),
        ({"options": MoEOptions(batch_invariant=True)}, (None, None), "batch invariance"),
        ({"has_hash_routing": True}, (None, None), "hash routing"),
        ({}, (FP8, None), "float8_e4m3fn"),
    ],
)
def test_every_requirement_is_checked_and_named(changes, keys, reason):
    found = LIMITED.unmet_by(config(**changes), *keys, FusedMoEActivationFormat.Standard)
    assert found is None if reason is None else reason in found


def test_experts_that_promise_no_order_of_sums_run_on_request_alone():
    atomic = replace(CPU, deterministic=False)
    found = [
        atomic.unmet_by(
            config(MoEOptions(deterministic=asked)),
            *(None, None),
            FusedMoEActivationFormat.Standard,
        )
        for asked in (True, False)
    ]
    assert found == ["does not support the same bits from run to run", None]


def test_format_and_modules_are_requirements_too():
    standard, batched = FusedMoEActivationFormat
    assert "Standard rows, not Batched" in CPU.unmet_by(config(), None, None, batched)
    missing = replace(CPU, requires=("no_such_module",))
    assert "no_such_module" in missing.unmet_by(config(), None, None, standard)


@pytest.mark.parametrize("how", ["name", "class"])
def test_experts_are_forced_by_name_or_class(how):
    from fusedmoe.experts.torch_reference import TorchExperts

    options = MoEOptions(experts="torch" if how == "name" else TorchExperts)
    assert select(config(options)).chosen is TorchExperts


def test_a_forced_choice_that_cannot_run_says_why():
    options = MoEOptions(experts=SlotExperts)
    with pytest.raises(ValueError, match=r"slot: does not compute in torch\.bfloat16"):
        select(config(options, in_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"is called 'slot'; known: .*torch"):
        select(config(MoEOptions(experts="slot")))
    with pytest.raises(ValueError, match="known: no_ep"):
        select(config(MoEOptions(prepare_finalize="deepep")))


def test_rows_nothing_delivers_are_a_reason():
    why = (
        r"takes BatchedExperts rows, which no prepare/finalize delivers \(batched: needs max_num_t"
    )
    with pytest.raises(ValueError, match=why):
        select(config(MoEOptions(experts=BatchedExperts)))


def test_experts_that_route_by_themselves_get_a_mover_of_their_kind():
    options = MoEOptions(experts=LogitsExperts)
    selection = select(config(options))
    assert selection.prepare_finalize.__name__ == "MoEPrepareAndFinalizeNoDPEPMonolithic"
    with pytest.raises(ValueError, match="needs its routing before the experts"):
        select(config(options, require_modular=True))
    with pytest.raises(ValueError, match="which no prepare/finalize delivers"):
        select(config(MoEOptions(experts=LogitsExperts, prepare_finalize=AsyncMover)))


def test_tokens_on_other_ranks_need_something_that_moves_them():
    parallel = FusedMoEParallelConfig(1, 1, 2, 2, 0, 0, 0, 0, use_ep=True)
    moe = config(moe_parallel_config=parallel, num_local_experts=2)
    with pytest.raises(ValueError, match=r"moves no tokens.*dp_size 2"):
        select(moe, groups=ParallelGroups())
    assert select(moe).prepare_finalize.name == "no_ep"  # no groups: for loading alone


def test_explain_prints_what_was_chosen_and_why_the_rest_was_not(monkeypatch):
    monkeypatch.setattr(
        "fusedmoe.selection.EXPERTS",
        (
            "toy_stages:LogitsExperts",
            "fusedmoe.experts.torch_reference:TorchExperts",
            "toy_stages:SlotExperts",
        ),
    )
    monkeypatch.setattr(
        "fusedmoe.selection.PREPARE_FINALIZE",
        ("fusedmoe.prepare_finalize.no_ep:MoEPrepareAndFinalizeNoDPEPModular",),
    )
    assert str(explain(config(require_modular=True))) == (
        "experts: torch\n"
        "  not logits: routes by itself, but this layer needs its routing before the experts\n"
        "  not slot: it can, but a preferred one came first\n"
        "prepare_finalize: no_ep"
    )


def test_explain_takes_a_layer_and_looks_at_where_its_weights_are():
    layer = FusedMoE(4, 2, 8, 8, torch.float32, options=MoEOptions(experts=SlotExperts))
    assert explain(layer).chosen is SlotExperts
    assert explain(layer.routed_experts).chosen is SlotExperts
    layer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        explain(layer)
    with pytest.raises(ValueError, match=r"not a Linear.*accelerated_blocks"):
        explain(torch.nn.Linear(2, 2))


def test_a_default_layer_runs_everywhere():
    """No option set, any dtype and activation: something in the table takes it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for activation in MoEActivation:
            if activation is not MoEActivation.RELU2:
                assert explain(config(in_dtype=dtype, activation=activation)).chosen is not None
