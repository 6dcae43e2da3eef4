"""Act-order weights on Triton: sorted once while loading, or read through their table."""

from dataclasses import replace

import pytest
import torch

from expert_layers import Layer
from fusedmoe import MoEOptions
from fusedmoe.activation import MoEActivation
from fusedmoe.experts import triton_quantized
from fusedmoe.experts.act_order import room_on, sorted_operands
from fusedmoe.experts.triton_quantized import TritonEmulatedExperts, TritonQuantizedExperts
from fusedmoe.experts.triton_quantized_batched import BatchedTritonQuantizedExperts
from fusedmoe.kernels.gather_columns import gather_columns, gather_columns_reference
from fusedmoe.quantization.keys import FP8_DYNAMIC_TOKEN
from gemm_oracle import assert_right
from quantized_bodies import triton_gather, triton_gemm, triton_packed
from quantized_experts import Quantized

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = float("nan")
LAYER = Layer(H=64, I=96)
CASES = {
    "plain": Quantized("int4_g32_act_order", layer=LAYER, one_order=True),
    "zero_points_bias": Quantized(
        "int4_g32_zp_act_order", layer=replace(LAYER, bias=True), one_order=True
    ),
    "interleaved": Quantized(
        "int4_g32_act_order",
        layer=replace(LAYER, activation=MoEActivation.SWIGLUOAI, bias=True),
        one_order=True,
    ),
    "no_gate_map": Quantized(
        "int4_g16_act_order",
        layer=replace(LAYER, activation=MoEActivation.RELU2_NO_MUL, E=8, local=3),
    ),
    "int8": Quantized("int8_g32_act_order", layer=LAYER, one_order=True),
    "int8_zero_points": Quantized("int8_g32_zp_act_order", layer=LAYER, one_order=True),
    "up_alone": Quantized("int4_g32_act_order", layer=LAYER, down="int8_channel", one_order=True),
    "down_alone": Quantized("int4_g32", layer=LAYER, down="int4_g32_act_order"),
    "down_of_blocks": Quantized("q4_k", layer=replace(LAYER, H=256), down="int4_g32_act_order"),
    "gate_and_up_apart": Quantized("int4_g32_act_order", layer=LAYER),
    "one_token": Quantized("int4_g32_act_order", layer=replace(LAYER, T=1, E=16), one_order=True),
    "batch_invariant": Quantized(
        "int4_g32_act_order",
        layer=replace(LAYER, options=MoEOptions(batch_invariant=True)),
        one_order=True,
    ),
    "fp16": Quantized(
        "int4_g32_act_order", layer=replace(LAYER, dtype=torch.float16), one_order=True
    ),
}
# What is sorted: the columns of w1, those of w2.
SORTED = {"up_alone": (True, False), "down_alone": (False, True), "down_of_blocks": None} | {
    "gate_and_up_apart": (False, True)
}


@pytest.fixture
def kernels(monkeypatch, bodies):
    if bodies == "torch":
        return
    from fusedmoe.kernels import gather_columns, grouped_gemm_packed, grouped_gemm_quantized

    monkeypatch.setattr(grouped_gemm_quantized, "quantized_gemm_reference", triton_gemm)
    monkeypatch.setattr(grouped_gemm_packed, "packed_gemm_reference", triton_packed)
    monkeypatch.setattr(gather_columns, "gather_columns_reference", triton_gather)


def loaded(case, experts_class=TritonQuantizedExperts):
    """(run, experts, tensors) of a layer whose weights have been prepared."""
    tensors = case.layer.tensors()
    run = case.runner(tensors, experts_class, prepare=True)
    return run, run.experts, tensors


@pytest.mark.parametrize("name", CASES)
def test_sorted_layers(name, kernels):
    case = CASES[name]
    run, experts, tensors = loaded(case)
    tolerance = 3e-3 if case.layer.dtype == torch.float16 else 2e-5
    assert_right(run(), case.expected(tensors), tolerance)
    wanted = SORTED.get(name, (True, True))
    found = experts._sorted
    assert (found is None) == (wanted is None)
    if wanted is not None:
        assert (found.order is not None) == wanted[0]
        assert (found.w2.data.data_ptr() != run.weights[1].data.data_ptr()) == wanted[1]


@pytest.mark.parametrize("name", CASES)
def test_sorted_batches(name, kernels):
    case = CASES[name]
    run, _, tensors = loaded(case, BatchedTritonQuantizedExperts)
    tolerance = 3e-3 if case.layer.dtype == torch.float16 else 2e-5
    assert_right(run(), case.expected(tensors), tolerance)


def test_ids_of_no_expert_nan_rows_and_no_tokens(kernels):
    case = replace(CASES["plain"], layer=replace(LAYER, T=6))
    run, _, tensors = loaded(case)
    tensors["topk_ids"][0], tensors["topk_ids"][1, 0] = -1, -1
    clean = run()
    assert (clean[0] == 0).all()
    assert_right(clean, case.expected(tensors), 2e-5)
    tensors["hidden_states"][3] = NAN
    dirty = run()
    assert dirty[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert dirty[others].equal(clean[others])
    empty = loaded(replace(case, layer=replace(LAYER, T=0)))[0]
    assert empty().shape == (0, 64)


def test_weights_written_since_are_read_as_they_are():
    case = CASES["plain"]
    run, _, tensors = loaded(case)
    before = run()
    run.weights[1].data.random_(0, 256)
    after = run()
    assert not after.equal(before)
    fresh = case.runner(tensors, weights=run.weights, prepare=True)
    assert_right(after, fresh().double(), 2e-5)


def test_a_bias_written_since_is_read_as_it_is():
    case = CASES["zero_points_bias"]
    run, _, tensors = loaded(case)
    before = run()
    tensors["w1_bias"].add_(1)
    after = run()
    assert not after.equal(before)
    assert_right(after, case.expected(tensors), 2e-5)


def test_a_copy_made_again_takes_no_more_memory(monkeypatch):
    run, experts, _ = loaded(CASES["plain"])
    like = torch.empty_like
    made = []
    monkeypatch.setattr(torch, "empty_like", lambda x: made.append(x.shape) or like(x))
    old = experts._sorted
    again = sorted_operands(
        experts.operands(*(w.data for w in run.weights), *experts._seen[2:]), old
    )
    assert not made
    assert again.w1.data is old.w1.data
    assert again.w2.data is old.w2.data


@pytest.mark.parametrize("name", ["zero_points_bias", "down_alone"])
def test_weights_prepared_again_keep_their_place(name):
    """Experts that moved in while a graph was captured: it goes on reading the same memory."""
    case = CASES[name]
    run, experts, tensors = loaded(case)
    before = experts._sorted
    other = case.weights({n: t.flip(0) if n in ("w1", "w2") else t for n, t in tensors.items()})
    for mine, theirs in zip(run.weights, other, strict=True):
        for part, tensor in theirs.parts().items():
            getattr(mine, part).copy_(tensor)
    run.prepare()
    assert experts._sorted is before
    assert_right(run(), case.runner(tensors, weights=other)().double(), 2e-5)


def test_without_memory_and_emulated_the_table_is_read(monkeypatch):
    _, experts, _ = loaded(replace(CASES["plain"], rows=FP8_DYNAMIC_TOKEN), TritonEmulatedExperts)
    assert experts._sorted is None
    monkeypatch.setattr(triton_quantized, "room_on", lambda device, size: False)
    run, experts, tensors = loaded(CASES["plain"])
    assert experts._sorted is None
    assert_right(run(), CASES["plain"].expected(tensors), 2e-5)


def test_a_copy_leaves_a_quarter_of_a_gpu_free(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2)
    assert room_on(device, 15)
    assert not room_on(device, 16)
    assert room_on(torch.device("cpu"), 1 << 60)


def test_groups_that_a_rank_has_a_part_of_stay_in_their_table():
    """Half of w2's columns, of any group: nothing to sort there, w1 is sorted all the same."""
    case = CASES["plain"]
    run, experts, _ = loaded(case)
    w1, w2 = run.weights
    operands = experts.operands(w1.data, w2.data, case.layer.activation, torch.float32)
    half = replace(
        w2,
        data=w2.data[..., :24].contiguous(),
        group_index=w2.group_index[..., :48].contiguous(),
        shape=(*w2.shape[:2], 48),
    )
    found = sorted_operands(replace(operands, w2=half))
    assert found.w2 is half
    assert found.order is not None
    assert not found.w1.format.act_order
    # Values stay with their columns: even ones first, as rows will be gathered.
    order = found.order.view(-1, 2, 32).transpose(1, 2).flatten(1).long()
    values = w1.dequantize(torch.float64)
    assert found.w1.dequantize(torch.float64).equal(
        values.gather(2, order[:, None].expand_as(values))
    )


@pytest.mark.parametrize("experts", [TritonQuantizedExperts, BatchedTritonQuantizedExperts])
def test_compiled_without_graph_breaks(experts):
    case = CASES["zero_points_bias"]
    tensors = case.layer.tensors()
    eager = case.runner(tensors, experts, prepare=True)
    assert case.runner(tensors, experts, compiled=True, prepare=True)().equal(eager())


def test_gathering_and_its_errors():
    x, order = torch.randn(3, 70), torch.stack([torch.randperm(70) for _ in range(4)]).int()
    ids = torch.tensor([0, 5, 9, -1, 3, 2], dtype=torch.int32)
    here = torch.tensor([2, 0, 1, -1, 0, 3], dtype=torch.int32)
    for expert_map in (None, here):
        found, expected = torch.full((2, 6, 70), 7.0)
        triton_gather(x, order, found, ids, expert_map)
        gather_columns_reference(x, order, expected, ids, expert_map)
        assert found.equal(expected)
    assert (expected[[2, 3, 4]] == 7).all()
    assert expected[1].equal(x[0, order[3].long()])

    def refused(message, x=x, order=order, out=found, ids=ids):
        with pytest.raises(ValueError, match=message):
            gather_columns(x, order, out, ids)

    refused("int32", order=order.long())
    refused(r"expected \(6, 70\)", out=found[:5])
    refused("dense", x=x.t().contiguous().t())
    refused("no multiple", x=x[:2].repeat(2, 1), out=found, ids=ids)
