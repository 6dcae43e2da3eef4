"""The experts of a large batch on Hopper: the whole layer but routing, bound by the products.

Device code: ``kernels/triton/hopper_prefill.py`` (Gluon). The definition is ``experts_reference``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.align import MoEAlignment, align_local_slots, padded_slots
from fusedmoe.kernels.align_arrivals import Arrivals, align_arrivals
from fusedmoe.kernels.hopper_decode import check_biases, check_experts, hopper_decode_reference
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.peer_layout import LateRows
from fusedmoe.tuning.hopper_tiles import COUNTER_SLOTS, PrefillTiles

PREFILL_BLOCK = 128


def prefill_rows(R: int, num_local: int) -> int:
    """How many rows the scratch of R slots over ``num_local`` experts has at most."""
    return padded_slots(R, PREFILL_BLOCK, num_local, whole_blocks=True)


def hopper_prefill(layer: LayerTensors[torch.Tensor], tiles: PrefillTiles | None = None) -> None:
    """As ``hopper_decode``, but for the scratch: act [P, I] and y [P, H], P = ``prefill_rows``.

    The same errors.
    """
    R, e = layer.topk_ids.numel(), layer.w2.shape[0]
    check_experts(layer, prefill_rows(R, e))
    check_biases(layer)
    if not layer.x.is_cuda:
        hopper_decode_reference(layer)
        return
    from fusedmoe.kernels.triton.hopper_prefill import prefill

    if R == 0:
        return
    x, tables, arrivals = align_rows(layer.x, layer.topk_ids, e, layer.expert_map)
    prefill(layer._replace(x=x), tables, tiles or PrefillTiles(), arrivals)


def align_rows(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_local: int,
    expert_map: torch.Tensor | None,
) -> tuple[torch.Tensor, MoEAlignment, Arrivals | None]:
    """x as an ordinary tensor, its slots in blocks, and when each may begin if rows are late."""
    if isinstance(x, LateRows):
        tables, arrivals = align_arrivals(
            topk_ids, PREFILL_BLOCK, num_local, expert_map, x, spare_slots=COUNTER_SLOTS
        )
        return x.plain(), tables, arrivals
    tables = align_local_slots(
        topk_ids, PREFILL_BLOCK, num_local, expert_map, whole_blocks=True, spare_slots=COUNTER_SLOTS
    )
    return x, tables, None
