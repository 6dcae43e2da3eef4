"""A layer whose device and dtype were given heeds nothing of torch's that is set elsewhere: neither
the default device nor the default dtype, nor autocast."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fusedmoe import FusedMoE, MoEOptions, quantize_layer
from fusedmoe.experts.torch_reference import TorchExperts
from fusedmoe.quantization.keys import INT8_DYNAMIC_TOKEN
from fusedmoe.testing import check_experts
from fusedmoe.testing.routing import ROUTINGS, routing_logits

E, K, H, I = 8, 2, 128, 64  # noqa: E741
BF16 = torch.bfloat16


@contextmanager
def other_defaults(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Every tensor that says nothing of its device is on meta, and without values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    return (drawn / shape[-1] ** 0.5).to(dtype)


def output(dtype, fmt, rows, T, options) -> torch.Tensor:
    layer = FusedMoE(E, K, H, I, params_dtype=dtype, device="cpu", options=options, has_bias=True)
    for parameter in layer.parameters():
        parameter.data.copy_(numbers(*parameter.shape, dtype=dtype))
    if fmt is not None:
        quantize_layer(layer, fmt, activation=rows)
    logits = routing_logits("uniform", T, E, K)
    with torch.no_grad():
        return layer(numbers(T, H, dtype=dtype), logits)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(
    ("dtype", "fmt", "rows", "experts"),
    [
        *((dtype, None, None, "auto") for dtype in (torch.float32, torch.float16, BF16)),
        *((torch.float32, None, None, e) for e in ("torch", "grouped_mm", "cpu_monolithic")),
        (BF16, "int8_channel", INT8_DYNAMIC_TOKEN, "auto"),
        *(
            (BF16, fmt, None, "auto")
            for fmt in (
                *("int4_g32", "int4_g32_zp", "int4_channel", "int8_channel", "int8_g32_zp"),
                *("fp8_block_32x32", "mxfp4", "mxfp6_e3m2", "mxfp8", "nvfp4", "nf4", "iq4_nl"),
            )
        ),
    ],
)
def test_a_layer_computes_the_same(dtype, fmt, rows, experts, T):
    options = MoEOptions() if experts == "auto" else MoEOptions(experts=experts)
    usual = output(dtype, fmt, rows, T, options)
    with other_defaults():
        found = output(dtype, fmt, rows, T, options)
    assert found.device.type == "cpu"
    assert torch.equal(found, usual)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("fmt", [None, "int4_g32", "int8_channel", "fp8_channel", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_autocast_changes_nothing(dtype, fmt, T):
    usual = output(dtype, fmt, None, T, MoEOptions())
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(output(dtype, fmt, None, T, MoEOptions()), usual)


def test_the_checks_of_an_implementation_draw_the_same():
    def errors() -> list[float | None]:
        return [result.error for result in check_experts(TorchExperts, dtypes=(torch.float32,))]

    usual = errors()
    with other_defaults():
        assert errors() == usual


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_logits_are_the_same(routing):
    usual = routing_logits(routing, 9, E, K, seed=3)
    with other_defaults(BF16):
        assert torch.equal(routing_logits(routing, 9, E, K, seed=3), usual)
