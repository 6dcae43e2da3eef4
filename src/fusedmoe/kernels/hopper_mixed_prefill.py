"""The experts of a large batch on Hopper, 16-bit rows and quantized weights, bound by the products.

The whole layer but routing. Device code: ``kernels/triton/hopper_mixed_prefill.py`` (Gluon). The
definition is the weighted sum of ``quantized_gemm_reference`` twice.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.align import MoEAlignment, align_local_slots, padded_slots
from fusedmoe.kernels.align_tails import align_with_tails, tails_rows
from fusedmoe.kernels.grouped_gemm_quantized import ELEMENTS, NIBBLES, TABLES
from fusedmoe.kernels.hopper_decode import check_biases
from fusedmoe.kernels.hopper_quantized import quantized_decode_reference
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.quantized_checks import check_plain_rows
from fusedmoe.kernels.row_steps import AS_THEY_COME, BothSteps, check_steps
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor
from fusedmoe.tuning.hopper_tiles import COUNTER_SLOTS
from fusedmoe.tuning.mixed_tiles import MixedPrefillTiles
from fusedmoe.tuning.quantized_tiles import SEXTETS

ALIGNED_BYTES = 16
ROW_ELEMENTS = 16  # rows of x are a multiple of so many apart: the compiler relies on it
MINIMA = frozenset({"q4_k", "q5_k"})
_ELEMENTS = ELEMENTS | TABLES | SEXTETS | MINIMA
_ROUNDED = MINIMA | {"iq4_nl"}
SEXTET_COLUMNS = 64  # a step of floats of six bits
MAX_NUMBERS = 2**31 - 1  # of one expert, in either matrix


def mixed_prefill_rows(R: int, num_local: int, tiles: MixedPrefillTiles) -> int:
    """How many rows the scratch of R slots over ``num_local`` experts has at most."""
    if tiles.tails is not None:
        return tails_rows(R, num_local)
    return padded_slots(R, tiles.gemm1.slots, num_local, whole_blocks=True)


def wide_rows(*formats: QuantFormat) -> bool:
    """Whether the second GEMM's rows are kept in fp32 until they are summed: where numbers are
    rounded that are products with scales of any size, one rounding more is too much."""
    return any(fmt.element in _ROUNDED for fmt in formats)


def unmet_by_mixed_prefill(w1: QuantizedTensor, w2: QuantizedTensor) -> str | None:
    """Why the kernels cannot read these weights, None where they can."""
    for w in (w1, w2):
        fmt, group = w.format, w.format.group.col
        packed = fmt.element in NIBBLES
        if fmt.element not in _ELEMENTS or fmt.act_order or not (packed or fmt.symmetric):
            return f"does not read {fmt.name}"
        own = fmt.scale_dtype is not None or fmt.element in MINIMA
        if not own or (fmt.element == "e2m1" and group < 0):
            return f"wants scales of its own for groups of columns, not {fmt.name}"
        if fmt.element in SEXTETS and w.shape[-1] % SEXTET_COLUMNS:
            return f"wants rows of a multiple of {SEXTET_COLUMNS} columns, got {w.shape[-1]}"
        # nf4's scales multiply sums only: its entries are rounded already.
        least = 64 if fmt.element == "nf4" else 16 if packed else 32
        if group > 0 and (group < least or group & (group - 1)):
            return f"wants groups of a power of two of at least {least} columns, not {fmt.name}"
        parts = {"data": w.data, "scale": w.scale, "zero_point": w.zero_point, "scale2": w.scale2}
        for name, part in parts.items():
            if part is not None and not part.is_contiguous():
                return f"wants {name} to be contiguous"
        if w.data.data_ptr() % ALIGNED_BYTES or w.data.shape[-1] % ALIGNED_BYTES:
            return f"wants rows of a multiple of {ALIGNED_BYTES} bytes, got {w.data.shape[-1]}"
        if w.scale is not None and w.scale.dtype == torch.uint8 and w.scale.data_ptr() % 2:
            return "reads two scales at a time, from even addresses"
        if w.shape[1] * w.shape[2] > MAX_NUMBERS:
            return f"wants experts of at most {MAX_NUMBERS} numbers, not {w.shape[1:]}"
    return None


def mixed_prefill(
    layer: LayerTensors[QuantizedTensor],
    tiles: MixedPrefillTiles,
    steps: BothSteps = AS_THEY_COME,
) -> None:
    """Run a layer of many slots: x and out bf16, weights in 4, 6 or 8 bits; scratch act [P, I] bf16
    and y [P, H] bf16, fp32 for ``wide_rows``, P = ``mixed_prefill_rows``.

    ``steps``: of the rows that enter each product; none are rounded with one dynamic scale for all.

    Raises ValueError for weights that the kernels cannot read and for tensors that do not fit.
    """
    reason = unmet_by_mixed_prefill(layer.w1, layer.w2)
    if reason is not None:
        raise ValueError(f"the Hopper kernel {reason}")
    tiles.check()
    _check(layer, tiles)
    check_biases(layer)
    check_steps(steps)
    if not layer.x.is_cuda:
        mixed_prefill_reference(layer, tiles, steps)
        return
    from fusedmoe.kernels.triton.hopper_mixed_prefill import prefill

    ids, e = layer.topk_ids, layer.w1.shape[0]
    if ids.numel() > 0:
        tables = mixed_prefill_tables(ids, e, layer.expert_map, tiles)
        prefill(layer, tables, tiles, steps)


def mixed_prefill_tables(
    topk_ids: torch.Tensor, e: int, expert_map: torch.Tensor | None, tiles: MixedPrefillTiles
) -> MoEAlignment:
    """The blocks that these tiles read, with room for what they count."""
    if tiles.tails is not None:
        return align_with_tails(topk_ids, e, expert_map, spare_slots=COUNTER_SLOTS)
    return align_local_slots(
        topk_ids, tiles.gemm1.slots, e, expert_map, whole_blocks=True, spare_slots=COUNTER_SLOTS
    )


def mixed_prefill_reference(
    layer: LayerTensors[QuantizedTensor],
    tiles: MixedPrefillTiles,
    steps: BothSteps = AS_THEY_COME,
) -> None:
    """The definition, in plain torch: that of few slots. Rows of act and y are slots."""
    R = layer.topk_ids.numel()
    layer = layer._replace(act=layer.act[:R], y=layer.y[:R])
    quantized_decode_reference(layer, steps=steps)


def _check(layer: LayerTensors[QuantizedTensor], tiles: MixedPrefillTiles) -> None:
    w1, w2 = layer.w1, layer.w2
    (e, H, I), R = w2.shape, layer.topk_ids.numel()  # noqa: E741
    shards = 2 if layer.activation.is_gated else 1
    if w1.shape != (e, shards * I, H) or w1.shards != shards or w2.shards != 1:
        raise ValueError(
            f"w1 is {w1.shape} of {w1.shards} shards, w2 of {w2.shards}; expected "
            f"{(e, shards * I, H)} of {shards}, and 1"
        )
    y_dtype = torch.float32 if wide_rows(w1.format, w2.format) else torch.bfloat16
    P = mixed_prefill_rows(R, e, tiles)
    check_plain_rows(layer, P, y_dtype=y_dtype, apart=ROW_ELEMENTS)
