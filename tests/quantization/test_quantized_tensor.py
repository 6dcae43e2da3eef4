"""QuantizedTensor and QuantFormat: what they accept, name and refuse, and keys that match."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedmoe import QuantFormat
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.formats.act_order import sort_columns, unsort_columns
from fusedmoe.quantization.formats.groups import columns_of
from fusedmoe.quantization.keys import (
    ANY,
    FP8_DYNAMIC_TOKEN,
    PER_CHANNEL,
    PER_TENSOR,
    GroupShape,
    QuantKey,
    accepts,
)
from quantized_layers import FORMATS, draw


@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_one_expert_are_views(name):
    q = draw(name, 3, 8, 256, shards=2)
    one = q[1]
    assert one.shape == (8, 256)
    for part, tensor in one.parts().items():
        assert tensor.data_ptr() == getattr(q, part)[1].data_ptr()
    assert torch.equal(one.dequantize(torch.float32), q.dequantize(torch.float32)[1])
    assert q.nbytes == sum(part.nbytes for part in q.parts().values())
    assert torch.equal(q.to("cpu").dequantize(), q.dequantize())
    assert q.map(torch.clone).scale.data_ptr() != q.scale.data_ptr()


def test_dequantizing_in_fp64_is_exact():
    q = draw("fp8_channel", 2, 4, 32)
    exact = q.data.double() * q.scale.double()
    assert torch.equal(q.dequantize(torch.float64), exact)
    assert torch.equal(q.dequantize(torch.float32), q.data.float() * q.scale)
    assert q.dequantize().dtype == q.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        (
            "int4_g32",
            "scale",
            lambda t: None,
            r"scale of int4_g32 .*expected \[2, 8, 4\], found no",
        ),
        ("int4_g32", "scale", lambda t: t[..., :2], r"shape \[2, 8, 4\], found \[2, 8, 2\]"),
        ("int4_g32", "data", lambda t: t[..., :3], r"data of .*\[2, 8, 64\], found \[2, 8, 3\]"),
        ("int4_g32", "data", lambda t: t.char(), r"data .* expected torch.uint8, found torch.int8"),
        ("int4_g32_zp", "zero_point", lambda t: None, r"zero_point of int4_g32_zp .*found none"),
        ("int4_g32", "zero_point", lambda t: torch.zeros(2, 8, 4), "zero_point .*expected none"),
        ("mxfp4", "scale", lambda t: t.float(), "expected torch.uint8, found torch.float32"),
        ("nvfp4", "scale2", lambda t: None, r"scale2 of nvfp4 .*expected \[2, 2\], found none"),
        ("fp8_tensor", "scale", lambda t: t[:, :1], r"expected shape \[2, 2\], found \[2, 1\]"),
        ("int4_g32_act_order", "group_index", lambda t: t.long(), "torch.int32, found torch.int64"),
        (
            "int4_g32_act_order",
            "group_index",
            lambda t: t[:, :1],
            r"\[2, 2, 128\], found \[2, 1, 1",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(name, part, change, message):
    q = draw(name, 2, 8, 128, shards=2)
    value = getattr(q, part)
    with pytest.raises(ValueError, match=message):
        replace(q, **{part: change(value)})


@pytest.mark.parametrize(
    ("name", "part", "bad"),
    [
        ("fp8_block", "scale", torch.inf),
        ("int8_channel", "scale", torch.nan),
        ("int4_g32", "scale", -torch.inf),
        ("mxfp4", "scale", 255),
        ("nvfp4", "scale", torch.nan),
        ("nvfp4", "scale2", torch.nan),
    ],
)
def test_scales_that_are_not_finite_are_found(name, part, bad):
    q = draw(name, 2, 8, 128)
    q.check_values()
    getattr(q, part).view(2, -1)[1, 0] = bad
    with pytest.raises(ValueError, match=rf"layers.3.w2: 1 of \d+ numbers of its {part} are not"):
        q.check_values("layers.3.w2")


@pytest.mark.parametrize("bad", [-1, 4])
def test_group_indices_out_of_range_are_found(bad):
    q = draw("int4_g32_act_order", 2, 8, 128)
    q.check_values()
    q.group_index[1, 0, 5] = bad
    with pytest.raises(ValueError, match=r"w: group_index lies in .*, not in \[0, 4\)"):
        q.check_values("w")


@pytest.mark.parametrize("byte", [0x80, 0xB8])
def test_a_scale_of_nvfp4_has_no_sign(byte):
    q = draw("nvfp4", 2, 8, 32)
    q.check_values()
    q.scale.view(torch.uint8)[1, 3, 1] = byte
    with pytest.raises(ValueError, match=r"w: 1 of 32 numbers of its scale are negative"):
        q.check_values("w")


@pytest.mark.parametrize("name", ["int4_g32_act_order", "int8_g32_zp_act_order"])
def test_sorted_columns_mean_the_same(name):
    q = draw(name, 2, 8, 128)
    values, fresh = q.dequantize(torch.float64), q.map(torch.clone)
    assert sort_columns(q)
    assert (q.group_index < 0).all()
    assert not q.data.equal(fresh.data)
    q.check_values()
    assert q.dequantize(torch.float64).equal(values)
    unsort_columns(q[1])
    assert q.dequantize(torch.float64).equal(values)
    assert sort_columns(q)  # one expert of two
    for expert in range(2):
        unsort_columns(q[expert])
        unsort_columns(q[expert])
    assert all(part.equal(fresh.parts()[n]) for n, part in q.parts().items())


def test_columns_of_a_single_group_are_sorted_too():
    q = draw("int4_g32_act_order", 2, 8, 32)
    values = q.dequantize(torch.float64)
    assert sort_columns(q)
    assert (q.group_index < 0).all()
    assert q.dequantize(torch.float64).equal(values)


def test_no_column_is_looked_for_outside_the_matrix():
    assert columns_of(torch.tensor([[~9, ~2, ~0], [1, 0, 2]])).tolist() == [[2, 2, 0], [0, 1, 2]]


def test_columns_of_parts_of_groups_and_of_shards_that_disagree_stay():
    apart = draw("int4_g32_act_order", 2, 8, 128, shards=2)
    uneven = draw("int4_g32_act_order", 2, 8, 128)
    uneven.group_index[1, 0, :33] = 0
    for q in (apart, uneven):
        before = q.data.clone()
        assert not sort_columns(q)
        assert q.data.equal(before)


def test_tables_of_sorted_columns_are_checked():
    q = draw("int4_g32_act_order", 2, 8, 128)
    sort_columns(q)
    q.group_index[1, 0, 3] = q.group_index[1, 0, 4]
    with pytest.raises(ValueError, match="group_index lies in"):
        q.check_values()
    parts = {"data": q.data[0, :, :32], "group_index": ~torch.arange(64).int()[None]}
    with pytest.raises(ValueError, match="64 sorted columns for 4 groups of 32"):
        replace(q[0], shape=(8, 64), **parts).check_values()


def test_formats_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="unknown element type 'int3'"):
        QuantFormat(element="int3", group=PER_TENSOR)
    with pytest.raises(ValueError, match="act-order needs groups"):
        QuantFormat(element="int4", group=PER_CHANNEL, act_order=True)
    with pytest.raises(ValueError, match="unknown weight dtype int3"):
        QuantFormat.of("int3", PER_TENSOR, torch.float32)
    with pytest.raises(ValueError, match="mxfp4 weights have no scales in torch"):
        QuantFormat.of("mxfp4", GroupShape(1, 32), torch.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found_again_by_its_dtype(name):
    fmt = format_named(name)
    again = QuantFormat.of(
        fmt.key_dtype,
        fmt.group,
        fmt.scale_dtype,
        symmetric=fmt.symmetric,
        act_order=fmt.act_order,
    )
    assert again == fmt
    assert fmt.bits in (4, 6, 8)


def test_keys_match_patterns():
    any_group = QuantKey("int4", True, GroupShape(1, ANY))
    assert any_group.accepts(format_named("int4_g32").key)
    assert any_group.accepts(format_named("int4_g128").key)
    for other in ("int4_channel", "int4_g32_zp", "int4_g32_act_order", "int8_g32", "mxfp4"):
        assert not any_group.accepts(format_named(other).key), other
    assert accepts(None, None)
    assert not accepts(None, any_group)
    assert not accepts(any_group, None)
    blocks = QuantKey(torch.float8_e4m3fn, True, GroupShape(ANY, ANY))
    assert blocks.accepts(format_named("fp8_block_64x32").key)
    assert not blocks.accepts(format_named("fp8_tensor").key)


def test_keys_read_well():
    assert str(FP8_DYNAMIC_TOKEN) == "float8_e4m3fn per row dynamic"
    assert str(format_named("int4_g32_zp").key) == "int4 per 1x32 static with zero points"
    assert str(format_named("mxfp4").key) == "mxfp4 per 1x32 static e8m0 scales"
