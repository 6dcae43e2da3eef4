"""Kernels whose work a number on the device bounds: align, grouped GEMM and weighted sum."""

import pytest
import torch

from fusedmoe.activation import MoEActivation, activation_reference
from fusedmoe.kernels.align import MoEAlignment, moe_align_block_size
from fusedmoe.kernels.bounded_align import (
    BoundedRouting,
    bounded_align,
    bounded_align_reference,
    bounded_ids,
)
from fusedmoe.kernels.bounded_gemm import bounded_gemm, bounded_gemm_reference, programs_for
from fusedmoe.kernels.bounded_sum import bounded_sum, bounded_sum_reference
from fusedmoe.tuning.tiles import TileConfig

NAN, UNTOUCHED = float("nan"), -123.0
SMALL = TileConfig(16, 16, 32, 2, 4, 2)


def triton_gemm(a, b, c, blocks, tiles, *, top_k, programs, row_weights=None, activation=None):
    from fusedmoe.kernels.triton.bounded_gemm import launch

    return launch(a, b, c, blocks, tiles, top_k, programs, row_weights, activation)


def triton_sum(*arguments):
    from fusedmoe.kernels.triton.bounded_sum import weigh_and_add

    return weigh_and_add(*arguments)


def align_with(name):
    from fusedmoe.kernels.triton import bounded_align as bodies

    return bounded_align_reference if name == "definition" else getattr(bodies, name)


def routing_of(T, K, experts, valid, first=0, local=None, seed=0, dtype=torch.int32):
    """Random ids, a tenth of them padding; those past the valid rows look like any others."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (T, K), generator=gen).to(dtype)
    ids[torch.rand(T, K, generator=gen) < 0.1] = -1
    number = torch.tensor([valid], dtype=torch.int32)
    return BoundedRouting(ids, number, first, experts if local is None else local)


ROUTINGS = {
    "all_valid": routing_of(9, 3, 5, 9),
    "some_valid": routing_of(9, 3, 5, 4),
    "none_valid": routing_of(9, 3, 5, 0),
    "no_rows": routing_of(0, 3, 5, 0),
    "fewer_than_none": routing_of(9, 3, 5, -7),
    "more_than_all": routing_of(9, 3, 5, 9)._replace(num_valid=torch.tensor([2**31 - 1])),
    "some_local": routing_of(40, 2, 12, 33, first=4, local=5),
    "one_local": routing_of(40, 2, 12, 40, first=11, local=1),
    "none_local": routing_of(9, 2, 3, 9, first=100, local=4),
    "long_ids": routing_of(30, 2, 6, 25, dtype=torch.int64),
}


def test_extreme_ids_are_no_expert():
    """Those too whose lower half, or whose distance to the first one, is a local expert's."""
    ids = torch.tensor([[-(2**63), 2**63 - 1], [2**32 + 3, 3 - 2**32], [3, 4]])
    routing = BoundedRouting(ids, torch.tensor([3]), 3, 1)
    assert bounded_ids(routing).tolist() == [-1, -1, -1, -1, 0, -1]
    for name in ("align_at_once", "align_in_steps"):
        assert align_with(name)(routing, 4, 8).sorted_ids.tolist() == [4, 6, 6, 6, 6, 6, 6, 6]


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_every_way_to_align_gives_the_same_table(name, block_size):
    routing = ROUTINGS[name]
    expected = bounded_align(routing, block_size)
    for way in ("align_at_once", "align_in_steps"):
        found = align_with(way)(routing, block_size, expected.sorted_ids.shape[0])
        for left, right in zip(found, expected, strict=True):
            assert left.equal(right)


def test_tables_are_those_of_the_other_alignment():
    """Where all rows are valid and all experts local, it is ``moe_align_block_size``."""
    routing = routing_of(50, 4, 7, 50)
    usual = moe_align_block_size(routing.routing_map, 8, 7, pad_sorted_ids=True)
    for left, right in zip(bounded_align(routing, 8), usual, strict=True):
        assert left.equal(right)


def test_expected_slots_choose_the_way_alone(monkeypatch):
    from fusedmoe.kernels.triton import bounded_align as bodies

    taken = []
    for way in ("align_at_once", "align_in_steps"):
        monkeypatch.setattr(bodies, way, lambda *_, way=way: taken.append(way))

    class OnGPU(torch.Tensor):
        is_cuda = True

    ids = torch.zeros(3000, 2, dtype=torch.int32).as_subclass(OnGPU)
    routing = BoundedRouting(ids, torch.tensor([1]), 0, 4)
    for expected in (None, 6000, 4096, 1):
        bounded_align(routing, 16, expected)
    assert taken == ["align_in_steps", "align_in_steps", "align_at_once", "align_at_once"]


@pytest.mark.parametrize(("block_size", "local"), [(0, 3), (4, 0), (2**31, 3)])
def test_impossible_tables_are_refused(block_size, local):
    with pytest.raises(ValueError, match=str(block_size)):
        bounded_align(routing_of(4, 2, 3, 4)._replace(num_local=local), block_size)


def gemm_case(name, S=1, N=24, D=40, dtype=torch.float32):
    torch.manual_seed(1)
    routing = ROUTINGS[name]
    T, e = routing.routing_map.shape[0], routing.num_local
    return routing, torch.randn(T, D).to(dtype), (torch.randn(e, S * N, D) / D**0.5).to(dtype)


def by_slot(a, b, routing, activation=None, row_weights=None):
    """fp64, one slot at a time; NaN where no expert is here."""
    K = routing.routing_map.shape[1]
    width = b.shape[1] // (2 if activation is MoEActivation.SILU else 1)
    rows = torch.full((routing.R, width), NAN, dtype=torch.float64)
    for slot, expert in enumerate(bounded_ids(routing).tolist()):
        if expert >= 0:
            row = b[expert].double() @ a[slot // K].double()
            rows[slot] = row if activation is None else activation_reference(activation, row)
    return rows if row_weights is None else rows * row_weights[:, None].double()


BOTH = pytest.mark.parametrize("function", [triton_gemm, bounded_gemm_reference])


@BOTH
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("activation", [None, MoEActivation.SILU, MoEActivation.RELU2_NO_MUL])
def test_products_of_the_slots_that_are_here(function, name, table, activation):
    routing, a, b = gemm_case(name, S=2 if activation is MoEActivation.SILU else 1)
    a[max(0, int(routing.num_valid)) :] = NAN
    c = torch.full((routing.R, 24), UNTOUCHED)
    blocks = bounded_align(routing, 16) if table else routing
    K = routing.routing_map.shape[1]
    function(a, b, c, blocks, SMALL, top_k=K, programs=3, activation=activation)
    expected = by_slot(a, b, routing, activation).nan_to_num(UNTOUCHED)
    torch.testing.assert_close(c.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("table", [True, False])
def test_any_number_of_programs_gives_the_same_bits(table):
    routing, a, b = gemm_case("all_valid")
    blocks = bounded_align(routing, 16) if table else routing
    outs = [
        triton_gemm(a, b, torch.full((27, 24), NAN), blocks, SMALL, top_k=3, programs=programs)
        for programs in (1, 2, 7, 500)
    ]
    assert not outs[0][bounded_ids(routing) >= 0].isnan().any()
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=0, equal_nan=True)


@BOTH
def test_fp16_strides_and_weights(function):
    routing, a, b = gemm_case("some_local", dtype=torch.float16)
    stored = b.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(80, 80).half()
    wide[::2, ::2] = a
    weights = torch.rand(routing.R)
    c = torch.full((routing.R, 48), NAN, dtype=torch.float16)[:, ::2]
    options = {"top_k": 2, "programs": 5, "row_weights": weights}
    function(wide[::2, ::2], stored, c, bounded_align(routing, 16), SMALL, **options)
    expected = by_slot(a, b, routing, row_weights=weights)
    torch.testing.assert_close(c.double(), expected, rtol=2e-3, atol=2e-3, equal_nan=True)


@BOTH
def test_hostile_tables_reach_nothing(function):
    """Slots and experts that do not exist are skipped, and the count is bounded by the table."""
    _, a, b = gemm_case("all_valid")
    table = MoEAlignment(
        torch.tensor([-1, 27, 2**31 - 1, 4] + 12 * [27] + 16 * [5], dtype=torch.int32),
        torch.tensor([0, 9], dtype=torch.int32),
        torch.tensor([2**31 - 16], dtype=torch.int32),
    )
    c = torch.full((27, 24), NAN)
    function(a, b, c, table, SMALL, top_k=3, programs=2)
    expected = a[1].double() @ b[0].T.double()
    torch.testing.assert_close(c[4].double(), expected, rtol=1e-4, atol=1e-5)
    c[4] = NAN
    assert c.isnan().all()


@pytest.mark.parametrize(
    "broken",
    [
        {"programs": 0},
        {"top_k": 2},
        {"activation": MoEActivation.GELU_NO_MUL},
        {"c": torch.zeros(27, 23)},
        {"blocks": routing_of(8, 3, 5, 8)},
        {"row_weights": torch.zeros(26)},
        {"blocks": MoEAlignment(torch.zeros(32).int(), torch.zeros(1).int(), torch.zeros(1).int())},
    ],
)
def test_products_that_do_not_fit_are_refused(broken):
    routing, a, b = gemm_case("all_valid")
    sound = {"a": a, "b": b, "c": torch.zeros(27, 24), "blocks": routing, "top_k": 3, "programs": 1}
    with pytest.raises(ValueError, match=r"\d|gelu"):
        bounded_gemm(tiles=SMALL, **(sound | broken))


def test_programs_follow_from_what_is_expected():
    assert programs_for(8, 128, 64, SMALL, lone=True) == 8 * 4
    assert programs_for(8, 128, 64, SMALL, lone=False) == 8 * 4
    assert programs_for(1000, 2, 40, SMALL, lone=False) == 65 * 3
    assert programs_for(0, 2, 40, SMALL, lone=False) == 1


@pytest.mark.parametrize("function", [triton_sum, bounded_sum_reference])
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("expected_tokens", [None, 1, 4])
@pytest.mark.parametrize("moved", [False, True])
def test_sums_of_the_picks_that_are_here(function, name, out_dtype, expected_tokens, moved):
    routing = ROUTINGS[name]
    (T, K), H = routing.routing_map.shape, 37
    torch.manual_seed(2)
    rows, weights = torch.randn(T, K, H), torch.rand(T, K)
    here = (bounded_ids(routing) >= 0).view(T, K)
    valid = min(max(0, int(routing.num_valid)), T)
    expected = torch.where(here[..., None], rows * weights[..., None], 0.0).sum(1)
    expected[valid:] = NAN
    rows[~here], weights[~here] = NAN, NAN
    rows, position = rows.flatten(0, 1), None
    if moved:
        order = torch.randperm(T * K)
        position = torch.full((T * K,), 2**31 - 1, dtype=torch.int32)
        inverse = order.argsort().int()
        rows = torch.cat([rows[order], torch.full((5, H), NAN)])
        position[here.flatten()] = inverse[here.flatten()]
    out = torch.full((T, H), NAN, dtype=out_dtype)
    function(rows, weights, routing, out, position, expected_tokens)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if out_dtype == torch.float16 else {}
    torch.testing.assert_close(out, expected.to(out_dtype), equal_nan=True, **tolerance)


def test_sums_without_weights_and_with_strides():
    routing = ROUTINGS["some_valid"]
    rows = torch.randn(20, 27).t()
    out, expected = torch.full((20, 9), NAN).t(), torch.full((9, 20), NAN)
    triton_sum(rows, None, routing, out)
    bounded_sum(rows, None, routing, expected)
    assert not expected[:4].isnan().any()
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize(
    "broken",
    [
        {"rows": torch.zeros(26, 4)},
        {"rows": torch.zeros(9, 3, 4)},
        {"topk_weights": torch.zeros(9, 2)},
        {"out": torch.zeros(9, 5)},
        {"position": torch.zeros(26, dtype=torch.int32)},
    ],
)
def test_sums_that_do_not_fit_are_refused(broken):
    sound = {
        "rows": torch.zeros(27, 4),
        "topk_weights": None,
        "routing": ROUTINGS["all_valid"],
        "out": torch.zeros(9, 4),
    }
    with pytest.raises(ValueError, match="T 9, K 3, H 4"):
        bounded_sum(**(sound | broken))
