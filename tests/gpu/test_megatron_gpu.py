"""Megatron's function on a GPU: right at any count, the same bits from a graph, nothing touched."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.experts import bounded
from fusedmoe.integrations.megatron import ActivationType, vllm_fused_moe, vllm_fused_moe_reference
from fusedmoe.testing.poison import nan_poison
from fusedmoe.testing.tolerances import assert_close

pytestmark = pytest.mark.gpu
NAN = float("nan")
SWIGLU, SQUARED_RELU = ActivationType.SWIGLU, ActivationType.SQUARED_RELU


@pytest.fixture(params=["chosen", "triton"])
def gemms(request, monkeypatch):
    """The GEMMs that fit this GPU, and those that fit any."""
    if request.param == "triton":
        monkeypatch.setattr(bounded, "fits_hopper", lambda *_: False)


def arguments(
    T=64, K=4, experts=16, H=256, I=192, valid=50, start=0, local=None, activation=SWIGLU,  # noqa: E741
    seed=0,
):  # fmt: skip
    gen = torch.Generator("cuda").manual_seed(seed)
    e = experts if local is None else local

    def normal(*shape):
        made = torch.randn(*shape, generator=gen, device="cuda") * shape[-1] ** -0.5
        return made.bfloat16()

    given = {
        "hidden_states": normal(T, H) * H**0.5,
        "probs": torch.rand(T, K, generator=gen, device="cuda"),
        "fc1_weight": normal(e, I * (2 if activation is SWIGLU else 1), H),
        "fc2_weight": normal(e, H, I),
        "activation_type": activation,
        "num_local_experts": e,
        "local_expert_start": start,
        "valid_tokens": torch.zeros((), dtype=torch.int32, device="cuda"),
        "routing_map": torch.zeros(T, K, dtype=torch.int32, device="cuda"),
    }
    route(given, valid, experts, seed)
    return given


def route(given, valid, experts, seed):
    """Another routing and count, in place; garbage past the valid rows."""
    gen = torch.Generator("cuda").manual_seed(seed + 1)
    T, K = given["routing_map"].shape
    ids = torch.rand(T, experts, generator=gen, device="cuda").topk(K, dim=1).indices
    ids[torch.rand(T, K, generator=gen, device="cuda") < 0.05] = -1
    ids[valid:] = 2**31 - 1
    given["routing_map"].copy_(ids)
    given["valid_tokens"].fill_(valid)
    given["probs"][:valid] = torch.rand(valid, K, generator=gen, device="cuda")
    given["probs"][valid:] = NAN
    fresh = torch.randn(valid, given["hidden_states"].shape[1], generator=gen, device="cuda")
    given["hidden_states"][:valid] = fresh.bfloat16()
    given["hidden_states"][valid:] = NAN


def poisoned(given, dtype=torch.float32):
    return torch.full_like(given["hidden_states"], NAN, dtype=dtype)


def check(given, **options):
    valid = int(given["valid_tokens"])
    with nan_poison():
        out = vllm_fused_moe(**given, out=poisoned(given), **options)
    expected = vllm_fused_moe_reference(
        **{
            n: t.double() if torch.is_tensor(t) and t.dtype == torch.bfloat16 else t
            for n, t in given.items()
        }
    )
    assert_close("out", out[:valid], expected[:valid], "bf16")
    assert out[valid:].isnan().all()
    return out


CASES = {
    "one_token": {"T": 1, "valid": 1},
    "lone_slots": {"T": 4, "experts": 64, "valid": 3},
    "a_few": {},
    "none_valid": {"valid": 0},
    "tall_blocks": {"T": 600, "valid": 511},
    "local_range": {"T": 300, "experts": 48, "start": 10, "local": 16, "valid": 300},
    "nothing_here": {"start": 30, "experts": 16, "local": 3},
    "odd_sizes": {"H": 250, "I": 99},
    "many_slots": {"T": 2048, "K": 4, "valid": 1999},
}


@pytest.mark.parametrize("activation", [SWIGLU, SQUARED_RELU])
@pytest.mark.parametrize("case", CASES)
def test_the_definition(gemms, case, activation):
    check(arguments(activation=activation, **CASES[case]))


@pytest.mark.parametrize("hint", [1, 3, 64, 4096])
@pytest.mark.parametrize("valid", [1, 64, 2048])
def test_any_hint_is_right(gemms, hint, valid):
    """Without a table, with one of one launch or of several, whatever then comes."""
    given = arguments(T=2048, valid=valid, experts=48, start=7, local=32)
    check(given, num_tokens_hint=hint, num_experts=48)


@pytest.mark.parametrize("hint", [None, 1, 8])
@pytest.mark.parametrize("activation", [SWIGLU, SQUARED_RELU])
def test_one_graph_serves_every_count_and_routing(gemms, hint, activation):
    """Captured once; replayed with others, bit for bit what an eager call gives."""
    given = arguments(T=96, valid=8, activation=activation, experts=24, start=4, local=16)
    out = poisoned(given)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        vllm_fused_moe(**given, out=out, num_tokens_hint=hint)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        vllm_fused_moe(**given, out=out, num_tokens_hint=hint)
        made = vllm_fused_moe(**given, num_tokens_hint=hint)
    for seed, valid in enumerate((8, 0, 96, 1, 37, 95)):
        route(given, valid, 24, seed)
        out.fill_(NAN)
        graph.replay()
        eager = vllm_fused_moe(**given, out=poisoned(given), num_tokens_hint=hint)
        torch.testing.assert_close(out, eager, rtol=0, atol=0, equal_nan=True)
        assert made[:valid].equal(eager[:valid])
        check(given, num_tokens_hint=hint)


@pytest.mark.parametrize("count", [-5, 97, 2**31 - 1])
def test_counts_out_of_range_are_those_of_the_buffers(gemms, count):
    given = arguments(T=96, valid=96 if count > 0 else 0)
    expected = vllm_fused_moe(**given, out=poisoned(given))
    given["valid_tokens"].fill_(count)
    out = vllm_fused_moe(**given, out=poisoned(given))
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_out_is_rounded_once(dtype):
    given = arguments()
    exact = vllm_fused_moe(**given, out=poisoned(given))
    out = vllm_fused_moe(**given, out=poisoned(given, dtype))
    # One step: another dtype is another kernel, whose fp32 sum may contract differently.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), exact, rtol=step, atol=1e-6, equal_nan=True)


def test_nothing_waits_for_the_device(gemms):
    given = arguments(T=2048, valid=100)
    vllm_fused_moe(**given)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        vllm_fused_moe(**given)
        vllm_fused_moe(**given, num_tokens_hint=8)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_compiled_without_graph_breaks():
    given = arguments()
    compiled = torch.compile(vllm_fused_moe, fullgraph=True, backend="aot_eager")
    eager = vllm_fused_moe(**given, out=poisoned(given))
    for out in (compiled(**given, out=poisoned(given)), compiled(**given)):
        assert out[:50].equal(eager[:50])


def test_buffers_past_two_to_the_31_elements(gemms):
    given = arguments(T=2**17 + 64, K=8, experts=16, H=2064, I=16, valid=2**17 + 60)
    assert given["routing_map"].numel() * 2064 > 2**31
    for hint in (64, 4096):
        check_last_rows(given, vllm_fused_moe(**given, num_tokens_hint=hint))


def check_last_rows(given, out):
    last = slice(2**17 + 50, 2**17 + 60)
    names = ("hidden_states", "probs", "routing_map")
    part = given | {name: given[name][last] for name in names}
    part["valid_tokens"] = torch.tensor(10, dtype=torch.int32, device="cuda")
    expected = vllm_fused_moe_reference(**part)
    assert_close("last rows", out[last], expected[:10], "bf16")
