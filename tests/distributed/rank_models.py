"""Models of Transformers over ranks; runs inside a RankPool."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_layers import Layout, make_groups

import fusedmoe
from fusedmoe import MoEOptions
from fusedmoe.distributed.agreement import RanksDisagreeError
from fusedmoe.integrations.transformers.accelerate import accelerated_blocks
from fusedmoe.integrations.transformers.make_block import make_replacements

MODULE = "fusedmoe.integrations.transformers.accelerate"


def model(num_experts: int = 6) -> Any:
    """Two layers with shared experts and a gate of theirs (Qwen2-MoE), the same on each rank."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=num_experts,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        sliding_window=None,
    )
    torch.manual_seed(0)
    made = Qwen2MoeForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return made


def prompt(seed: int, rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def check_accelerate(same_tokens: bool, mover: str | None) -> None:
    """Logits of this rank's batch, and tokens generated together, are those of the model alone."""
    rank = dist.get_rank()
    group = make_groups(Layout(dp=4, ep=True))[0].dp
    plain, spread = model(), model()
    options = MoEOptions(prepare_finalize=mover)
    fusedmoe.accelerate(spread, ep_group=group, same_tokens=same_tokens, options=options)
    blocks = list(accelerated_blocks(spread).values())
    assert len(blocks) == 2
    assert blocks[0].routed_experts.w13_weight.shape[0] == (2, 2, 1, 1)[rank]
    ids = prompt(0, 2, 5) if same_tokens else prompt(rank, 1 + rank % 2, 3 + rank)
    torch.testing.assert_close(spread(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    ids = prompt(0, 2, 5) if same_tokens else prompt(rank, 1, 3 + rank)
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    arguments["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(spread.generate(ids, **arguments), plain.generate(ids, **arguments))
    if not same_tokens:  # ranks that end after different numbers of tokens go on for each other
        arguments |= dict.fromkeys(("max_new_tokens", "min_new_tokens"), 2 + rank % 3)
        found = spread.generate(ids, **arguments, synced_gpus=True)
        assert torch.equal(found, plain.generate(ids, **arguments))
    assert set(spread.state_dict()) == set(plain.state_dict())
    fusedmoe.restore(spread)
    assert torch.equal(spread(ids).logits, plain(ids).logits)


def no_room(*_: Any) -> Any:
    raise MemoryError("no room")


def check_different_models() -> None:
    group = make_groups(Layout(dp=4, ep=True))[0].dp
    other = model(8 if dist.get_rank() == 1 else 6)
    with pytest.raises(ValueError, match="num_experts is 6, 8, 6, 6"):
        fusedmoe.accelerate(other, ep_group=group)
    peers: Any = object() if dist.get_rank() == 3 else None
    with pytest.raises(ValueError, match="peers is False, False, False, True"):
        fusedmoe.accelerate(model(), ep_group=group, peers=peers)
    odd = dist.get_rank() == 1
    for told, arguments in (
        ("ValueError: .*nonsense", {"options": MoEOptions(experts="nonsense" if odd else None)}),
        ("ValueError: accelerate takes a model", {"model": "a folder" if odd else model()}),
    ):
        own = told.removeprefix("ValueError: ")
        with pytest.raises(
            ValueError, match=own if odd else f"wrong is nothing, {told}.*, nothing"
        ):
            fusedmoe.accelerate(**({"model": model(), "ep_group": group} | arguments))
    fewer, hooked, other = model(), model(), model()
    if odd:
        fewer.model.layers[1].mlp = torch.nn.Identity()
        hooked.model.layers[0].mlp.forward = torch.nn.Identity().forward
        other.model.layers[1].mlp.experts.act_fn = torch.nn.Tanh()
    for changed, message in (
        (fewer, "model.layers.1.mlp is .*, missing, "),
        (hooked, "model.layers.0.mlp is .*, its forward was replaced"),
        (other, "went wrong is nothing, the activation of .* is none of ours, nothing, "),
    ):
        with pytest.raises(ValueError, match=message):
            fusedmoe.accelerate(changed, ep_group=group)
    assert not other.model.layers[1].mlp._load_state_dict_post_hooks
    with (
        mock.patch(f"{MODULE}.make_replacements", no_room if odd else make_replacements),
        pytest.raises(MemoryError if odd else RanksDisagreeError, match="no room"),
    ):
        fusedmoe.accelerate(model(), ep_group=group)
    for given in ({}, {"ep_group": group, "same_tokens": True}):
        with pytest.raises(ValueError, match="whose batches differ"):
            fusedmoe.accelerate(model(), peers=object(), **given)
