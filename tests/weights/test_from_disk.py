"""Per-rank loading: the right weights, and no byte of another rank's experts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fusedmoe import FusedMoE, MoEOptions, OnlineQuantization, ParallelGroups
from fusedmoe.checkpoint import read_checkpoint
from fusedmoe.weights.from_disk import load_local_experts
from layer_oracle import Experts

E, K, H, I = 6, 2, 8, 4  # noqa: E741
PREFIX = "model.layers.0.mlp.experts"


def checkpoint(folder, tensors):
    """A folder with these tensors and one that is somebody else's."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(
        {f"{PREFIX}.{name}": tensor for name, tensor in tensors.items()}
        | {"model.norm.weight": torch.ones(3)},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text("{}")
    return read_checkpoint(folder)


def one_by_one(experts):
    return {name.removeprefix("experts."): tensor for name, tensor in experts.named()}


def stacked(experts, transposed=False):
    gate_up = torch.stack([torch.cat(pair) for pair in zip(experts.gate, experts.up, strict=True)])
    down = torch.stack(experts.down)
    biases = torch.stack(
        [torch.cat(pair) for pair in zip(experts.gate_bias, experts.up_bias, strict=True)]
    )
    return {
        "gate_up_proj": gate_up.mT if transposed else gate_up,
        "down_proj": down.mT if transposed else down,
        "gate_up_proj_bias": biases,
        "down_proj_bias": torch.stack(experts.down_bias),
    }


def layer(**arguments):
    options = MoEOptions(experts="torch")
    given = {"options": None if "quant_config" in arguments else options} | arguments
    return FusedMoE(E, K, H, I, torch.float32, has_bias=True, prefix=PREFIX, **given)


EXPERT_PARALLEL = {"tp_size": 3, "parallel": ParallelGroups(enable_expert_parallel=True)}


@pytest.mark.parametrize("kind", ["one_by_one", "stacked", "transposed"])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_a_rank_reads_its_own_experts_alone(tmp_path, kind, placement):
    experts = Experts.random(E, H, I, bias=True)
    tensors = one_by_one(experts) if kind == "one_by_one" else stacked(experts, kind != "stacked")
    folder = checkpoint(tmp_path, tensors)
    extra = {"is_fused_checkpoint_transposed": kind == "transposed"}
    whole = layer(**extra)
    everything = load_local_experts(whole.routed_experts, folder)
    assert everything == sum(tensor.nbytes for tensor in tensors.values())
    for rank in range(3):
        mine = layer(tp_rank=rank, expert_placement=placement, **EXPERT_PARALLEL, **extra)
        assert load_local_experts(mine.routed_experts, folder) == everything // 3
        ids = mine.expert_local_to_global.tolist()
        for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias"):
            found = getattr(mine.routed_experts, name)
            assert torch.equal(found, getattr(whole.routed_experts, name)[ids])


@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_are_rounded_expert_by_expert(tmp_path, transposed):
    experts = Experts.random(E, H, I, bias=True)
    rounded = {"quant_config": OnlineQuantization.of("fp8_tensor")}
    one = layer(**rounded, is_fused_checkpoint_transposed=transposed).routed_experts
    load_local_experts(one, checkpoint(tmp_path, stacked(experts, transposed)))
    other = layer(**rounded).routed_experts
    other.load_weights(one_by_one(experts))
    for name, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_redundant_copies_are_read_once(tmp_path):
    experts = Experts.random(E, H, I, bias=True)
    folder = checkpoint(tmp_path, one_by_one(experts))
    extra = {"enable_eplb": True, "num_redundant_experts": 3}
    one = layer(tp_rank=2, **EXPERT_PARALLEL, **extra)
    read = load_local_experts(one.routed_experts, folder)
    assert one.expert_local_to_global.tolist() == [6, 7, 8]  # copies of experts 0, 1 and 2
    assert read == sum(tensor.nbytes for tensor in one_by_one(experts).values()) // 2
    assert torch.equal(one.routed_experts.w2_weight, torch.stack(experts.down[:3]))


def test_slices_of_a_sharded_expert(tmp_path):
    """Under tensor parallelism each rank has a part of every expert."""
    experts = Experts.random(E, H, I, bias=True)
    folder = checkpoint(tmp_path, stacked(experts))
    whole, half = layer(), layer(tp_size=2, tp_rank=1)
    for one in (whole, half):
        load_local_experts(one.routed_experts, folder)
    expected = whole.routed_experts.w2_weight[..., I // 2 :]
    assert torch.equal(half.routed_experts.w2_weight, expected)


def test_what_is_missing_or_unknown(tmp_path):
    experts = Experts.random(E, H, I, bias=True)
    tensors = one_by_one(experts)
    del tensors["4.up_proj.weight"]
    folder = checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match="w3 of expert 4"):
        load_local_experts(layer().routed_experts, folder)
    other = layer(tp_rank=0, **EXPERT_PARALLEL)
    load_local_experts(other.routed_experts, folder)  # expert 4 is another rank's
    with pytest.raises(ValueError, match=r"no tensor called elsewhere\.\.\."):
        load_local_experts(other.routed_experts, folder, "elsewhere")
    odd = tmp_path / "odd"
    odd.mkdir()
    folder = checkpoint(odd, tensors | {"4.side_proj.weight": torch.ones(2, 2)})
    half = layer().routed_experts
    for attempt in (lambda: load_local_experts(half, folder), half.check_usable):
        with pytest.raises(ValueError, match=r"side_proj\.weight names no tensor"):
            attempt()


def test_a_folder_may_be_read_after_one_that_did_not_fit(tmp_path):
    experts = Experts.random(E, H, I, bias=True)
    tensors, one = one_by_one(experts), layer().routed_experts
    for place in ("short", "whole"):
        (tmp_path / place).mkdir()
    short = checkpoint(tmp_path / "short", tensors | {"5.down_proj.weight": torch.zeros(H, I + 1)})
    with pytest.raises(ValueError, match=r"5\.down_proj\.weight: expected shape"):
        load_local_experts(one, short)
    load_local_experts(one, checkpoint(tmp_path / "whole", tensors))
    one.check_usable()
    assert torch.equal(one.w2_weight, torch.stack(experts.down))
