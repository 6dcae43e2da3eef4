"""The indirect grouped GEMM with quantized weights and rows in floating point.

As ``kernels/grouped_gemm.py``: slots, blocks and results are the same; the weights are a
``QuantizedTensor`` that is read as it is stored. Triton bodies:
``kernels/triton/grouped_gemm_quantized.py``, and ``grouped_gemm_packed.py`` for formats that take
more than a mask to become numbers; tiles: ``tuning/quantized_tiles.py``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.kernels.activation import DeviceActivation, device_activation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.column_orders import REPEATS, order_for, ordered, unordered
from fusedmoe.kernels.grouped_gemm import blocks_on_host
from fusedmoe.kernels.grouped_gemm_packed import check_packed, is_packed
from fusedmoe.kernels.tensor_checks import check_contiguous
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import QuantizedTile

ELEMENTS = frozenset({"int4", "e2m1", "int8", "e4m3"})
TABLES = frozenset({"nf4", "iq4_nl"})
NIBBLES = frozenset({"int4", "e2m1"}) | TABLES


@lru_cache
def has_packed_bf16(device: torch.device) -> bool:
    """Whether this GPU multiplies and adds two bf16 at a time (compute capability 9 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class QuantizedProduct(NamedTuple):
    """c[slot] = act(a[slot // top_k] @ w[expert].T + bias[expert]) for each slot.

    a [rows, D] with dense rows, w logically [e, S * N, D] (S = 2 shards where the activation is
    gated), c [R, N] with R <= rows * top_k, bias [e, S * N]. ``blocks`` hold ``tile.slots`` slots
    each, or one (``LoneSlots``). The rest is as in ``grouped_gemm``.
    """

    a: torch.Tensor
    w: QuantizedTensor
    c: torch.Tensor
    blocks: MoEAlignment | LoneSlots
    tile: QuantizedTile
    top_k: int
    bias: torch.Tensor | None = None
    activation: MoEActivation | None = None
    activation_config: ApplyMoEActivationConfig | None = None

    @property
    def epilogue(self) -> DeviceActivation:
        """The activation as kernels are told."""
        return device_activation(self.activation, self.activation_config)


def quantized_gemm(
    product: QuantizedProduct,
    *,
    a_ordered: bool = False,
    c_order: str = "",
    c_places: torch.Tensor | None = None,
) -> torch.Tensor:
    """``product`` with rows in floating point; c.

    ``a_ordered``: the columns of a lie as ``order_for`` these weights says, which spares them an
    unzipping; ``c_order``: of those of c. Or ``c_places`` int32 [e, N]: where each feature of an
    expert is written, all of them somewhere.

    Sums are fp32. Where scales change every few columns, a number times its scale is rounded to
    the dtype of a before it is multiplied. Raises ValueError where shapes, dtypes or steps
    disagree.
    """
    a, w, c, _, tile, *_ = product
    check_product(product)
    check_orders(a, w, c, a_ordered, c_order, c_places)
    packed, group = is_packed(w.format), w.format.group.col
    if packed:
        check_packed(w, tile, a_ordered)
    elif group > 0 and max(group, tile.depth) % min(group, tile.depth):
        raise ValueError(f"steps of {tile.depth} columns and groups of {group} do not fit")
    if a.is_cuda:
        from fusedmoe.kernels.triton import grouped_gemm_packed, grouped_gemm_quantized

        launch = (grouped_gemm_packed if packed else grouped_gemm_quantized).launch
        native = a.dtype == torch.bfloat16 and has_packed_bf16(a.device)
        launch(product, a_ordered, c_order, c_places, native)
        return c
    return quantized_gemm_reference(
        product, a_ordered=a_ordered, c_order=c_order, c_places=c_places
    )


def quantized_gemm_reference(
    product: QuantizedProduct,
    *,
    a_ordered: bool = False,
    c_order: str = "",
    c_places: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in plain torch, on dequantized weights; walks the blocks on the host."""
    a, w, c, blocks, tile, top_k, *_ = product
    rows = unordered(a, order_for(w.format, a.shape[1])) if a_ordered else a
    weights = w.dequantize(torch.float32)
    for slots, expert in blocks_on_host(blocks, tile.slots, c.shape[0], w.shape[0]):
        sums = finished_sums(rows[slots // top_k].float() @ weights[expert].T, expert, product)
        sums = ordered(sums, c_order)
        if c_places is not None:
            sums = sums[:, c_places[expert].long().argsort()]
        c[slots] = sums.to(c.dtype)
    return c


def finished_sums(sums: torch.Tensor, expert: int, product: QuantizedProduct) -> torch.Tensor:
    """The bias and the activation of sums whose columns are the rows of an expert's weights."""
    _, w, _, _, _, _, bias, activation, config = product
    if bias is not None:
        sums = sums + bias[expert].float()
    if activation is None:
        return sums
    if w.interleaved == (activation is MoEActivation.SWIGLUOAI) or not activation.is_gated:
        return activation_reference(activation, sums, config)
    gate, up = (sums[:, 0::2], sums[:, 1::2]) if w.interleaved else sums.chunk(2, 1)
    both = torch.cat([gate, up], 1) if w.interleaved else torch.stack([gate, up], 2).flatten(1)
    return activation_reference(activation, both, config)


def row_addresses(w: QuantizedTensor) -> tuple[int, ...]:
    """Where the weight row of feature j of shard s lies, as four numbers: the strides of data by
    expert and by row; row = s * shard_step + j * row_step (two numbers)."""
    steps = (1, w.shards) if w.interleaved else (w.shape[-2] // w.shards, 1)
    return (*w.data.stride()[:2], *steps)


def weight_addresses(w: QuantizedTensor) -> tuple[int, ...]:
    """``row_addresses``, and likewise for the scales: their strides by expert and by row; their
    row = s * shard_step + j // block * row_step (three numbers)."""
    scale = w.scale
    assert scale is not None
    if scale.dim() == 2:  # one number per shard
        return (*row_addresses(w), *scale.stride(), 1, 0, 1)
    block = w.format.group.row
    scale_rows = -(-(w.shape[-2] // w.shards) // block)
    scale_steps = (1, w.shards) if w.interleaved else (scale_rows, 1)
    return (*row_addresses(w), *scale.stride()[:2], *scale_steps, block)


def check_weights(w: QuantizedTensor, c: torch.Tensor, activation: MoEActivation | None) -> None:
    """Raise ValueError where ``w`` cannot give the columns of ``c`` or lies strided."""
    shards = 2 if activation is not None and activation.is_gated else 1
    if len(w.shape) != 3 or c.dim() != 2 or w.shape[1] != shards * c.shape[1]:
        raise ValueError(
            f"c {tuple(c.shape)} asks for weights [e, {shards * c.shape[-1]}, D], got "
            f"{tuple(w.shape)}"
        )
    if shards == 2 and w.shards != 2:
        raise ValueError(f"a gated activation takes two shards, these weights have {w.shards}")
    if shards == 1 and w.shards != 1:
        raise ValueError(f"without a gate there is one shard, these weights have {w.shards}")
    check_contiguous(data=w.data, scale=w.scale, scale2=w.scale2, zero_point=w.zero_point)


def check_orders(
    a: torch.Tensor,
    w: QuantizedTensor,
    c: torch.Tensor,
    a_ordered: bool,
    c_order: str,
    c_places: torch.Tensor | None,
) -> None:
    """Raise ValueError where the columns of ``a`` and ``c`` cannot lie so."""
    if a_ordered and not order_for(w.format, a.shape[1]):
        raise ValueError(f"rows {tuple(a.shape)} have no order for {w.format.name}")
    if c.shape[1] % REPEATS[c_order]:
        raise ValueError(f"{c.shape[1]} columns are no multiple of {REPEATS[c_order]}")
    wanted = (w.shape[0], c.shape[1])
    if c_places is not None:
        check_contiguous(c_places=c_places)
        if c_places.shape != wanted or c_places.dtype != torch.int32 or c_order:
            raise ValueError(
                f"c_places {tuple(c_places.shape)} {c_places.dtype}, expected {wanted} int32"
            )


def check_product(product: QuantizedProduct) -> None:
    """Raise ValueError where weights, rows, slots and what is added to them do not fit."""
    a, w, c, blocks, _, top_k, bias, activation, _ = product
    check_weights(w, c, activation)
    if a.dim() != 2 or a.shape[1] != w.shape[2]:
        raise ValueError(f"a {tuple(a.shape)} does not fit weights {tuple(w.shape)}")
    if a.stride(1) != 1 or c.stride(1) != 1:
        raise ValueError(
            f"rows of a and c must be dense, their strides are {a.stride()} and {c.stride()}"
        )
    if top_k < 1 or c.shape[0] > a.shape[0] * top_k:
        raise ValueError(
            f"c has {c.shape[0]} slots, more than {a.shape[0]} rows with top_k {top_k}"
        )
    if bias is not None and bias.shape != w.shape[:2]:
        raise ValueError(f"bias is {tuple(bias.shape)}, expected {tuple(w.shape[:2])}")
    if isinstance(blocks, LoneSlots) and blocks.topk_ids.shape != c.shape[:1]:
        raise ValueError(f"{tuple(blocks.topk_ids.shape)} ids do not name {c.shape[0]} slots")
