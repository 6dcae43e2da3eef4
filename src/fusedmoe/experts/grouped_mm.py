"""Experts on ``torch.nn.functional.grouped_mm``: permute, GEMM, activation, GEMM, unpermute.

The GEMMs are PyTorch's own, so this is a second opinion on every machine that has them.
e local experts, H hidden, I intermediate, R = T * K rows, S = 2 where gated.
"""

from __future__ import annotations

import torch
from torch.nn.functional import grouped_mm

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.functional_call import run_opaque
from fusedmoe.kernels.permute import moe_permute, moe_unpermute
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEExpertsModular,
    ProblemSize,
    WorkspaceShapes,
    scratch,
)
from fusedmoe.quantization.keys import QuantKey

_STRIDE_BYTES = 16


class GroupedMMExperts(FusedMoEExpertsModular):
    """Standard rows, unquantized: bf16 on a GPU; bf16, fp16 and fp32 on a CPU."""

    name = "grouped_mm"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(batch_invariant=False)

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        dtype = moe.in_dtype
        if moe.device.type == "cuda" and dtype != torch.bfloat16:
            return f"on a GPU torch's grouped_mm takes bfloat16, not {dtype}"
        for name in ("hidden_dim", "intermediate_size_per_partition"):
            size = getattr(moe, name)
            if size * dtype.itemsize % _STRIDE_BYTES:
                return (
                    f"torch's grouped_mm wants rows of a multiple of {_STRIDE_BYTES} bytes, "
                    f"{name} {size} in {dtype} is not"
                )
        return None

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """The permuted rows, then the activation's output; torch allocates those of the GEMMs."""
        width = self.adjust_N_for_activation(size.N, activation)
        M, topk, H = size.M, size.topk, size.K
        return WorkspaceShapes((M, topk, H), (M, topk, width), (M, H))

    def run(self, work: ExpertsWork) -> None:
        if torch.compiler.is_compiling():
            run_opaque(self, GroupedMMExperts.name, work)
            return
        x, w1, w2 = work.hidden_states, _readable(work.w1), _readable(work.w2)
        H, R, (e, _, width) = x.shape[1], work.topk_ids.numel(), w2.shape
        rows, _, offsets, inverse, _ = moe_permute(
            x,
            None,
            work.topk_ids,
            e if work.expert_map is None else work.expert_map.shape[0],
            e,
            work.expert_map,
            permuted_hidden_states=scratch(work.workspace13, R, H),
        )
        ends = offsets[1:].to(torch.int32)
        act = scratch(work.workspace2, R, width)
        first = grouped_mm(rows, w1.transpose(1, 2), offs=ends)
        self.activation(work.activation, act, self._biased(first, self.quant_config.w1_bias, ends))
        second = grouped_mm(act, w2.transpose(1, 2), offs=ends)
        second = self._biased(second, self.quant_config.w2_bias, ends)
        moe_unpermute(work.output, second, work.output_weights_or_ones, inverse, offsets)

    @staticmethod
    def _biased(rows: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor) -> torch.Tensor:
        """Add each row's expert's bias; rows past the last end hold nothing, before and after."""
        if bias is None:
            return rows
        row = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        expert = torch.searchsorted(ends, row, right=True).clamp_(max=bias.shape[0] - 1)
        return rows.add_(bias[expert])


def _readable(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [e, N, K], copied where torch's product cannot step through it: neither rows nor
    columns are dense, or begin where 16 bytes do not."""
    _, N, K = weight.shape
    outer, row, column = weight.stride()
    dense = (column == 1 and row >= K) or (row == 1 and column >= N)
    aligned = not any(step * weight.itemsize % _STRIDE_BYTES for step in (outer, max(row, column)))
    return weight if dense and aligned else weight.contiguous()
