"""How much scratch memory the experts get, and in how many passes they use it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.modular_kernel.experts import FusedMoEExpertsModular
from fusedmoe.modular_kernel.records import PrepareResult, ProblemSize, WorkspaceShapes
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduceNoOP


@dataclass(frozen=True)
class WorkspacePlan:
    """How the experts of one forward are run: rows per pass and the memory that takes.

    ``shapes`` has the workspaces of one pass and the output of all rows; ``in_place`` says that
    this output is the layer's own.
    """

    rows_per_pass: int
    shapes: WorkspaceShapes
    dtype: torch.dtype
    in_place: bool

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the two scratch tensors."""
        return _bytes(self.dtype, self.shapes.workspace13, self.shapes.workspace2)

    @property
    def peak_bytes(self) -> int:
        """All that is alive beside input, weights and the layer's output."""
        own = () if self.in_place else (self.shapes.output,)
        return self.workspace_bytes + _bytes(self.dtype, *own)


def _bytes(dtype: torch.dtype, *shapes: tuple[int, ...]) -> int:
    return dtype.itemsize * sum(math.prod(shape) for shape in shapes)


def plan_workspaces(
    experts: FusedMoEExpertsModular,
    size: ProblemSize,
    act_dtype: torch.dtype,
    activation: MoEActivation,
    global_num_experts: int,
    prepared: PrepareResult | None = None,
) -> WorkspacePlan:
    """Keep the workspaces within ``MoEOptions.max_workspace_bytes`` by running rows in passes.

    A pass has at least one row. The batched format has its rows bounded by construction and is
    never cut. A pure function of sizes.
    """
    dtype = experts.workspace_dtype(act_dtype)
    meta = None if prepared is None else prepared.expert_tokens_meta

    def plan(rows: int) -> WorkspacePlan:
        def shapes(M: int) -> WorkspaceShapes:
            sizes = M, size.N, size.K, size.topk, global_num_experts, size.E
            return WorkspaceShapes(*experts.workspace_shapes(*sizes, meta, activation))

        reduced = isinstance(experts.finalize_weight_and_reduce_impl(), TopKWeightAndReduceNoOP)
        whole = shapes(size.M).output
        in_place = reduced and whole == (size.M, size.K) and dtype == act_dtype
        return WorkspacePlan(rows, shapes(rows)._replace(output=whole), dtype, in_place)

    whole, limit = plan(size.M), experts.moe_config.options.max_workspace_bytes
    if limit is None or experts.is_batched or whole.workspace_bytes <= limit:
        return whole
    low, high = 1, size.M
    while low < high:
        middle = (low + high + 1) // 2
        fits = plan(middle).workspace_bytes <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return plan(low)
