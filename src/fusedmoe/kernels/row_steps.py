"""What is done to rows before a product: they are rounded to a format, and their columns are put in
the order of their expert's weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fusedmoe.kernels.column_orders import order_for
from fusedmoe.kernels.gather_columns import gather_columns
from fusedmoe.kernels.round_rows import round_rows
from fusedmoe.quantization.keys import PER_TENSOR, QuantKey
from fusedmoe.quantization.tensor import QuantizedTensor


class RowSteps(NamedTuple):
    """``key``: what rows are rounded to (``round_rows``), with its ``scale`` fp32 [1] if it is
    static. ``columns`` int32 [e, D]: the column that meets each of an expert's weights, in the
    order (``order_for``) of these. None: rows stay as they are."""

    key: QuantKey | None = None
    scale: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @property
    def none(self) -> bool:
        """Whether rows enter the product unchanged."""
        return self.key is None and self.columns is None

    def top_k(self, K: int) -> int:
        """How many slots share a row, of the K that shared it before."""
        return K if self.columns is None else 1

    def taken(
        self,
        x: torch.Tensor,
        w: QuantizedTensor,
        ids: torch.Tensor | None,
        expert_map: torch.Tensor | None,
        *,
        order: str = "",
        position: torch.Tensor | None = None,
        room: torch.Tensor | None = None,
        num_local_experts: int | None = None,
    ) -> torch.Tensor:
        """Rows x [T or R, D] that meet ``w`` after these steps, [R, D] where columns follow, which
        may be written into ``room``; in ``order`` (``column_orders``) of columns unless ``none``.

        ``ids`` int of the R slots, ``expert_map`` and ``position`` are as ``gather_columns`` takes
        them. With ``num_local_experts`` rows are slots, of which those without an expert do not
        count for a scale that all share.
        """
        if self.key is not None:
            live: dict[str, Any] = {}
            if num_local_experts is not None:
                live = {"topk_ids": ids, "expert_map": expert_map}
            x = round_rows(
                x,
                self.key,
                self.scale,
                order=order if self.columns is None else "",
                num_local_experts=num_local_experts,
                **live,
            )
        if self.columns is None:
            return x
        assert ids is not None
        ids, D = ids.flatten(), x.shape[1]
        rows = ids.numel() if position is None else x.shape[0]
        memory = x.new_empty(rows * D) if room is None else room.flatten().view(x.dtype)
        stored = order_for(w.format, D)
        orders = ("", "") if stored == order else (stored, order)
        given = x, self.columns, memory[: rows * D].view(rows, D), ids, expert_map
        return gather_columns(*given, orders=orders, position=position)


BothSteps = tuple[RowSteps, RowSteps]
AS_THEY_COME = RowSteps(), RowSteps()


def check_steps(steps: BothSteps) -> None:
    """Raise ValueError for rows that share one dynamic scale."""
    keys = [step.key for step in steps]
    if PER_TENSOR in {key.group_shape for key in keys if key is not None and not key.static}:
        raise ValueError("the Hopper kernel rounds rows one by one, not all by one dynamic scale")


def in_slots(steps: BothSteps) -> bool:
    """Whether there are steps between slots: rows of their own, or after the first product."""
    return steps[0].columns is not None or not steps[1].none
