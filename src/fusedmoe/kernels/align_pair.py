"""Grouping routed slots by expert and bringing the tokens' rows into the order in which a product
with quantized weights reads them, in one launch. Device code: ``kernels/triton/align_pair.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.kernels.align import MoEAlignment, align_local_slots, padded_slots
from fusedmoe.quantization.tensor import QuantFormat

ONE_LAUNCH_SLOTS = 2048


class PairedOrder(NamedTuple):
    """Columns of a row as ``kernels/cuda/quantized_stream.cu`` multiplies them with stored weights.

    A word of weights holds 2 * ``width`` columns and becomes ``width`` registers of two numbers,
    columns (i, i + width). The words of four threads, 8 * width columns, meet as many matrices of
    eight columns: matrix i has register i of every thread. Numbers of weights lack a factor that
    ``even`` and ``odd`` registers of the row bring, as exponents of two.
    """

    width: int
    even: int
    odd: int

    @classmethod
    def of(cls, fmt: QuantFormat) -> PairedOrder:
        if fmt.element == "e2m1" and fmt.group.col == 16:
            return cls(4, 0, 0)
        return {
            "int4": cls(4, 64, 60),
            "e2m1": cls(4, 64, 64),
            "int8": cls(2, 0, 0),
            "e4m3": cls(2, 64, 64),
        }[fmt.element]


def paired_reference(x: torch.Tensor, order: PairedOrder) -> torch.Tensor:
    """The definition: x [T, D], D a multiple of 8 * order.width, in this order."""
    T, D = x.shape
    words = x.reshape(T, D // (8 * order.width), 4, 2, order.width)  # threads, halves, registers
    units = [2.0 ** (order.odd if i % 2 else order.even) for i in range(order.width)]
    scaled = words.float() * torch.tensor(units, device=x.device)
    return scaled.permute(0, 1, 4, 2, 3).reshape(T, D).to(x.dtype)


def align_and_pair(
    x: torch.Tensor,
    order: PairedOrder,
    topk_ids: torch.Tensor,
    block_size: int,
    num_local_experts: int,
    expert_map: torch.Tensor | None,
    blocks: MoEAlignment | None = None,
) -> tuple[MoEAlignment, torch.Tensor]:
    """``align_local_slots`` unless there are ``blocks``, and ``paired_reference`` of x [T, D].

    One launch for at most ONE_LAUNCH_SLOTS slots. x: rows dense, 8 * order.width divides D.
    Raises ValueError where it does not.
    """
    if x.shape[1] % (8 * order.width):
        raise ValueError(f"rows of {x.shape[1]} columns are not whole {8 * order.width}")
    if not x.is_cuda:
        blocks = blocks or align_local_slots(topk_ids, block_size, num_local_experts, expert_map)
        return blocks, paired_reference(x, order)
    from fusedmoe.kernels.triton.align_pair import align_and_pair as launch

    paired = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if blocks is None and topk_ids.numel() > ONE_LAUNCH_SLOTS:
        blocks = align_local_slots(topk_ids, block_size, num_local_experts, expert_map)
    if blocks is not None:
        launch(x, paired, order)
        return blocks, paired
    P = padded_slots(topk_ids.numel(), block_size, num_local_experts, False)
    blocks = MoEAlignment.empty(P, block_size, x.device)
    launch(x, paired, order, topk_ids, expert_map, num_local_experts, block_size, blocks)
    return blocks, paired
