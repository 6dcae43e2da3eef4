"""The experts of a small batch on Hopper: the whole layer but routing, at the speed of memory.

Device code: ``kernels/triton/hopper_decode.py`` (Gluon). The definition is ``experts_reference``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.align import align_local_slots, padded_slots
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.tensor_checks import check_contiguous, check_tensors
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.hopper_tiles import MAX_PICKS, DecodeTiles, decode_tiles

# For TMA strides, 16-byte gathers and Triton's specialisation of divisible widths.
ALIGNED_ELEMENTS = 16
DRAW_WORDS = 4  # before the counters of blocks: how many tasks both launches have drawn


def hopper_decode(layer: LayerTensors[torch.Tensor], tiles: DecodeTiles | None = None) -> None:
    """Run a layer of few slots: w1 and w2 contiguous, all in bf16 or in fp16; scratch act [R, I]
    and y [R, H], R = T * K.

    Raises ValueError for sizes that are not multiples of 16 and for tensors that do not fit.
    """
    R = layer.topk_ids.numel()
    check_experts(layer, R)
    check_biases(layer)
    if not layer.x.is_cuda:
        hopper_decode_reference(layer)
        return
    from fusedmoe.kernels.triton.hopper_decode import decode

    if R == 0:
        return
    e, H, I = layer.w2.shape  # noqa: E741
    tiles = tiles or decode_tiles(R, e, H, I)
    tables = align_local_slots(
        layer.topk_ids,
        tiles.block,
        e,
        layer.expert_map,
        whole_blocks=True,
        spare_slots=decode_table(R, tiles.block, e)[1],
    )
    decode(layer, tables, tiles)


def decode_table(R: int, block: int, num_local: int) -> tuple[int, int]:
    """(places of a table of R slots, spare ones behind it), whole blocks of both: in padding, the
    launches count the tasks that they have drawn, and for each block the tiles that are done."""
    places = padded_slots(R, block, num_local, whole_blocks=True)
    return places, -(-(DRAW_WORDS + places // block) // block) * block


def decode_counters(sorted_ids: torch.Tensor, R: int, block: int, num_local: int) -> torch.Tensor:
    """The spare places of such a table, where launches count. They count up, so a table serves one
    layer. ValueError if the table is shorter."""
    places, spare = decode_table(R, block, num_local)
    if sorted_ids.shape[0] < places + spare:
        raise ValueError(
            f"a table of {sorted_ids.shape[0]} slots for {places} has no room for {spare} counters"
        )
    return sorted_ids[places:]


def hopper_decode_reference(layer: LayerTensors[torch.Tensor]) -> None:
    """The definition, in plain torch."""
    weights = layer.topk_weights
    if weights is None:
        weights = torch.ones_like(layer.topk_ids, dtype=torch.float32)
    result = experts_reference(
        layer.x,
        layer.w1,
        layer.w2,
        weights,
        layer.topk_ids,
        activation=layer.activation,
        activation_config=layer.activation_config,
        w1_bias=layer.w1_bias,
        w2_bias=layer.w2_bias,
        expert_map=layer.expert_map,
    )
    layer.out.copy_(result)


def check_experts(layer: LayerTensors[torch.Tensor], rows: int) -> None:
    """Raise ValueError where the tensors of a Hopper launch do not fit; ``rows`` of act and y."""
    x, w1, w2, topk_weights, topk_ids, out, act, y = layer[:8]
    (e, H, I), (T, K) = w2.shape, topk_ids.shape  # noqa: E741
    check_picks(K)
    if H % ALIGNED_ELEMENTS or I % ALIGNED_ELEMENTS:
        raise ValueError(f"H {H} and I {I} must be multiples of {ALIGNED_ELEMENTS}")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the Hopper kernels compute in fp16 or bf16, got {x.dtype}")
    check_tensors(
        (
            ("x", x, (T, H), x.dtype),
            ("out", out, (T, H), x.dtype),
            ("act", act, (rows, I), x.dtype),
            ("y", y, (rows, H), x.dtype),
        )
    )
    if w1.shape not in ((e, I, H), (e, 2 * I, H)):
        raise ValueError(f"w1 is {tuple(w1.shape)}, w2 {tuple(w2.shape)} asks for {(e, 2 * I, H)}")
    if topk_weights is not None and topk_weights.shape != (T, K):
        raise ValueError(f"topk_weights is {tuple(topk_weights.shape)}, expected {(T, K)}")
    check_contiguous(w1=w1, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids, act=act, y=y)
    if x.stride(1) != 1 or x.stride(0) % ALIGNED_ELEMENTS or out.stride(1) != 1:
        raise ValueError(
            f"rows of x must start at multiples of {ALIGNED_ELEMENTS} elements and rows of x and "
            f"out must be dense, strides are {x.stride()} and {out.stride()}"
        )


def check_picks(K: int) -> None:
    """Raise ValueError for more picks of a token than the sums add up."""
    if K > MAX_PICKS:
        raise ValueError(f"at most {MAX_PICKS} picks of a token are added up, got {K}")


def check_biases(layer: LayerTensors[torch.Tensor] | LayerTensors[QuantizedTensor]) -> None:
    """Raise ValueError for biases that are not dense with a number for each row of the weights."""
    for name, bias, shape in (
        ("w1_bias", layer.w1_bias, layer.w1.shape),
        ("w2_bias", layer.w2_bias, layer.w2.shape),
    ):
        if bias is None:
            continue
        if bias.shape != shape[:2] or not bias.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(bias.shape)} of strides {bias.stride()}, expected a contiguous "
                f"{tuple(shape[:2])}"
            )
