"""What Hopper's kernels for few rows and quantized weights cannot read, and tensors that do not fit
each other: found before a launch."""

from __future__ import annotations

import torch

from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.grouped_gemm_quantized import ELEMENTS, TABLES, check_weights
from fusedmoe.kernels.hopper_decode import check_biases, check_picks
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.tensor_checks import check_quantized_rows
from fusedmoe.quantization.tensor import QuantizedTensor

ALIGNED_BYTES = 16
FEWEST_FEATURES = 16
BIAS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unmet_by_weights(*weights: QuantizedTensor) -> str | None:
    """Why the kernel cannot read these, None where it can: formats, contiguity, TMA's alignment."""
    for w in weights:
        fmt = w.format
        known = fmt.element in ELEMENTS or fmt.element in TABLES
        if not known or fmt.act_order or fmt.scale_dtype is None:
            return f"does not read {fmt.name}"
        if fmt.element not in ("int4", "e2m1") and not fmt.symmetric:
            return f"does not read {fmt.name}"
        least = 16 if fmt.values == 2 else 32
        if fmt.group.col > 0 and (fmt.group.col < least or fmt.group.col & (fmt.group.col - 1)):
            return f"wants groups of a power of two of at least {least} columns, not {fmt.name}"
        data = w.data
        if not data.is_contiguous() or data.data_ptr() % ALIGNED_BYTES:
            return "wants weights that are contiguous and aligned"
        if data.shape[-1] % ALIGNED_BYTES:
            return f"wants rows of a multiple of {ALIGNED_BYTES} bytes, got {data.shape[-1]}"
    return None


def unmet_by_stream(*weights: QuantizedTensor) -> str | None:
    """Why the streaming kernel cannot read these, None where it can."""
    reason = unmet_by_weights(*weights)
    if reason is not None:
        return reason
    for w in weights:
        fmt, scale, zero, N = w.format, w.scale, w.zero_point, w.shape[1] // w.shards
        assert scale is not None
        if fmt.group.col == 16 and fmt.scale_kind != "e4m3":
            return f"reads groups of 16 columns with scales in e4m3 alone, not {fmt.name}"
        if fmt.scale_kind == "e4m3" and (fmt.element != "e2m1" or fmt.group.col != 16):
            return f"does not read {fmt.name}"
        if N < FEWEST_FEATURES or w.shape[1] * w.data.shape[-1] >= 2**31:
            return f"wants {FEWEST_FEATURES} features and experts of less than 2 GiB, not {w.shape}"
        for part in (scale, zero):
            if part is None:
                continue
            if not part.is_contiguous() or part.data_ptr() % 4 or part.nbytes % 4:
                return "wants scales and zero points that are contiguous, of whole 4-byte words"
    return None


def check_decode(
    layer: LayerTensors[QuantizedTensor], blocks: MoEAlignment | LoneSlots | None, most: int
) -> None:
    """Raise ValueError where the tensors of a streaming launch do not fit, or slots without a table
    are more than ``most``."""
    R = layer.topk_ids.numel()
    check_plain_rows(layer, R, y_dtype=torch.float32, apart=8)
    if isinstance(blocks, LoneSlots):
        ids = blocks.topk_ids
        if most < R:
            raise ValueError(f"at most {most} slots go without a table, got {R}")
        if ids.shape != (R,) or ids.dtype != layer.topk_ids.dtype or not ids.is_contiguous():
            raise ValueError(f"ids {tuple(ids.shape)} {ids.dtype} are not those of {R} slots")


def check_plain_rows(
    layer: LayerTensors[QuantizedTensor], rows: int, *, y_dtype: torch.dtype, apart: int
) -> None:
    """Raise ValueError where tensors of a layer whose rows are bf16 do not fit, act [rows, I] and
    y [rows, H] among them. Rows of x lie a multiple of ``apart`` elements apart."""
    x = layer.x
    check_quantized_rows(layer, rows, y_dtype=y_dtype)
    if x.stride(1) != 1 or x.data_ptr() % ALIGNED_BYTES or x.stride(0) % apart:
        raise ValueError(
            f"x must lie at a multiple of {ALIGNED_BYTES} bytes, its rows dense and a multiple of "
            f"{apart} elements apart, not of strides {x.stride()}"
        )


def check_layer(layer: LayerTensors[QuantizedTensor]) -> None:
    """Raise ValueError where the weights of a streamed layer do not fit each other or its scratch,
    whose shapes are right, and where ids or biases are not what the kernels read."""
    w1, w2, topk_ids, expert_map = layer.w1, layer.w2, layer.topk_ids, layer.expert_map
    check_weights(w1, layer.act, layer.activation)
    check_weights(w2, layer.y, None)
    e, H, _ = w2.shape
    if w1.shape[0] != e or w1.shape[2] != H:
        raise ValueError(f"w1 {tuple(w1.shape)} does not fit w2 {tuple(w2.shape)}")
    if topk_ids.shape[1] < 1 or topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"topk_ids must be int32 or int64 [T, K], got {tuple(topk_ids.shape)} {topk_ids.dtype}"
        )
    if expert_map is not None and (
        expert_map.dim() != 1 or expert_map.dtype != torch.int32 or not expert_map.is_contiguous()
    ):
        raise ValueError(
            f"expert_map must be int32 and dense, got {tuple(expert_map.shape)} {expert_map.dtype}"
        )
    check_picks(topk_ids.shape[1])
    check_biases(layer)
    for bias in (layer.w1_bias, layer.w2_bias):
        if bias is not None and bias.dtype not in BIAS_DTYPES:
            raise ValueError(f"a bias is {bias.dtype}, expected one of {BIAS_DTYPES}")
    if layer.act.data_ptr() % ALIGNED_BYTES or layer.y.data_ptr() % ALIGNED_BYTES:
        raise ValueError(f"act and y must begin at multiples of {ALIGNED_BYTES} bytes")
