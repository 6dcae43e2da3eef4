"""Every weight format with every way of rounding rows that kernels multiply, once: as data.

The same list is run by Triton's interpreter and on a GPU; a test holds it against the keys that
selection knows, so that a new format has to join it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from expert_layers import Layer
from fusedmoe import MoEOptions
from fusedmoe.activation import MoEActivation
from fusedmoe.experts.hopper_quantized import HopperEmulatedExperts, HopperQuantizedExperts
from fusedmoe.experts.triton_quantized import TritonEmulatedExperts, TritonQuantizedExperts
from fusedmoe.experts.triton_quantized_batched import (
    BatchedTritonEmulatedExperts,
    BatchedTritonQuantizedExperts,
)
from fusedmoe.quantization import keys
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_128_UE8M0,
    QuantKey,
    fp8_dynamic_group,
)
from quantized_experts import Quantized

WEIGHT_ONLY = (
    *("int4_g32", "int4_g64_zp", "int4_g128", "int4_channel", "int4_channel_zp"),
    *("int4_g32_act_order", "int4_g64_zp_act_order"),
    *("int8_channel", "int8_channel_zp", "int8_g32", "int8_g32_zp"),
    *("int8_g32_act_order", "int8_g64_zp_act_order"),
    *("fp8_tensor", "fp8_channel", "fp8_block", "fp8_block_64x32"),
    *("mxfp4", "mxfp8", "mxfp6_e3m2", "mxfp6_e2m3", "nvfp4", "nf4", "iq4_nl"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_1", "q5_1"),
)
ROUNDED: tuple[tuple[str, QuantKey], ...] = (
    *((f"fp8_{kind}", keys.FP8_DYNAMIC_TOKEN) for kind in ("tensor", "channel", "block")),
    *((f"fp8_{kind}", keys.FP8_STATIC_TENSOR) for kind in ("tensor", "channel")),
    ("fp8_tensor", keys.FP8_DYNAMIC_TENSOR),
    ("fp8_block", keys.FP8_DYNAMIC_128),
    ("fp8_block", keys.FP8_DYNAMIC_128_UE8M0),
    ("fp8_block_64x64", fp8_dynamic_group(64)),
    ("int8_channel", keys.INT8_DYNAMIC_TOKEN),
    ("int8_channel", keys.INT8_STATIC_TENSOR),
    ("mxfp8", keys.MXFP8_DYNAMIC),
    *((name, keys.FP8_DYNAMIC_TOKEN) for name in ("int4_g64", "int4_g128_zp", "int4_channel")),
    ("int4_g128", keys.FP8_STATIC_TENSOR),
)
EMULATED: tuple[tuple[str, QuantKey], ...] = (
    ("mxfp4", keys.MXFP4_DYNAMIC),
    ("mxfp4", keys.MXFP8_DYNAMIC),
    ("mxfp4", keys.FP8_STATIC_TENSOR),
    ("int4_g128", keys.INT8_DYNAMIC_TOKEN),
    ("mxfp6_e3m2", keys.MXFP6_E3M2_DYNAMIC),
    ("mxfp6_e2m3", keys.MXFP6_E2M3_DYNAMIC),
    ("nvfp4", keys.NVFP4_DYNAMIC),
    ("nvfp4", keys.NVFP4_STATIC),
    ("int4_g32_zp_act_order", keys.FP8_DYNAMIC_128),
    ("q6_k", keys.INT8_DYNAMIC_TOKEN),
    ("q3_k", keys.FP8_DYNAMIC_TOKEN),
    ("q5_1", keys.INT8_DYNAMIC_TOKEN),
)
MATRIX = (*((name, None) for name in WEIGHT_ONLY), *ROUNDED, *EMULATED)
CLASSES = (
    TritonQuantizedExperts,
    TritonEmulatedExperts,
    HopperQuantizedExperts,
    HopperEmulatedExperts,
    BatchedTritonQuantizedExperts,
    BatchedTritonEmulatedExperts,
)

LAYER = Layer(T=5, K=2, E=4)
FEATURES = replace(LAYER, E=6, local=4, bias=True, activation=MoEActivation.RELU2_NO_MUL)
"""No gate, biases and an expert map in one layer; ``with_ids_of_no_expert`` adds the rest."""
INVARIANT = replace(LAYER, bias=True, options=MoEOptions(batch_invariant=True))


def case_of(name: str, rows: QuantKey | None, layer: Layer) -> Quantized:
    """H and I are two whole groups on a GPU and one for the interpreter, but 64 at least."""
    group = 128 if name == "fp8_block" else format_named(name).group.col
    size = max(64, group, 128 if rows in (FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0) else 0)
    size *= 1 if layer.device == "cpu" else 2
    layer = replace(layer, H=size, I=size)
    return Quantized(name, rows, layer, one_order=layer.activation.is_gated)


def serving(case: Quantized, classes: tuple[type, ...] = CLASSES) -> list[type]:
    """The classes that run a case; emulation only where nothing multiplies the rows as they are."""
    able = []
    for cls in classes:
        weight = case.weights(case.layer.tensors())[0].format.key
        moe = replace(case.layer.config(), in_dtype=torch.bfloat16, device=torch.device("cuda"))
        if cls.is_supported_config(moe, weight, case.rows, cls.activation_format())[0]:
            twins = [c for c in able if c.activation_format() is cls.activation_format()]
            multiplied = any(not c.emulate for c in twins)
            if cls is HopperEmulatedExperts or not (cls.emulate and multiplied):
                able.append(cls)
    return able


def with_ids_of_no_expert(tensors: dict) -> dict:
    """-1 for some and for all of a token's; on a GPU, where nobody looks, past the end as well."""
    ids = tensors["topk_ids"]
    ids[0], ids[1, 0] = -1, -1
    if ids.is_cuda:
        ids[2, 1], ids[3, 0] = 2**31 - 1, -5
    return tensors
