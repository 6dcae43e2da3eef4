"""compressed-tensors: bytes from its own compressors, values from its own decompressors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fusedmoe.quantization import keys
from fusedmoe.quantization.dialects import Matrix, read_quantization
from fusedmoe.quantization.dialects.base import read_matrix

if TYPE_CHECKING:
    from compressed_tensors.quantization.quant_scheme import QuantizationScheme

MODULE = "model.layers.0.mlp.experts.0.up_proj"
N, K = 48, 256

FORMATS = {
    "W4A16": "int4_g128",
    "W4A16_ASYM": "int4_g128_zp",
    "W3A16": "int4_g128",
    "W6A16": "int8_g128",
    "W8A16": "int8_g128",
    "INT8": "int8_channel",
    "W4AFP8": "int4_g128",
    "W4A8": "int4_g128",
    "FP8": "fp8_tensor",
    "FP8_DYNAMIC": "fp8_channel",
    "FP8_BLOCK": "fp8_block",
    "NVFP4": "nvfp4",
    "NVFP4A16": "nvfp4",
    "MXFP4": "mxfp4",
    "MXFP4A16": "mxfp4",
    "MXFP8": "mxfp8",
    "MXFP6A16": "mxfp6_e2m3",
    "MXFP4XFP8": "mxfp4",
    "MXFP6A8": "mxfp6_e2m3",
    "MXFP8A16": "mxfp8",
    "W8A8": "int8_channel",
    **dict.fromkeys(("W2A16", "W2A8", "W3A8"), "int4_g128"),
    **dict.fromkeys(("W5A16", "W5A8", "W6A8", "W7A16", "W7A8"), "int8_g128"),
}
# Rows of 4-bit integers, and no quantization.
OTHERS = {"W2A4", "W3A4", "W4A4", "UNQUANTIZED"}


def grouped(weight: torch.Tensor, scheme: QuantizationScheme) -> torch.Tensor:
    """weight with what shares a scale along the last axis: [rows, groups, elements]."""
    args = scheme.weights
    if args.strategy == "tensor":
        return weight.reshape(1, 1, -1)
    if args.strategy == "channel":
        return weight[:, None]
    if args.strategy == "block":
        row, col = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -K % col, 0, -N % row))
        blocks = padded.unflatten(0, (-1, row)).unflatten(-1, (-1, col)).transpose(1, 2)
        return blocks.flatten(-2)
    return weight.unflatten(-1, (-1, args.group_size))


def stored(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """(quantization_config, tensors of one matrix, its values) as the package writes and reads."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization.quant_config import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme(name, ["Linear"])
    packing = infer_module_format(torch.nn.Linear, scheme)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    groups = grouped(weight, scheme)
    global_scale = None
    if scheme.weights.strategy == "tensor_group":
        global_scale = (448.0 * 6.0 / weight.abs().max()).reshape(1)
    scale, zero = calculate_qparams(
        groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=global_scale
    )
    if scheme.weights.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    compressor = BaseCompressor.get_value_from_registry(packing.value)
    tensors = compressor.compress(state, scheme)
    values = compressor.decompress(tensors, scheme)["weight"]
    inputs = scheme.input_activations
    if inputs is not None and inputs.dynamic != True:  # noqa: E712 - "local" is not true
        leaf = "input_global_scale" if global_scale is not None else "input_scale"
        tensors[leaf] = torch.tensor([0.5])
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=packing.value,
        ignore=["lm_head", "re:.*self_attn.*"],
        quantization_status="compressed",
    )
    return json.loads(config.model_dump_json()), tensors, values


def leaves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_package(name: str) -> None:
    config, tensors, values = stored(name)
    scheme = read_quantization(config, leaves(tensors)).scheme(MODULE)
    assert scheme is not None
    assert scheme.name == FORMATS[name]
    assert scheme.size({suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}) == (
        N,
        K,
    )
    ours = read_matrix(scheme, tensors, Matrix(name=MODULE, N=N, K=K))
    torch.testing.assert_close(ours.dequantize(torch.float32), values.float(), rtol=1e-2, atol=0)
    exact = ours.dequantize(torch.float32).to(values.dtype)
    assert (exact == values).float().mean() > 0.9, "the package rounds to its dtype on the way"


@pytest.mark.parametrize("group_size", [None, -1, 128])
def test_a_strategy_that_is_left_out_is_the_one_the_package_infers(group_size: int | None) -> None:
    from compressed_tensors.quantization import QuantizationArgs

    weights = {"num_bits": 8, "type": "float", "group_size": group_size}
    said = weights | {"strategy": QuantizationArgs(**weights).strategy.value}
    schemes = [
        read_quantization(
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
            }
        ).scheme(MODULE)
        for settings in (weights, said)
    ]
    found, wanted = schemes
    assert found is not None
    assert wanted is not None
    assert found.format == wanted.format


def test_every_scheme_that_the_package_names_is_here() -> None:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    assert set(PRESET_SCHEMES) == {*FORMATS, *OTHERS}
    for name in OTHERS - {"UNQUANTIZED"}:
        with pytest.raises(ValueError, match="unknown scheme: dynamic 4-bit int activations"):
            read_quantization(stored(name)[0])


@pytest.mark.parametrize("name", ["FP8", "NVFP4"])
def test_static_input_scales_are_multipliers(name: str) -> None:
    config, tensors, _ = stored(name)
    scheme = read_quantization(config, leaves(tensors)).scheme(MODULE)
    assert scheme is not None
    rule = next(rule for rule in scheme.rules if rule.needs[0].startswith("input"))
    part = rule.convert(Matrix(name=MODULE, N=N, K=K), tensors[rule.needs[0]])
    assert part is not None
    assert part.item() == (2.0 if name == "NVFP4" else 0.5)


def test_ignored_and_targeted_names() -> None:
    config, _, _ = stored("W4A16")
    config["ignore"] += ["re:.*mlp.gate$", "model.layers.1.mlp.experts.0.up_proj"]
    quantization = read_quantization(config)
    assert quantization.scheme("model.layers.0.self_attn.q_proj") is None
    assert quantization.scheme("model.layers.0.mlp.gate") is None
    assert quantization.scheme("model.layers.1.mlp.experts.0.up_proj") is None
    assert quantization.scheme("model.layers.1.mlp.experts.1.up_proj") is not None
    config["config_groups"]["group_0"]["targets"] = ["re:.*experts.*"]
    assert read_quantization(config).scheme("model.layers.1.mlp.shared_expert.up_proj") is None
    other = json.loads(json.dumps(config["config_groups"]["group_0"]))
    other["targets"] = ["Linear"]
    other["weights"]["num_bits"] = 8
    config["config_groups"]["group_1"] = other
    quantization = read_quantization(config)
    found = [quantization.scheme(f"model.layers.2.mlp.{m}.up_proj") for m in ("experts.0", "x")]
    assert [s and s.name for s in found] == ["int4_g128", "int8_g128"]


def test_mixed_formats_in_one_layer_are_refused() -> None:
    config, _, _ = stored("W4A16")
    config["ignore"].append("re:.*down_proj")
    with pytest.raises(ValueError, match=r"mixed formats .*up_proj is int4_g128, .*unquantized"):
        read_quantization(config).layer_schemes(
            ["model.layers.0.mlp.experts.0.up_proj"], ["model.layers.0.mlp.experts.0.down_proj"]
        )
    config["ignore"][-1] = "re:.*gate_proj"
    with pytest.raises(ValueError, match=r"gate_proj is unquantized, .*up_proj is int4_g128"):
        read_quantization(config).layer_schemes(
            [f"model.layers.0.mlp.experts.0.{name}" for name in ("gate_proj", "up_proj")],
            ["model.layers.0.mlp.experts.0.down_proj"],
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 1}, "1 bits"),
        ({"num_bits": 4, "type": "float", "group_size": 64}, "4-bit floats in groups of 1 x 64"),
        ({"type": "complex"}, "type is 'complex'"),
        ({"group_size": 0}, "group_size must be positive or -1, got 0"),
        ({"group_size": "128"}, "group_size must be an integer, got '128'"),
        ({"strategy": "block", "block_structure": [128]}, "must be 2 positive integers"),
        ({"dynamic": True}, "weights cannot be dynamic"),
    ],
)
def test_unknown_schemes_are_refused(change: dict[str, Any], message: str) -> None:
    config, _, _ = stored("W4A16")
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(ValueError, match=message):
        read_quantization(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "rotated activ"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "format is 'sparse-24-bitmask'"),
        ({"format": "marlin-24"}, "format is 'marlin-24'; known: 'int-quantized'"),
        ({"format": "dense"}, "format is 'dense'"),
    ],
)
def test_what_would_change_the_numbers_is_not_overlooked(
    change: dict[str, Any], message: str
) -> None:
    config, _, _ = stored("W4A16")
    read_quantization(config | {"transform_config": {}, "sparsity_config": {"format": "dense"}})
    with pytest.raises(ValueError, match=message):
        read_quantization(config | change)


def test_a_group_s_own_way_of_packing_is_not_overlooked() -> None:
    config, _, _ = stored("W4A16")
    config["config_groups"]["group_0"]["format"] = "marlin-24"
    with pytest.raises(ValueError, match="format is 'marlin-24'"):
        read_quantization(config)


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("FP8", {"type": "int"}, "type is 'int'; known: 'float'"),
        ("FP8", {"num_bits": 4}, "4-bit float activations per token"),
        ("FP8", {"strategy": "tensor"}, keys.FP8_DYNAMIC_TENSOR),
        ("NVFP4", {}, keys.FP8_DYNAMIC_TOKEN),
        ("NVFP4", {"num_bits": 4, "strategy": "group", "group_size": 16}, keys.NVFP4_DYNAMIC),
        ("MXFP4", {"strategy": "tensor", "dynamic": False}, keys.FP8_STATIC_TENSOR),
        ("MXFP4", {"num_bits": 6, "strategy": "group", "group_size": 32}, keys.MXFP6_E2M3_DYNAMIC),
        ("MXFP4", {"strategy": "group", "group_size": 32}, keys.MXFP8_DYNAMIC),
        ("MXFP4", {"strategy": "group", "group_size": 128}, keys.FP8_DYNAMIC_128),
        ("MXFP4", {"type": "int"}, "type is 'int'; known: 'float'"),
    ],
)
def test_activations_are_what_the_config_says_or_refused(
    name: str, inputs: dict[str, Any], expected: keys.QuantKey | str
) -> None:
    config, _, _ = stored(name)
    token = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    config["config_groups"]["group_0"]["input_activations"] = token | inputs
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read_quantization(config)
        return
    scheme = read_quantization(config).scheme(MODULE)
    assert scheme is not None
    assert scheme.activation == expected
    assert ("input_scale" in scheme.required) == expected.static


@pytest.mark.parametrize(
    ("order", "needs_index"), [("weight", False), ("static", False), ("group", True), (True, True)]
)
def test_an_order_of_columns_is_not_forgotten(order: object, needs_index: bool) -> None:
    config, tensors, _ = stored("W4A16")
    config["config_groups"]["group_0"]["weights"]["actorder"] = order
    scheme = read_quantization(config, leaves(tensors)).scheme(MODULE)
    assert scheme is not None
    assert ("weight_g_idx" in scheme.required) == needs_index
    assert scheme.format.act_order == needs_index


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "missing scale": ("W4A16", {"weight_scale": None}, r"up_proj\.weight_scale: missing beside"),
    "missing zero": ("W4A16_ASYM", {"weight_zero_point": None}, "weight_zero_point: missing"),
    "group size": (
        "W4A16",
        {"weight_scale": torch.ones(N, K // 64)},
        r"weight_scale: expected shape \(48, 2\) for a 48 x 256 matrix, found \(48, 4\)",
    ),
    "truncated": (
        "W4A16",
        {"weight_packed": torch.zeros(N, K // 8 - 1, dtype=torch.int32)},
        r"weight_packed: expected shape \(48, 32\) .* found \(48, 31\)",
    ),
    "dtype": (
        "W4A16",
        {"weight_packed": torch.zeros(N, K // 8, dtype=torch.int64)},
        r"weight_packed: expected torch.int32, found torch.int64",
    ),
    "inf": (
        "W4A16",
        {"weight_scale": torch.full((N, 2), torch.inf)},
        r"weight_scale: expected finite scales, found inf at \[0, 0\]",
    ),
    "nan": ("FP8_BLOCK", {"weight_scale": torch.full((1, 2), torch.nan)}, "found nan"),
    "nan e8m0": (
        "MXFP4",
        {"weight_scale": torch.full((N, K // 32), 255, dtype=torch.uint8)},
        r"found nan \(e8m0 255\)",
    ),
    "zero inverse": ("NVFP4", {"weight_global_scale": torch.zeros(1)}, "inverse of a scale"),
    "another format's": ("W4A16", {"qweight": torch.zeros(1)}, r"up_proj\.qweight: unexpected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused_by_name(case: str) -> None:
    name, changes, message = BAD[case]
    config, tensors, _ = stored(name)
    scheme = read_quantization(config, leaves(tensors)).scheme(MODULE)
    assert scheme is not None
    tensors = {key: t for key, t in (tensors | changes).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        read_matrix(scheme, tensors, Matrix(name=MODULE, N=N, K=K))
