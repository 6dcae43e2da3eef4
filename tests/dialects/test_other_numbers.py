"""Settings that would change what the same bytes mean are obeyed, or refused: never passed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from writers import CASES

from fusedmoe.quantization.dialects import read_quantization
from fusedmoe.quantization.dialects.base import Matrix, read_matrix

MODULE = "model.layers.3.mlp.experts.7.up_proj"
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True}
AS_AWQ = AUTO_ROUND | {"packing_format": "auto_round:auto_awq", "sym": False}
QUARK_INT8 = {"dtype": "int8", "qscheme": "per_channel"}
NVFP4 = {"quant_algo": "NVFP4"}
FP8 = {"quant_method": "fp8"}


def quark(weight: dict[str, Any], **more: Any) -> dict[str, Any]:
    settings = {"weight": weight, "input_tensors": more.pop("inputs", None)}
    return {"quant_method": "quark", "global_quant_config": settings} | more


def compressed(weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    known = {"type": "float", "num_bits": 8, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": known | weights} | group
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


INT8 = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rounded activations": (AUTO_ROUND | {"act_bits": 8}, "activations of 8 bits"),
    "of one layer": (AUTO_ROUND | {"extra_config": {"x": {"act_bits": 4}}}, "activations of 4"),
    "floats": (AUTO_ROUND | {"data_type": "mx_fp"}, "data_type is 'mx_fp'"),
    "floats of one layer": (AUTO_ROUND | {"extra_config": {"x": {"data_type": "fp8"}}}, "'fp8'"),
    "bits by name": (AUTO_ROUND | {"extra_config": {"x": {"bits": "8"}}}, "must be an integer"),
    "bits as a flag": (AUTO_ROUND | {"bits": True}, "must be an integer, got True"),
    "awq by layer": (AS_AWQ | {"extra_config": {"x": {"group_size": 32}}}, "x has group_size 32"),
    "awq without zeros": (AS_AWQ | {"extra_config": {"x": {"sym": True}}}, "x has sym True"),
    "zero points": (quark(QUARK_INT8 | {"symmetric": False}), "zero points of int8"),
    "of rows": (
        quark(QUARK_INT8, inputs=QUARK_INT8 | {"is_dynamic": True, "symmetric": False}),
        "zero points of int8",
    ),
    "scales of columns": (quark(QUARK_INT8 | {"ch_axis": 1}), "ch_axis is 1"),
    "by type": (
        quark(QUARK_INT8, layer_type_quant_config={"Linear": {"weight": QUARK_INT8}}),
        "by type of layer",
    ),
    "neither": ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
    "groups of one layer": (
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {MODULE: NVFP4 | {"group_size": 32}},
        },
        "groups of 16, not 32",
    ),
    "asymmetric floats": (compressed({"symmetric": False}), "zero points of floats"),
    "asymmetric rows": (
        compressed({"type": "int"}, input_activations=INT8 | {"symmetric": False}),
        "zero points of activations",
    ),
    "local scales of tensors": (
        compressed({}, input_activations=INT8 | {"type": "float", "dynamic": "local"}),
        "dynamic must be true or false, got 'local'",
    ),
    "scales of rows that are stored": (
        compressed({}, input_activations={"type": "float", "strategy": "channel"}),
        "static activation scales must be per tensor",
    ),
    "integers by tensor": (
        compressed({"type": "int", "num_bits": 4, "strategy": "tensor"}),
        "4-bit integers by 'tensor'",
    ),
    "integers by block": (
        compressed({"type": "int", "strategy": "block", "block_structure": [32, 32]}),
        "8-bit integers by 'block'",
    ),
    "a zero point of a tensor": (
        compressed({"type": "int", "strategy": "tensor", "symmetric": False}),
        "one zero point for a whole matrix",
    ),
    "one scale of rows": (
        compressed({"type": "int"}, input_activations=INT8 | {"strategy": "tensor"}),
        "dynamic 8-bit int activations per tensor",
    ),
    "blocks of nothing": (FP8 | {"weight_block_size": [0, 128]}, r"integers, got \[0, 128\]"),
    "blocks of floats": (FP8 | {"weight_block_size": [128.0, 1]}, r"integers, got \[128.0, 1\]"),
    "rounded outputs": (compressed({}, output_activations=INT8), "rounded outputs"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_they_are_refused(case: str) -> None:
    config, message = OTHERS[case]
    with pytest.raises(ValueError, match=message):
        read_quantization(config).scheme(MODULE)


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        (MODULE, {"bits": 8}, "int8_g64"),
        ("model.layers.3.mlp.experts.70.up_proj", {"bits": 8}, "int4_g64"),
        (r".*experts\.\d+\.up_proj", {"bits": 8, "group_size": 32}, "int8_g32"),
        (r"experts\.7\.", {"bits": 16}, None),
        ("mlp.experts.7.up_proj", {"bits": 16}, None),
        ("up_proj_of_another", {"bits": 16}, "int4_g64"),
    ],
)
def test_auto_round_names_layers_and_searches_for_expressions(
    name: str, own: dict[str, Any], expected: str | None
) -> None:
    config = AUTO_ROUND | {"extra_config": {name: own}}
    scheme = read_quantization(config).scheme(MODULE)
    assert (scheme and scheme.format.name) == expected


@pytest.mark.parametrize("own", [MODULE, r"experts\.\d+\.up_proj$"])
def test_auto_round_leaves_layers_of_16_bits_alone_in_awq_s_packing_too(own: str) -> None:
    quantization = read_quantization(AS_AWQ | {"extra_config": {own: {"bits": 16}}})
    assert quantization.scheme(MODULE) is None
    assert quantization.scheme(MODULE.replace("up", "down")) is not None


def test_rows_of_llm_int8_are_rounded_where_none_of_their_columns_is_spared() -> None:
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for threshold, rounded in ((None, False), (6.0, False), (0.0, True)):
        scheme = read_quantization(config | {"llm_int8_threshold": threshold}).scheme(MODULE)
        assert (scheme.activation is not None) == rounded


def matrix(N: int, K: int) -> Matrix:
    return Matrix(name=MODULE, N=N, K=K)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8])
def test_bytes_of_nf4_may_be_stored_as_other_numbers(storage: torch.dtype) -> None:
    case = CASES["bitsandbytes nf4"]
    stored = case.write(torch.randn(64, 128))
    rule = next(
        rule
        for rule in read_quantization(case.config).scheme(MODULE).rules
        if rule.needs[0] == "weight"
    )
    tensors = [stored.tensors[name] for name in rule.needs]
    wanted = rule.convert(matrix(64, 128), *tensors)
    tensors[0] = tensors[0].flatten().view(storage).reshape(-1, 1)
    assert rule.convert(matrix(64, 128), *tensors).equal(wanted)
    with pytest.raises(ValueError, match="expected shape"):
        rule.convert(matrix(64, 128), tensors[0][1:], tensors[1])


def test_zero_points_of_symmetric_integers_must_be_none() -> None:
    config = compressed({"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32})
    config["format"] = "pack-quantized"
    rules = read_quantization(config).scheme(MODULE).rules
    rule = next(rule for rule in rules if rule.needs == ("weight_zero_point",))
    assert rule.optional
    for good in (torch.zeros(16, 2, dtype=torch.int8), torch.full((2, 2), -0x77777778).int()):
        rule.convert(matrix(16, 64), good)
    with pytest.raises(ValueError, match=r"up_proj.weight_zero_point: expected 0 .* found 1$"):
        rule.convert(matrix(16, 64), torch.full((2, 2), -0x77777777).int())


@pytest.mark.parametrize(
    ("case", "change"),
    [("awq", {"version": "GEMM"}), ("gptq", {"sym": None, "desc_act": None, "dynamic": None})],
)
def test_capitals_and_null_say_what_is_usual(case: str, change: dict[str, Any]) -> None:
    plain, other = (
        read_quantization(config).scheme(MODULE)
        for config in (CASES[case].config, CASES[case].config | change)
    )
    assert plain.describe() == other.describe()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_integers_of_a_byte_have_zero_points_of_a_byte(bits: int) -> None:
    """compressed-tensors without packing: all are signed, whatever their bits."""
    group = {"type": "int", "num_bits": bits, "strategy": "group", "group_size": 32}
    config = compressed(group | {"symmetric": False}) | {"format": "int-quantized"}
    low, high = -(1 << bits - 1), 1 << bits - 1
    stored = {
        "weight": torch.randint(low, high, (16, 64)).to(torch.int8),
        "weight_scale": torch.rand(16, 2),
        "weight_zero_point": torch.randint(low, high, (16, 2)).to(torch.int8),
    }
    found = read_matrix(read_quantization(config).scheme(MODULE), stored, matrix(16, 64))
    numbers, scale, zero = (tensor.float() for tensor in stored.values())
    wanted = (numbers - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    assert torch.equal(found.dequantize(torch.float32), wanted)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3, 1)])
def test_scales_of_blocks_may_have_axes_of_one(shape: tuple[int, ...]) -> None:
    """ModelOpt's FP8_PB_WO; of as many numbers in another order nothing is known."""
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
    weight, scale = torch.randn(256, 300).to(torch.float8_e4m3fn), torch.rand(2, 3)
    scheme = read_quantization(config, {}).scheme(MODULE)
    stored = {"weight": weight, "weight_scale": scale.reshape(shape)}
    found = read_matrix(scheme, stored, matrix(256, 300))
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :300]
    assert torch.equal(found.dequantize(torch.float32), weight.float() * spread)
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\).* found \(3, 2\)"):
        read_matrix(scheme, stored | {"weight_scale": scale.reshape(3, 2)}, matrix(256, 300))


def test_groups_that_do_not_divide_a_matrix_are_named() -> None:
    config = compressed({"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32})
    stored = {
        "weight_packed": torch.zeros(16, 10, dtype=torch.int32),
        "weight_scale": torch.ones(16, 3),
    }
    scheme = read_quantization(config | {"format": "pack-quantized"}).scheme(MODULE)
    with pytest.raises(
        ValueError, match=r"weight_scale: groups of 32 columns do not divide the 80"
    ):
        read_matrix(scheme, stored, matrix(16, 80))


@pytest.mark.parametrize(
    ("case", "suffix"),
    [
        ("deepseek", "input_scale"),
        ("modelopt fp8 channel", "input_scale"),
        ("quark int8", "input_scale"),
        ("ct w4a16", "weight_g_idx"),
        ("ct mxfp4", "weight_observer"),
    ],
)
def test_tensors_that_mean_nothing_here_are_passed_over(case: str, suffix: str) -> None:
    tensors = CASES[case].write(torch.randn(64, 64)).tensors
    leaves = {name: tensor.dtype for name, tensor in tensors.items()}
    scheme = read_quantization(CASES[case].config, leaves).scheme(MODULE)
    plain, more = (
        read_matrix(scheme, tensors | other, matrix(64, 64)).dequantize(torch.float32)
        for other in ({}, {suffix: torch.zeros(1)})
    )
    assert torch.equal(plain, more)


def test_a_matrix_of_zeros_may_have_a_second_scale_of_zero() -> None:
    tensors = CASES["modelopt nvfp4"].write(torch.randn(64, 64)).tensors
    scheme = read_quantization(CASES["modelopt nvfp4"].config).scheme(MODULE)
    tensors["weight_scale_2"] = torch.zeros(())
    assert not read_matrix(scheme, tensors, matrix(64, 64)).dequantize(torch.float32).any()


@pytest.mark.parametrize("number", [0.0, 1e-40])
def test_the_inverse_of_a_scale_has_an_inverse(number: float) -> None:
    found = refusal("ct nvfp4", "weight_global_scale", lambda scale: torch.full_like(scale, number))
    assert found.startswith("up_proj.weight_global_scale: expected the inverse of a scale, found ")


def test_fp8_of_no_rows_is_read() -> None:
    stored = {
        "weight": torch.empty(0, 64, dtype=torch.float8_e4m3fn),
        "weight_scale": torch.empty(0, 1),
    }
    scheme = read_quantization(CASES["ct fp8 channel"].config).scheme(MODULE)
    assert read_matrix(scheme, stored, matrix(0, 64)).dequantize().shape == (0, 64)


def test_bytes_outside_four_bits_are_named() -> None:
    config = compressed({"type": "int", "num_bits": 4}) | {"format": "int-quantized"}
    rules = read_quantization(config).scheme(MODULE).rules
    rule = next(rule for rule in rules if rule.needs == ("weight",))
    weight = torch.randint(-8, 8, (16, 64)).to(torch.int8)
    rule.convert(matrix(16, 64), weight)
    weight[3, 5] = 8
    with pytest.raises(ValueError, match="expected numbers of 4 bits, found 8"):
        rule.convert(matrix(16, 64), weight)


def refusal(case: str, suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """What reading a 64 x 64 matrix says where one of its stored tensors is another."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    tensors = CASES[case].write(weight).tensors
    tensors[suffix] = change(tensors[suffix].clone())
    leaves = {name: tensor.dtype for name, tensor in tensors.items()}
    scheme = read_quantization(CASES[case].config, leaves).scheme(MODULE)
    assert scheme is not None
    with pytest.raises(ValueError) as caught:
        read_matrix(scheme, tensors, Matrix(name="up_proj", N=64, K=64))
    return str(caught.value)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
@pytest.mark.parametrize("case", ["deepseek", "ct fp8 channel", "quark fp8"])
def test_fp8_weights_of_nan_are_named(case: str, byte: int) -> None:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight.view(torch.uint8)[3, 5] = byte
        return weight

    message = refusal(case, "weight", change)
    assert message == f"up_proj.weight: expected numbers, found nan (e4m3 0x{byte:x}) at [3, 5]"


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("suffix", ["weight.nested_absmax", "weight.nested_quant_map"])
def test_nested_maxima_are_checked_where_they_are_stored(suffix: str, number: float) -> None:
    """Even the entry of a table that no block of this matrix happens to use."""

    def change(numbers: torch.Tensor) -> torch.Tensor:
        numbers[0] = number
        return numbers

    message = refusal("bitsandbytes nf4", suffix, change)
    assert message == f"up_proj.{suffix}: expected finite scales, found {number} at [0]"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([64, 128], "expected [64, 64], found [64, 128]"),
        ([64], "expected shape (2,) for a 64 x 64 matrix, found (1,)"),
        ([64.0, 64.0], "expected torch.int64 or torch.int32, found torch.float32"),
    ],
)
def test_the_shape_beside_packed_integers_is_theirs(shape: list[float], message: str) -> None:
    found = refusal("ct w4a16", "weight_shape", lambda _: torch.tensor(shape))
    assert found == f"up_proj.weight_shape: {message}"


@pytest.mark.parametrize(
    ("case", "suffix"), [("modelopt nvfp4", "input_scale"), ("ct nvfp4", "input_global_scale")]
)
def test_stored_scales_of_nvfp4_rows_are_checked_and_not_used(case: str, suffix: str) -> None:
    """Rows get a second scale each, as they come."""
    tensors = CASES[case].write(torch.randn(64, 64)).tensors
    leaves = {name: tensor.dtype for name, tensor in tensors.items()} | {suffix: torch.float32}
    scheme = read_quantization(CASES[case].config, leaves).scheme(MODULE)
    assert scheme is not None
    assert scheme.describe()["activation"] == "nvfp4 per 1x16 dynamic e4m3 scales"
    matrix = Matrix(name="up_proj", N=64, K=64)
    one, other = (
        read_matrix(scheme, tensors | {suffix: torch.tensor(number)}, matrix).parts()
        for number in (0.5, 3.0)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].float(), other[name].float()) for name in one)
    with pytest.raises(ValueError, match=rf"up_proj\.{suffix}: expected finite scales, found nan"):
        read_matrix(scheme, tensors | {suffix: torch.tensor(torch.nan)}, matrix)


def test_zero_points_of_symmetric_awq_are_half_the_range_or_left_out() -> None:
    message = refusal("awq symmetric", "qzeros", lambda zeros: zeros - 0x11111111)
    assert message == "up_proj.qzeros: expected 8 everywhere as zero_point is false, found 7"
    assert "qzeros" not in read_quantization(CASES["awq symmetric"].config).scheme(MODULE).required


@pytest.mark.parametrize("layout", [1, 3])
def test_int8_in_the_order_of_one_kernel_is_not_read_as_rows(layout: int) -> None:
    message = refusal("bitsandbytes int8", "weight_format", lambda zero: zero + layout)
    assert message == f"up_proj.weight_format: expected 0 (row by row), found {layout}"


@pytest.mark.parametrize(("case", "suffix"), [("gptq", "scales"), ("awq", "scales")])
def test_the_place_of_a_bad_scale_is_the_one_in_the_file(case: str, suffix: str) -> None:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale[1, 40] = torch.inf
        return scale

    message = refusal(case, suffix, change)
    assert message == f"up_proj.{suffix}: expected finite scales, found inf at [1, 40]"
