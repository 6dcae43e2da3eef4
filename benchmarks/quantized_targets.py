"""What a quantized layer has to reach on one H200: balanced routing, from router logits."""

from __future__ import annotations

from dataclasses import dataclass

from fusedmoe.bench import LayerShape
from fusedmoe.bench.shapes import SHAPES as KNOWN
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    QuantKey,
)


@dataclass(frozen=True)
class Target:
    """``kind``: ``us`` at most, ``fraction`` (of the limit) or ``tflops`` at least."""

    shape: str
    format: str
    tokens: tuple[int, ...]
    kind: str
    value: float


ROWS: dict[str, QuantKey] = {
    "fp8_block": FP8_DYNAMIC_128,
    "fp8_channel": FP8_DYNAMIC_TOKEN,
    "fp8_tensor": FP8_STATIC_TENSOR,
    "int8_channel": INT8_DYNAMIC_TOKEN,
}
"""How rows are quantized beside these weights; rows of the others stay as they come."""

SHAPES: dict[str, LayerShape] = KNOWN | {
    shape.name: shape
    for shape in (
        LayerShape("kimi-k2-tp8", 384, 8, 7168, 256),
        LayerShape("256x6x4096x2048", 256, 6, 4096, 2048),
    )
}

TARGETS = (
    Target("qwen3-30b", "fp8_block", (1,), "us", 17),
    Target("qwen3-30b", "fp8_block", (8,), "us", 85),
    Target("qwen3-30b", "fp8_block", (16, 64, 128), "fraction", 0.90),
    Target("qwen3-30b", "fp8_block", (8192, 16384), "tflops", 850),
    Target("deepseek-v3-ep8", "fp8_block", (2048,), "tflops", 1020),
    Target("deepseek-v3-ep8", "fp8_block", (4096,), "tflops", 1100),
    Target("deepseek-v3-ep8", "fp8_block", (8192,), "tflops", 1150),
    Target("256x6x4096x2048", "fp8_block", (64,), "fraction", 0.95),
    Target("256x6x4096x2048", "fp8_block", (16384,), "tflops", 1000),
    Target("qwen3-30b", "fp8_channel", (1,), "us", 17),
    Target("qwen3-30b", "fp8_channel", (8192,), "tflops", 935),
    Target("qwen3-30b", "fp8_tensor", (1,), "us", 17),
    Target("qwen3-30b", "fp8_tensor", (8192,), "tflops", 935),
    Target("gpt-oss-120b", "mxfp4", (1,), "us", 22),
    Target("gpt-oss-120b", "mxfp4", (8,), "us", 125),
    Target("gpt-oss-120b", "mxfp4", (32, 64, 128), "us", 455),
    Target("gpt-oss-120b", "mxfp4", (4096,), "tflops", 550),
    Target("gpt-oss-120b", "mxfp4", (8192, 16384), "tflops", 600),
    Target("kimi-k2-tp8", "int4_g32", (1,), "us", 13),
    Target("kimi-k2-tp8", "int4_g32", (16,), "us", 110),
    Target("kimi-k2-tp8", "int4_g32", (64,), "us", 310),
    Target("qwen3-30b", "int4_g128", (1,), "us", 14),
    Target("qwen3-30b", "int4_g128", (8,), "us", 45),
    Target("qwen3-30b", "int4_g128", (64,), "us", 85),
    Target("qwen3-30b", "int4_g128", (8192,), "tflops", 500),
    Target("mixtral", "int4_g128", (1,), "us", 60),
    Target("mixtral", "int4_g128", (8,), "us", 180),
    Target("mixtral", "int4_g128", (64,), "us", 205),
    Target("mixtral", "int4_g128", (8192,), "tflops", 550),
    Target("qwen3-30b", "int8_channel", (64,), "fraction", 0.90),
    Target("qwen3-30b", "int8_channel", (8192,), "tflops", 850),
    Target("mixtral", "int8_channel", (64,), "fraction", 0.90),
    Target("mixtral", "int8_channel", (8192,), "tflops", 1000),
)
