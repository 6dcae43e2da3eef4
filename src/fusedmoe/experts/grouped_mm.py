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
    ExpertTokensMetadata,
    FusedMoEExpertsModular,
    WorkspaceShapes,
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

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> WorkspaceShapes:
        """The permuted rows, then the activation's output; torch allocates those of the GEMMs."""
        width = self.adjust_N_for_activation(N, activation)
        return WorkspaceShapes((M, topk, K), (M, topk, width), (M, K))

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor | None,
        workspace2: torch.Tensor | None,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
        if torch.compiler.is_compiling():
            given = (output, hidden_states, w1, w2, weights, topk_ids, activation, expert_map)
            run_opaque(self, GroupedMMExperts.name, *given)
            return
        assert workspace13 is not None
        assert workspace2 is not None
        H, R, (e, _, width) = hidden_states.shape[1], topk_ids.numel(), w2.shape
        rows, _, offsets, inverse, _ = moe_permute(
            hidden_states,
            None,
            topk_ids,
            e if expert_map is None else expert_map.shape[0],
            e,
            expert_map,
            permuted_hidden_states=workspace13.flatten()[: R * H].view(R, H),
        )
        ends = offsets[1:].to(torch.int32)
        act = workspace2.flatten()[: R * width].view(R, width)
        first = grouped_mm(rows, w1.transpose(1, 2), offs=ends)
        self.activation(activation, act, self._biased(first, self.quant_config.w1_bias, ends))
        second = grouped_mm(act, w2.transpose(1, 2), offs=ends)
        second = self._biased(second, self.quant_config.w2_bias, ends)
        moe_unpermute(output, second, weights, inverse, offsets)

    @staticmethod
    def _biased(rows: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor) -> torch.Tensor:
        """Add each row's expert's bias; rows past the last end hold nothing, before and after."""
        if bias is None:
            return rows
        row = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        expert = torch.searchsorted(ends, row, right=True).clamp_(max=bias.shape[0] - 1)
        return rows.add_(bias[expert])
