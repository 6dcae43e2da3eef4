"""Act-order weights on Triton: sorted once while loading, or read through their table."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from expert_layers import Layer
from fusedmoe import MoEOptions
from fusedmoe.activation import MoEActivation
from fusedmoe.experts import triton_quantized_floating
from fusedmoe.experts.act_order import sorted_operands
from fusedmoe.experts.quantized_operands import TABLES, Operands
from fusedmoe.experts.triton_quantized import TritonEmulatedExperts, TritonQuantizedExperts
from fusedmoe.experts.triton_quantized_batched import BatchedTritonQuantizedExperts
from fusedmoe.kernels.column_orders import ordered
from fusedmoe.kernels.gather_columns import gather_columns, gather_columns_reference
from fusedmoe.quantization.formats.act_order import sort_columns
from fusedmoe.quantization.keys import fp8_dynamic_group
from gemm_oracle import assert_right
from quantized_bodies import triton_gather, triton_gemm
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
SORTED = {"up_alone": (True, False)} | dict.fromkeys(
    ("down_alone", "down_of_blocks", "gate_and_up_apart"), (False, True)
)


@pytest.fixture
def kernels(monkeypatch, bodies):
    if bodies == "torch":
        return
    from fusedmoe.kernels import gather_columns, grouped_gemm_quantized

    monkeypatch.setattr(grouped_gemm_quantized, "quantized_gemm_reference", triton_gemm)
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
    assert (found.order is not None, found.places is not None) == wanted
    assert (found.down_order is None) == (found.places is None)


@pytest.mark.parametrize("name", CASES)
def test_weights_of_which_nobody_has_looked_whether_they_are_sorted(name, kernels):
    """The functional form: it may not wait for a GPU to look at a table."""
    case = CASES[name]
    tolerance = 3e-3 if case.layer.dtype == torch.float16 else 2e-5
    run, _, tensors = loaded(case)
    expected = case.expected(tensors)
    assert_right(case.runner(tensors)(), expected, tolerance)
    assert_right(case.runner(tensors, weights=run.weights)(), expected, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_sorted_weights_mean_what_they_meant(name):
    """They are rewritten with their tables: any kernel, and any other layer, reads them."""
    case = CASES[name]
    run, _, tensors = loaded(case)
    for mine, fresh in zip(run.weights, case.weights(tensors), strict=True):
        mine.check_values()
        assert mine.dequantize(torch.float64).equal(fresh.dequantize(torch.float64))
    again = [part.clone() for w in run.weights for part in w.parts().values()]
    run.prepare()
    parts = [part for w in run.weights for part in w.parts().values()]
    assert all(map(torch.equal, parts, again))


@pytest.mark.parametrize("name", ["plain", "zero_points_bias", "down_alone"])
def test_every_weight_lives_once(name):
    """What a layer holds beside its parameters is three tables, not weights."""
    run, experts, tensors = loaded(CASES[name])
    run()
    own = {part.untyped_storage().data_ptr() for w in run.weights for part in w.parts().values()}
    own |= {t.untyped_storage().data_ptr() for t in tensors.values() if t is not None}
    held = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for part in tensors_held_by(experts)
    }
    beside = sum(size for address, size in held.items() if address not in own)
    e, N, K = run.weights[1].shape
    assert beside <= 4 * e * (N + 2 * K)


def tensors_held_by(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for part in thing.values():
            yield from tensors_held_by(part)
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            yield from tensors_held_by(part)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from tensors_held_by(vars(thing))
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from tensors_held_by(getattr(thing, field.name))


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


def addresses_of_tables(experts):
    tables = [getattr(experts._sorted, name) for name in TABLES]
    return [None if table is None else table.data_ptr() for table in tables]


@pytest.mark.parametrize("name", ["zero_points_bias", "down_alone"])
def test_weights_prepared_again_keep_their_place(name):
    """Experts that moved in while a graph was captured: it goes on reading the same memory."""
    case = CASES[name]
    run, experts, tensors = loaded(case)
    wanted = addresses_of_tables(experts)
    other = case.weights({n: t.flip(0) if n in ("w1", "w2") else t for n, t in tensors.items()})
    for mine, theirs in zip(run.weights, other, strict=True):
        for part, tensor in theirs.parts().items():
            getattr(mine, part).copy_(tensor)
    run.prepare()
    assert addresses_of_tables(experts) == wanted
    assert_right(run(), case.runner(tensors, weights=other)().double(), 2e-5)


@pytest.mark.parametrize("name", ["plain", "down_of_blocks"])
def test_many_rows_are_gathered_not_scattered(name, monkeypatch):
    """The same numbers, whichever way they take."""
    run, _, _ = loaded(CASES[name])
    few = run()
    monkeypatch.setattr(triton_quantized_floating, "_MANY_TOKENS", 1)
    assert_right(run(), few.double(), 1e-6)


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("only", ["", "w1", "w2"])
def test_rows_are_rounded_before_they_follow(prepare, only, kernels):
    """Groups of activations are those of their own columns, however the weights lie."""
    case = replace(CASES["zero_points_bias"], rows=fp8_dynamic_group(32), only=only)
    tensors = case.layer.tensors()
    run = case.runner(tensors, TritonEmulatedExperts, prepare=prepare)
    assert_right(run(), case.expected(tensors), 1e-3)


def test_groups_that_a_rank_has_a_part_of_stay_in_their_table():
    """Half of w2's columns, of any group: nothing to sort there, w1 is sorted all the same."""
    case = CASES["plain"]
    w1, w2 = case.weights(case.layer.tensors())
    values = w1.dequantize(torch.float64)
    half = replace(
        w2,
        data=w2.data[..., :24].contiguous(),
        group_index=w2.group_index[..., :48].contiguous(),
        shape=(*w2.shape[:2], 48),
    )
    found = sorted_operands(Operands(w1, half))
    assert found.w2 is half
    assert found.places is None
    assert not found.w1.format.act_order
    # Values stay with their columns: even ones first, as rows will be gathered.
    order = found.order.view(-1, 2, 32).transpose(1, 2).flatten(1).long()
    assert found.w1.dequantize(torch.float64).equal(
        values.gather(2, order[:, None].expand_as(values))
    )


def test_a_sorted_expert_among_others_that_cannot_be(kernels):
    """It moved in: one expert's columns are sorted, another's groups are uneven."""
    case = CASES["plain"]
    tensors = case.layer.tensors()
    w1, w2 = case.weights(tensors)
    w2.group_index[1, 0, :33] = 0
    wanted = case.runner(tensors, weights=(w1.map(torch.clone), w2.map(torch.clone)))()
    parts = {name: part[2:3] for name, part in w2.parts().items()}
    assert sort_columns(replace(w2, shape=(1, *w2.shape[1:]), **parts))
    run = case.runner(tensors, weights=(w1, w2), prepare=True)
    assert run.experts._sorted.w2.group_index is not None
    assert_right(run(), wanted.double(), 2e-5)


@pytest.mark.parametrize("experts", [TritonQuantizedExperts, BatchedTritonQuantizedExperts])
def test_compiled_without_graph_breaks(experts):
    case = CASES["zero_points_bias"]
    tensors = case.layer.tensors()
    eager = case.runner(tensors, experts, prepare=True)
    assert case.runner(tensors, experts, compiled=True, prepare=True)().equal(eager())


def test_gathering_from_one_order_into_another():
    """Rows that lie where they were put, of a table in the order of weights."""
    ids = torch.tensor([0, 5, 9, -1, 3, 2], dtype=torch.int32)
    here = torch.tensor([2, 0, 1, -1, 0, 3], dtype=torch.int32)
    x, raw = torch.randn(9, 64), torch.stack([torch.randperm(64) for _ in range(4)]).int()
    position = torch.tensor([4, 1, 8, 0, 6, 2], dtype=torch.int32)
    found, wanted = torch.full((2, 9, 64), 7.0)
    given = ordered(raw, "halves").contiguous(), found, ids, here
    triton_gather(x, *given, ("halves", "lanes"), position)
    for slot, expert in enumerate(here[ids.clamp(0, 5).long()].tolist()):
        if 0 <= ids[slot] < 6 and expert >= 0:
            row = x[position[slot], raw[expert].long()]
            wanted[position[slot]] = ordered(row[None], "lanes")[0]
    assert found.equal(wanted)
    assert gather_columns(
        *(x, given[0], torch.full((9, 64), 7.0), ids, here),
        orders=("halves", "lanes"),
        position=position,
    ).equal(wanted)


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
    with pytest.raises(ValueError, match="none of the orders"):
        gather_columns(x, order, found, ids, orders=("halves", "lanes"))
    with pytest.raises(ValueError, match="position"):
        gather_columns(x, order, x.clone(), ids, position=ids[:2])
