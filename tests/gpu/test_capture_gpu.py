"""A CUDA graph of the streaming kernels' very first launches, captured with one routing and
replayed with others."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.kernels.cuda import quantized_launch
from fusedmoe.kernels.hopper_quantized import quantized_decode, quantized_decode_reference
from fusedmoe.kernels.hopper_w8a8 import w8a8_decode, w8a8_decode_reference
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import FP8_DYNAMIC_TOKEN
from gpu_marks import needs_hopper

pytestmark = [pytest.mark.gpu, needs_hopper]


def forget_launches():
    """As in a process that has launched none of these kernels."""
    from fusedmoe.kernels.triton import align, align_pair, align_quantize, hopper_w8a8, weighted_sum

    quantized_launch._kernel.cache_clear()
    for launcher in (
        align._launch_once,
        align_pair._launch,
        align_quantize._launch,
        hopper_w8a8._launch_gemm,
        weighted_sum._launch_sum,
    ):
        launcher._variants.clear()
        launcher.kernel.device_caches.clear()


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("rows", [None, FP8_DYNAMIC_TOKEN], ids=["bf16", "fp8"])
def test_captured_at_the_first_launch_and_replayed_with_other_routings(rows, T):
    torch.manual_seed(0)
    K, e, H, I = 2, 16, 512, 256  # noqa: E741
    fmt = format_named("int4_g32" if rows is None else "fp8_channel")
    w1 = quantize(torch.randn(e, 2 * I, H, device="cuda") / H**0.5, fmt, shards=2)
    w2 = quantize(torch.randn(e, H, I, device="cuda") / I**0.5, fmt)
    x = torch.randn(T, H, device="cuda").bfloat16()
    weights, ids = torch.rand(T, K, device="cuda"), torch.zeros(T, K, device="cuda").int()
    more = () if rows is None else ((rows, rows), (None, None))
    decode = quantized_decode if rows is None else w8a8_decode
    reference = quantized_decode_reference if rows is None else w8a8_decode_reference
    programs = torch.cuda.get_device_properties("cuda").multi_processor_count

    def scratch():
        act = torch.full((T * K, I), float("nan"), device="cuda", dtype=torch.bfloat16)
        y = torch.full((T * K, H), float("nan"), device="cuda")
        return torch.empty_like(x), act, y if rows is None else y.bfloat16()

    given = scratch()
    forget_launches()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(LayerTensors(x, w1, w2, weights, ids, *given, programs), *more)
    for low in (0, 0, e - 1, -1):
        ids.copy_(torch.randint(low, low + 1 if low else e, (T, K)))
        graph.replay()
        launched, expected = scratch(), scratch()
        decode(LayerTensors(x, w1, w2, weights, ids, *launched, programs), *more)
        assert given[0].equal(launched[0])
        reference(LayerTensors(x, w1, w2, weights, ids, *expected, programs), *more)
        # Elements at a tie of fp8 may be rounded to either side, and a few sums follow them.
        apart = (given[0] - expected[0]).double().norm()
        assert apart <= 2e-2 * expected[0].double().norm()
