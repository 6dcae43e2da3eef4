"""Logical to physical experts: the documented hash, and a load that counts what really ran."""

import pytest
import torch

from fusedmoe.kernels.eplb_map import eplb_map_reference, eplb_map_to_physical_and_record

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOGICAL, PHYSICAL, REPLICAS = 5, 9, 3


def eplb_map_triton(*args, **kwargs):
    from fusedmoe.kernels.triton.eplb_map import eplb_map_triton as launch

    return launch(*args, **kwargs)


IMPLEMENTATIONS = [eplb_map_reference, eplb_map_triton]


def placement(dtype=torch.int64):
    """Expert 3 has three copies, 0 two, 4 none; the unused places of the map hold -1."""
    table = torch.tensor([[0, 5, -1], [1, -1, -1], [2, -1, -1], [3, 6, 7], [-1, -1, -1]])
    count = torch.tensor([2, 1, 1, 3, 0])
    return table.to(DEVICE, dtype), count.to(DEVICE, dtype)


def loop(ids, table, count, num_valid=None, record=True):
    table, count = table.tolist(), count.tolist()
    out, load = [], [0] * PHYSICAL
    for token, row in enumerate(ids.tolist()):
        mapped = []
        for logical in row:
            physical = -1
            if 0 <= logical < LOGICAL and count[logical] > 0:
                replica = ((token * 2654435769) & 0xFFFFFFFF) % min(count[logical], REPLICAS)
                physical = table[logical][replica]
            if not 0 <= physical < PHYSICAL:
                physical = -1
            elif record and (num_valid is None or token < num_valid):
                load[physical] += 1
            mapped.append(physical)
        out.append(mapped)
    return out, load


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("ids_dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [0, 1, 300])
def test_the_loop_agrees(run, ids_dtype, num_tokens):
    """Ids of -1 and far out of range, and an expert without copies, among the rest."""
    torch.manual_seed(0)
    ids = torch.randint(-2, LOGICAL + 2, (num_tokens, 4), device=DEVICE).to(ids_dtype)
    if num_tokens:
        ids[0, 0], ids[0, 1] = 32767, -32768
    table, count = placement(torch.int32)
    load = torch.zeros(PHYSICAL, dtype=torch.int32, device=DEVICE)
    physical = run(ids, table, count, load)
    expected, expected_load = loop(ids, table, count)
    assert physical.dtype is ids_dtype
    assert physical.tolist() == expected
    assert load.tolist() == expected_load


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_padding_and_the_record_flag(run):
    ids = torch.randint(0, LOGICAL, (20, 2), device=DEVICE)
    table, count = placement()
    for record, num_valid in ((0, None), (1, 7), (1, 0), (0, 7), (1, 100)):
        load = torch.zeros(PHYSICAL, dtype=torch.int32, device=DEVICE)
        physical = run(
            ids,
            table,
            count,
            load,
            should_record=torch.tensor(record, device=DEVICE),
            num_unpadded_tokens=None
            if num_valid is None
            else torch.tensor([num_valid], dtype=torch.int32, device=DEVICE),
        )
        expected, expected_load = loop(ids, table, count, num_valid, bool(record))
        assert physical.tolist() == expected
        assert load.tolist() == expected_load


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_a_corrupt_map_reads_and_counts_nothing_else(run):
    """Counts beyond the map's width, entries beyond the physical experts."""
    table = torch.tensor([[100, -7]], device=DEVICE)
    load = torch.zeros(PHYSICAL, dtype=torch.int32, device=DEVICE)
    ids = torch.zeros(6, 1, dtype=torch.int32, device=DEVICE)
    physical = run(ids, table, torch.tensor([50], device=DEVICE), load)
    assert physical.flatten().tolist() == [-1] * 6
    assert load.sum() == 0


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_a_replica_count_beyond_the_map_stays_in_its_row(run):
    table = torch.tensor([[0, 1], [2, 3]], device=DEVICE)
    load = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    ids = torch.zeros(50, 1, dtype=torch.int32, device=DEVICE)
    physical = run(ids, table, torch.tensor([50, 1], device=DEVICE), load)
    assert physical.unique().tolist() == [0, 1]
    assert load.sum() == 50


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_strided_ids_and_accumulating_load(run):
    ids = torch.randint(0, 4, (4, 10), device=DEVICE).t()[::2, 1:3]
    table, count = placement()
    load = torch.ones(PHYSICAL, dtype=torch.int32, device=DEVICE)
    physical = run(ids, table, count, load)
    expected, added = loop(ids, table, count)
    assert physical.tolist() == expected
    assert load.tolist() == [1 + n for n in added]


def test_one_replica_per_expert_is_the_identity():
    ids = torch.randint(0, PHYSICAL, (30, 2), device=DEVICE)
    load = torch.zeros(PHYSICAL, dtype=torch.int32, device=DEVICE)
    table = torch.arange(PHYSICAL, device=DEVICE)[:, None]
    physical = eplb_map_to_physical_and_record(ids, table, torch.ones_like(table[:, 0]), load)
    assert torch.equal(physical, ids)
    assert torch.equal(load.long(), torch.bincount(ids.flatten(), minlength=PHYSICAL))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_ids": torch.zeros(4, dtype=torch.int32)}, r"\(4,\)"),
        ({"topk_ids": torch.zeros(4, 2)}, "topk_ids may not be torch.float32"),
        ({"logical_replica_count": torch.ones(4, dtype=torch.int32)}, r"\(4,\)"),
        ({"logical_to_physical_map": torch.zeros(5, 0, dtype=torch.int32)}, r"\(5, 0\)"),
        ({"expert_load_view": torch.zeros(9)}, "float32"),
        ({"expert_load_view": torch.zeros(18, dtype=torch.int32)[::2]}, "contiguous"),
        ({"num_unpadded_tokens": torch.ones(2, dtype=torch.int32)}, r"\(2,\)"),
        ({"should_record": torch.ones(1)}, "should_record"),
        ({"should_record": torch.ones(1, dtype=torch.int32, device="meta")}, "meta"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = {
        "topk_ids": torch.zeros(3, 2, dtype=torch.int32),
        "logical_to_physical_map": torch.zeros(5, 2, dtype=torch.int32),
        "logical_replica_count": torch.ones(5, dtype=torch.int32),
        "expert_load_view": torch.zeros(9, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        eplb_map_to_physical_and_record(**arguments | changes)


def operator_arguments(device):
    return (
        torch.randint(0, 5, (3, 2), device=device),
        torch.zeros(5, 2, dtype=torch.int32, device=device),
        torch.ones(5, dtype=torch.int32, device=device),
        torch.zeros(9, dtype=torch.int32, device=device),
        None,
        torch.tensor([2], device=device),
    )


def test_the_operator_keeps_its_contract():
    torch.library.opcheck(
        torch.ops.fusedmoe.eplb_map,
        operator_arguments("cpu"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.gpu
def test_on_a_gpu():
    """No synchronisation, in a graph, and many tokens on one expert counted one by one."""
    torch.library.opcheck(torch.ops.fusedmoe.eplb_map, operator_arguments("cuda"))
    ids = torch.full((100_000, 8), 3, dtype=torch.int32, device="cuda")
    table, count = placement()
    load = torch.zeros(PHYSICAL, dtype=torch.int32, device="cuda")
    record = torch.ones(1, dtype=torch.int32, device="cuda")
    expected = eplb_map_reference(ids, table, count, load.clone())
    eplb_map_to_physical_and_record(ids, table, count, load.clone(), should_record=record)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            physical = eplb_map_to_physical_and_record(
                ids, table, count, load, should_record=record
            )
        graph.replay()
        record.zero_()
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(physical, expected)
    assert load.sum() == ids.numel()
    assert load[[3, 6, 7]].sum() == ids.numel()
