"""Quantized layers over ranks: the same output, also after experts have moved. In a RankPool."""

from __future__ import annotations

from typing import Any

import torch
from rank_layers import Layout, make_groups

from fusedmoe import FusedMoE, QuantizedFusedMoEMethod
from fusedmoe.eplb.balancer import ExpertBalancer
from fusedmoe.quantization import keys
from fusedmoe.quantization.formats import format_named, quantize

E, K, H, I = 8, 2, 128, 64  # noqa: E741
SCHEMES = {
    "fp8_channel": keys.FP8_DYNAMIC_TOKEN,
    "int4_g32": None,
    "mxfp4": keys.MXFP8_DYNAMIC,
}
PARTS = {"data": "weight", "scale": "weight_scale"}


class Scheme:
    def __init__(self, name: str) -> None:
        self.name = name

    def get_quant_method(self, moe_config, prefix):
        return QuantizedFusedMoEMethod(
            moe_config, format_named(self.name), activation=SCHEMES[self.name]
        )


def build(name: str, **arguments: Any):
    return FusedMoE(E, K, H, I, torch.float32, quant_config=Scheme(name), **arguments)


def fill(layer: Any, name: str) -> None:
    """Every slot gets the weights of its expert, the same on each rank."""
    experts, generator = layer.routed_experts, torch.Generator().manual_seed(0)
    slots = layer.expert_local_to_global
    ids = range(E) if slots is None else [slot % E for slot in slots.tolist()]
    for owner, shape in (("w13", (E, 2 * I, H)), ("w2", (E, H, I))):
        weight = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        stored = quantize(weight, format_named(name), shards=2 if owner == "w13" else 1)
        for part, tensor in stored.parts().items():
            parameter = getattr(experts, f"{owner}_{PARTS[part]}")
            parameter.data.copy_(tensor[list(ids)].reshape(parameter.shape))
    experts.process_weights_after_loading()


def check(name: str) -> None:
    groups, rank = make_groups(Layout(dp=4, ep=True, spanning=True))
    alone = build(name)
    layer = build(name, parallel=groups, enable_eplb=True, num_redundant_experts=4)
    for one in (alone, layer):
        fill(one, name)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn((3, 0, 5, 2)[rank], H, generator=generator)
    logits = torch.randn(x.shape[0], E, generator=generator)
    logits[:, 2:4] += 2
    balancer = ExpertBalancer([layer], groups.ep)
    expected = alone(x, logits)
    torch.testing.assert_close(layer(x, logits), expected, rtol=1e-5, atol=1e-5)
    before = balancer.physical_to_logical.clone()
    balancer.should_record.fill_(1)
    layer(x, logits)
    balancer.rearrange()
    assert not torch.equal(balancer.physical_to_logical, before)
    torch.testing.assert_close(layer(x, logits), expected, rtol=1e-5, atol=1e-5)
