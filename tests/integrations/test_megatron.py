"""Megatron's functions: what they compute, what they leave alone and what they refuse."""

from enum import Enum

import pytest
import torch

from fusedmoe.experts.bounded import bounded_experts
from fusedmoe.integrations.megatron import (
    ActivationType,
    _get_default_config,
    _invoke_fused_moe_kernel,
    _moe_align_block_size_cuda_graphable,
    _moe_sum,
    vllm_fused_moe,
    vllm_fused_moe_reference,
)
from fusedmoe.kernels.bounded_align import BoundedRouting, bounded_ids
from fusedmoe.testing.poison import nan_poison
from fusedmoe.testing.tolerances import assert_close

NAN = float("nan")
SWIGLU, SQUARED_RELU = ActivationType.SWIGLU, ActivationType.SQUARED_RELU
BOTH_ACTIVATIONS = pytest.mark.parametrize("activation", [SWIGLU, SQUARED_RELU])


def arguments(
    T=9, K=2, experts=6, H=40, I=24, valid=7, start=0, local=None, activation=SWIGLU,  # noqa: E741
    dtype=torch.bfloat16, seed=0,
):  # fmt: skip
    """Keyword arguments of ``vllm_fused_moe``; past the valid rows is NaN, under plausible ids."""
    gen = torch.Generator().manual_seed(seed)
    e = experts if local is None else local

    def normal(*shape):
        return (torch.randn(*shape, generator=gen) * shape[-1] ** -0.5).to(dtype)

    scores = torch.rand(T, experts, generator=gen)
    probs, routing_map = scores.topk(K, dim=1)
    given = {
        "hidden_states": torch.randn(T, H, generator=gen).to(dtype),
        "probs": probs,
        "fc1_weight": normal(e, I * (2 if activation is SWIGLU else 1), H),
        "fc2_weight": normal(e, H, I),
        "activation_type": activation,
        "num_local_experts": e,
        "local_expert_start": start,
        "valid_tokens": torch.tensor(valid, dtype=torch.int32),
        "routing_map": routing_map.to(torch.int32),
    }
    given["hidden_states"][valid:] = NAN
    given["probs"][valid:] = NAN
    if valid > 1:
        given["routing_map"][1, 0] = -1
        given["probs"][1, 0] = NAN
    return given


def expected(given):
    """fp64, slot by slot."""
    out = torch.zeros(given["hidden_states"].shape, dtype=torch.float64)
    for t in range(int(given["valid_tokens"])):
        for k, expert in enumerate(given["routing_map"][t].tolist()):
            here = expert - given["local_expert_start"]
            if not 0 <= here < given["num_local_experts"]:
                continue
            up = given["fc1_weight"][here].double() @ given["hidden_states"][t].double()
            if given["activation_type"] is SWIGLU:
                gate, up = up.chunk(2)
                act = torch.nn.functional.silu(gate) * up
            else:
                act = up.relu() ** 2
            row = given["fc2_weight"][here].double() @ act
            out[t] += given["probs"][t, k].double() * row
    return out


CASES = {
    "plain": {},
    "one_token_one_expert": {"T": 1, "K": 1, "experts": 1, "valid": 1},
    "all_valid": {"valid": 9},
    "none_valid": {"valid": 0},
    "every_expert": {"K": 6},
    "local_range": {"experts": 12, "start": 4, "local": 5},
    "nothing_local": {"start": 50, "local": 3},
    "odd_sizes": {"H": 33, "I": 19},
    "lone_slots": {"T": 3, "experts": 32, "valid": 2},
    "no_rows": {"T": 0, "valid": 0},
}


def bounded(given, out, hint=None, num_experts=None):
    bounded_experts(
        out,
        *(given[n] for n in ("hidden_states", "fc1_weight", "fc2_weight", "probs", "routing_map")),
        given["valid_tokens"].reshape(1),
        given["local_expert_start"],
        given["activation_type"].moe_activation.value,
        len(out) if hint is None else hint,
        given["num_local_experts"] if num_experts is None else num_experts,
    )
    return out


@pytest.fixture(params=["torch", "align_at_once", "align_in_steps"])
def bodies(request, monkeypatch):
    """The launchers on CPU tensors with their references, then with Triton's bodies."""
    if request.param == "torch":
        return
    from fusedmoe.kernels import bounded_align, bounded_gemm, bounded_sum
    from fusedmoe.kernels.triton import bounded_align as align_bodies
    from fusedmoe.kernels.triton import bounded_gemm as gemm_bodies
    from fusedmoe.kernels.triton import bounded_sum as sum_bodies

    def gemm(a, b, c, blocks, tiles, *, top_k, programs, row_weights, activation):
        return gemm_bodies.launch(a, b, c, blocks, tiles, top_k, programs, row_weights, activation)

    align = getattr(align_bodies, request.param)
    monkeypatch.setattr(bounded_align, "bounded_align_reference", align)
    monkeypatch.setattr(bounded_gemm, "bounded_gemm_reference", gemm)
    monkeypatch.setattr(bounded_sum, "bounded_sum_reference", sum_bodies.weigh_and_add)


class ActivationsOfMegatron(Enum):
    """An enumeration of another package: only the function's import has changed."""

    SQUARED_RELU = "squared_relu"
    SWIGLU = "swiglu"
    IDENTITY = "identity"


@BOTH_ACTIVATIONS
def test_members_of_another_enumeration_are_known_by_their_names(activation):
    given = arguments(activation=activation)
    wanted = vllm_fused_moe(**given)[:7]
    theirs = ActivationsOfMegatron[activation.name]
    assert torch.equal(vllm_fused_moe(**given | {"activation_type": theirs})[:7], wanted)
    with pytest.raises(ValueError, match=r"ActivationType, got <ActivationsOfMegatron\.IDENTITY"):
        vllm_fused_moe(**given | {"activation_type": ActivationsOfMegatron.IDENTITY})


@pytest.mark.parametrize("case", CASES)
@BOTH_ACTIVATIONS
def test_the_definition(case, activation):
    given = arguments(activation=activation, **CASES[case])
    valid = int(given["valid_tokens"])
    out = vllm_fused_moe(**given, out=torch.full_like(given["hidden_states"], NAN).float())
    assert_close(case, out[:valid], expected(given)[:valid], "bf16")
    assert out[valid:].isnan().all()
    assert vllm_fused_moe(**given).dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
@BOTH_ACTIVATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_agree_with_the_definition(bodies, case, activation, dtype):
    given = arguments(activation=activation, dtype=dtype, **CASES[case])
    valid = int(given["valid_tokens"])
    with nan_poison():
        out = bounded(given, torch.full_like(given["hidden_states"], NAN).float())
    assert_close(case, out[:valid], expected(given)[:valid], dtype)
    assert out[valid:].isnan().all()


@pytest.mark.parametrize("hint", [-3, 1, 2, 10**9])
@pytest.mark.parametrize("num_experts", [1, 1000])
def test_hints_are_hints(bodies, hint, num_experts):
    """Far too small or too large, they cost time alone; sums over D may associate differently."""
    given = arguments(T=40, valid=33, experts=8, start=2, local=5, dtype=torch.float32)
    out = bounded(given, torch.full((40, 40), NAN), hint, num_experts)
    assert_close("hint", out[:33], expected(given)[:33])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_out_of_any_dtype_is_rounded_once(bodies, out_dtype):
    given = arguments(dtype=torch.float32)
    exact = bounded(given, torch.full((9, 40), NAN))
    out = bounded(given, torch.full((9, 40), NAN, dtype=out_dtype))
    torch.testing.assert_close(out, exact.to(out_dtype), rtol=0, atol=0, equal_nan=True)
    public = arguments()
    made = vllm_fused_moe(**public, out=torch.empty(9, 40, dtype=out_dtype))
    assert made[:7].equal(vllm_fused_moe(**public)[:7].to(out_dtype))


def test_strides_are_followed(bodies):
    given = arguments(dtype=torch.float32)
    plain = bounded(given, torch.full((9, 40), NAN))
    for name in ("fc1_weight", "fc2_weight"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("hidden_states", "probs", "routing_map"):
        given[name] = given[name].t().contiguous().t()
    out = bounded(given, torch.full((40, 9), NAN).t())
    torch.testing.assert_close(out, plain, equal_nan=True)


def test_a_nan_row_harms_its_own_token_alone(bodies):
    given = arguments(valid=9, dtype=torch.float32)
    clean = bounded(given, torch.full((9, 40), NAN))
    given["hidden_states"][3] = NAN
    out = bounded(given, torch.full((9, 40), NAN))
    assert out[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert out[others].equal(clean[others])


def test_all_tokens_on_one_expert(bodies):
    given = arguments(T=35, K=1, valid=35, dtype=torch.float32)
    given["routing_map"].fill_(2)
    out = bounded(given, torch.full((35, 40), NAN))
    given["probs"] = given["probs"].nan_to_num()
    given["probs"][1] = out.new_tensor([0.5])
    out = bounded(given, torch.full((35, 40), NAN))
    assert_close("one expert", out, expected(given))


def test_long_ids_and_a_long_count_are_fine(bodies):
    given = arguments(dtype=torch.float32)
    narrow = bounded(given, torch.full((9, 40), NAN))
    given["routing_map"] = given["routing_map"].long()
    given["valid_tokens"] = given["valid_tokens"].long().reshape(1)
    out = bounded(given, torch.full((9, 40), NAN))
    torch.testing.assert_close(out, narrow, rtol=0, atol=0, equal_nan=True)


def test_the_host_functions_make_up_the_whole(bodies):
    """As a caller of Megatron's would put them together, with the default tiles."""
    given = arguments(
        T=9, experts=8, start=3, local=4, activation=SQUARED_RELU, dtype=torch.float32
    )
    placement = (4, 3)
    config = _get_default_config(9, 4, 2)
    routing, valid = given["routing_map"], given["valid_tokens"]
    table = _moe_align_block_size_cuda_graphable(routing, config["BLOCK_SIZE_M"], *placement, valid)
    act, rows = torch.full((18, 24), NAN), torch.full((9, 2, 40), NAN)
    x, fc1, fc2 = given["hidden_states"], given["fc1_weight"], given["fc2_weight"]
    _invoke_fused_moe_kernel(x, fc1, act, None, *table, False, 2, config, 3, fuse_squared_relu=True)
    _invoke_fused_moe_kernel(act, fc2, rows, None, *table, False, 1, config, 100)
    args = (given["probs"], 9, 2, 40, valid, routing, 3, 4)
    out = _moe_sum(rows.flatten(0, 1), *args)
    assert out.dtype == torch.float32
    assert_close("whole", out[:7], expected(given)[:7])
    into = torch.full((9, 40), NAN, dtype=torch.float16)
    assert _moe_sum(rows.flatten(0, 1), *args, out=into) is into
    assert into[:7].equal(out[:7].half())
    assert into[7:].isnan().all()


def test_routed_weights_in_the_gemm(bodies):
    given = arguments(dtype=torch.float32, valid=9)
    given["probs"][1, 0] = 0.5
    config = _get_default_config(1, 6, 2)
    routing = BoundedRouting(given["routing_map"], torch.tensor([9]), 0, 6)
    table = _moe_align_block_size_cuda_graphable(
        given["routing_map"], config["BLOCK_SIZE_M"], 6, 0, given["valid_tokens"]
    )
    c = torch.full((9, 2, 48), NAN)
    x, fc1, probs = given["hidden_states"], given["fc1_weight"], given["probs"]
    _invoke_fused_moe_kernel(x, fc1, c, probs, *table, True, 2, config, 4)
    ids = bounded_ids(routing).view(9, 2)
    for t, k in ((0, 0), (4, 1), (8, 1)):
        row = probs[t, k] * (fc1[ids[t, k]] @ x[t])
        torch.testing.assert_close(c[t, k], row, rtol=1e-4, atol=1e-5)
    assert c[1, 0].isnan().all()
    with pytest.raises(ValueError, match="topk_weights"):
        _invoke_fused_moe_kernel(x, fc1, c, None, *table, True, 2, config, 4)
    del config["num_stages"]
    with pytest.raises(ValueError, match="num_stages"):
        _invoke_fused_moe_kernel(x, fc1, c, None, *table, False, 2, config, 4)


def test_the_table_is_of_the_documented_form():
    routing = torch.tensor([[5, 3], [-1, 4], [3, 9], [4, 4]], dtype=torch.int32)
    table = _moe_align_block_size_cuda_graphable(routing, 2, 3, 3, torch.tensor(3))
    sorted_token_ids, expert_ids, num_tokens_post_padded = table
    # expert 3: slots 1, 4; expert 4: slot 3 and padding; expert 5: slot 0 and padding
    assert sorted_token_ids.tolist() == [1, 4, 3, 8, 0, 8, 8, 8, 8, 8, 8, 8]
    assert expert_ids.tolist() == [0, 1, 2, -1, -1, -1]
    assert num_tokens_post_padded.tolist() == [6]
    assert [t.dtype for t in table] == [torch.int32] * 3


@pytest.mark.parametrize(
    ("M", "E", "tiles"),
    [
        (1, 8, (16, 64, 128, 1, 4, 4)),
        (33, 8, (32, 64, 128, 1, 4, 3)),
        (65, 8, (32, 128, 64, 1, 4, 3)),
        (129, 1, (64, 128, 64, 16, 8, 3)),
        (513, 128, (128, 128, 64, 1, 8, 3)),
        (8192, 8, (128, 128, 64, 16, 8, 3)),
    ],
)
def test_default_tiles(M, E, tiles):
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
    assert _get_default_config(M, E, 2) == dict(
        zip((*names, "num_warps", "num_stages"), tiles, strict=True)
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_states": torch.zeros(9, 40)}, "bfloat16"),
        ({"fc1_weight": torch.zeros(6, 48, 40, dtype=torch.float16)}, "bfloat16"),
        ({"fc2_weight": torch.zeros(6, 40, 24)}, "bfloat16"),
        ({"fc1_weight": torch.zeros(6, 24, 40).bfloat16()}, "24, 40"),
        ({"fc2_weight": torch.zeros(6, 39, 24).bfloat16()}, "39"),
        ({"hidden_states": torch.zeros(9, 4, 10).bfloat16()}, "9, 4, 10"),
        ({"num_local_experts": 5}, "5 local experts"),
        ({"num_local_experts": 0}, "num_local_experts 0"),
        ({"local_expert_start": -1}, "-1"),
        ({"probs": torch.zeros(9, 3)}, "9, 3"),
        ({"probs": torch.zeros(9, 2, dtype=torch.int32)}, "int32"),
        ({"routing_map": torch.zeros(9, 2)}, "float32"),
        ({"routing_map": torch.zeros(9, 0, dtype=torch.int32)}, "9, 0"),
        ({"routing_map": torch.zeros(8, 2, dtype=torch.int32)}, "8, 2"),
        ({"routing_map": torch.full((9, 2), -2, dtype=torch.int32)}, "-2"),
        ({"valid_tokens": 7}, "7"),
        ({"valid_tokens": torch.tensor([7, 7])}, "one int32"),
        ({"valid_tokens": torch.tensor(7.0)}, "one int32"),
        ({"valid_tokens": torch.tensor(10)}, "10"),
        ({"valid_tokens": torch.tensor(-1)}, "-1"),
        ({"valid_tokens": torch.zeros((), dtype=torch.int32, device="meta")}, "meta"),
        ({"activation_type": "swiglu"}, "swiglu"),
        ({"num_tokens_hint": 2.5}, "num_tokens_hint must be a whole number or None, got 2.5"),
        ({"num_experts": "6"}, "num_experts must be a whole number"),
        ({"out": torch.zeros(9, 39)}, "39"),
        ({"out": torch.zeros(9, 40, dtype=torch.int32)}, "int32"),
        ({"out": torch.zeros(9, 40, device="meta")}, "meta"),
    ],
)
def test_what_does_not_fit_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        vllm_fused_moe(**(arguments() | change))


def test_sums_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="18, 40"):
        _moe_sum(torch.zeros(17, 40), torch.zeros(9, 2), 9, 2, 40, torch.tensor(1),
                 torch.zeros(9, 2, dtype=torch.int32), 0, 3)  # fmt: skip


def test_sums_are_not_cut_to_integers():
    with pytest.raises(ValueError, match="int32"):
        _moe_sum(torch.zeros(18, 40), torch.zeros(9, 2), 9, 2, 40, torch.tensor(1),
                 torch.zeros(9, 2, dtype=torch.int32), 0, 3,
                 out=torch.zeros(9, 40, dtype=torch.int32))  # fmt: skip


def test_the_reference_takes_the_same_arguments():
    given = arguments()
    out = vllm_fused_moe_reference(**given, num_tokens_hint=3, num_experts=9)
    assert out[:7].equal(vllm_fused_moe(**given)[:7])


def test_the_op_keeps_its_promises():
    given = arguments(dtype=torch.float32)
    names = ("hidden_states", "fc1_weight", "fc2_weight", "probs", "routing_map")
    for name in ("hidden_states", "probs"):
        given[name] = given[name].nan_to_num()
    torch.library.opcheck(
        torch.ops.fusedmoe.bounded_experts.default,
        (torch.zeros(9, 40), *(given[n] for n in names), given["valid_tokens"].reshape(1),
         0, "silu", 9, 6),
    )  # fmt: skip
