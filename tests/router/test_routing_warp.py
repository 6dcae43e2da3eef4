"""Routing by a warp for each token, its text compiled for the CPU where there is no GPU."""

from __future__ import annotations

import shutil

import pytest
import torch
from routing_cases import CASES, make_logits, make_rows, make_tensors

from cuda_on_cpu import KernelOnCpu
from fusedmoe.kernels.cuda import routing_warp
from fusedmoe.kernels.routing import routing_reference
from fusedmoe.router.spec import RoutingSpec, RoutingTensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
TAKEN = [
    case
    for case in CASES
    if routing_warp.has_rule(case.spec) and not {"hash", "vision"} & set(case.tensors)
]
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and shutil.which("g++") is None, reason="compiles with g++"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    def kernel(defines):
        files, shared = ("routing_warp.cu",), routing_warp.SHARED_BYTES
        return KernelOnCpu(files, "routing_warp", defines.items(), 32, shared)

    if DEVICE == "cpu":
        monkeypatch.setattr(routing_warp, "_kernel", kernel)
    empty = torch.empty

    def poison(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(NAN if out.is_floating_point() else 12345)

    monkeypatch.setattr(torch, "empty", poison)


def compare(logits, spec, tensors=None, **rows):
    """Same ids, and weights as close as the device's exp and division allow."""
    tensors = tensors or RoutingTensors()
    expected = routing_reference(logits, spec, tensors, **rows)
    result = routing_warp.routing_warp(logits, spec, tensors, **rows)
    assert torch.equal(result.topk_ids, expected.topk_ids)
    torch.testing.assert_close(result.topk_weights, expected.topk_weights, rtol=1e-5, atol=1e-6)
    return result


@pytest.mark.parametrize("kind", ["random", "ties", "hostile"])
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_every_rule(case, kind):
    logits = make_logits(case, 7, kind=kind).to(DEVICE)
    padding = make_rows(case, 7, DEVICE)["is_padding"]
    compare(logits, case.spec, make_tensors(case, DEVICE), is_padding=padding)


@pytest.mark.parametrize("E", [1, 7, 31, 32, 33, 384, 512])
@pytest.mark.parametrize("kind", ["random", "few values", "equal", "one lane's", "one is NaN"])
def test_the_chosen_lie_anywhere(E, kind):
    """In lanes of their own or in one, more of them than lanes, equal ones too."""
    torch.manual_seed(E)
    logits = torch.randn(5, E, device=DEVICE)
    if kind == "few values":
        logits = logits.round()
    elif kind == "equal":
        logits[:] = 1.5
    elif kind == "one lane's":
        logits[:, E // 2 % 32 :: 32] += 50.0
    elif kind == "one is NaN":
        logits[3, E // 3] = NAN
    for K in {1, min(E, 8), min(E, 16)}:
        spec = RoutingSpec(top_k=K, num_experts=E, score_function="sigmoid", renormalize=True)
        compare(logits, spec)
        compare(logits.bfloat16(), RoutingSpec(top_k=K, num_experts=E, renormalize=True))
        compare(logits, RoutingSpec(top_k=K, num_experts=E, score_after_topk=True))


def test_experts_that_cannot_be_chosen():
    spec = RoutingSpec(top_k=6, num_experts=70, score_function="sigmoid", renormalize=True)
    bias = torch.full((70,), -float("inf"), device=DEVICE)
    bias[[3, 40, 41, 69]] = torch.tensor([0.5, float("inf"), 0.1, NAN], device=DEVICE)
    logits = torch.zeros(3, 70, device=DEVICE)
    ids = compare(logits, spec, RoutingTensors(correction_bias=bias)).topk_ids
    assert ids.tolist() == [[40, 3, 41, -1, -1, -1]] * 3


def test_strides_and_narrow_dtypes():
    """Logits that are a slice of a wider GEMM output, in fp16; biases of another dtype."""
    spec = RoutingSpec(top_k=3, num_experts=10, score_function="sigmoid", renormalize=True)
    wide = torch.full((4, 33), NAN, dtype=torch.float16, device=DEVICE)
    wide[:, 2:22:2] = torch.randn(4, 10).half()
    bias = torch.randn(20, device=DEVICE).bfloat16()[::2]
    scale = torch.rand(20, device=DEVICE)[::2]
    padding = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0], dtype=torch.bool, device=DEVICE)[::2]
    tensors = RoutingTensors(correction_bias=bias, per_expert_scale=scale)
    compare(wide[:, 2:22:2], spec, tensors, is_padding=padding)
    compare(wide[:, 2:22:2], spec, tensors, indices_dtype=torch.int64)


def test_other_tokens_change_no_bit():
    """Programs that go from token to token, too."""
    torch.manual_seed(0)
    logits = torch.randn(9, 384, device=DEVICE)
    spec = RoutingSpec(top_k=8, num_experts=384, renormalize=True)
    whole = compare(logits, spec)
    for token in range(9):
        one = compare(logits[token : token + 1], spec)
        assert one.topk_weights.equal(whole.topk_weights[token : token + 1])


def test_more_tokens_than_programs(monkeypatch):
    monkeypatch.setattr(routing_warp, "MOST_PROGRAMS", 2)
    logits = torch.randn(7, 40, device=DEVICE)
    logits[3] = 0.0
    compare(logits, RoutingSpec(top_k=8, num_experts=40, renormalize=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_rules_are_left_to_others(case):
    logits, tensors = make_logits(case, 0).to(DEVICE), make_tensors(case, DEVICE)
    result = routing_warp.routing_warp(logits, case.spec, tensors)
    assert (result is not None) == (case in TAKEN)
    assert routing_warp.routing_warp(logits.double(), case.spec, tensors) is None


def test_no_tokens():
    spec = RoutingSpec(top_k=2, num_experts=4)
    result = routing_warp.routing_warp(torch.empty(0, 4, device=DEVICE), spec, RoutingTensors())
    assert result.topk_ids.shape == result.topk_weights.shape == (0, 2)
