"""The experts of a small batch on Hopper with quantized weights, at the speed of memory.

The whole layer but routing. Device code, in ``kernels/cuda`` and compiled when first needed:
``quantized_token.cu`` for one token of int4 whose experts are small and
``quantized_token_rows.cu`` for one of mxfp4 whose rows come in one piece, in one launch;
``quantized_lone.cu`` for few slots that hardly share experts, ``quantized_rows.cu`` for more of
them and for blocks of eight or sixteen of mxfp4 and int4 without zero points,
``quantized_warps.cu`` for blocks of eight of all others, ``quantized_stream.cu`` for larger ones.
The definition is the weighted sum of ``quantized_gemm_reference`` twice.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.align import LoneSlots, MoEAlignment, align_local_slots
from fusedmoe.kernels.align_pair import PairedOrder, align_and_pair
from fusedmoe.kernels.grouped_gemm_quantized import (
    ELEMENTS,
    TABLES,
    check_weights,
    quantized_gemm_reference,
)
from fusedmoe.kernels.hopper_decode import check_biases, check_picks
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum_reference
from fusedmoe.kernels.round_rows import RowKeys, RowScales, round_rows, round_rows_reference
from fusedmoe.kernels.tensor_checks import check_quantized_rows
from fusedmoe.quantization.keys import PER_TENSOR
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.cuda_tiles import (
    EIGHT_MEAN,
    MAX_LONE_SLOTS,
    CudaDecodeTiles,
    CudaRowsTile,
    CudaWarpsTile,
    cuda_decode_tiles,
    eights_tile,
    int4_rows_tile,
    rows_tile,
    table_tile,
)
from fusedmoe.tuning.quantized_tiles import QuantizedTile, expected_slots
from fusedmoe.tuning.token_tiles import TokenCut, TokenShape, token_cut, token_rows_cut

ALIGNED_BYTES = 16
# Lone slots go by whole rows from so many on; fewer do where rows of mxfp4 come in one piece,
# because they are no multiple of this.
FEWEST_LONE_ROWS, LINE_BYTES = 17, 128
MOST_NAMED = 2**16 - 1  # experts that a program's own tables can tell apart
GROUP_OF_LONE_INT4 = 32  # columns; with larger groups a lone slot has nothing of whole rows
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


def lone_slots(R: int, e: int, expert_map: torch.Tensor | None) -> bool:
    """Whether R slots are so few that two rarely share an expert."""
    return min(MAX_LONE_SLOTS, (e if expert_map is None else expert_map.shape[0]) // 4) >= R


def decode_tiles_for(
    R: int, w1: QuantizedTensor, w2: QuantizedTensor, lone: bool, programs: int
) -> CudaDecodeTiles:
    """Tiles for R slots and these weights; ``lone``: every slot is a block. ``programs``: the
    number of multiprocessors."""
    if {w1.format.element, w2.format.element} & TABLES:
        blocks = min(R, w2.shape[0])
        return CudaDecodeTiles(*(_of_eight(w, blocks, programs) for w in (w1, w2)))
    rows, row_bytes = (w1.shape[1], w2.shape[1]), (w1.data.shape[-1], w2.data.shape[-1])
    tiles = cuda_decode_tiles(R, w2.shape[0], rows, row_bytes, lone, programs)
    slots = 1 if lone else 8 if tiles.slots == 8 else 16
    in_one_piece = w1.format.element == "e2m1" and _in_one_piece(*row_bytes)
    few = R < FEWEST_LONE_ROWS and not in_one_piece
    if few if lone else slots * w2.shape[0] < R:
        return tiles
    first, second = _rows(w1, slots, splits=False), _rows(w2, slots, splits=not lone)
    if first is not None and second is not None:
        return CudaDecodeTiles(first, second)
    return tiles


def _of_eight(w: QuantizedTensor, blocks: int, programs: int) -> CudaWarpsTile:
    tile = table_tile if w.format.element in TABLES else eights_tile
    return tile(blocks, w.shape[1], w.data.shape[-1], programs)


def _in_one_piece(*row_bytes: int) -> bool:
    """Whether rows are no whole lines, so that neighbouring ones lie in different banks."""
    return all(size % LINE_BYTES for size in row_bytes)


def _rows(w: QuantizedTensor, slots: int, *, splits: bool) -> CudaRowsTile | None:
    """A tile of ``quantized_rows.cu``; None where that does not read these: it takes mxfp4 and int4
    without zero points, whose scales the copy engine can bring. ``splits``: rows may be read in
    parts."""
    fmt, scale = w.format, w.scale
    if fmt.element not in ("int4", "e2m1") or not fmt.symmetric or scale is None:
        return None
    grouped = fmt.group.row == 1 and 32 <= fmt.group.col < w.shape[-1] and fmt.group.col <= 256
    if not grouped or w.scale2 is not None or scale.data_ptr() % ALIGNED_BYTES:
        return None
    if slots == 1 and fmt.element == "int4" and fmt.group.col > GROUP_OF_LONE_INT4:
        return None
    scale_bytes = scale.shape[-1] * scale.element_size()
    features = w.shape[1] // w.shards
    tile = int4_rows_tile if fmt.element == "int4" else rows_tile
    return tile(features, w.shards, w.data.shape[-1], scale_bytes, slots, splits)


def token_cut_for(
    layer: LayerTensors[QuantizedTensor], *, where_faster: bool = True
) -> TokenCut | None:
    """How one launch runs the whole layer; None where there are more tokens than one, or it does
    not read these weights: it takes two matrices in mxfp4 or in int4 without zero points, in the
    same format, with scales that the copy engine can bring. ``where_faster``: only where it is,
    which is where rows of mxfp4 come in one piece, and where a program's shared memory holds all of
    its weights in int4."""
    (T, K), first, second = layer.topk_ids.shape, layer.w1, layer.w2
    biases = [bias for bias in (layer.w1_bias, layer.w2_bias) if bias is not None]
    alike = first.format == second.format and len({bias.dtype for bias in biases}) <= 1
    if T != 1 or K > MAX_LONE_SLOTS or not alike:
        return None
    rows, dtypes = [], set()
    for w in (first, second):
        fmt, scale, group = w.format, w.scale, w.format.group
        if fmt.element not in ("int4", "e2m1") or not fmt.symmetric or w.scale2 is not None:
            return None
        if scale is None or group.row != 1 or group.col < 32 or w.shape[-1] % group.col:
            return None
        if scale.data_ptr() % ALIGNED_BYTES:
            return None
        dtypes.add(scale.dtype)
        rows.append((w.data.shape[-1], scale.shape[-1] * scale.element_size()))
    if len(dtypes) > 1:
        return None
    if any(bias.data_ptr() % ALIGNED_BYTES for bias in biases):
        return None
    (_, H, I), size = second.shape, biases[0].element_size() if biases else 0  # noqa: E741
    row_bytes, scale_bytes = zip(*rows, strict=True)
    shape = TokenShape(K, H, I, first.shards, row_bytes, scale_bytes, size)
    if first.format.element == "e2m1":
        faster = _in_one_piece(*row_bytes)
        return token_rows_cut(shape, layer.programs) if faster or not where_faster else None
    cut = token_cut(shape, layer.programs)
    if cut is None or (where_faster and not cut.at_once):
        return None
    return cut


def quantized_decode(
    layer: LayerTensors[QuantizedTensor],
    blocks: MoEAlignment | LoneSlots | None = None,
    tiles: CudaDecodeTiles | None = None,
    keys: RowKeys = (None, None),
    scales: RowScales = (None, None),
) -> None:
    """Run a layer of few slots: x and out bf16; scratch act [R, I] bf16 and y [R, H] fp32,
    R = T * K.

    ``blocks`` hold the tiles' slots, or are ids (``LoneSlots``, ``tiles.made`` at most); both are
    chosen here where they are not given. ``keys``: how the rows that enter each product are rounded
    before (``round_rows``), with the ``scales`` fp32 [1] of those that are static; not with one
    dynamic scale for all rows. Raises ValueError for weights that the kernel cannot read and for
    tensors that do not fit.
    """
    w1, w2, topk_ids, expert_map = layer.w1, layer.w2, layer.topk_ids, layer.expert_map
    reason = unmet_by_stream(w1, w2)
    if reason is not None:
        raise ValueError(f"the Hopper kernel {reason}")
    R, e = topk_ids.numel(), w2.shape[0]
    check_one_by_one(keys)
    chosen = tiles is None and blocks is None and keys == (None, None)
    one_launch = token_cut_for(layer) if chosen else None
    if tiles is None:
        if isinstance(blocks, MoEAlignment):
            raise ValueError("a table of blocks comes with the tiles it was made for")
        lone, likely = blocks is not None or lone_slots(R, e, expert_map), R
        if not lone and expert_map is not None:
            likely = expected_slots(R, e, expert_map.shape[0])
        if keys[1] is not None:  # tiles of more slots take rows in an order of their own
            likely = min(likely, EIGHT_MEAN * e)
        tiles = decode_tiles_for(likely, w1, w2, lone, layer.programs)
    if blocks is None and tiles.made >= R and e < MOST_NAMED:
        blocks = LoneSlots.of(topk_ids, expert_map)
    if tiles.paired and keys[1] is not None:
        raise ValueError(f"rows are not rounded in the order in which {tiles.gemm2} takes them")
    check_decode(layer, blocks, tiles.made)
    check_layer(layer)
    if not layer.x.is_cuda:
        quantized_decode_reference(layer, blocks, keys, scales)
        return
    from fusedmoe.kernels.cuda.quantized_decode import decode

    if R == 0:
        return
    if one_launch is not None:
        from fusedmoe.kernels.cuda.quantized_token import run_token

        run_token(layer, one_launch)
        return
    if keys[0] is not None:
        layer = layer._replace(x=round_rows(layer.x, keys[0], scales[0]))
    if blocks is None or (tiles.paired and not isinstance(blocks, LoneSlots)):
        if tiles.paired:
            order = PairedOrder.of(w1.format)
            blocks, x = align_and_pair(layer.x, order, topk_ids, tiles.slots, e, expert_map, blocks)
            layer = layer._replace(x=x)
        else:
            blocks = align_local_slots(topk_ids, tiles.slots, e, expert_map)
    decode(layer, blocks, tiles, keys[1], scales[1])


def quantized_decode_reference(
    layer: LayerTensors[QuantizedTensor],
    blocks: MoEAlignment | LoneSlots | None = None,
    keys: RowKeys = (None, None),
    scales: RowScales = (None, None),
) -> None:
    """The definition, in plain torch."""
    x, w1, w2, topk_weights, topk_ids, out, act, y = layer[:8]
    if keys[0] is not None:
        x = round_rows_reference(x, keys[0], scales[0])
    (T, K), (e, H, _), expert_map = topk_ids.shape, w2.shape, layer.expert_map
    # The definition knows no tiles: its blocks are of eight slots, or its caller's.
    if not isinstance(blocks, LoneSlots):
        blocks = align_local_slots(topk_ids, 8, e, expert_map)
    tile = QuantizedTile(64, 8, 64, 1, 4, 2)
    quantized_gemm_reference(
        x, w1, act, blocks, tile, top_k=K, bias=layer.w1_bias, activation=layer.activation,
        activation_config=layer.activation_config,
    )  # fmt: skip
    rows = act if keys[1] is None else round_rows_reference(act, keys[1], scales[1])
    quantized_gemm_reference(rows, w2, y, blocks, tile, top_k=1, bias=layer.w2_bias)
    moe_fused_mul_sum_reference(
        y.view(T, K, H), topk_weights, out, topk_ids, expert_map, num_local_experts=e
    )


def check_one_by_one(keys: RowKeys) -> None:
    """Raise ValueError for rows that share one dynamic scale."""
    if PER_TENSOR in {key.group_shape for key in keys if key is not None and not key.static}:
        raise ValueError("the Hopper kernel rounds rows one by one, not all by one dynamic scale")


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
