"""One token's layer with 4-bit weights in one launch, its text compiled for the CPU: formats, odd
numbers of picks, picks without an expert here, one launch after the other."""

import shutil
from dataclasses import replace

import pytest
import torch
from test_cuda_decode import before_ones, tile_map

from cuda_on_cpu import KernelOnCpu
from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.cuda import quantized_launch, quantized_token
from fusedmoe.kernels.hopper_quantized import quantized_decode_reference, token_cut_for
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.tuning.token_tiles import (
    EXCLUSIVE_BYTES,
    MOST_BYTES,
    TokenShape,
    token_cut,
    token_rows_cut,
)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles with g++")
SILU, OAI = MoEActivation.SILU, MoEActivation.SWIGLUOAI
RELU2 = MoEActivation.RELU2_NO_MUL
NAN = float("nan")
KIMI = TokenShape(8, 7168, 256, 2, (3584, 128), (448, 16), 0)
GPT_OSS = TokenShape(4, 2880, 2880, 2, (1440, 1440), (90, 90), 2)


@pytest.fixture
def on_cpu(monkeypatch):
    def kernel(sources, defines, threads, shared, cooperative):
        assert cooperative
        given = sources, sources[-1].removesuffix(".cu"), defines, threads, shared
        return KernelOnCpu(*given, cooperative=True)

    monkeypatch.setattr(quantized_launch, "_kernel", kernel)
    monkeypatch.setattr(quantized_token, "tile_map", tile_map)


def weights(fmt, e, N, D, act):
    shards = 1 if act is None or not device_activation(act).gated else 2
    interleaved = act is not None and device_activation(act).interleaved
    values = torch.randn(e, shards * N, D) / D**0.5
    w = quantize(values, format_named(fmt), shards=shards, interleaved=interleaved)
    return replace(w, scale=before_ones(w.scale))


def layer_of(fmt, act, ids, H, I, *, programs, bias=False, expert_map=None):  # noqa: E741
    torch.manual_seed(0)
    K, e = ids.shape[1], 9 if expert_map is None else int((expert_map >= 0).sum())
    w1, w2 = weights(fmt, e, I, H, act), weights(fmt, e, H, I, None)
    biases = (torch.randn(e, n).bfloat16() if bias else None for n in (w1.shape[1], H))
    return LayerTensors(
        torch.randn(1, H).bfloat16(), w1, w2, torch.rand(1, K), ids,
        torch.full((1, H), NAN).bfloat16(), torch.full((K, I), NAN).bfloat16(),
        torch.full((K, H), NAN), programs, act, None, *biases, expert_map,
    )  # fmt: skip


def both(layer):
    """(of the kernel, of the definition)."""
    cut = token_cut_for(layer, where_faster=False)
    assert cut is not None
    expected = layer._replace(out=layer.out.clone(), act=layer.act.clone())
    quantized_decode_reference(expected)
    quantized_token.run_token(layer, cut)
    return layer.out.double(), expected.out.double()


FROM_MAP = torch.tensor([4, -1, 0, 2, -1, 1, 3, -1, -1], dtype=torch.int32)
CASES = {
    "int4": ("int4_g32", SILU, [3, 1, 8, 0], 1024, 256, 3, {}),
    "int4_more_warps_than_octets": ("int4_g32", SILU, [5, 2], 256, 64, 16, {"bias": True}),
    "int4_wide_groups": ("int4_g128", SILU, [3, 1, 8, 0, 2], 1024, 512, 5, {"bias": True}),
    "mxfp4_odd_picks": ("mxfp4", OAI, [3, 1, 8], 576, 320, 4, {"bias": True}),
    "mxfp4_no_gate": ("mxfp4", RELU2, [7, 7], 576, 320, 3, {"bias": True}),
    "one_pick": ("mxfp4", SILU, [5], 576, 320, 5, {}),
    "no_expert_of_some": ("int4_g32", SILU, [3, -1, 8, 77], 1024, 256, 3, {"bias": True}),
    "experts_elsewhere": ("mxfp4", OAI, [0, 1, 2, 6], 320, 320, 2, {"expert_map": FROM_MAP}),
}


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_one_token(name, on_cpu):
    fmt, act, ids, H, I, programs, more = CASES[name]  # noqa: E741
    ids = torch.tensor([ids], dtype=torch.int32)
    out, expected = both(layer_of(fmt, act, ids, H, I, programs=programs, **more))
    assert (out - expected).norm() <= 1e-3 * expected.norm()


@needs_compiler
def test_launches_one_after_the_other(on_cpu):
    """Other picks, none, and NaN go before."""
    first = layer_of("mxfp4", OAI, torch.tensor([[3, 1, 8]]), 576, 320, programs=4, bias=True)
    for round_ in range(7):
        ids = torch.tensor([[3, round_, 8]]) if round_ % 3 else torch.full((1, 3), -1)
        x = torch.randn(1, 576).bfloat16()
        if round_ == 4:
            x[:] = NAN
        layer = first._replace(topk_ids=ids, x=x, out=torch.full_like(first.out, 7.0))
        out, expected = both(layer)
        assert out.isnan().equal(expected.isnan())
        out, expected = out.nan_to_num(), expected.nan_to_num()
        assert (out - expected).norm() <= 1e-3 * expected.norm()


@needs_compiler
def test_digits_of_x_of_every_size(on_cpu):
    """Neighbouring groups may differ by any factor; what is small beside its own loses little."""
    layer = layer_of("int4_g32", SILU, torch.tensor([[3, 1, 8]]), 1024, 256, programs=3)
    torch.manual_seed(1)
    sizes = torch.tensor([1e-30, 1e-3, 1.0, 1e3, 0.0]).repeat_interleave(32).repeat(7)[:1024]
    for x in (torch.randn(1024) * sizes, torch.randn(1024) * torch.rand(1024) ** 8, sizes * 0):
        out, expected = both(layer._replace(x=x[None].bfloat16()))
        assert (out - expected).norm() <= 1.5e-3 * expected.norm()
    x[700] = NAN
    assert both(layer._replace(x=x[None].bfloat16()))[0].isnan().all()


def test_more_tokens_than_one_and_more_weights_than_fit_go_another_way():
    layer = layer_of("int4_g32", SILU, torch.tensor([[3, 1]]), 1024, 256, programs=132)
    assert token_cut_for(layer) is not None
    two = layer._replace(topk_ids=torch.tensor([[3], [1]]))
    assert token_cut_for(two) is None
    more = layer._replace(programs=3)
    assert token_cut_for(more) is None
    assert token_cut_for(more, where_faster=False) is not None
    of_a_rank = torch.full((2 * layer.w2.shape[0],), -1, dtype=torch.int32)
    assert token_cut_for(more._replace(expert_map=of_a_rank)) is not None
    # Rows of whole lines lie in the same banks.
    lines, pieces = (
        layer_of("mxfp4", SILU, torch.tensor([[3, 1]]), H, 320, programs=132) for H in (512, 576)
    )
    assert token_cut_for(lines) is None
    assert token_cut_for(lines, where_faster=False) is not None
    assert token_cut_for(pieces) is not None


def test_cuts_of_known_models():
    kimi, gpt_oss = token_cut(KIMI, 132), token_rows_cut(GPT_OSS, 132)
    assert kimi[:3] == (14, 14, 1)
    assert kimi.at_once
    assert gpt_oss[:4] == (12, 12, 12, 4)
    assert not gpt_oss.at_once
    assert min(kimi.shared, gpt_oss.shared) >= EXCLUSIVE_BYTES
    assert max(kimi.shared, gpt_oss.shared) <= MOST_BYTES


@pytest.mark.parametrize(
    "change",
    [
        {"row_bytes": (1440, 7168)},  # more than the registers of 16 warps
        {"hidden": 2884},
        {"intermediate": 2876},
        {"scale_bytes": (45, 90)},
        {"picks": 32, "scale_bytes": (5760, 90)},  # no room for a ring
    ],
)
def test_layers_without_a_cut(change):
    assert token_cut(GPT_OSS._replace(**change), 132) is None
    assert token_rows_cut(GPT_OSS._replace(**change), 132) is None
