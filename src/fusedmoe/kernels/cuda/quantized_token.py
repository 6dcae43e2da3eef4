"""Launching ``quantized_token.cu`` and ``quantized_token_rows.cu``: constants and arguments."""

from __future__ import annotations

import ctypes

import torch

from fusedmoe.kernels.align import LoneSlots
from fusedmoe.kernels.cuda.quantized_decode import tile_map
from fusedmoe.kernels.cuda.quantized_launch import (
    BIASES,
    ELEMENTS,
    FORMULAS,
    MAP_BYTES,
    SCALES,
    launch,
    structure_of,
)
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.token_tiles import TILE_ROWS, TokenCut

COMMON = (
    *("quantized_numbers.cuh", "activation.cuh", "quantized_lone_slots.cuh"),
    "quantized_token_layer.cuh",
)
OF_BOXES = ("quantized_digits.cuh", "quantized_token_steps.cuh", "quantized_token.cu")
OF_ROWS = ("quantized_token_ring.cuh", "quantized_token_rows.cu")


Arguments = structure_of(
    ("first", "second"),
    (
        *((name, ctypes.c_void_p) for name in ("first_rows", "second_rows")),
        *((name, ctypes.c_void_p) for name in ("first_scale", "second_scale")),
        *((name, ctypes.c_void_p) for name in ("first_bias", "second_bias")),
        *((name, ctypes.c_void_p) for name in ("x", "act", "out")),
        *((name, ctypes.c_void_p) for name in ("pick_weights", "ids", "map")),
        *((name, ctypes.c_int32) for name in ("R", "num_mapped", "num_local")),
        *((name, ctypes.c_float) for name in ("limit", "alpha", "beta")),
    ),
)


def run_token(layer: LayerTensors[QuantizedTensor], cut: TokenCut) -> None:
    """The layer of one token, as checked by ``kernels.hopper_quantized``, in one launch."""
    w1, w2, act = layer.w1, layer.w2, layer.epilogue
    picks = LoneSlots.of(layer.topk_ids, layer.expert_map)
    tensors = {
        "first_rows": w1.data,
        "second_rows": w2.data,
        "first_scale": w1.scale,
        "second_scale": w2.scale,
        "first_bias": layer.w1_bias,
        "second_bias": layer.w2_bias,
        "x": layer.x,
        "act": layer.act,
        "out": layer.out,
        "pick_weights": layer.topk_weights,
        "ids": picks.topk_ids,
        "map": picks.expert_map,
    }
    given = Arguments(
        R=layer.topk_ids.numel(),
        num_mapped=0 if picks.expert_map is None else picks.expert_map.shape[0],
        num_local=w1.shape[0],
        limit=act.limit or 0.0,
        alpha=act.alpha,
        beta=act.beta,
    )
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(given, name, tensor.data_ptr())
    (_, H, I), shards, address = w2.shape, w1.shards, ctypes.addressof(given)  # noqa: E741
    boxes = (w1, I, shards, TILE_ROWS // shards), (w2, H, 1, TILE_ROWS // 2)
    for i, (w, features, parts, box) in enumerate(() if cut.whole_rows else boxes):
        size = w.data.data_ptr(), w.shape[0], features, parts, w.data.shape[-1]
        ctypes.memmove(address + MAP_BYTES * i, tile_map(*size, w.interleaved, box), MAP_BYTES)
    sources = (*COMMON, *(OF_ROWS if cut.whole_rows else OF_BOXES))
    launch(
        *(sources, _constants(layer, cut), cut.threads, cut.shared, given, 1, layer.programs),
        layer.x.get_device(),
        cooperative=True,
    )


def _constants(layer: LayerTensors[QuantizedTensor], cut: TokenCut) -> dict[str, int]:
    w1, act, biases = layer.w1, layer.epilogue, (layer.w1_bias, layer.w2_bias)
    assert w1.scale is not None
    first_bias, second_bias = (0 if b is None else BIASES[b.dtype] for b in biases)
    return {
        "HIDDEN": w1.shape[2],
        "INTERMEDIATE": layer.w2.shape[2],
        "PICKS": layer.topk_ids.numel(),
        "ID64": int(layer.topk_ids.dtype == torch.int64),
        "BLOCKS": layer.programs,
        "WARPS": cut.warps,
        "UP_KW": cut.up_along,
        "DOWN_KW": cut.down_along,
        "STAGES": cut.stages,
        "RING_BYTES": cut.ring_bytes,
        "RING_BARRIERS": cut.barriers,
        "WHOLE_ROWS": int(cut.whole_rows),
        "MOST_TILES": cut.tiles,
        "MOST_UNITS": cut.units,
        "MOST_SUMS": cut.sums,
        "ELEMENT": ELEMENTS[w1.format.element],
        "GROUP": w1.format.group.col,
        "SCALE": SCALES[w1.scale.dtype],
        "SCALE_BYTES": w1.scale.element_size(),
        "INTERLEAVED": int(w1.interleaved),
        "FIRST_BIAS": first_bias,
        "SECOND_BIAS": second_bias,
        "BIAS_BYTES": max((b.element_size() for b in biases if b is not None), default=0),
        "FORMULA": FORMULAS.index(act.formula),
        "GATED": int(act.gated),
        "LIMITED": int(act.limit is not None),
        # What other kernels' text asks for, and this one has no use for.
        **dict.fromkeys(("NEXT", "NEXT_EVEN", "NEXT_ODD", "WIDE"), 0),
        "FEATURES": layer.w2.shape[2],
    }
