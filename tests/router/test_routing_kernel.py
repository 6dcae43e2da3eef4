"""The Triton routing kernels against the reference: interpreted here, compiled on a GPU."""

import subprocess
import sys
import textwrap

import pytest
import torch
from routing_cases import CASES, make_logits, make_rows, make_tensors

import fusedmoe
from fusedmoe.kernels.routing import routing_reference
from fusedmoe.router.functional import _spec_arguments, _tensor_arguments, route
from fusedmoe.router.spec import RoutingSpec, RoutingTensors

pytest.importorskip("triton")

NAN = float("nan")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty full of NaN (or of a number no id has), so that unwritten outputs show."""
    empty = torch.empty

    def poison(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(NAN if out.is_floating_point() else 12345)

    monkeypatch.setattr(torch, "empty", poison)


def routing_triton(*args, **kwargs):
    from fusedmoe.kernels.triton.routing import routing_triton as launch

    return launch(*args, **kwargs)


def compare(logits, spec, tensors, **rows):
    """Same ids, and weights as close as the device's exp and division allow."""
    expected = routing_reference(logits, spec, tensors, **rows)
    result = routing_triton(logits, spec, tensors, **rows)
    assert torch.equal(result.topk_ids, expected.topk_ids)
    torch.testing.assert_close(result.topk_weights, expected.topk_weights, rtol=1e-5, atol=1e-6)
    if spec.num_zero_experts:
        torch.testing.assert_close(
            result.zero_expert_weight, expected.zero_expert_weight, rtol=1e-5, atol=1e-6
        )
    else:
        assert result.zero_expert_weight is None
    return result


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["random", "ties", "hostile"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rule(case, kind, poisoned):
    logits = make_logits(case, 7, kind=kind).to(DEVICE)
    compare(logits, case.spec, make_tensors(case, DEVICE), **make_rows(case, 7, DEVICE))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("block_t", [2, 8])
@pytest.mark.parametrize("name", ["deepseek_v3", "longcat", "phimoe", "shared", "hash_softmax"])
def test_several_tokens_per_program(name, block_t, monkeypatch, poisoned):
    """As kernels that fuse the routing have them, with a last program that is half empty."""
    import fusedmoe.kernels.triton.routing as routing_module
    import fusedmoe.kernels.triton.sparsemixer as sparsemixer_module

    case = next(case for case in CASES if case.name == name)
    logits, tensors = make_logits(case, 5).to(DEVICE), make_tensors(case, DEVICE)
    rows = make_rows(case, 5, DEVICE)
    for module in (routing_module, sparsemixer_module):
        monkeypatch.setattr(module, "TOKENS_PER_PROGRAM", block_t)
    compare(logits, case.spec, tensors, **rows)


def test_signed_zeros_are_ties():
    spec = RoutingSpec(top_k=3, num_experts=6, score_function="identity")
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0, -1.0]], device=DEVICE)
    assert compare(logits, spec, RoutingTensors()).topk_ids.tolist() == [[0, 1, 2]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_group_of_infinity_and_its_opposite_is_the_worst():
    spec = RoutingSpec(
        top_k=2, num_experts=4, num_expert_group=2, topk_group=1, group_score="top2_sum"
    )
    bias = torch.tensor([float("inf"), float("-inf"), 0.0, 0.0], device=DEVICE)
    result = compare(torch.zeros(1, 4, device=DEVICE), spec, RoutingTensors(correction_bias=bias))
    assert result.topk_ids.tolist() == [[2, 3]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sqrtsoftplus_keeps_its_digits_everywhere():
    """Far below zero, where 1 + exp(x) rounds to 1, and far above, where exp overflows."""
    spec = RoutingSpec(top_k=48, num_experts=48, score_function="sqrtsoftplus")
    logits = torch.linspace(-60, 120, 48, device=DEVICE)[None]
    result = compare(logits, spec, RoutingTensors())
    exact = torch.nn.functional.softplus(logits.double()).sqrt().flip(1)
    torch.testing.assert_close(result.topk_weights.double(), exact, rtol=1e-5, atol=0)


def test_empty_batch():
    spec = RoutingSpec(top_k=2, num_experts=4, num_zero_experts=1)
    result = routing_triton(torch.empty(0, 5, device=DEVICE), spec, RoutingTensors())
    assert [tuple(t.shape) for t in result] == [(0, 2), (0, 2), (0,)]


def test_strides_and_narrow_dtypes():
    """Logits that are a slice of a wider GEMM output, in fp16; biases of another dtype."""
    spec = RoutingSpec(top_k=3, num_experts=10, score_function="sigmoid", renormalize=True)
    wide = torch.full((4, 33), NAN, dtype=torch.float16, device=DEVICE)
    wide[:, 2:22:2] = torch.randn(4, 10).half()
    bias = torch.randn(20, device=DEVICE).half()[::2]
    tensors = RoutingTensors(correction_bias=bias)
    compare(wide[:, 2:22:2], spec, tensors)
    compare(wide[:, 2:22:2], spec, tensors, indices_dtype=torch.int64)
    table = torch.randint(0, 10, (3, 7), dtype=torch.int32, device=DEVICE).t()
    ids = torch.tensor([0, 9, 6, 9, 1, 9, 2, 9], device=DEVICE)[::2]
    padding = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0], dtype=torch.bool, device=DEVICE)[::2]
    compare(
        wide[:, 2:22:2],
        spec,
        RoutingTensors(hash_indices_table=table),
        input_ids=ids,
        is_padding=padding,
    )


def test_nothing_outside_a_table_is_read():
    """Token ids and experts that do not exist: -1, where the CPU's reference raises."""
    spec = RoutingSpec(top_k=2, num_experts=4, renormalize=True)
    table = torch.tensor([[0, 4], [-9, 3], [2**31 - 1, 1]], device=DEVICE)
    ids = torch.tensor([0, 1, 2, 3, -1, 2**40], device=DEVICE)
    result = routing_triton(
        torch.zeros(6, 4, device=DEVICE),
        spec,
        RoutingTensors(hash_indices_table=table),
        input_ids=ids,
    )
    assert result.topk_ids.tolist() == [[0, -1], [-1, 3], [-1, 1], [-1, -1], [-1, -1], [-1, -1]]
    weights = [[1, 0], [0, 1], [0, 1], [0, 0], [0, 0], [0, 0]]
    assert result.topk_weights.tolist() == weights


HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from fusedmoe.kernels.triton.eplb_map import eplb_map_kernel
from fusedmoe.kernels.triton.routing import routing_case, routing_kernel
from fusedmoe.kernels.triton.sparsemixer import sparsemixer_kernel
from fusedmoe.router.spec import RoutingSpec

def build(kernel, types, constants, num_warps=1):
    names = kernel.arg_names
    constants |= {name: None for name in names if name not in types and name not in constants}
    signature = {name: types.get(name, "constexpr") for name in names}
    at = {(names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature, at)
    target = GPUTarget("cuda", 90, 32)
    assert triton.compile(source, target=target, options={"num_warps": num_warps}).asm["cubin"]

SCALARS = {"num_tokens": "i32", "stride_row": "i32", "stride_padding": "i32"}
TABLE = {"num_table_rows": "i32", "stride_input_id": "i32", "stride_table_row": "i32",
         "stride_table_slot": "i32"}
OUT = {"weights_ptr": "*fp32", "ids_ptr": "*i64"}

def routing(spec, block_t, num_warps, **pointers):
    case, _ = routing_case(spec, "vision_bias_ptr" in pointers, block_t)
    constants = {"CASE": case, "CHAINED": True, "stride_expert": 1}
    types = {"logits_ptr": "*bf16"} | OUT | SCALARS | TABLE | pointers
    build(routing_kernel, types, constants, num_warps)

routing(RoutingSpec(top_k=8, num_experts=128, renormalize=True), 1, 1)
routing(RoutingSpec(top_k=8, num_experts=128, renormalize=True), 8, 4)
routing(RoutingSpec(top_k=8, num_experts=256, score_function="sigmoid", renormalize=True,
        num_expert_group=8, topk_group=4, group_score="top2_sum"), 4, 4, bias_ptr="*fp32")
routing(RoutingSpec(top_k=32, num_experts=1000, num_zero_experts=24, logit_softcap=3.0,
        num_fused_shared_experts=1, renormalize=True, renormalize_norm=3.0), 1, 4,
        bias_ptr="*bf16", scale_ptr="*bf16", padding_ptr="*i1", zero_weight_ptr="*fp32")
routing(RoutingSpec(top_k=6, num_experts=256, score_function="sqrtsoftplus", renormalize=True,
        image_sentinel_lo=9), 1, 1, table_ptr="*i64", input_ids_ptr="*i64",
        vision_bias_ptr="*fp32")
phi = RoutingSpec(top_k=2, num_experts=16, selection="sparsemixer")
build(sparsemixer_kernel, {"logits_ptr": "*bf16"} | OUT | SCALARS,
      {"CASE": routing_case(phi, False, 1)[0], "stride_expert": 1})
build(eplb_map_kernel, {"ids_ptr": "*i32", "table_ptr": "*i64", "count_ptr": "*i64",
      "load_ptr": "*i32", "should_record_ptr": "*i1", "num_valid_ptr": "*i32", "out_ptr": "*i32",
      "num_slots": "i32", "stride_token": "i32", "stride_pick": "i32", "num_logical": "i32",
      "num_physical": "i32"}, {"K": 8, "REPLICAS": 3, "BLOCK": 256})
"""


def test_the_kernels_compile_for_hopper(monkeypatch):
    """Without a GPU the interpreter proves the arithmetic, and this that there is a program."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    built = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOPPER)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 16, 333, 3000])
@pytest.mark.parametrize(
    ("experts", "top_k", "fields"),
    [
        (8, 2, {"renormalize": True}),
        (128, 8, {"renormalize": True}),
        (256, 8, {"score_function": "sigmoid", "num_expert_group": 8, "topk_group": 4}),
        (512, 10, {"score_after_topk": True}),
        (1024, 32, {"score_function": "sqrtsoftplus", "renormalize": True}),
        (3000, 4, {}),
        (5000, 4, {}),
    ],
)
def test_real_sizes_on_a_gpu(experts, top_k, fields, num_tokens, dtype):
    """Where the two differ, the scores were within rounding of each other."""
    torch.manual_seed(0)
    spec = RoutingSpec(top_k=top_k, num_experts=experts, group_score="top2_sum", **fields)
    logits = torch.randn(num_tokens, experts, device="cuda").to(dtype)
    tensors = RoutingTensors(correction_bias=torch.randn(experts, device="cuda"))
    result = route(logits, spec, tensors)
    expected = routing_reference(logits, spec, tensors)
    same = (result.topk_ids == expected.topk_ids).all(dim=1)
    assert int((~same).sum()) <= max(1, num_tokens // 300)
    torch.testing.assert_close(
        result.topk_weights[same], expected.topk_weights[same], rtol=1e-5, atol=1e-6
    )


@pytest.mark.gpu
def test_a_row_has_the_same_bits_in_any_batch():
    spec = RoutingSpec(top_k=8, num_experts=128, renormalize=True)
    logits = torch.randn(4096, 128, device="cuda", dtype=torch.bfloat16)
    whole = route(logits, spec)
    for first, last in ((0, 1), (5, 21), (0, 1024)):
        part = route(logits[first:last], spec)
        assert torch.equal(part.topk_ids, whole.topk_ids[first:last])
        assert torch.equal(part.topk_weights, whole.topk_weights[first:last])


@pytest.mark.gpu
def test_logits_beyond_two_to_the_31_elements():
    spec = RoutingSpec(top_k=2, num_experts=256)
    num_tokens = 2**23 + 9
    logits = torch.zeros(num_tokens, 256, device="cuda", dtype=torch.bfloat16)
    logits[-1, 77] = 9.0
    result = route(logits, spec)
    assert result.topk_ids[-1].tolist() == [77, 0]
    assert result.topk_ids[-2].tolist() == [0, 1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["softmax_renormalized", "deepseek_v3", "longcat", "phimoe", "hash", "vision_hash"]
)
def test_no_synchronisation_and_a_graph_replays(name):
    case = next(case for case in CASES if case.name == name)
    tensors, rows = make_tensors(case, "cuda"), make_rows(case, 7, "cuda")
    logits = make_logits(case, 7).cuda()
    route(logits, case.spec, tensors, **rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = route(logits, case.spec, tensors, **rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    logits.copy_(make_logits(case, 7, seed=5))
    graph.replay()
    expected = routing_reference(logits, case.spec, tensors, **rows)
    assert torch.equal(captured.topk_ids, expected.topk_ids)
    torch.testing.assert_close(captured.topk_weights, expected.topk_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_compiled_and_checked_on_a_gpu():
    case = next(case for case in CASES if case.name == "longcat")
    logits, tensors = make_logits(case, 5).cuda(), make_tensors(case, "cuda")
    compiled = torch.compile(lambda x: route(x, case.spec, tensors), fullgraph=True)
    for ours, theirs in zip(compiled(logits), route(logits, case.spec, tensors), strict=True):
        assert torch.equal(ours, theirs)
    torch.library.opcheck(
        torch.ops.fusedmoe.route,
        (
            logits,
            *_tensor_arguments(tensors),
            None,
            None,
            torch.int32,
            *_spec_arguments(case.spec),
        ),
    )


@pytest.mark.multigpu
def test_tensors_on_another_gpu_than_the_current_one():
    """Routing, the gate and the replica mapping all run where their tensors are."""
    router = fusedmoe.create_fused_moe_router(2, 8)
    gate = fusedmoe.GateLinear(16, 8, out_dtype=torch.float32, device="cuda:1")
    hidden = torch.randn(3, 16, device="cuda:1")
    load = torch.zeros(8, dtype=torch.int32, device="cuda:1")
    ones = torch.ones(8, dtype=torch.int64, device="cuda:1")
    router.set_eplb_state(load, torch.arange(8, device="cuda:1")[:, None], ones)
    with torch.cuda.device(0):
        logits = gate(hidden)
        result = router.route(hidden, logits)
    assert torch.equal(result.topk_ids.long(), logits.topk(2, dim=1).indices)
    assert load.sum() == 6
