"""Experts in the batched format, on Triton: blocks of the rows in use, then two GEMMs.

e local experts, M rows per expert at most, H hidden, I intermediate, S = 2 where gated.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.opaque import opaque
from fusedmoe.experts.triton import TRITON_DTYPES, shared_memory_of
from fusedmoe.kernels.batched_gemm import batched_gemm
from fusedmoe.kernels.counts import batched_moe_align_block_size
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    WorkspaceShapes,
    rows_per_expert,
)
from fusedmoe.tuning.tiles import LayerTiles, layer_tiles

# An expert's rows are known only on the device; blocks of more than this would mostly be padding.
_LIKELY_ROWS = 48


@opaque("fusedmoe::batched_triton_experts", ("output", "workspace13"))
def batched_triton_experts(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    expert_num_tokens: torch.Tensor,
    activation: MoEActivation,
    activation_config: ApplyMoEActivationConfig,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    workspace13: torch.Tensor,
    *,
    batch_invariant: bool = False,
    tiles: LayerTiles | None = None,
) -> None:
    """Write ``output`` [e, M, H], row by row, up to each expert's count.

    hidden_states [e, M, H], w1 [e, S * I, H], w2 [e, H, I], expert_num_tokens int32 [e];
    ``workspace13`` holds at least e * M * I elements. Nothing is weighted or summed.
    """
    (e, M, H), width = hidden_states.shape, w2.shape[2]
    if M == 0:
        return
    if tiles is None:
        tiles = layer_tiles(
            e * min(M, _LIKELY_ROWS),
            1,
            e,
            H,
            width,
            hidden_states.dtype,
            gated=activation.is_gated,
            batch_invariant=batch_invariant,
            shared_memory=shared_memory_of(hidden_states.device),
        )
    blocks = batched_moe_align_block_size(M, tiles.gemm1.block_m, expert_num_tokens)
    act = workspace13.flatten()[: e * M * width].view(e, M, width)
    batched_gemm(
        hidden_states,
        w1,
        act,
        blocks,
        tiles.gemm1,
        bias=w1_bias,
        activation=activation,
        activation_config=activation_config,
    )
    batched_gemm(act, w2, output, blocks, tiles.gemm2, bias=w2_bias)


class BatchedTritonExperts(FusedMoEExpertsModular):
    """Batched rows, unquantized; what moved the rows also weights and sums them.

    ``tiles``, if set, replaces the choice of ``tuning.tiles``.
    """

    name = "triton_batched"
    tiles: LayerTiles | None = None

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(
            activation_format=FusedMoEActivationFormat.BatchedExperts,
            devices=frozenset({"cuda"}),
            dtypes=TRITON_DTYPES,
            requires=("triton",),
            batch_invariant=True,
        )

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
        """The activation's output; M counts rows per expert."""
        width = self.adjust_N_for_activation(N, activation)
        return WorkspaceShapes((local_num_experts, M, width), (0,), (local_num_experts, M, K))

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
        counts = rows_per_expert(expert_tokens_meta, w1.shape[0])
        assert workspace13 is not None
        batched_triton_experts(
            output,
            hidden_states,
            w1,
            w2,
            counts,
            activation,
            self.activation_config,
            self.quant_config.w1_bias,
            self.quant_config.w2_bias,
            workspace13,
            batch_invariant=self.moe_config.options.batch_invariant,
            tiles=self.tiles,
        )
