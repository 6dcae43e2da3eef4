"""Transformers' fp8 experts: our dequantization, against its own loop over the same numbers.

Transformers' fp8 kernels need a GPU and a download; what its ``FP8Experts`` compute without them is
its own eager loop over weights that are not quantized, so that is given the numbers decoded here.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import relative_error
from torch import nn
from transformers.integrations.finegrained_fp8 import (
    ALL_FP8_EXPERTS_FUNCTIONS,
    Fp8Dequantize,
    FP8Experts,
)
from transformers.integrations.moe import use_experts_implementation

from fusedmoe.integrations.transformers import fp8_experts
from fusedmoe.integrations.transformers.fp8_experts import dequantize, fp8_experts_forward

E, H, INNER = 6, 64, 32


def blocks_by_loop(weight, scale, block, parts):
    """fp32 weight [n, R, C] times its block's scale, one block after the other."""
    values = weight.float().clone()
    start_scale = 0
    for part in values.chunk(parts, 1):
        for r in range(0, part.shape[1], block[0]):
            for c in range(0, part.shape[2], block[1]):
                s = scale[:, start_scale + r // block[0], c // block[1]].float()
                part[:, r : r + block[0], c : c + block[1]] *= s[:, None, None]
        start_scale += math.ceil(part.shape[1] / block[0])
    return values


def fp8_module(has_gate=True, scale_fmt="float", block_size=(16, 16), seed=0, **config):
    """An ``FP8Experts`` as the quantizer would place it, with random weights and scales."""

    class Experts(FP8Experts):
        """Of its own, since decorating changes the class."""

    decorate = use_experts_implementation(
        experts_interface=ALL_FP8_EXPERTS_FUNCTIONS, has_gate=has_gate
    )
    sizes = {"hidden_size": H, "moe_intermediate_size": INNER, "num_experts": E}
    settings = SimpleNamespace(
        **({"hidden_act": "silu", "_experts_implementation": "fusedmoe"} | sizes | config)
    )
    experts = decorate(Experts)(
        settings, block_size=block_size, scale_fmt=scale_fmt, has_gate=has_gate
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(experts.named_parameters()):
        if name.endswith("scale_inv"):
            exponents = torch.randint(-8, -5, parameter.shape, generator=generator)
            value = torch.exp2(exponents.float()).to(parameter.dtype)
            if parameter.dtype == torch.float32:
                value *= 0.75 + torch.rand(parameter.shape, generator=generator) / 2
        elif parameter.dtype == torch.int8:
            value = torch.randint(-128, 128, parameter.shape, generator=generator).to(torch.int8)
        else:
            value = torch.randn(parameter.shape, generator=generator).mul(20).to(parameter.dtype)
        setattr(experts, name, nn.Parameter(value, requires_grad=False))
    return experts.eval()


def unquantized(experts, decode):
    """The module with plain fp32 weights, run by Transformers' own loop."""
    twin = copy.deepcopy(experts)
    twin.config._experts_implementation = "eager"
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    for name in (up, "down_proj"):
        value = decode(name, getattr(experts, name), getattr(experts, f"{name}_scale_inv"))
        setattr(twin, name, nn.Parameter(value, requires_grad=False))
    return twin


def routed(T=9, K=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(T, E, generator=generator).topk(K).indices
    weights = torch.rand(T, K, generator=generator).softmax(-1)
    return torch.randn(T, H, generator=generator), ids, weights


def decode_blocks(block):
    def decode(name, weight, scale):
        return blocks_by_loop(weight, scale, block, 2 if name == "gate_up_proj" else 1)

    return decode


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"swiglu_limit": 0.5},
        {"swiglu_limit": 0.5, "swiglu_alpha": 1.702},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"has_gate": False, "hidden_act": "relu2"},
        {"hidden_act": "quick_gelu"},
    ],
    ids=str,
)
def test_block_scales(config, scale_fmt):
    experts = fp8_module(scale_fmt=scale_fmt, **config)
    twin = unquantized(experts, decode_blocks((16, 16)))
    inputs = routed()
    assert relative_error(experts(*inputs), twin(*inputs)) <= 1e-5


def test_blocks_larger_than_a_matrix_are_one_for_gate_and_one_for_up():
    experts = fp8_module(block_size=(128, 128))
    assert experts.gate_up_proj_scale_inv.shape[1:] == (2, 1)
    twin = unquantized(experts, decode_whole)
    inputs = routed()
    assert relative_error(experts(*inputs), twin(*inputs)) <= 1e-5


def decode_whole(name, weight, scale):
    rows = weight.shape[1] // scale.shape[1]
    return weight.float() * scale.float().repeat_interleave(rows, 1)


def test_one_scale_for_a_matrix():
    experts = fp8_module(block_size=None)
    twin = unquantized(experts, decode_whole)
    inputs = routed()
    assert relative_error(experts(*inputs), twin(*inputs)) <= 1e-5


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_packed_four_bit_weights(scale_fmt):
    experts = fp8_module(expert_dtype="fp4", scale_fmt=scale_fmt)
    theirs = Fp8Dequantize(SimpleNamespace())
    twin = unquantized(
        experts,
        lambda _, weight, scale: theirs._dequantize_one(weight, scale, output_dtype=torch.float32),
    )
    assert twin.gate_up_proj.shape == (E, 2 * INNER, H)
    inputs = routed()
    assert relative_error(experts(*inputs), twin(*inputs)) <= 1e-5


def test_blocks_that_do_not_fill_the_last_one():
    weight = torch.randn(3, 40, 24).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3, 2)
    wanted = blocks_by_loop(weight, scale, (16, 16), 1)
    torch.testing.assert_close(dequantize(weight, scale, (16, 16)), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("block", [16, 32])
def test_halves_have_blocks_of_their_own(block):
    """Gate and up were quantized as two matrices; with 32, one grid over both would fit as well."""
    weight = torch.randn(3, 2 * 24, 16).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2 * math.ceil(24 / block), 1)
    wanted = blocks_by_loop(weight, scale, (block, 16), 2)
    got = dequantize(weight, scale, (block, 16), parts=2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_scales_that_do_not_tile_are_refused():
    weight = torch.zeros(1, 32, 32, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="5 x 2 scales do not tile 32 x 32"):
        dequantize(weight, torch.ones(1, 5, 2), (16, 16))


@pytest.mark.parametrize("config", [{}, {"hidden_act": "quick_gelu"}], ids=str)
def test_pieces_do_not_change_the_result(config, monkeypatch):
    """Run here, and by Transformers, which has the gate that is not known here."""
    experts = fp8_module(**config)
    inputs = routed()
    wanted = experts(*inputs)
    monkeypatch.setattr(fp8_experts, "_PIECE_BYTES", 1)
    assert relative_error(experts(*inputs), wanted) <= 1e-6


def test_slots_of_other_ranks_count_as_nothing_and_foreign_ids_are_refused():
    experts = fp8_module()
    x, ids, weights = routed()
    keep = torch.ones_like(weights)
    keep[:, 1] = 0
    wanted = experts(x, ids[:, :1], weights[:, :1])
    got = experts(x, ids.masked_fill(keep == 0, E), weights * keep)
    assert relative_error(got, wanted) <= 1e-6
    with pytest.raises(ValueError, match="7"):
        experts(x, ids + 7, weights)


def test_no_tokens_and_bf16():
    experts = fp8_module()
    x, ids, weights = routed()
    assert experts(x[:0], ids[:0], weights[:0]).shape == (0, H)
    wanted = experts(x, ids, weights)
    got = experts(x.bfloat16(), ids, weights.bfloat16())
    assert got.dtype == torch.bfloat16
    assert relative_error(got.float(), wanted) <= 2e-2


def test_the_name_is_in_the_fp8_registry():
    assert ALL_FP8_EXPERTS_FUNCTIONS["fusedmoe"] is fp8_experts_forward
