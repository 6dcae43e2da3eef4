"""What leads to the prefill kernels for quantized weights with 16-bit rows, on CPU tensors: their
reference runs."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from expert_layers import Layer
from fusedmoe.activation import MoEActivation
from fusedmoe.experts import hopper_quantized
from fusedmoe.experts.hopper_quantized import HopperEmulatedExperts, HopperQuantizedExperts
from fusedmoe.quantization import keys
from fusedmoe.quantization.formats import format_named
from fusedmoe.testing import assert_no_worse
from fusedmoe.testing.tolerances import relative_error
from fusedmoe.tuning.mixed_tiles import MixedPrefillTile, MixedPrefillTiles
from quantized_experts import Quantized

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MANY = Layer(T=100, E=3, K=2, H=256, I=128, dtype=torch.bfloat16)
PREFILLED = {
    "int4": Quantized("int4_g32", layer=MANY),
    "zero_points": Quantized("int4_g128_zp", layer=replace(MANY, T=350)),
    "gpt_oss": Quantized(
        "mxfp4", layer=replace(MANY, activation=MoEActivation.SWIGLUOAI, bias=True, H=288, I=160)
    ),
    "no_gate": Quantized("nvfp4", layer=replace(MANY, activation=MoEActivation.RELU2_NO_MUL)),
    "few": Quantized("int4_g32", layer=replace(MANY, T=60)),
    # So few that streaming kernels could read them, too.
    "fewest": Quantized("mxfp4", layer=replace(MANY, T=24)),
    "map": Quantized("int8_channel", layer=replace(MANY, T=300, E=8, local=3)),
    "weight_on_input": Quantized(
        "fp8_block", layer=replace(MANY, T=200, K=1, weight_on_input=True)
    ),
}


@pytest.fixture
def prefilled(monkeypatch):
    """The slots per block of each launch."""
    ran, launcher = [], hopper_quantized.mixed_prefill

    def run(layer, tiles, *rounding):
        ran.append(tiles.gemm1.slots)
        launcher(layer, tiles, *rounding)

    monkeypatch.setattr(hopper_quantized, "mixed_prefill", run)
    monkeypatch.setattr(hopper_quantized, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(hopper_quantized, "multiprocessors_of", lambda device: 132)
    return ran


def error(case, experts=HopperQuantizedExperts):
    tensors = case.layer.tensors()
    out, expected = case.run(tensors, experts).double(), case.expected(tensors)
    assert not out.isnan().any()
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", PREFILLED)
def test_many_rows_fill_tiles(name, prefilled):
    assert error(PREFILLED[name]) < 6e-3
    assert prefilled == [{"zero_points": 256, "few": 64, "fewest": 64}.get(name, 128)]


def test_int4_streams_where_others_begin_to_fill_tiles(prefilled):
    assert error(Quantized("int4_g128", layer=replace(MANY, T=24))) < 6e-3
    assert prefilled == []


def test_tiles_may_be_given(prefilled, monkeypatch):
    tile, tail = MixedPrefillTile(128, 256, 1, 2, 4), MixedPrefillTile(192, 128, 2, 2, 4)
    tiles = MixedPrefillTiles(tile, tile, (tail, tail))
    monkeypatch.setattr(HopperQuantizedExperts, "mixed_tiles", tiles)
    assert error(PREFILLED["int4"]) < 6e-3
    assert prefilled == [256]


@pytest.mark.parametrize(
    "case",
    [
        Quantized("int4_g32", layer=replace(MANY, dtype=torch.float16)),
        Quantized("int8_channel", layer=replace(MANY, I=24)),
    ],
    ids=["fp16", "narrow"],
)
def test_the_rest_goes_the_triton_experts_way(case, prefilled):
    assert error(case) < 6e-3
    assert not prefilled


ROUNDED = {
    "nvfp4": Quantized("nvfp4", keys.NVFP4_DYNAMIC, MANY),
    "mxfp4_bias": Quantized(
        "mxfp4",
        keys.MXFP4_DYNAMIC,
        replace(MANY, activation=MoEActivation.SWIGLUOAI, bias=True, H=288, I=160),
    ),
    "mxfp8": Quantized("mxfp8", keys.MXFP8_DYNAMIC, MANY),
    "int4_by_fp8_map": Quantized(
        "int4_g128", keys.FP8_DYNAMIC_TOKEN, replace(MANY, T=300, E=8, local=3)
    ),
    "int4_by_one_scale": Quantized("int4_channel", keys.FP8_STATIC_TENSOR, MANY),
    "first_rows_alone": Quantized("mxfp4", keys.MXFP8_DYNAMIC, MANY, only="w1"),
    "second_rows_alone": Quantized("mxfp4", keys.MXFP8_DYNAMIC, MANY, only="w2"),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_many_rounded_rows_fill_tiles_as_floats(name, prefilled):
    """Those that enter one product, or both: neither is left as it comes."""
    case = ROUNDED[name]
    tensors = case.layer.tensors()
    out, computed = case.run(tensors, HopperEmulatedExperts), case.expected(tensors)
    exact = replace(case, rows=None).expected(tensors)
    assert len(prefilled) == 1
    assert_no_worse(name, out, computed.to(out.dtype), exact)
    assert relative_error(out, computed).frobenius < 0.8 * relative_error(out, exact).frobenius


@pytest.mark.parametrize(
    "case",
    [
        Quantized("int4_g32_act_order", layer=MANY, one_order=True),
        Quantized("int8_g32_act_order", layer=replace(MANY, E=8, local=3, T=300), one_order=True),
        Quantized("int4_g128", layer=MANY, down="int4_g32_zp_act_order"),
        Quantized("int4_g128_act_order", keys.MXFP8_DYNAMIC, MANY, one_order=True),
    ],
    ids=["int4", "bytes_map", "down_alone", "rounded"],
)
def test_many_rows_follow_sorted_columns(case, prefilled):
    tensors = case.layer.tensors()
    experts = HopperQuantizedExperts if case.rows is None else HopperEmulatedExperts
    out = case.runner(tensors, experts, prepare=True)().double()
    expected = case.expected(tensors)
    assert len(prefilled) == 1
    assert float((out - expected).norm() / expected.norm()) < (6e-3 if case.rows is None else 3e-2)


@pytest.mark.parametrize("fmt", ["fp8_tensor", "int4_g128"])
def test_one_dynamic_scale_for_all_rows_goes_another_way(fmt, prefilled):
    case = Quantized(fmt, keys.FP8_DYNAMIC_TENSOR, MANY)
    error(case, HopperEmulatedExperts)
    assert not prefilled
    pairs = HopperEmulatedExperts.capabilities().weight_formats
    assert keys.FP8_DYNAMIC_TENSOR not in {rows for _, rows in pairs}


def test_int4_meets_fp8_rows_where_fp8_is_multiplied(monkeypatch):
    """Groups of 32 columns, whose products are too small for that, are multiplied here; rows of
    int8, which would notice that act is in bf16 before, are not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(hopper_quantized, "unmet_by_hopper", lambda moe: None)
    moe = replace(MANY.config(), device=torch.device("cuda"))
    for name, rows, able in (
        ("int4_g128", keys.FP8_DYNAMIC_TOKEN, False),
        ("int4_g32", keys.FP8_DYNAMIC_TOKEN, True),
        ("int4_g128", keys.INT8_DYNAMIC_TOKEN, False),
        ("mxfp8", keys.MXFP8_DYNAMIC, True),
    ):
        given = moe, format_named(name).key, rows, HopperEmulatedExperts.activation_format()
        assert HopperEmulatedExperts.is_supported_config(*given)[0] is able, name
