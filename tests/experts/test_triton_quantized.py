"""The quantized Triton experts against the definition, feature by feature."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from expert_layers import Layer
from fusedmoe import FusedMoEParallelConfig, MoEOptions
from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.hopper_quantized import HopperQuantizedExperts
from fusedmoe.experts.quantized_operands import Operands
from fusedmoe.experts.torch_quantized import BatchedTorchQuantizedExperts
from fusedmoe.experts.triton_quantized import TritonEmulatedExperts, TritonQuantizedExperts
from fusedmoe.experts.triton_quantized_batched import (
    BatchedTritonEmulatedExperts,
    BatchedTritonQuantizedExperts,
)
from fusedmoe.experts.triton_quantized_formats import PAIRS, unmet_by_groups
from fusedmoe.experts.triton_quantized_run import batched_quantized_experts
from fusedmoe.kernels.quantize import quantize_rows
from fusedmoe.modular_kernel import ExpertsWork
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.formats import format_named, superblocks
from fusedmoe.quantization.formats.keys import ACTIVATION_KEYS
from fusedmoe.quantization.keys import (
    ANY,
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    MXFP4_DYNAMIC,
    MXFP6_E2M3_DYNAMIC,
    MXFP8_DYNAMIC,
    NVFP4_DYNAMIC,
    accepts,
    fp8_dynamic_group,
)
from gemm_oracle import assert_right
from quantized_bodies import triton_gemm, triton_round, triton_w4a8, triton_w8a8
from quantized_experts import Quantized

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = float("nan")


PLAIN = Layer(H=64, I=32)
WIDE = Layer(H=256, I=128)
BLOCKS = Layer(H=256, I=256, E=3)
CASES = {
    "int4": Quantized("int4_g32", layer=replace(PLAIN, dtype=torch.float16)),
    "int4_zero_points": Quantized("int4_g32_zp"),
    "int4_channel": Quantized("int4_channel"),
    "int8": Quantized("int8_channel"),
    "mxfp4_interleaved_bias": Quantized(
        "mxfp4", layer=replace(PLAIN, activation=MoEActivation.SWIGLUOAI, bias=True)
    ),
    "nvfp4": Quantized("nvfp4"),
    "nf4": Quantized("nf4", layer=replace(PLAIN, I=128)),
    "iq4_nl_bias": Quantized("iq4_nl", layer=replace(PLAIN, bias=True)),
    "q2_k_by_q3_k": Quantized("q2_k", layer=BLOCKS, down="q3_k"),
    "q3_k_bias_by_q2_k": Quantized(
        "q3_k", layer=replace(BLOCKS, activation=MoEActivation.SWIGLUOAI, bias=True), down="q2_k"
    ),
    "q4_k_by_q5_1": Quantized("q4_k", layer=replace(BLOCKS, I=160), down="q5_1"),
    "q4_1_bias_by_q5_1": Quantized("q4_1", layer=replace(WIDE, bias=True), down="q5_1"),
    "q4_k_by_q6_k": Quantized("q4_k", layer=BLOCKS, down="q6_k"),
    "q5_k_bias_by_int8": Quantized("q5_k", layer=replace(BLOCKS, bias=True), down="int8_g32"),
    "int4_by_q5_k": Quantized("int4_g32", layer=BLOCKS, down="q5_k"),
    "q6_k_by_iq4_nl": Quantized("q6_k", layer=BLOCKS, down="iq4_nl"),
    "mxfp6_e3m2": Quantized("mxfp6_e3m2"),
    "mxfp6_e2m3_interleaved_bias": Quantized(
        "mxfp6_e2m3", layer=replace(PLAIN, activation=MoEActivation.SWIGLUOAI, bias=True)
    ),
    "act_order": Quantized("int4_g32_act_order"),
    "act_order_zp_bias_map": Quantized(
        "int4_g32_zp_act_order", layer=replace(PLAIN, E=8, local=5, bias=True)
    ),
    "act_order_int8_no_gate": Quantized(
        "int8_g32_act_order", layer=replace(PLAIN, activation=MoEActivation.RELU2_NO_MUL)
    ),
    "fp8_weights": Quantized("fp8_channel"),
    "fp8_block": Quantized("fp8_block", FP8_DYNAMIC_128, WIDE),
    "fp8_small_blocks": Quantized("fp8_block_32x32", fp8_dynamic_group(32)),
    "fp8_channel": Quantized("fp8_channel", FP8_DYNAMIC_TOKEN),
    "fp8_tensor": Quantized("fp8_tensor", FP8_STATIC_TENSOR),
    "fp8_tensor_map": Quantized("fp8_tensor", FP8_DYNAMIC_TENSOR, replace(PLAIN, E=8, local=3)),
    "int8_rows": Quantized("int8_channel", INT8_DYNAMIC_TOKEN),
    "int4_by_fp8": Quantized("int4_g64", FP8_DYNAMIC_TOKEN, replace(WIDE, T=40, E=3)),
    "int4_by_fp8_few": Quantized("int4_g128_zp", FP8_STATIC_TENSOR, WIDE),
    "int4_by_fp8_tensor_map": Quantized(
        "int4_channel", FP8_DYNAMIC_TENSOR, replace(WIDE, T=60, E=8, local=2, bias=True)
    ),
    "int4_by_fp8_mixed": Quantized(
        "int4_g64", FP8_DYNAMIC_TOKEN, replace(WIDE, T=40, E=3), down="fp8_channel"
    ),
    "int4_by_fp8_invariant": Quantized(
        "int4_g128", FP8_DYNAMIC_TOKEN, replace(WIDE, options=MoEOptions(batch_invariant=True))
    ),
    "int8_channel_zero_points": Quantized("int8_channel_zp"),
    "one_token": Quantized("int4_g32", layer=replace(PLAIN, T=1)),
    "lone_slots": Quantized("mxfp4", layer=replace(PLAIN, T=2, E=16, bias=True)),
    "lone_slots_map": Quantized("int4_g32", layer=replace(PLAIN, T=1, E=32, local=9)),
    "many_rows": Quantized("int4_g32", layer=replace(PLAIN, T=40, E=3)),
    "expert_map_bias": Quantized("int8_channel", layer=replace(PLAIN, E=8, local=5, bias=True)),
    "no_gate": Quantized("mxfp4", layer=replace(PLAIN, activation=MoEActivation.RELU2_NO_MUL)),
    "weight_on_input": Quantized("int4_g32", layer=replace(PLAIN, K=1, weight_on_input=True)),
    "batch_invariant": Quantized(
        "int4_g32", layer=replace(PLAIN, options=MoEOptions(batch_invariant=True))
    ),
    "passes": Quantized(
        "int4_g32", layer=replace(PLAIN, T=9, options=MoEOptions(max_workspace_bytes=2500))
    ),
}


@pytest.fixture
def quantized_bodies(monkeypatch, bodies):
    """The launchers' own references, or Triton's bodies under the interpreter."""
    if bodies == "torch":
        return
    from fusedmoe.kernels import grouped_gemm_quantized as gemm
    from fusedmoe.kernels import grouped_gemm_quantized_w8a8 as w8a8
    from fusedmoe.kernels import grouped_gemm_w4a8 as w4a8
    from fusedmoe.kernels import round_rows

    monkeypatch.setattr(gemm, "quantized_gemm_reference", triton_gemm)
    monkeypatch.setattr(round_rows, "round_rows_reference", triton_round)
    monkeypatch.setattr(w4a8, "w4a8_gemm_reference", triton_w4a8)
    monkeypatch.setattr(w8a8, "w8a8_gemm_reference", triton_w8a8)


def tolerance_of(case):
    """Rounding to fp8 is the interpreter's own on the way into a product: see the GPU tests."""
    if case.rows is not None:
        return 0.2
    return 3e-3 if case.layer.dtype == torch.float16 else 2e-5


@pytest.mark.parametrize("name", CASES)
def test_layers(name, quantized_bodies):
    case = CASES[name]
    tensors = case.layer.tensors()
    assert_right(case.run(tensors), case.expected(tensors), tolerance_of(case))


@pytest.mark.parametrize("name", CASES)
def test_batched_layers(name):
    case = replace(CASES[name], layer=replace(CASES[name].layer, options=MoEOptions()))
    tensors = case.layer.tensors()
    out = case.run(tensors, BatchedTritonQuantizedExperts)
    wanted = case.expected(tensors)
    if case.rows == FP8_DYNAMIC_TENSOR:  # made by the rows that are here, not by those of a token
        wanted = case.run(tensors, BatchedTorchQuantizedExperts)
    assert_right(out, wanted, tolerance_of(case))


@pytest.mark.parametrize("fmt", ["fp8_tensor", "int4_g32", "int4_g64"])
@pytest.mark.parametrize("experts", [BatchedTritonQuantizedExperts, BatchedTritonEmulatedExperts])
def test_one_scale_of_batched_rows_counts_those_of_experts_alone(fmt, experts, quantized_bodies):
    """Whatever lies past an expert's rows: numbers far larger, infinities, NaN."""
    case = Quantized(fmt, FP8_DYNAMIC_TENSOR, WIDE)
    w1, w2, config = case.config(case.layer.tensors())
    activation, dtype = case.layer.activation, case.layer.dtype
    operands = Operands.of(config, w1.data, w2.data, activation, dtype, emulate=experts.emulate)
    e, H, I = operands.w2.shape  # noqa: E741
    counts = torch.tensor([3, 0, 7, 1, 2, 5, 4, 6][:e], dtype=torch.int32)
    x = torch.randn(e, 7, H, dtype=case.layer.dtype)
    outs = []
    for past in (0.0, 1e4, float("inf"), float("nan")):
        mine, out = x.clone(), torch.full_like(x, float("nan"))
        for expert, count in enumerate(counts.tolist()):
            mine[expert, count:] = past
        act, nobody = mine.new_full((e * 7 * I,), float("nan")), torch.empty(0, 1)
        work = ExpertsWork(
            out, mine, w1.data, w2.data, nobody, nobody, activation, e, workspace13=act
        )
        batched_quantized_experts(work, operands, counts, ApplyMoEActivationConfig())
        outs.append(torch.cat([out[i, :count] for i, count in enumerate(counts.tolist())]))
    assert outs[0].isfinite().all()
    assert all(torch.equal(out, outs[0]) for out in outs[1:])


@pytest.mark.parametrize("only", ["w1", "w2"])
@pytest.mark.parametrize("experts", [TritonQuantizedExperts, BatchedTritonQuantizedExperts])
@pytest.mark.parametrize(
    ("fmt", "down"),
    [("fp8_channel", "int4_g32"), ("int4_g32", "fp8_channel"), ("int4_g64", "int4_g64")],
)
def test_rows_of_one_product_alone_are_rounded(fmt, down, experts, only, quantized_bodies):
    """The other product takes floats, so both do; what was asked for is rounded all the same.

    Rows that were not would be 2e-2 off; one element that is nearly a tie is 3e-4.
    """
    case = Quantized(fmt, FP8_DYNAMIC_TOKEN, replace(PLAIN, I=64, T=40), down, only=only)
    tensors = case.layer.tensors()
    assert_right(case.run(tensors, experts), case.expected(tensors), 2e-3)


@pytest.mark.parametrize("part", ["scale", "scale2"])
def test_one_scale_for_gate_and_up(part, quantized_bodies):
    """As the API reference has scales per tensor: one number per expert."""
    case = Quantized("fp8_tensor" if part == "scale" else "nvfp4")
    tensors = case.layer.tensors()
    w1, w2 = case.weights(tensors)
    shared = getattr(w1, part)[:, :1]
    run = case.runner(tensors, weights=(replace(w1, **{part: shared.repeat(1, 2)}), w2))
    desc = run.experts.quant_config.w1
    run.experts.quant_config = replace(
        run.experts.quant_config, w1=replace(desc, **{part: shared[:, 0]})
    )
    expected = case.runner(tensors, weights=(replace(w1, **{part: shared.repeat(1, 2)}), w2))()
    assert run().equal(expected)


@pytest.mark.parametrize(
    "name",
    ["int4_zero_points", "nvfp4", "nf4", "fp8_block", "fp8_tensor", "q4_k_by_q6_k", "act_order"],
)
def test_compiled_without_graph_breaks(name):
    case = CASES[name]
    tensors = case.layer.tensors()
    assert case.run(tensors, compiled=True).equal(case.run(tensors))
    batched = BatchedTritonQuantizedExperts
    assert case.run(tensors, batched, compiled=True).equal(case.run(tensors, batched))


EMULATED = {
    "int4_by_fp8": Quantized("int4_g32", FP8_DYNAMIC_TOKEN),
    "int4_by_fp8_map": Quantized("int4_g32", FP8_DYNAMIC_TENSOR, replace(PLAIN, E=8, local=3)),
    "mxfp4_by_mxfp4": Quantized("mxfp4", MXFP4_DYNAMIC),
    "mxfp4_by_mxfp8_bias": Quantized(
        "mxfp4",
        MXFP8_DYNAMIC,
        replace(PLAIN, activation=MoEActivation.SWIGLUOAI, bias=True, T=1, E=16),
    ),
    "nvfp4_by_nvfp4": Quantized("nvfp4", NVFP4_DYNAMIC),
    "fp8_by_int8": Quantized("fp8_channel", INT8_DYNAMIC_TOKEN),
    "mxfp6_by_mxfp6": Quantized("mxfp6_e2m3", MXFP6_E2M3_DYNAMIC),
    "q4_k_by_fp8": Quantized("q4_k", FP8_DYNAMIC_TOKEN, BLOCKS, down="int4_g32"),
}


@pytest.mark.parametrize("name", EMULATED)
def test_rows_of_other_formats_are_rounded_and_multiplied_as_floats(name, quantized_bodies):
    """A value near a tie may be rounded the other way, since sums differ in their last bit."""
    case = EMULATED[name]
    tensors = case.layer.tensors()
    out = case.run(tensors, TritonEmulatedExperts)
    assert_right(out, case.expected(tensors), 2e-2)
    assert case.run(tensors, TritonEmulatedExperts, compiled=True).equal(out)


@pytest.mark.parametrize("name", [name for name in EMULATED if name != "int4_by_fp8_map"])
def test_rows_of_other_formats_in_batches(name, quantized_bodies):
    case = EMULATED[name]
    tensors = case.layer.tensors()
    out = case.run(tensors, BatchedTritonEmulatedExperts)
    assert_right(out, case.expected(tensors), 2e-2)


def test_emulation_is_said_and_a_scale_of_all_rows_is_no_batch_invariance():
    six = {("weights", format_named(name).key) for name in ("mxfp6_e3m2", "mxfp6_e2m3")}
    assert TritonQuantizedExperts.capabilities().emulated == six
    assert TritonEmulatedExperts.capabilities().emulated > six
    layer = replace(PLAIN, dtype=torch.bfloat16, options=MoEOptions(batch_invariant=True))
    moe = replace(layer.config(), device=torch.device("cuda"))
    weight = format_named("fp8_tensor").key
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        for experts, (key, message) in product(
            (TritonQuantizedExperts, HopperQuantizedExperts),
            ((FP8_DYNAMIC_TENSOR, "follows the batch"), (FP8_STATIC_TENSOR, None)),
        ):
            rows = experts.activation_format()
            found = experts.is_supported_config(moe, weight, key, rows)
            assert found[0] == (message is None)
            assert message is None or message in found[1]


def test_ids_of_no_expert_and_nan_rows(quantized_bodies):
    case = replace(CASES["int4"], layer=replace(PLAIN, T=6))
    tensors = case.layer.tensors()
    ids = tensors["topk_ids"]
    ids[0], ids[1, 0] = -1, -1
    clean = case.run(tensors)
    assert (clean[0] == 0).all()
    assert_right(clean, case.expected(tensors), 2e-5)
    tensors["hidden_states"][3] = NAN
    dirty = case.run(tensors)
    assert dirty[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert dirty[others].equal(clean[others])


def test_all_tokens_on_one_expert_and_no_tokens(quantized_bodies):
    case = replace(CASES["mxfp4_interleaved_bias"], layer=replace(PLAIN, T=37, K=1))
    tensors = case.layer.tensors()
    tensors["topk_ids"].fill_(2)
    assert_right(case.run(tensors), case.expected(tensors), 2e-5)
    empty = replace(case, layer=replace(PLAIN, T=0))
    assert empty.run(empty.layer.tensors()).shape == (0, 64)


def test_rows_that_are_not_contiguous(quantized_bodies):
    case = CASES["int8"]
    tensors = case.layer.tensors()
    expected = case.expected(tensors)
    tensors["hidden_states"] = tensors["hidden_states"].t().contiguous().t()
    tensors["topk_ids"] = tensors["topk_ids"].long().t().contiguous().t()
    assert_right(case.run(tensors), expected, 2e-5)


@pytest.mark.parametrize(
    ("fmt", "rows", "since"),
    [
        ("int4_g128", None, (8, 0)),
        ("int8_channel", INT8_DYNAMIC_TOKEN, (8, 0)),
        ("mxfp4", None, (8, 0)),
        ("q4_k", None, (8, 0)),
        ("nvfp4", None, (8, 9)),
        ("mxfp8", None, (8, 9)),
        ("fp8_channel", None, (8, 9)),
        ("fp8_block", FP8_DYNAMIC_128, (8, 9)),
        ("int4_g128", FP8_DYNAMIC_TOKEN, (8, 9)),
    ],
)
def test_e4m3_wants_a_gpu_that_reads_it(fmt, rows, since, monkeypatch):
    moe = replace(WIDE, dtype=torch.bfloat16).config()
    moe, weight = replace(moe, device=torch.device("cuda")), format_named(fmt).key
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        found, reason = TritonQuantizedExperts.is_supported_config(
            moe, weight, rows, TritonQuantizedExperts.activation_format()
        )
        assert found == (capability >= since), (capability, reason)
        assert found or str(capability) in reason


@pytest.mark.parametrize("batched", [False, True])
def test_no_format_is_dequantized_on_a_gpu(batched, monkeypatch):
    """Every weight format meets rows as they come, and rows of every format, without the
    reference."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    layer = replace(PLAIN, dtype=torch.bfloat16)
    moe = replace(layer.config(), device=torch.device("cuda"))
    classes = [BatchedTritonQuantizedExperts, BatchedTritonEmulatedExperts]
    if not batched:
        classes = [TritonQuantizedExperts, TritonEmulatedExperts]
    names = (
        *("fp8_tensor", "fp8_channel", "fp8_block", "int8_channel", "int8_g32_zp", "int4_g32"),
        *("int4_channel_zp", "int4_g32_act_order", "int8_g32_zp_act_order", "mxfp4", "mxfp8"),
        *("mxfp6_e3m2", "mxfp6_e2m3", "nvfp4", "nf4", "iq4_nl", *superblocks.CODECS),
    )
    for name in names:
        weight = format_named(name).key
        for rows in (None, *(key for key in ACTIVATION_KEYS if key.group_shape.col != ANY)):
            able = [
                cls.is_supported_config(moe, weight, rows, cls.activation_format())[0]
                for cls in classes
            ]
            assert any(able), (name, str(rows))
            assert able[0] or rows is not None


def test_pairs_are_what_the_reference_also_runs():
    """Every pair is a pattern of ``QuantKey``s, and formats that the kernels cannot read are not
    among them."""
    assert len(PAIRS) > 20
    for name, rows, there in (
        ("int4_g128", None, True),
        ("int4_g32_zp", None, True),
        ("fp8_block", FP8_DYNAMIC_128, True),
        ("fp8_block", FP8_DYNAMIC_TOKEN, True),
        ("int8_channel", FP8_DYNAMIC_TOKEN, False),
        ("mxfp6_e3m2", None, True),
        ("int4_g32_act_order", None, True),
        ("mxfp6_e3m2", FP8_DYNAMIC_TOKEN, False),
        ("int4_g128", FP8_DYNAMIC_TOKEN, True),
        ("int4_g128_act_order", FP8_DYNAMIC_TOKEN, False),
    ):
        key = format_named(name).key
        found = any(accepts(weight, key) and accepts(act, rows) for weight, act in PAIRS)
        assert found == there, name


@pytest.mark.parametrize(
    ("fmt", "rows", "message"),
    [
        ("fp8_block_16x16", FP8_DYNAMIC_TOKEN, "at least 32"),
        ("fp8_block_128x96", None, "96"),
        ("int4_g96", None, "96"),
        ("int4_g32", FP8_DYNAMIC_TOKEN, "at least 64"),
        ("int4_g128", None, None),
    ],
)
def test_groups_that_steps_cannot_have_are_refused_with_the_reason(fmt, rows, message):
    assert unmet_by_groups(format_named(fmt).key, rows) is None or message is not None
    if message is None:
        return
    weight = format_named(fmt).key
    assert message in unmet_by_groups(weight, rows)
    moe = replace(PLAIN, dtype=torch.bfloat16).config()
    for experts in (TritonQuantizedExperts, HopperQuantizedExperts):
        assert message in experts.unmet_requirement(moe, weight, rows)


def test_workspaces_follow_from_sizes():
    """Rows of the second GEMM are kept in fp32, twice the width where rows are 16-bit; where rows
    are rounded to 8 bits, only few of them."""
    layer = replace(PLAIN, dtype=torch.bfloat16)
    for key, many in ((None, 128), (FP8_DYNAMIC_TOKEN, 64)):
        desc = Quantized("int4_g128", key).rows_desc(torch.device("cpu"))
        experts = TritonQuantizedExperts(layer.config(), FusedMoEQuantConfig(a1=desc, a2=desc))
        shapes = experts.workspace_shapes(7, 64, 64, 2, 4, 4, None, MoEActivation.SILU)
        assert shapes == ((7, 2, 32), (7, 2, 128), (7, 64))
        shapes = experts.workspace_shapes(9000, 64, 64, 2, 4, 4, None, MoEActivation.SILU)
        assert shapes.workspace2 == (9000, 2, many)


def test_the_batched_format_needs_counts():
    experts = BatchedTritonQuantizedExperts(
        PLAIN.config(), FusedMoEQuantConfig(), max_num_tokens=4, num_dispatchers=1
    )
    w = torch.zeros(4, 64, 32)
    rows = torch.zeros(4, 4, 64)
    with pytest.raises(ValueError, match=r"expert_num_tokens \[4\]"):
        experts.apply(
            rows, rows, w, w, None, None, PLAIN.activation, 4, None, None, None, rows, rows, None,
            False,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["fp8_block", "fp8_channel", "int8_rows"])
def test_rows_rounded_before_they_travelled(name):
    """The same bits as rows that are rounded here."""
    case = CASES[name]
    options = MoEOptions(batch_invariant=True)
    case = replace(case, layer=replace(case.layer, T=40, options=options))
    tensors = case.layer.tensors()
    w1, w2, config = case.config(tensors)
    moe = case.layer.config()
    experts = TritonQuantizedExperts(moe, config)
    x = tensors["hidden_states"]
    q, scale = quantize_rows(x, config.a1.key)
    shapes = experts.workspace_shapes(
        case.layer.T, w1.shape[1], x.shape[1], case.layer.K, case.layer.E, w1.shape[0], None,
        case.layer.activation,
    )  # fmt: skip
    found = []
    for rows, rows_scale in ((x, None), (q, scale)):
        out = torch.full_like(x, NAN)
        experts.apply(
            out, rows, w1.data, w2.data, tensors["topk_weights"], tensors["topk_ids"],
            case.layer.activation, case.layer.E, None, rows_scale, None,
            x.new_empty(shapes.workspace13), x.new_empty(shapes.workspace2), None, False,
        )  # fmt: skip
        found.append(out)
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def test_rows_are_rounded_before_they_travel_where_their_scales_can():
    ranks = FusedMoEParallelConfig.make_no_parallel()
    apart = replace(ranks, dp_size=2, ep_size=2, use_ep=True)
    for name, here, travelling in (
        ("fp8_block", True, False),
        ("int8_rows", True, False),
        ("fp8_tensor", True, True),
        ("int4", True, True),
    ):
        case = CASES[name]
        config = case.config(case.layer.tensors())[2]
        for parallel, deferred in ((ranks, here), (apart, travelling)):
            moe = replace(case.layer.config(), moe_parallel_config=parallel)
            assert TritonQuantizedExperts(moe, config).expects_unquantized_inputs is deferred
    # Rounded rows would meet a product of floats.
    case = replace(CASES["fp8_channel"], only="w1")
    config = case.config(case.layer.tensors())[2]
    moe = replace(case.layer.config(), moe_parallel_config=apart)
    assert TritonQuantizedExperts(moe, config).expects_unquantized_inputs
