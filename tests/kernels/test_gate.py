"""Router logits: every tier is the same linear layer, rounded once from fp32 sums."""

import math

import pytest
import torch

import fusedmoe
from fusedmoe.kernels.gate import (
    MAX_CLUSTER_TOKENS,
    MAX_HALVES_TOKENS,
    MAX_PARTS_TOKENS,
    MAX_ROWS_TOKENS,
    MAX_ROWS_TOKENS_BESIDE_CLUSTER,
    gate_linear,
    gate_linear_reference,
    gate_tier,
    gate_tile,
)
from hopper_compiler import run_program

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def rows(x, weight, bias, out_dtype):
    from fusedmoe.kernels.triton.gate_rows import gate_rows

    return gate_rows(x, weight, bias, out_dtype)


def parts(x, weight, bias, out_dtype):
    from fusedmoe.kernels.triton.gate_parts import gate_parts

    tile = gate_tile(*weight.shape, weight.element_size())
    return gate_parts(x, weight, bias, out_dtype, tile)


def chained(x, weight, bias, out_dtype):
    """The same kernel that many tokens go through."""
    from fusedmoe.kernels.triton import gate_parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_parts, "PARTS_TOKENS", 0)
        return parts(x, weight, bias, out_dtype)


@pytest.mark.parametrize(
    ("arguments", "tier"),
    [
        ((1, BF16, BF16, FP32, "cuda"), "rows"),
        ((MAX_ROWS_TOKENS, BF16, BF16, BF16, "cuda"), "rows"),
        ((MAX_ROWS_TOKENS + 1, BF16, FP32, FP32, "cuda"), "parts"),
        ((MAX_PARTS_TOKENS, FP32, FP32, FP32, "cuda"), "parts"),
        ((MAX_HALVES_TOKENS, BF16, BF16, BF16, "cuda"), "parts"),
        ((MAX_HALVES_TOKENS + 1, BF16, BF16, FP32, "cuda"), "mm_fp32"),
        ((MAX_HALVES_TOKENS + 1, FP16, FP16, FP32, "cuda"), "mm_fp32"),
        ((MAX_HALVES_TOKENS + 1, BF16, BF16, BF16, "cuda"), "linear"),
        ((MAX_PARTS_TOKENS + 1, BF16, FP32, FP32, "cuda"), "linear"),
        ((MAX_PARTS_TOKENS + 1, FP32, FP32, FP32, "cuda"), "linear"),
        ((1, FP64, FP64, FP64, "cuda"), "linear"),
        ((1, BF16, BF16, FP32, "cpu"), "linear"),
        ((1, BF16, BF16, FP32, "cpu", True), "by_token"),
        ((1, FP64, FP64, FP64, "cuda", True), "by_token"),
        ((1, BF16, BF16, FP32, "cuda", True), "parts"),
        ((4096, BF16, BF16, FP32, "cuda", True), "parts"),
        ((MAX_ROWS_TOKENS_BESIDE_CLUSTER, FP32, FP32, FP32, "cuda", False, 16), "rows"),
        ((MAX_ROWS_TOKENS_BESIDE_CLUSTER + 1, FP32, FP32, FP32, "cuda", False, 16), "cluster"),
        ((MAX_CLUSTER_TOKENS + 1, FP32, FP32, FP32, "cuda", False, MAX_CLUSTER_TOKENS), "linear"),
        ((17, BF16, BF16, FP32, "cuda", False, 16), "parts"),
        ((8, FP32, FP32, FP32, "cuda", True, 16), "parts"),
    ],
)
def test_the_tier_is_a_function_of_shapes(arguments, tier):
    assert gate_tier(*arguments) == tier


@pytest.mark.parametrize("run", [rows, parts, chained])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [(FP32, FP32), (FP16, FP16), (FP16, FP32)])
@pytest.mark.parametrize(
    ("T", "H", "E"), [(0, 8, 4), (1, 5, 1), (3, 300, 7), (16, 64, 33), (2, 5000, 2)]
)
def test_kernels_agree_with_the_definition(run, T, H, E, x_dtype, w_dtype):
    torch.manual_seed(0)
    x = torch.randn(T, H, device=DEVICE).to(x_dtype)
    weight = (torch.randn(E, H, device=DEVICE) / H**0.5).to(w_dtype)
    bias = torch.randn(E, device=DEVICE).to(w_dtype)
    exact = x.double() @ weight.double().T + bias.double()
    out = run(x, weight, bias, FP32)
    assert out.dtype is FP32
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=3e-6)
    assert run(x, weight, None, FP16).dtype is FP16


@pytest.mark.parametrize("run", [rows, parts, chained])
def test_kernels_take_strides_and_write_every_logit(run, monkeypatch):
    """The surroundings are NaN: one read out of place would show."""
    wide_x = torch.full((5, 100), NAN, device=DEVICE)
    wide_w = torch.full((90, 9), NAN, device=DEVICE)
    x, weight = wide_x[1:4, 3:83:2], wide_w[2:82:2, ::2].t()
    x.normal_()
    weight.normal_()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))
    out = run(x, weight, None, FP32)
    torch.testing.assert_close(out, x.contiguous() @ weight.contiguous().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", [rows, parts, chained])
def test_a_nan_row_harms_its_own_token_alone(run):
    x, weight = torch.randn(4, 50, device=DEVICE), torch.randn(6, 50, device=DEVICE)
    clean = run(x, weight, None, FP32)
    x[2, 7] = NAN
    dirty = run(x, weight, None, FP32)
    assert dirty[2].isnan().all()
    assert torch.equal(dirty[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("E", [256, 257])
@pytest.mark.parametrize("T", [2, 3])
def test_two_experts_a_program(T, E):
    x, weight = torch.randn(T, 40, device=DEVICE), torch.randn(E, 40, device=DEVICE)
    bias = torch.randn(E, device=DEVICE)
    torch.testing.assert_close(rows(x, weight, bias, FP32), x @ weight.T + bias)


def test_few_tokens_fill_the_registers_but_not_more():
    from fusedmoe.kernels.triton.gate_rows import gate_rows_tile

    for tokens in range(1, MAX_ROWS_TOKENS + 1):
        for H in (64, 2048, 2880, 7168, 16384):
            for E in (8, 256):
                for itemsize in (2, 4):
                    tile = gate_rows_tile(tokens, E, H, itemsize)
                    assert tokens <= tile.block_t < 2 * tokens
                    assert tile.block_t * tile.block_h <= 64 * 32 * tile.warps
                    assert not tile.pair or (itemsize == 4 and E >= 256 and tokens > 1)


@pytest.mark.parametrize("E", [1, 8, 60, 128, 256, 384])
@pytest.mark.parametrize("H", [5, 64, 2048, 2880, 7168])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_parts_cover_the_columns_once(E, H, itemsize):
    tile = gate_tile(E, H, itemsize)
    part = 2 * tile.steps * tile.columns
    assert (tile.parts - 1) * part < H <= tile.parts * part
    assert tile.steps >= 2
    assert tile.experts <= 32  # more would change the instruction
    assert tile.parts * -(-E // tile.experts) <= 2 * 160


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_gate_linear_on_this_machine(leading):
    x = torch.randn(*leading, 12, device=DEVICE, dtype=BF16)
    gate = fusedmoe.GateLinear(12, 5, bias=True, params_dtype=BF16, device=DEVICE)
    gate.bias.normal_()
    assert gate(x).dtype is BF16
    gate.set_out_dtype(FP32)
    logits = gate(x)
    assert logits.shape == (*leading, 5)
    assert logits.dtype is FP32
    exact = x.double() @ gate.weight.double().T + gate.bias.double()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("leading", [(0,), (1,), (2,), (7,), (3, 5)])
def test_batch_invariant_logits_on_this_machine(leading, dtype):
    x = torch.randn(64, 256, device=DEVICE, dtype=dtype)
    weight, bias = torch.randn(60, 256, device=DEVICE).to(dtype), torch.randn(60, device=DEVICE)

    def logits(rows):
        return gate_linear(rows, weight, bias, out_dtype=FP32, batch_invariant=True)

    T = math.prod(leading)
    part = x[30 : 30 + T].view(*leading, 256)
    assert torch.equal(logits(part).view(T, 60), logits(x)[30 : 30 + T])


def test_fp32_logits_are_not_widened_bf16_ones():
    """What the dtype is for: two experts that bf16 cannot tell apart keep their order."""
    x = torch.ones(1, 2, dtype=BF16, device=DEVICE)
    weight = torch.tensor([[256.0, 0.5], [256.0, 1.0]], dtype=BF16, device=DEVICE)
    assert gate_linear(x, weight, out_dtype=FP32).tolist() == [[256.5, 257.0]]


def test_a_gate_has_a_plain_state_dict():
    gate = fusedmoe.GateLinear(4, 3, bias=True, out_dtype=FP32)
    assert list(gate.state_dict()) == ["weight", "bias"]
    assert not gate.weight.requires_grad
    with pytest.raises(ValueError, match="int32"):
        gate.set_out_dtype(torch.int32)
    with pytest.raises(ValueError, match="0 -> 3"):
        fusedmoe.GateLinear(0, 3)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.randn(2, 5), torch.randn(3, 4), None, r"\(2, 5\) and \(3, 4\)"),
        (torch.randn(2, 4), torch.randn(3, 4), torch.randn(4), r"\[3\].*\(4,\)"),
        (torch.ones(2, 4, dtype=torch.int64), torch.randn(3, 4), None, "int64"),
        (torch.randn(2, 4), torch.randn(3, 4, device="meta"), None, "meta"),
    ],
)
def test_what_does_not_fit_is_named(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        gate_linear(x, weight, bias)


def test_compiled_fullgraph_it_is_the_same():
    gate = fusedmoe.GateLinear(8, 4, out_dtype=FP32, device=DEVICE)
    x = torch.randn(2, 3, 8, device=DEVICE)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gate(x))


def test_the_operator_keeps_its_contract():
    torch.library.opcheck(
        torch.ops.fusedmoe.gate_linear,
        (torch.randn(2, 3, 8), torch.randn(4, 8), None, FP32, False),
        test_utils=("test_schema", "test_faketensor"),
    )


HOPPER = """
from triton.compiler import ASTSource
import hopper_compiler
from fusedmoe.kernels.gate import gate_tile
from fusedmoe.kernels.triton import gate_parts, gate_rows

TYPES = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*fp32", "out_ptr": "*fp32",
         "parts_ptr": "*fp32", "T": "i32", "H": "i32", "E": "i32", "stride_xt": "i32",
         "stride_we": "i32"}

def build(kernel, constants, num_warps, types={}, num_stages=3):
    types, names = TYPES | types, kernel.arg_names
    constants = {k: v for k, v in (constants | {"stride_xh": 1, "stride_wh": 1}).items()
                 if k in names}
    signature = {name: types.get(name, "constexpr") for name in names}
    at = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, at)
    hopper_compiler.build(source, num_warps=num_warps, num_stages=num_stages)

for tokens, hidden, dtype in ((1, 2048, "bf16"), (2, 7168, "fp32"), (4, 7168, "fp32")):
    tile = gate_rows.gate_rows_tile(tokens, 256, hidden, 4 if dtype == "fp32" else 2)
    build(gate_rows.gate_rows_kernel, {"PAIR": tile.pair, "BLOCK_T": tile.block_t,
          "BLOCK_H": tile.block_h, "CHAINED": True}, tile.warps,
          {"x_ptr": "*" + dtype, "weight_ptr": "*" + dtype})
for dtype, experts, hidden in (("fp32", 256, 7168), ("bf16", 128, 2048), ("fp32", 128, 2048)):
    tile = gate_tile(experts, hidden, 4 if dtype == "fp32" else 2)
    constants = {"STEPS": tile.steps, "WIDEN": dtype == "fp32", "BLOCK_E": tile.experts,
                 "BLOCK_H": tile.columns}
    types = {"x_ptr": "*" + dtype, "weight_ptr": "*" + dtype}
    for tokens in (8, 16):
        build(gate_parts.gate_parts_kernel, constants | {"BLOCK_T": tokens, "CHAINED": True},
              tile.warps, types, tile.steps + 1)
    tokens = gate_parts.CHAINED_TOKENS_PER_TILE
    build(gate_parts.gate_chained_kernel,
          constants | {"BLOCK_T": tokens, "PARTS": tile.parts}, 4, types)
build(gate_parts.gate_sum_kernel, {"PARTS": 14, "BLOCK": gate_parts.SUM_BLOCK, "CHAINED": True}, 4)
print("compiled")
"""


def test_the_kernels_compile_for_hopper():
    run_program(HOPPER, gluon=False)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 3, 16, 17, 500])
@pytest.mark.parametrize(("H", "E"), [(2048, 128), (7168, 256), (2880, 32), (4096, 8)])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "out_dtype"),
    [
        (BF16, BF16, FP32),
        (BF16, BF16, BF16),
        (FP16, FP16, FP32),
        (BF16, FP32, FP32),
        (FP32, FP32, FP32),
    ],
)
def test_real_gates_on_a_gpu(T, H, E, batch_invariant, x_dtype, w_dtype, out_dtype):
    torch.manual_seed(0)
    x = torch.randn(T, H, device="cuda").to(x_dtype)
    weight = (torch.randn(E, H, device="cuda") / H**0.5).to(w_dtype)
    bias = torch.randn(E, device="cuda").to(w_dtype)
    out = gate_linear(x, weight, bias, out_dtype=out_dtype, batch_invariant=batch_invariant)
    exact = x.double() @ weight.double().T + bias.double()
    # Tensor cores add 7168 products in fp32, but not in exact order or with exact rounding.
    tolerance = 5e-5 if out_dtype is FP32 else 2e-2
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    assert torch.equal(
        out, gate_linear(x, weight, bias, out_dtype=out_dtype, batch_invariant=batch_invariant)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "E"), [(2880, 128), (7168, 256), (300, 20), (2048, 60)])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [(BF16, BF16), (FP32, FP32), (BF16, FP32)])
def test_batch_invariant_logits_on_a_gpu(H, E, x_dtype, w_dtype):
    """The parts of few tokens have the bits of the chain of many."""
    x = torch.randn(4096, H, device="cuda").to(x_dtype)
    weight, bias = torch.randn(E, H, device="cuda").to(w_dtype), torch.randn(E, device="cuda")

    def logits(rows):
        return gate_linear(rows, weight, bias, out_dtype=FP32, batch_invariant=True)

    whole = logits(x)
    for first, last in ((0, 1), (7, 14), (40, 104), (31, 364), (4095, 4096)):
        assert torch.equal(logits(x[first:last]), whole[first:last])


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 64])
def test_capture_compile_and_no_synchronisation(T):
    gate = fusedmoe.GateLinear(256, 16, out_dtype=FP32, params_dtype=BF16, device="cuda")
    x = torch.randn(T, 256, device="cuda", dtype=BF16)
    expected = gate(x)
    torch.testing.assert_close(torch.compile(gate, fullgraph=True)(x), expected)
    arguments = (x, gate.weight, None, FP32, False)
    torch.library.opcheck(torch.ops.fusedmoe.gate_linear, arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gate(x)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_reference_and_tiers_agree_between_devices():
    x, weight = torch.randn(5, 64), torch.randn(8, 64)
    on_gpu = gate_linear(x.cuda(), weight.cuda(), out_dtype=FP32).cpu()
    torch.testing.assert_close(on_gpu, gate_linear_reference(x, weight), rtol=1e-5, atol=1e-5)
