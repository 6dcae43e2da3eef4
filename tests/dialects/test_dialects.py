"""Every dialect: one matrix to its values, and a layer's experts through FusedMoE.load_weights."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator

import pytest
import torch
import transformers.utils.quantization_config
from writers import CASES, Case, mxfp4

import fusedmoe
from fusedmoe.quantization.dialects import Matrix, Scheme, read_quantization
from fusedmoe.quantization.dialects.base import read_matrix

MODULE = "model.layers.0.mlp.experts.0.up_proj"
E, H, I = 3, 64, 192  # noqa: E741


def random_weight(seed: int, N: int, K: int) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def leaves_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


def scheme_of(case: Case) -> Scheme:
    found = case.write(random_weight(0, 64, 64)).tensors
    scheme = read_quantization(case.config, leaves_of(found)).scheme(MODULE)
    assert scheme is not None
    return scheme


@pytest.mark.parametrize("name", CASES)
def test_one_matrix_has_its_values(name: str) -> None:
    case = CASES[name]
    stored = case.write(random_weight(1, 96, 128))
    scheme = scheme_of(case)
    assert scheme.name == case.format
    found = read_matrix(scheme, stored.tensors, Matrix(name=MODULE, N=96, K=128))
    torch.testing.assert_close(found.dequantize(torch.float32), stored.values, rtol=1e-6, atol=0)
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in stored.tensors.items()}
    assert scheme.size(shapes, stored.tensors.__getitem__) == (96, 128)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_needed_or_says_so(name: str) -> None:
    case = CASES[name]
    tensors = case.write(random_weight(1, 64, 64)).tensors
    scheme, matrix = scheme_of(case), Matrix(name=MODULE, N=64, K=64)
    for missing in scheme.required:
        rest = {suffix: t for suffix, t in tensors.items() if suffix != missing}
        with pytest.raises(ValueError, match=rf"up_proj\.{missing}: missing beside"):
            read_matrix(scheme, rest, matrix)


@pytest.mark.parametrize("name", CASES)
def test_truncated_and_wrongly_typed_tensors_are_named(name: str) -> None:
    case = CASES[name]
    tensors = case.write(random_weight(1, 64, 64)).tensors
    scheme, matrix = scheme_of(case), Matrix(name=MODULE, N=64, K=64)
    for suffix in scheme.required:
        if tensors[suffix].dim() == 2:
            with pytest.raises(ValueError, match=rf"up_proj\.{suffix}: expected"):
                read_matrix(scheme, tensors | {suffix: tensors[suffix][:-1]}, matrix)
        with pytest.raises(ValueError, match=rf"up_proj\.{suffix}: expected"):
            read_matrix(scheme, tensors | {suffix: tensors[suffix].to(torch.complex64)}, matrix)


def layer_tensors(case: Case, shift: int = 0) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, tensor, values of its matrix) for E experts, out of order."""
    for e in reversed(range(E)):
        for i, (name, N, K) in enumerate(
            (("down_proj", H, I), ("up_proj", I, H), ("gate_proj", I, H))
        ):
            stored = case.write(random_weight(shift + 10 * e + i, N, K))
            for suffix, tensor in stored.tensors.items():
                yield f"{e}.{name}.{suffix}", tensor, stored.values


def new_layer(case: Case, **arguments: int) -> fusedmoe.MoERunner:
    leaves = {name.split(".", 2)[2]: tensor.dtype for name, tensor, _ in layer_tensors(case)}
    return fusedmoe.FusedMoE(
        num_experts=E,
        top_k=2,
        hidden_size=H,
        intermediate_size=I,
        params_dtype=torch.float32,
        quant_config=read_quantization(case.config, leaves),
        prefix="model.layers.0.mlp.experts",
        **arguments,
    )


def check_rank(
    case: Case, layer: fusedmoe.MoERunner, rank: int, width: int, shift: int = 0
) -> None:
    """The layer's values are those of the matrices, or a rank's part of them."""
    experts = layer.routed_experts
    w13, w2 = experts.quant_method.quantized_weights(experts)
    gate_up, down = w13.dequantize(torch.float32), w2.dequantize(torch.float32)
    stored = gate_up.shape[1] // 2
    start, stop = rank * stored, min((rank + 1) * stored, width)
    for name, _, values in layer_tensors(case, shift):
        e, projection, _ = name.split(".", 2)
        if projection == "down_proj":
            mine, wanted = down[int(e)], values[:, start:stop]
            mine = mine[:, : stop - start]
        else:
            half = gate_up[int(e)].chunk(2)[projection == "up_proj"]
            mine, wanted = half[: stop - start], values[start:stop]
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_loads_it(name: str) -> None:
    case = CASES[name]
    layer = new_layer(case)
    layer.load_weights((f"model.layers.0.mlp.experts.{n}", t) for n, t, _ in layer_tensors(case))
    layer.routed_experts.check_loaded()
    check_rank(case, layer, 0, I)


@pytest.mark.parametrize("tp_size", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_rank_that_cuts_blocks_and_groups_has_the_same_values(name: str, tp_size: int) -> None:
    case = CASES[name]
    for rank in range(tp_size):
        layer = new_layer(case, tp_size=tp_size, tp_rank=rank)
        layer.load_weights((n, t) for n, t, _ in layer_tensors(case))
        layer.routed_experts.check_loaded()
        check_rank(case, layer, rank, I)


def test_a_layer_that_failed_to_load_refuses_to_run() -> None:
    case = CASES["ct w4a16"]
    layer = new_layer(case)
    tensors = [(n, t) for n, t, _ in layer_tensors(case)]
    bad = [(n, t[:-1] if n == "1.up_proj.weight_scale" else t) for n, t in tensors]
    with pytest.raises(ValueError, match=r"1\.up_proj\.weight_scale: expected shape \(192, 2\)"):
        layer.load_weights(bad)
    with pytest.raises(ValueError, match=r"not loaded: .*weight_scale"):
        layer(torch.zeros(2, H), torch.zeros(2, E))
    layer.load_weights((n, t) for n, t in tensors if n != "0.gate_proj.weight_scale")
    with pytest.raises(ValueError, match=r"lacks 0\.gate_proj\.weight_scale"):
        layer.routed_experts.check_loaded()
    layer.load_weights(tensors)
    assert layer(torch.zeros(2, H), torch.zeros(2, E)).shape == (2, H)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gptq", {"is_marlin_format": True}, "the layout of one kernel"),
        ("gptq", {"format": "marlin"}, "format is 'marlin'; known: 'gptq', 'gptq_v2'"),
        ("deepseek", {"activation_scheme": "static"}, "has dynamic activations, not static"),
    ],
)
def test_settings_that_nothing_here_means_are_refused(
    case: str, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_quantization(CASES[case].config | change)


def test_the_newer_key_for_the_version_of_gptq() -> None:
    config = CASES["gptq v1 zero points"].config | {"format": "gptq_v2"}
    scheme = read_quantization(config).scheme(MODULE)
    assert scheme is not None
    assert scheme.dialect == "gptq v2"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FineGrainedFP8Config", {}),
        ("FbgemmFp8Config", {}),
        ("GPTQConfig", {"bits": 4}),
        ("AwqConfig", {}),
        ("BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("AutoRoundConfig", {}),
    ],
)
def test_records_of_transformers_are_read_as_the_json_that_it_writes(
    name: str, settings: dict[str, object]
) -> None:
    record = getattr(transformers.utils.quantization_config, name)(**settings)
    written = json.loads(record.to_json_string(use_diff=False))
    scheme = read_quantization(record).scheme(MODULE)
    assert scheme is not None
    assert scheme.describe() == read_quantization(written).scheme(MODULE).describe()


@pytest.mark.parametrize("group", [-1, 2, 1 << 30])
def test_columns_of_groups_that_do_not_exist_are_refused(group: int) -> None:
    case = CASES["gptq act-order"]
    tensors = case.write(random_weight(1, 64, 64)).tensors
    tensors["g_idx"][7] = group
    with pytest.raises(ValueError, match=rf"up_proj\.g_idx: expected groups in \[0, 2\).*{group}"):
        read_matrix(scheme_of(case), tensors, Matrix(name=MODULE, N=64, K=64))


def test_awq_as_the_converter_of_compressed_tensors_reads_it() -> None:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    stored = CASES["awq"].write(random_weight(5, 64, 128))
    converter = AutoAWQConverter(bits=4, group_size=32, zero_point=True)
    qweight, scales, qzeros = (stored.tensors[n] for n in ("qweight", "scales", "qzeros"))
    numbers, scale, zero = converter._convert_gemm_module(qweight, scales, qzeros)
    spread = [part.repeat_interleave(32, 1).float() for part in (zero, scale)]
    assert torch.equal((numbers.float() - spread[0]) * spread[1], stored.values)


def test_gpt_oss_tensors_hold_all_experts_with_gate_and_up_interleaved() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors: dict[str, torch.Tensor] = {}
    for name, N, K in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        parts = [mxfp4(random_weight(e, N, K)).tensors for e in range(E)]
        blocks = torch.stack([p["weight"].reshape(N, K // 32, 16) for p in parts])
        tensors[f"experts.{name}_blocks"] = blocks
        tensors[f"experts.{name}_scales"] = torch.stack([p["weight_scale"] for p in parts])
        tensors[f"experts.{name}_bias"] = random_weight(7, E, N).bfloat16()
    quantization = read_quantization(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    )
    layer = fusedmoe.FusedMoE(
        num_experts=E,
        top_k=2,
        hidden_size=H,
        intermediate_size=I,
        params_dtype=torch.bfloat16,
        quant_config=quantization,
        activation="swigluoai",
        swiglu_limit=7.0,
        has_bias=True,
        prefix="model.layers.0.mlp.experts",
    )
    layer.load_weights(tensors.items())
    layer.routed_experts.check_loaded()
    experts = layer.routed_experts
    for found, name in zip(
        experts.quant_method.quantized_weights(experts), ("gate_up_proj", "down_proj"), strict=True
    ):
        wanted = convert_moe_packed_tensors(
            tensors[f"experts.{name}_blocks"], tensors[f"experts.{name}_scales"]
        )
        assert torch.equal(found.dequantize(torch.bfloat16), wanted.transpose(1, 2))
    assert torch.equal(experts.w13_bias, tensors["experts.gate_up_proj_bias"])


@pytest.mark.parametrize("name", CASES)
def test_other_values_may_be_loaded_over_the_first(name: str) -> None:
    """All of a matrix's tensors or none: new numbers with old scales would be neither."""
    case = CASES[name]
    layer, first = new_layer(case), list(layer_tensors(case))
    layer.load_weights((n, t) for n, t, _ in first)
    for shift in (100, 200):
        shuffled = list(layer_tensors(case, shift))
        random.Random(shift).shuffle(shuffled)
        layer.load_weights((n, t) for n, t, _ in shuffled)
        check_rank(case, layer, 0, I, shift)
    weight = next(n for n, *_ in first if n.endswith((".weight", "qweight", "weight_packed")))
    base = weight.rpartition(".")[0]
    again = [(n, t) for n, t, _ in first if n.startswith(f"{base}.")]
    layer.load_weights((n, t) for n, t in again if n == weight)
    with pytest.raises(ValueError, match=rf"the checkpoint lacks {re.escape(base)}\."):
        layer(torch.randn(2, H), torch.randn(2, E))
    layer.load_weights((n, t) for n, t in again if n != weight)
    assert layer(torch.randn(2, H), torch.randn(2, E)).isfinite().all()
