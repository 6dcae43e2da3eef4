"""Quantized layers for tests: weights drawn, quantized and written into a FusedMoE layer."""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe import FusedMoE, MoEOptions, MoERunner, QuantizedFusedMoEMethod, QuantizedTensor
from fusedmoe.quantization import keys
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import QuantKey

FORMATS = (
    *("fp8_tensor", "fp8_channel", "fp8_block", "fp8_block_32x16", "fp8_g64"),
    *("int8_channel", "int8_g64", "int8_g32_zp", "int8_g32_act_order"),
    *("int4_channel", "int4_g32", "int4_g64", "int4_g128", "int4_channel_zp", "int4_g32_zp"),
    *("int4_g32_act_order", "int4_g32_zp_act_order"),
    *("mxfp4", "mxfp8", "mxfp6_e3m2", "mxfp6_e2m3", "nvfp4"),
)
SCHEMES: tuple[tuple[str, QuantKey], ...] = (
    ("fp8_tensor", keys.FP8_STATIC_TENSOR),
    ("fp8_tensor", keys.FP8_DYNAMIC_TENSOR),
    ("fp8_channel", keys.FP8_DYNAMIC_TOKEN),
    ("fp8_block", keys.FP8_DYNAMIC_128),
    ("fp8_block", keys.FP8_DYNAMIC_128_UE8M0),
    ("int8_channel", keys.INT8_DYNAMIC_TOKEN),
    ("int8_channel", keys.INT8_STATIC_TENSOR),
    ("int4_g128", keys.FP8_DYNAMIC_TOKEN),
    ("mxfp4", keys.MXFP4_DYNAMIC),
    ("mxfp4", keys.MXFP8_DYNAMIC),
    ("mxfp4", keys.MXFP6_E3M2_DYNAMIC),
    ("mxfp8", keys.MXFP8_DYNAMIC),
    ("mxfp6_e2m3", keys.MXFP6_E2M3_DYNAMIC),
    ("nvfp4", keys.NVFP4_DYNAMIC),
    ("nvfp4", keys.NVFP4_STATIC),
)

REFERENCE = MoEOptions(experts="torch_quantized")
SUFFIXES = {
    "data": "weight",
    "scale": "weight_scale",
    "scale2": "weight_scale_2",
    "zero_point": "weight_zero_point",
    "group_index": "weight_group_index",
}


class Scheme:
    """A QuantizationConfig written by hand: one format for all layers."""

    def __init__(self, name: str, activation: QuantKey | None = None) -> None:
        self.format, self.activation = format_named(name), activation

    def get_quant_method(self, moe_config, prefix):
        return QuantizedFusedMoEMethod(moe_config, self.format, activation=self.activation)


def draw(name: str, *shape: int, shards: int = 1, seed: int = 0, **layout: Any) -> QuantizedTensor:
    """A random weight [..., N, K] quantized to the format called ``name``."""
    gen = torch.Generator().manual_seed(seed)
    fmt, K = format_named(name), shape[-1]
    weight = torch.randn(*shape, generator=gen) * K**-0.5
    weight *= torch.rand(*shape[:-1], 1, generator=gen) + 0.5
    index = None
    if fmt.act_order:
        order = torch.rand(*shape[:-2], shards, K, generator=gen).argsort(-1)
        index = (order // fmt.group.col).int()
    return quantize(weight, fmt, shards=shards, group_index=index, **layout)


def fill(
    layer: MoERunner,
    w13: QuantizedTensor,
    w2: QuantizedTensor,
    experts_here: slice = slice(None),
) -> None:
    """Write both weights, of the experts that are here, into the layer's parameters."""
    experts = layer.routed_experts
    with torch.no_grad():
        for owner, weight in (("w13", w13), ("w2", w2)):
            for part, tensor in weight.parts().items():
                parameter = getattr(experts, f"{owner}_{SUFFIXES[part]}")
                parameter.copy_(tensor[experts_here].reshape(parameter.shape))
    experts.process_weights_after_loading()


def make_layer(
    name: str,
    activation: QuantKey | None = None,
    *,
    E: int = 4,
    K: int = 2,
    H: int = 128,
    I: int = 128,  # noqa: E741
    dtype: torch.dtype = torch.float32,
    input_scale: float | None = None,
    act: str = "silu",
    one_order: bool = False,
    **arguments: Any,
) -> tuple[MoERunner, QuantizedTensor, QuantizedTensor]:
    """(layer, w13, w2) with everything random and static activation scales set.

    It runs the reference unless ``options`` say otherwise. ``one_order``: act-order columns of gate
    and up lie alike, as they do in checkpoints.
    """
    arguments = {"options": REFERENCE} | arguments
    layer = FusedMoE(
        E, K, H, I, dtype, quant_config=Scheme(name, activation), activation=act, **arguments
    )
    experts, S = layer.routed_experts, layer.moe_config.w13_num_shards
    w13 = draw(name, E, S * I, H, shards=S, interleaved=experts.sizes.interleaved)
    w2 = draw(name, E, H, I, seed=1)
    if activation is not None and activation.static:
        largest = 448 * 6 if activation.dtype == "nvfp4" else 127
        for owner in ("w13", "w2"):
            getattr(experts, f"{owner}_input_scale").data.fill_(
                4.0 / largest if input_scale is None else input_scale
            )
    if layer.moe_config.has_bias:
        for owner in ("w13", "w2"):
            torch.nn.init.normal_(getattr(experts, f"{owner}_bias"))
    if one_order and w13.group_index is not None:
        w13.group_index[:, 1:] = w13.group_index[:, :1]
    fill(layer, w13, w2)
    return layer, w13, w2
