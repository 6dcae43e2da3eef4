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

from fusedmoe.kernels.align import LoneSlots, MoEAlignment, align_local_slots
from fusedmoe.kernels.align_pair import PairedOrder, align_and_pair
from fusedmoe.kernels.grouped_gemm_quantized import (
    TABLES,
    QuantizedProduct,
    quantized_gemm_reference,
)
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum_reference
from fusedmoe.kernels.quantized_checks import (
    ALIGNED_BYTES,
    check_decode,
    check_layer,
    unmet_by_stream,
)
from fusedmoe.kernels.row_steps import AS_THEY_COME, BothSteps, check_steps, in_slots
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

# From so many lone slots on, whole rows are read. With fewer, only rows of mxfp4 that are no
# multiple of a line are: they come in one piece.
FEWEST_LONE_ROWS, LINE_BYTES = 17, 128
MOST_NAMED = 2**16 - 1  # experts that a program's own tables can tell apart
GROUP_OF_LONE_INT4 = 32  # columns; with larger groups lone slots gain nothing by whole rows


def lone_slots(T: int, K: int, num_local: int, num_experts: int) -> bool:
    """Whether each slot of T tokens is a block: they are so few that two rarely share an expert.

    On a rank of several only those of one token: most slots have no expert there, and tasks dealt
    without a table leave most programs without one (of four tokens that takes up to five times as
    long).
    """
    few = min(MAX_LONE_SLOTS, num_experts // 4) >= T * K
    return few and (T == 1 or num_local >= num_experts)


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
    which is on a rank of several, most of whose picks are elsewhere, where rows of mxfp4 come in
    one piece, and where a program's shared memory holds all of its weights in int4."""
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
    anywhere = not where_faster or second.shape[0] < layer.num_experts
    if first.format.element == "e2m1":
        faster = anywhere or _in_one_piece(*row_bytes)
        return token_rows_cut(shape, layer.programs) if faster else None
    cut = token_cut(shape, layer.programs)
    return cut if cut is not None and (anywhere or cut.at_once) else None


def quantized_decode(
    layer: LayerTensors[QuantizedTensor],
    blocks: MoEAlignment | LoneSlots | None = None,
    tiles: CudaDecodeTiles | None = None,
    steps: BothSteps = AS_THEY_COME,
) -> None:
    """Run a layer of few slots: x and out bf16; scratch act [R, I] bf16 and y [R, H] fp32,
    R = T * K.

    ``blocks`` hold the tiles' slots, or are ids (``LoneSlots``, ``tiles.made`` at most); both are
    chosen here where they are not given. ``steps``: of the rows that enter each product; none are
    rounded with one dynamic scale for all. Raises ValueError for weights that the kernel cannot
    read and for tensors that do not fit.
    """
    w1, w2, topk_ids, expert_map = layer.w1, layer.w2, layer.topk_ids, layer.expert_map
    reason = unmet_by_stream(w1, w2)
    if reason is not None:
        raise ValueError(f"the Hopper kernel {reason}")
    (T, K), e = topk_ids.shape, w2.shape[0]
    R, num_experts = T * K, layer.num_experts
    check_steps(steps)
    chosen = tiles is None and blocks is None and all(step.none for step in steps)
    one_launch = token_cut_for(layer) if chosen else None
    if tiles is None:
        if isinstance(blocks, MoEAlignment):
            raise ValueError("a table of blocks comes with the tiles it was made for")
        lone, likely = blocks is not None or lone_slots(T, K, e, num_experts), R
        if not lone:
            likely = expected_slots(R, e, num_experts)
        if in_slots(steps):  # larger tiles would want rows in another order
            likely = min(likely, EIGHT_MEAN * e)
        tiles = decode_tiles_for(likely, w1, w2, lone, layer.programs)
    if blocks is None and tiles.made >= R and e < MOST_NAMED:
        blocks = LoneSlots.of(topk_ids, expert_map)
    if tiles.paired and in_slots(steps):
        raise ValueError(f"no steps lead to the order in which {tiles.gemm2} takes rows")
    check_decode(layer, blocks, tiles.made)
    check_layer(layer)
    if not layer.x.is_cuda:
        quantized_decode_reference(layer, blocks, steps)
        return
    from fusedmoe.kernels.cuda.quantized_decode import decode

    if R == 0:
        return
    if one_launch is not None:
        from fusedmoe.kernels.cuda.quantized_token import run_token

        run_token(layer, one_launch)
        return
    # The first product's rows may lie in y, which is written after they are read.
    layer = layer._replace(x=steps[0].taken(layer.x, w1, topk_ids, expert_map, room=layer.y))
    if blocks is None or (tiles.paired and not isinstance(blocks, LoneSlots)):
        if tiles.paired:
            order = PairedOrder.of(w1.format)
            blocks, x = align_and_pair(layer.x, order, topk_ids, tiles.slots, e, expert_map, blocks)
            layer = layer._replace(x=x)
        else:
            blocks = align_local_slots(topk_ids, tiles.slots, e, expert_map)
    decode(layer, blocks, tiles, steps)


def quantized_decode_reference(
    layer: LayerTensors[QuantizedTensor],
    blocks: MoEAlignment | LoneSlots | None = None,
    steps: BothSteps = AS_THEY_COME,
) -> None:
    """The definition, in plain torch."""
    x, w1, w2, topk_weights, topk_ids, out, act, y = layer[:8]
    (T, K), (e, H, _), expert_map = topk_ids.shape, w2.shape, layer.expert_map
    x = steps[0].taken(x, w1, topk_ids, expert_map)
    # The definition has no tiles: blocks are the caller's, or of eight slots.
    if not isinstance(blocks, LoneSlots):
        blocks = align_local_slots(topk_ids, 8, e, expert_map)
    tile = QuantizedTile(64, 8, 64, 1, 4, 2)
    epilogue, top_k = (layer.w1_bias, layer.activation, layer.activation_config), steps[0].top_k(K)
    quantized_gemm_reference(QuantizedProduct(x, w1, act, blocks, tile, top_k, *epilogue))
    rows = steps[1].taken(act, w2, topk_ids, expert_map)
    quantized_gemm_reference(QuantizedProduct(rows, w2, y, blocks, tile, 1, layer.w2_bias))
    moe_fused_mul_sum_reference(
        y.view(T, K, H), topk_weights, out, topk_ids, expert_map, num_local_experts=e
    )
