"""Weight formats: what is packed comes back, and rounding is what each file says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedmoe.quantization.formats import (
    MXFP4,
    MXFP8,
    NVFP4,
    codec,
    format_named,
    fp8_block,
    int4_group,
    quantize,
    scale_values,
    swizzle_scales,
    unswizzle_scales,
)
from fusedmoe.quantization.formats.e8m0 import ceil_e8m0, decode_e8m0, floor_e8m0
from fusedmoe.quantization.formats.int4 import pack_nibbles, unpack_nibbles
from fusedmoe.quantization.formats.minifloat import E2M1, E2M3, E3M2
from fusedmoe.quantization.formats.mxfp6 import pack_sextets, unpack_sextets
from fusedmoe.quantization.tensor import QuantizedTensor
from quantized_layers import FORMATS, draw

quick = settings(max_examples=25, deadline=None)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also of floats of one byte, which compare bit by bit."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_names_name_formats():
    for name in FORMATS:
        assert format_named(name).name == name
    with pytest.raises(ValueError, match="unknown weight format 'int3'"):
        format_named("int3")


@quick
@given(st.data())
def test_packing_is_exact_both_ways(data):
    K = 12 * data.draw(st.integers(1, 5))
    seed = data.draw(st.integers(0, 2**31))
    gen = torch.Generator().manual_seed(seed)
    for bits, pack, unpack, per in (
        (4, pack_nibbles, unpack_nibbles, 2),
        (6, pack_sextets, unpack_sextets, 4 / 3),
    ):
        codes = torch.randint(0, 1 << bits, (3, K), generator=gen, dtype=torch.uint8)
        packed = pack(codes)
        assert packed.shape == (3, int(K / per))
        assert torch.equal(unpack(packed), codes)
        stored = torch.randint(0, 256, packed.shape, generator=gen, dtype=torch.uint8)
        assert torch.equal(pack(unpack(stored)), stored)


def test_what_lies_where_in_a_byte():
    assert pack_nibbles(torch.tensor([0x1, 0xF], dtype=torch.uint8)).tolist() == [0xF1]
    codes = torch.tensor([0b000001, 0b000010, 0b000100, 0b111111], dtype=torch.uint8)
    number = 0b000001 | 0b000010 << 6 | 0b000100 << 12 | 0b111111 << 18
    assert bytes(pack_sextets(codes).tolist()) == number.to_bytes(3, "little")


def test_small_floats_have_the_values_of_the_standard():
    assert E2M1.magnitudes() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E3M2.max, E3M2.magnitudes()[1], E3M2.magnitudes()[4]) == (28.0, 0.0625, 0.25)
    assert (E2M3.max, E2M3.magnitudes()[1], E2M3.magnitudes()[8]) == (7.5, 0.125, 1.0)


@pytest.mark.parametrize("kind", [E2M1, E3M2, E2M3], ids=["e2m1", "e3m2", "e2m3"])
def test_small_floats_round_to_the_nearest_ties_to_even_and_saturate(kind):
    codes = torch.arange(1 << kind.bits, dtype=torch.uint8)
    values = kind.decode(codes)
    assert torch.equal(kind.encode(values), codes)
    assert kind.decode(codes, torch.float64).dtype == torch.float64
    up = values[: len(codes) // 2]
    middles = (up[1:] + up[:-1]) / 2
    even = codes[: len(up) - 1] + codes[: len(up) - 1] % 2
    assert torch.equal(kind.encode(middles), even)
    just = torch.nextafter(middles, torch.tensor(torch.inf))
    assert torch.equal(kind.encode(just), codes[1 : len(up)])
    top = torch.tensor([kind.max, kind.max * 1.01, 1e30, torch.inf])
    assert (kind.decode(kind.encode(top)) == kind.max).all()
    assert (kind.decode(kind.encode(-top)) == -kind.max).all()
    with pytest.raises(ValueError, match="1 values to be encoded are NaN"):
        kind.encode(torch.tensor([1.0, torch.nan]))
    assert kind.round(torch.tensor(torch.nan)).isnan()


def test_powers_of_two():
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode_e8m0(codes, torch.float64)
    assert values[127] == 1
    assert values[0] == 2.0**-127
    assert values[255].isnan()
    assert torch.equal(values[1:255] / values[:254], torch.full((254,), 2.0, dtype=torch.float64))
    assert decode_e8m0(codes)[0] == 2.0**-127
    amax = torch.tensor([0.0, 6.0, 8.0, 7.99, 448.0, 449.0, torch.inf, torch.nan])
    assert floor_e8m0(amax, 2).tolist() == [127, 127, 128, 127, 133, 133, 255, 255]
    assert ceil_e8m0(amax, 448.0).tolist() == [127, 121, 122, 122, 127, 128, 255, 255]
    beyond = torch.tensor([1e-300, 1e300], dtype=torch.float64)
    assert floor_e8m0(beyond, 2).tolist() == ceil_e8m0(beyond, 448.0).tolist() == [0, 254]


@pytest.mark.parametrize("interleaved", [False, True], ids=["stacked", "interleaved"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_values_quantize_to_themselves(name, interleaved):
    q = draw(name, 3, 2 * 36, 256, shards=2, interleaved=interleaved)
    values = q.dequantize(torch.float64)
    layout = {"shards": 2, "interleaved": interleaved, "group_index": q.group_index}
    again = quantize(values, q.format, like=q, **layout)
    for part, tensor in q.parts().items():
        assert same_bytes(getattr(again, part), tensor), part
    if q.format.symmetric:  # a zero point and its scale are not unique
        free = quantize(values, q.format, **layout)
        assert torch.equal(free.dequantize(torch.float64), values)


@pytest.mark.parametrize("name", FORMATS)
def test_every_stored_number_comes_back(name):
    """Random bytes, not only those that our own rounding gives."""
    q = draw(name, 2, 8, 256)
    gen = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, q.data.shape, generator=gen, dtype=torch.uint8)
    if q.format.element == "e4m3":
        raw[(raw & 127) == 127] = 0  # NaN
    q.data.view(torch.uint8).copy_(raw)
    again = quantize(q.dequantize(torch.float64), q.format, like=q, group_index=q.group_index)
    assert torch.equal(again.dequantize(torch.float64), q.dequantize(torch.float64))
    zeros = q.dequantize(torch.float64) == 0  # signs of zero are not kept by integers
    assert same_bytes(again.data, q.data) or zeros.any()


@pytest.mark.parametrize("name", [*FORMATS, "nf4", "iq4_nl"])
def test_zero_rows_and_zero_weights_stay_zero(name):
    fmt = format_named(name)
    index = torch.arange(128).div(32).int().expand(2, 1, 128).flip(-1) if fmt.act_order else None
    weight = torch.randn(2, 16, 128)
    weight[0, 3] = 0
    weight[1] = 0
    q = quantize(weight, fmt, group_index=index)
    assert (q.dequantize()[0, 3] == 0).all()
    assert (q.dequantize()[1] == 0).all()
    assert scale_values(q).isfinite().all()
    q.check_values()


@pytest.mark.parametrize("name", ["fp8_channel", "fp8_block", "int8_channel", "iq4_nl"])
def test_rows_too_small_for_a_scale_become_zero(name):
    weight = torch.zeros(1, 1, 128)
    weight[..., ::2] = 1e-44
    assert (quantize(weight, format_named(name)).dequantize(torch.float32) == 0).all()


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("fp8_channel", 0.03),
        ("fp8_block", 0.03),
        ("int8_channel", 0.01),
        ("int4_g32", 0.11),
        ("int4_g32_zp", 0.10),
        ("int4_g32_act_order", 0.11),
        ("mxfp4", 0.13),
        ("mxfp8", 0.03),
        ("mxfp6_e3m2", 0.06),
        ("mxfp6_e2m3", 0.04),
        ("nvfp4", 0.11),
    ],
)
def test_rounding_errors_are_those_of_the_format(name, bound):
    weight = torch.randn(2, 64, 256)
    fmt = format_named(name)
    index = (torch.randperm(256) // 32).int().expand(2, 1, 256) if fmt.act_order else None
    error = quantize(weight, fmt, group_index=index).dequantize() - weight
    assert bound / 3 < error.norm() / weight.norm() < bound


def test_integers_round_ties_to_even_and_saturate():
    scale = torch.ones(1, 1)
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0, 0.0]])
    for name, top, low in (("int8_channel", 127, -128), ("int4_channel", 7, -8)):
        fmt = format_named(name)
        like = QuantizedTensor(
            format=fmt,
            data=torch.zeros(1, fmt.data_columns(8), dtype=fmt.dtype),
            scale=scale,
            shape=(1, 8),
        )
        got = quantize(weight, fmt, like=like).dequantize(torch.float32)
        assert got.tolist() == [[0.0, 2.0, 2.0, 0.0, -2.0, top, low, 0.0]]


def test_fp8_rounds_ties_to_even_and_saturates():
    fp8 = codec(format_named("fp8_tensor"))
    x = torch.tensor([1.0625, 1.1875, 448.0, 1e9, -torch.inf, torch.nan])
    got = fp8.decode(fp8.encode(x), torch.float32)
    assert got[:5].tolist() == [1.0, 1.25, 448.0, 448.0, -448.0]
    assert got[5].isnan()


def test_scales_use_the_whole_range():
    q = quantize(torch.tensor([[7.0, -8.0, 1.0, 0.0]]), int4_group(-1, scale_dtype=torch.float32))
    assert q.scale.item() == 1
    assert q.dequantize(torch.float32).tolist() == [[7.0, -8.0, 1.0, 0.0]]
    weight = torch.tensor([[3.0, 4.5, 6.0, 3.75]])
    q = quantize(weight, int4_group(-1, symmetric=False, scale_dtype=torch.float32))
    assert q.zero_point.item() == 0
    assert torch.equal(q.dequantize(torch.float32), weight.div(0.4).round() * q.scale)


def test_blocks_of_gate_and_up_are_cut_separately():
    """A block that would span both shards ends at the first one's edge."""
    weight = torch.ones(1, 2 * 40, 64)
    weight[:, 40:] = 100.0
    q = quantize(weight, fp8_block(32, 32), shards=2)
    assert q.scale.shape == (1, 4, 2)
    assert torch.equal(q.dequantize(torch.float32), weight)
    assert torch.equal((q.scale * 448)[0, :, 0], torch.tensor([1.0, 1.0, 100.0, 100.0]))
    mixed = weight.unflatten(1, (2, 40)).transpose(1, 2).reshape(1, 80, 64)
    q = quantize(mixed, fp8_block(32, 32), shards=2, interleaved=True)
    assert torch.equal((q.scale * 448)[0, :, 0], torch.tensor([1.0, 100.0, 1.0, 100.0]))
    assert torch.equal(q.dequantize(torch.float32), mixed)


def test_shards_have_scales_of_their_own():
    weight = torch.cat([torch.ones(2, 8, 32), torch.full((2, 8, 32), 64.0)], 1)
    for fmt in (format_named("fp8_tensor"), NVFP4):
        q = quantize(weight, fmt, shards=2)
        whole = q.scale2 if fmt.second_scale else q.scale
        assert whole.shape == (2, 2)
        assert torch.allclose(whole[:, 1] / whole[:, 0], torch.tensor(64.0))
        assert torch.allclose(q.dequantize(torch.float32), weight)


def test_mx_scales_are_those_of_the_groups():
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 32] = 6.0, 0.75
    assert quantize(weight, MXFP4).scale.tolist() == [[127, 124]]
    assert quantize(weight, MXFP8).scale.tolist() == [[121, 118]]


@quick
@given(st.integers(1, 300), st.integers(1, 20))
def test_tiled_scales_come_back(rows, columns):
    scale = torch.arange(rows * columns).remainder(256).to(torch.uint8).view(1, rows, columns)
    tiled = swizzle_scales(scale)
    assert tiled.shape == (1, -(-rows // 128) * 128 * -(-columns // 4) * 4)
    assert torch.equal(unswizzle_scales(tiled, rows, columns), scale)
    fp8 = scale.view(torch.float8_e4m3fn)
    assert unswizzle_scales(swizzle_scales(fp8), rows, columns).dtype == fp8.dtype


def test_tiled_scales_of_another_size_are_refused():
    with pytest.raises(ValueError, match="128 x 5: expected 1024 numbers, found 512"):
        unswizzle_scales(torch.zeros(512, dtype=torch.uint8), 128, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantize(torch.ones(4, 40), MXFP4), "32 columns do not divide 40"),
        (lambda: quantize(torch.ones(4, 5), int4_group(-1)), "5 columns are no multiple of the 2"),
        (lambda: quantize(torch.full((4, 32), torch.nan), MXFP4), "128 of 128 weights .* finite"),
        (lambda: quantize(torch.ones(3, 32), fp8_block(), shards=2), "3 rows are not 2 equal"),
        (lambda: quantize(torch.ones(4, 64), format_named("int4_g32_act_order")), "group_index"),
        (lambda: int4_group(31), "groups of 31 columns cut the 2 columns"),
        (lambda: fp8_block(0, 128), "0 rows and 128 columns"),
    ],
)
def test_sizes_a_format_cannot_hold_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_groups_of_unequal_size_are_refused():
    index = torch.zeros(1, 1, 64, dtype=torch.int32)
    with pytest.raises(ValueError, match="each of 2 groups 32 columns"):
        quantize(torch.ones(1, 4, 64), format_named("int4_g32_act_order"), group_index=index)
