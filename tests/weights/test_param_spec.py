"""Cutting and filling one expert's tensors: shards, tensor-parallel ranks, padding, packing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedmoe.weights.param_spec import (
    HIDDEN,
    INTERMEDIATE,
    Axis,
    Dim,
    ExpertSizes,
    ParamSpec,
    cut_for_rank,
    load_shard,
)

W13 = ParamSpec(owner="w13", suffix="weight", axes=(INTERMEDIATE, HIDDEN))
W2 = ParamSpec(owner="w2", suffix="weight", axes=(HIDDEN, INTERMEDIATE))
W2_BIAS = ParamSpec(owner="w2", suffix="bias", axes=(HIDDEN,), rank0_only=True)


def sizes(hidden=5, intermediate=8, tp=1, pad_hidden=0, pad_intermediate=0, **more) -> ExpertSizes:
    return ExpertSizes(
        hidden=hidden,
        hidden_stored=hidden + pad_hidden,
        intermediate=intermediate,
        intermediate_stored=-(-intermediate // tp) + pad_intermediate,
        tp_size=tp,
        **more,
    )


def loaded_on_all_ranks(spec, whole, shard, layout):
    """Each rank's parameter of one expert, poisoned before loading."""
    for rank in range(layout.tp_size):
        one = replace(layout, tp_rank=rank)
        data = torch.full(spec.expert_shape(one), float("nan"))
        load_shard(data, whole, spec, shard, one, "tensor")
        yield one, data


@given(
    tp=st.integers(1, 5),
    intermediate=st.integers(1, 17),
    pad_hidden=st.integers(0, 3),
    pad_intermediate=st.integers(0, 3),
    interleaved=st.booleans(),
    shard=st.sampled_from(["w1", "w3", "w2"]),
)
def test_ranks_hold_the_whole_shard_once_and_zeros_around_it(
    tp, intermediate, pad_hidden, pad_intermediate, interleaved, shard
):
    layout = sizes(5, intermediate, tp, pad_hidden, pad_intermediate, interleaved=interleaved)
    spec = W2 if shard == "w2" else W13
    whole = torch.randn(spec.checkpoint_shape(layout)) + 10
    stored = layout.intermediate_stored
    parts = []
    for one, data in loaded_on_all_ranks(spec, whole, shard, layout):
        view = spec.shard_view(data, shard, one)
        assert not view.isnan().any()
        parts.append(view if shard == "w2" else view.T)
    joined = torch.cat(parts, dim=1)
    assert joined.shape == (5 + pad_hidden, stored * tp)
    expected = torch.zeros_like(joined)
    expected[:5, :intermediate] = whole if shard == "w2" else whole.T
    torch.testing.assert_close(joined, expected)


def test_gate_and_up_fill_halves_or_alternate_rows():
    for interleaved, rows in (
        (False, (slice(0, 4), slice(4, 8))),
        (True, (slice(0, 8, 2), slice(1, 8, 2))),
    ):
        layout = sizes(3, 4, interleaved=interleaved)
        data = torch.zeros(W13.expert_shape(layout))
        load_shard(data, torch.ones(4, 3), W13, "w1", layout, "gate")
        load_shard(data, torch.full((4, 3), 2.0), W13, "w3", layout, "up")
        assert (data[rows[0]] == 1).all()
        assert (data[rows[1]] == 2).all()


def test_without_a_gate_there_is_one_shard():
    layout = sizes(3, 4, num_w13_shards=1)
    assert W13.expert_shape(layout) == (4, 3)
    with pytest.raises(ValueError, match="w13_weight has shards w1, not w3"):
        W13.shard_view(torch.zeros(4, 3), "w3", layout)


def test_an_addend_of_the_output_is_on_rank_0_alone():
    layout = sizes(3, 4, tp=2, pad_hidden=1)
    (_, first), (_, second) = loaded_on_all_ranks(W2_BIAS, torch.ones(3), "w2", layout)
    assert first.tolist() == [1, 1, 1, 0]
    assert second.tolist() == [0, 0, 0, 0]


def test_block_scales_packed_weights_and_tensor_scales_are_only_other_specs():
    block = ParamSpec(
        owner="w13",
        suffix="weight_scale_inv",
        axes=(Axis(Dim.INTERMEDIATE, 4), Axis(Dim.HIDDEN, 4)),
        fill=1.0,
        dtype=torch.float32,
    )
    layout = sizes(10, 24, tp=3, pad_intermediate=4)  # 12 of 24 on each: ranks 0 and 1 suffice
    assert block.expert_shape(layout) == (6, 3)
    parts = loaded_on_all_ranks(block, torch.full((6, 3), 7.0), "w3", layout)
    assert [part[3:].unique().tolist() for _, part in parts] == [[7.0], [7.0], [1.0]]

    packed = ParamSpec(owner="w2", suffix="qweight", axes=(Axis(Dim.INTERMEDIATE, 8), HIDDEN))
    layout = sizes(5, 32, tp=2)
    whole = torch.arange(20.0).view(4, 5)
    parts = [data for _, data in loaded_on_all_ranks(packed, whole, "w2", layout)]
    torch.testing.assert_close(torch.cat(parts), whole)

    tensor_scale = ParamSpec(owner="w13", suffix="weight_scale", axes=(), fill=1.0)
    data = torch.zeros(tensor_scale.expert_shape(layout))
    assert data.shape == (2,)
    load_shard(data, torch.tensor([3.0]), tensor_scale, "w3", layout, "scale")
    assert data.tolist() == [0.0, 3.0]

    whole_scale = ParamSpec(
        owner="w2", suffix="scales", axes=(Axis(Dim.INTERMEDIATE, 16), HIDDEN), sharded=False
    )
    assert whole_scale.expert_shape(layout) == (2, 5)
    for _, data in loaded_on_all_ranks(whole_scale, torch.ones(2, 5), "w2", layout):
        assert (data == 1).all()


def test_a_rank_boundary_inside_a_packed_element_is_refused():
    packed = ParamSpec(owner="w2", suffix="qweight", axes=(Axis(Dim.INTERMEDIATE, 8), HIDDEN))
    with pytest.raises(ValueError, match=r"8 intermediate units .* 12 of one of 2 ranks"):
        cut_for_rank(torch.zeros(3, 5), packed, sizes(5, 24, tp=2))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(5, 8), r"gate: expected shape \(8, 5\) for w1 of w13_weight, found \(5, 8\)"),
        (torch.zeros(8, 5, 1), r"found \(8, 5, 1\)"),
        (torch.zeros(0, 5), r"found \(0, 5\)"),
        (torch.zeros(8, 5, dtype=torch.int8), "torch.int8"),
        (torch.zeros(8, 5).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name_and_shape(tensor, message):
    data = torch.zeros(W13.expert_shape(sizes()))
    with pytest.raises(ValueError, match=message):
        load_shard(data, tensor, W13, "w1", sizes(), "gate")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_wide_floating_point_is_rounded_into_the_parameter(dtype):
    data = torch.zeros(W2.expert_shape(sizes()))
    load_shard(data, torch.full((5, 8), 0.5, dtype=dtype), W2, "w2", sizes(), "down")
    assert (data == 0.5).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_stored": 4}, "4 stored hidden units cannot hold 5"),
        ({"intermediate_stored": 3}, "cannot hold 8"),
    ],
)
def test_sizes_that_cannot_hold_the_checkpoint_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(sizes(), **changes)
